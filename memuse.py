#!/usr/bin/env python3
"""Count the physical memory that a tree of processes really occupies.

    $ sudo ./memuse.py 11945
      PID FRAMES +UNIQUE   SIZE   TREE  FREED    PSS SWAP COMMAND
    11945  53248   53248 212992 225660 223508  73441    0 python3 server.py
    11947  52607    1593 210428 210428   6304  75129    0  ├─ python3 server.py
    11948  52607    1574 210428 210428   6296  75125    0  └─ python3 server.py
    TOTAL  56415   56415 225660 225660 223508 223695    0 KiB, 3 processes

find_processes() turns PIDs and control groups into Nodes, one for each row.  For each, survey() has
a Reader read the whole process, then a Census count it, in one Ledger for anonymous memory, one for
files and one for each swap area; a second thread reads kernel_figures() meanwhile.  Then
Census.add_up() makes TREE and FREED of the counts, and table() or as_json() makes the output.

The kernel's interface is described in its Documentation/admin-guide/mm/pagemap.rst and
Documentation/filesystems/proc.rst, "pagemap.rst" and "proc.rst" below.  PFN: page frame number.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    raise SystemExit(f"memuse: needs Python 3.9 or newer, and {sys.executable} is older")

import argparse
import array
import contextlib
import errno
import mmap
import os
import re
import signal
import struct
import threading
import time
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, compress, count, groupby, takewhile
from operator import itemgetter, le
from typing import Any, NamedTuple, NoReturn, Optional, TextIO

try:
    import fcntl

    import psutil
except ImportError as missing:
    raise SystemExit(
        f"memuse: {sys.executable}: {missing}; memuse needs Linux and psutil. Install it for this"
        f" interpreter ({sys.executable} -m pip install psutil), or run memuse by one that has it"
        f" (after apt install python3-psutil: sudo /usr/bin/python3 {sys.argv[0]} PID)"
    ) from None

__version__ = "2.0.0"

Pair = tuple[int, int]
Place = tuple[Optional[bytes], int]  # a file, or None for the address space; a group of pages
Row = dict[str, Any]  # its cells, by column; what was not read has no key

VANISHED = (FileNotFoundError, ProcessLookupError, psutil.Error)  # it ended, or called exec


class Error(Exception):
    """What can be expected to go wrong, told in the one line that the user sees."""


# ---- The kernel's interface ---------------------------------------------------------------------

WORD = 8  # bytes: an entry of pagemap, kpageflags or kpagecount is a u64 in native order

# A pagemap entry (pagemap.rst).  Bits 0-54 hold the PFN, or swap type (0-4) and offset.
PFN_BYTES = 5  # for addresses of 52 bits, the most on x86-64 and arm64; swap has fewer slots
PFN_MASK = (1 << 8 * PFN_BYTES) - 1
SWAP_TYPE_BITS = 5
SWAP_TYPES = 23  # from here up: migration, poison, device, markers (MAX_SWAPFILES, linux/swap.h)
FLAGS = 7  # the byte that holds bits 56-63, where the least significant comes first
EXCLUSIVE, GUARD, FILE_OR_SHARED, SWAPPED, PRESENT = 1 << 0, 1 << 2, 1 << 5, 1 << 6, 1 << 7
KPF_ANON, KPF_THP, KPF_ZERO_PAGE = 1 << 12, 1 << 22, 1 << 24  # /proc/kpageflags (pagemap.rst)
PAGEMAP_SCAN = 0xC0606610  # ioctl (pagemap.rst, since Linux 6.7)
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13 (mmap(2))
PF_EXITING, PF_KTHREAD = 0x4, 0x00200000  # in /proc/PID/stat's flags (include/linux/sched.h)
ENDED = (b"Z", b"X")  # the states in it of what has ended (proc.rst, table 1-4)
FIRST_NAMESPACES = {0xEFFFFFFC, 0xEFFFFFFD}  # inodes: PID and user (include/linux/proc_ns.h)

# What an entry stands for.  ANON_EXCLUSIVE: anonymous memory, mapped once in the whole machine.
# ANON_OR_DEVICE: copies-on-write, KSM, a zero page, a device.  FILE_PAGE: also shared memory.
NOTHING, ANON_EXCLUSIVE, ANON_OR_DEVICE, FILE_PAGE, IN_SWAP = range(5)


def kind_of(flags: int) -> int:
    """What an entry with these flags (its bits 56-63) stands for."""
    if flags & PRESENT:
        if flags & FILE_OR_SHARED:
            return FILE_PAGE
        return ANON_EXCLUSIVE if flags & EXCLUSIVE else ANON_OR_DEVICE
    return IN_SWAP if flags & SWAPPED and not flags & GUARD else NOTHING


# Tables for bytes.translate.
KINDS = bytes(map(kind_of, range(256)))  # of flags
EQUALS = [bytes(byte) + b"\x80" + bytes(255 - byte) for byte in range(256)]  # 0x80 for one byte
SHAREABLE = bytes([0, 0]) + b"\x80" * 254  # 0x80 for the kinds of what others may have, too
SWAP_TYPE_OF = bytes(low % (1 << SWAP_TYPE_BITS) for low in range(256))  # of the lowest byte


class Descriptor(int):
    """A file descriptor; `with` closes it at its end."""

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self)


class Machine:
    """What memuse reads of /proc and /sys; tests put made-up machines in its place."""

    proc, sysfs = "/proc", "/sys"
    page_size = os.sysconf("SC_PAGE_SIZE")
    byteorder = sys.byteorder

    def pids(self) -> list[int]:
        return psutil.pids()

    def opened(self, path: str, directory: int | None = None) -> Descriptor:
        """A file, or a directory; the path may be relative to one that is open."""
        return Descriptor(os.open(path, os.O_RDONLY, dir_fd=directory))

    def read(self, path: str, directory: int | None = None, at_most: int = -1) -> bytes:
        """A file's bytes; with `at_most`, what a single read of so many gives."""
        with self.opened(path, directory) as fd:
            if at_most > 0:
                return os.read(fd, at_most)
            return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)

    def words(self, fd: int, first: int, number: int) -> bytes:
        """Words of pagemap or /proc/kpage*, as little-endian; fewer where the file ends."""
        words = array.array("Q", self.pread(fd, number * WORD, first * WORD))
        if self.byteorder == "big":
            words.byteswap()
        return words.tobytes()

    def next_resident(self, pagemap: int, start: int, end: int) -> int:
        """The first page from `start` on that may be present or swapped, or else `end`."""
        size, which = self.page_size, PAGE_IS_PRESENT | PAGE_IS_SWAPPED
        region = array.array("Q", [0, 0, 0])  # the kernel's answer: start, end, categories
        vector, _ = region.buffer_info()
        # struct pm_scan_arg: its size, flags, start, end, walk_end, vec, vec_len, max_pages, masks.
        scan = (12 * WORD, 0, start * size, end * size, 0, vector, 1, 1, 0, 0, which, which)
        try:
            fcntl.ioctl(pagemap, PAGEMAP_SCAN, struct.pack("=12Q", *scan))
        except OSError:  # the kernel cannot tell
            return start
        return region[0] // size if region[1] else end

    def own_pid(self) -> int:
        """Our PID as this /proc shows it, whose PID namespace need not be ours."""
        try:
            return int(os.readlink(f"{self.proc}/self"))
        except OSError:
            raise Error(f"no {self.proc}/self: mount the /proc of this PID namespace") from None

    def stat(self, pid: int, thread: str = "") -> Stat | None:
        with contextlib.suppress(*VANISHED, PermissionError):  # hidepid=1 lists what it hides
            return parse_stat(self.read(f"{self.proc}/{pid}/{thread}stat"))
        return None


class Kernel:
    """What the kernel tells of frames: /proc/kpageflags and /proc/kpagecount, held open."""

    def __init__(self, machine: Machine, files: contextlib.ExitStack) -> None:
        """PermissionError, or FileNotFoundError, naming a file of frames that cannot be opened."""
        self.machine = machine
        # Memory that is only read maps a zero page; s390 has up to 128 (arch/s390/mm/init.c).
        with lazy_bytes(128 * mmap.PAGESIZE) as memory:
            memory[:: mmap.PAGESIZE]
            own = {*self.own_pfns(ANON_OR_DEVICE)}
        if not any(own):  # without CAP_SYS_ADMIN pagemap opens, but shows none
            raise PermissionError(errno.EPERM, "no PFNs", f"{machine.proc}/self/pagemap")
        self.kpageflags = files.enter_context(machine.opened(f"{machine.proc}/kpageflags"))
        self.kpagecount = files.enter_context(machine.opened(f"{machine.proc}/kpagecount"))
        self.zero_pages = [pfn for pfn in own if self.flags_of(pfn) & KPF_ZERO_PAGE]
        self.pmd_pages = 0  # pages in a PMD-mapped huge page, if there are any (transhuge.rst)
        with contextlib.suppress(FileNotFoundError):
            size = machine.read(f"{machine.sysfs}/kernel/mm/transparent_hugepage/hpage_pmd_size")
            self.pmd_pages = int(size) // machine.page_size
        ramp = struct.pack(f"<{self.pmd_pages}Q", *range(self.pmd_pages))
        self.ramp = int.from_bytes(ramp, "little")

    def own_pfns(self, kind: int) -> list[int]:
        """The PFNs of memuse's own pages of this kind."""
        machine, pfns = self.machine, list[int]()
        vmas = parse_maps(machine.read(f"{machine.proc}/self/maps"), machine.page_size)
        with machine.opened(f"{machine.proc}/self/pagemap") as pagemap:
            for start, end in areas_of([vma for vma in vmas if vma.file or kind != FILE_PAGE]):
                entries = machine.words(pagemap, start, end - start)
                chosen = entries[FLAGS::WORD].translate(KINDS).translate(EQUALS[kind])
                pfns += compress(pfns_of(entries), chosen)
        return pfns

    def corrected(self, start: int, entries: bytes) -> bytes:
        """The entries from page `start` on, without huge zero pages and with their true bits.

        All entries of a PMD-mapped huge page have its first page's EXCLUSIVE (before Linux 6.11,
        and seen again in 6.18), while others may have its other pages: their mapcounts tell.
        A file's can lack FILE_OR_SHARED (seen in 5.10): kpageflags tells.
        """
        pages, words, counts = self.pmd_pages, self.machine.words, self.kpagecount
        size = pages * WORD
        for at in range(-start % pages * WORD, len(entries) - size + 1, size) if pages else ():
            entry = int.from_bytes(entries[at : at + WORD], "little")
            pfn, kind = entry & PFN_MASK, KINDS[entry >> 56]
            if kind == NOTHING or pfn % pages or entries[at : at + size] != self.huge_page(entry):
                continue
            flags = self.flags_of(pfn)
            if flags & KPF_ZERO_PAGE:
                right = bytes(size)
            elif kind != FILE_PAGE and flags & (KPF_THP | KPF_ANON) == KPF_THP:
                right = self.huge_page(entry | FILE_OR_SHARED << 56)
            elif kind == ANON_EXCLUSIVE and {*low_halves(words(counts, pfn, pages))} != {1}:
                right = self.huge_page(entry & ~(EXCLUSIVE << 56))
            else:
                continue
            entries = entries[:at] + right + entries[at + size :]
        return entries

    def huge_page(self, first: int) -> bytes:
        """The entries of a PMD-mapped huge page: the first's flags, and PFNs that go up by one."""
        alike = int.from_bytes(first.to_bytes(WORD, "little") * self.pmd_pages, "little")
        return (alike | self.ramp).to_bytes(self.pmd_pages * WORD, "little")  # the PFN is aligned

    def flags_of(self, pfn: int) -> int:
        """A frame's flags in /proc/kpageflags; 0 past its end, where a device's may be."""
        return int.from_bytes(self.machine.words(self.kpageflags, pfn, 1), "little")


# ---- Parsing ------------------------------------------------------------------------------------

MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+ \d+) *(.*)\n", re.M)
ANONYMOUS = (b"[heap]", b"[stack", b"[anon:")  # anonymous mappings that have a name
AREAS_APART = 256  # pages; fewer cost less to read over than another call
SIZE = re.compile(rb"^(Rss|Pss|Private_(?:Clean|Dirty|Hugetlb)|VmPTE):\s+(\d{1,15}) kB$", re.M)
COMMAND_LIMIT = 1 << 16  # bytes: a process can claim any of its memory to be arguments


def low_halves(words: bytes) -> memoryview:
    """The lower 32 bits of each little-endian word."""
    halves = array.array("I", words)
    if sys.byteorder == "big":
        halves.byteswap()
    return memoryview(halves)[::2]


def pfns_of(entries: bytes) -> list[int]:
    """The PFNs in entries, or what stands in their bits."""
    number = len(entries) // WORD
    if entries[4::WORD].count(0) == number:  # no PFN has more than 32 bits
        return low_halves(entries).tolist()  # in a quarter of the time
    return [entry & PFN_MASK for entry in struct.unpack(f"<{number}Q", entries)]


class Vma(NamedTuple):
    """A line of /proc/PID/maps, or several that go on as one; counted in pages."""

    start: int
    end: int
    shift: int  # from its pages to those of the file
    file: bytes | None  # device and inode, or a special mapping's name; None: anonymous memory


def parse_maps(maps: bytes, page_size: int) -> list[Vma]:
    """The VMAs in /proc/PID/maps (proc.rst).  Error on a malformed line."""
    lines = MAPPING.findall(maps)
    if len(lines) != maps.count(b"\n"):
        raise Error("cannot make out the kernel's list of mappings")
    vmas = []
    for low, high, offset, file, name in lines:
        if name == b"[vsyscall]":  # which pagemap does not cover
            continue
        if file.endswith(b" 0"):  # no inode, so no file
            file = b"" if name.startswith(ANONYMOUS) else name
        start, end = int(low, 16) // page_size, int(high, 16) // page_size
        shift = int(offset, 16) // page_size - start if file else 0
        vmas.append(Vma(start, end, shift, file or None))
    return vmas


def areas_of(vmas: list[Vma]) -> list[Pair]:
    """Where anything is mapped; areas that are not far apart are one."""
    areas: list[Pair] = []
    for vma in vmas:
        near = areas and vma.start - areas[-1][1] < AREAS_APART
        areas.append((areas.pop()[0] if near else vma.start, vma.end))
    return areas


def joined(vmas: list[Vma]) -> list[Vma]:
    """The same VMAs; neighbours are joined if all are anonymous, or map one file with one shift."""
    runs = [(alike, [*run]) for alike, run in groupby(vmas, itemgetter(2, 3))]
    return [Vma(run[0].start, run[-1].end, *alike) for alike, run in runs]


@lru_cache(maxsize=1)  # forked processes often have the same
def layout_of(maps: bytes, page_size: int) -> tuple[list[Pair], list[Vma]]:
    """Where a process has anything, and its VMAs, joined."""
    vmas = parse_maps(maps, page_size)
    return areas_of(vmas), joined(vmas)


def size_of(name: bytes, text: bytes) -> int:
    """Fields with this name, or that begin so, in smaps_rollup or status (proc.rst), in bytes."""
    return sum(int(kib) * 1024 for field, kib in SIZE.findall(text) if field.startswith(name))


class Stat(NamedTuple):
    """Of /proc/PID/stat (proc.rst, table 1-4)."""

    name: bytes
    state: bytes
    ppid: int
    flags: int
    threads: int
    image: list[bytes]  # when it started, and where exec put code, stack, data and arguments


def parse_stat(text: bytes) -> Stat:
    name, _, rest = text.partition(b"(")[2].rpartition(b")")  # which may hold anything
    fields = rest.split()  # from the third on
    image = [fields[19], *fields[23:26], *fields[42:49]]
    return Stat(name, fields[0], int(fields[1]), int(fields[6]), int(fields[17]), image)


def command_line(cmdline: bytes, name: bytes) -> str:
    """The arguments joined by spaces or, without any, the name in brackets as ps has it."""
    line = cmdline.rstrip(b"\0").replace(b"\0", b" ")
    line = line if line.strip() else b"[%s]" % name
    shown = escaped(line[:COMMAND_LIMIT].decode("utf-8", "surrogateescape"))
    return shown + "..." if len(line) > COMMAND_LIMIT else shown


def escaped(text: str) -> str:
    """The text with what a terminal might obey, or not show, written as escapes."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # PEP 383
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- Which processes ----------------------------------------------------------------------------

WAITERS = (b"sudo", b"doas", b"pkexec", b"su")  # they start memuse, and then only wait for it


class Node(NamedTuple):
    """A process that was found.  Nodes are rows of the tree, numbered from 1; TOTAL is row 0."""

    pid: int
    stat: Stat
    parent: int  # the row that it is below


def find_processes(machine: Machine, roots: list[int], members: set[int]) -> list[Node]:
    """The roots with all below them, and the members: depth first, siblings by PID.

    From one pass: psutil's children(recursive=True) makes two, and loses those whose parent exits
    in between.  memuse is left out, and so are those right above that only wait and are no roots.
    """
    own_pid = machine.own_pid()  # before all else: it fails on the wrong /proc
    stats = {pid: stat for pid in sorted(machine.pids()) for stat in [machine.stat(pid)] if stat}
    children: dict[int, list[int]] = defaultdict(list)
    for pid, stat in stats.items():
        children[stat.ppid].append(pid)

    chosen: set[int] = set()
    below = [*roots]
    for pid in below:  # which grows meanwhile
        if pid not in chosen:
            chosen.add(pid)
            below += children[pid]
    chosen = (chosen | members) & stats.keys() - {own_pid}
    child, pid = own_pid, stats[own_pid].ppid if own_pid in stats else 0
    while pid in stats and stats[pid].name in WAITERS and children[pid] == [child]:
        chosen -= {pid} - {*roots}
        child, pid = pid, stats[pid].ppid

    # First those without a chosen parent.  Others are tops only if PIDs used anew make a circle.
    tops = [pid for pid in (*roots, *sorted(chosen)) if pid in chosen]
    tops.sort(key=lambda pid: stats[pid].ppid in chosen)
    nodes: list[Node] = []
    stack = [(pid, 0) for pid in reversed(tops)]
    while stack:
        pid, parent = stack.pop()
        if pid in chosen:
            chosen.discard(pid)
            nodes.append(Node(pid, stats[pid], parent))
            stack += [(child, len(nodes)) for child in reversed(children[pid])]
    return nodes


def why_missing(machine: Machine, pid: int) -> str:
    with contextlib.suppress(OSError):
        status = machine.read(f"{machine.proc}/{pid}/status")
        process = int(status.partition(b"\nTgid:")[2].split(None, 1)[0])
        if process != pid:
            return f"{pid} is a thread of process {process}"
        if pid == machine.own_pid():
            return f"{pid} is memuse itself"
    return f"there is no process {pid}"


def cgroup_members(machine: Machine, path: str) -> set[int]:
    """The PIDs in a control group and in all below it (cgroup-v2.rst).  Error if none.

    A path that is no control group's directory is looked up where they are mounted: v2, then v1.
    """
    lines = os.fsdecode(machine.read(f"{machine.proc}/self/mounts"))
    mounts = re.findall(r"^\S* (\S+) (cgroup2?) ", lines, re.M)
    mounts.sort(key=itemgetter(1), reverse=True)
    groups = [path, *(f"{mount}/{path.strip('/')}" for mount, _ in mounts if path)]
    groups = [group for group in groups if os.path.exists(f"{group}/cgroup.procs")]
    if not groups:
        raise Error(f"there is no control group {path!r}")
    pids: set[int] = set()
    for directory, _, _ in os.walk(groups[0]):
        try:
            pids.update(map(int, machine.read(f"{directory}/cgroup.procs").split()))
        except OSError as error:
            # Groups below come and go; what is in threaded ones, the one above them lists.
            if directory == groups[0]:
                threaded = error.errno == errno.EOPNOTSUPP
                why = "a threaded group; name the one above it" if threaded else error.strerror
                raise Error(f"{directory}/cgroup.procs: {why}") from None
    pids.discard(0)  # it stands for those of another PID namespace
    if not pids:
        raise Error(f"the control group {path!r} has no process")
    return pids


# ---- Reading a process --------------------------------------------------------------------------

SPAN = 1 << 13  # pages read at a time; what is larger is searched for what is resident
NOBODY = 0  # instead of a row: TOTAL's, which has nothing of its own


class Process:
    """One process; it is counted only once all of it is read."""

    def __init__(self, row: int, node: Node) -> None:
        self.row, self.pid, self.stat = row, node.pid, node.stat
        self.cells: Row = {"pid": node.pid, "ppid": node.stat.ppid}
        self.private = 0  # how many frames are ANON_EXCLUSIVE
        # What others may have: a VMA, a page in it, and the entries from there on.
        self.pieces: list[tuple[Vma, int, bytes]] = []
        self.witness: Pair | None = None  # its first ANON_EXCLUSIVE page, and the PFN
        self.sibling = NOBODY  # the last row before that shares the address space

    def add(self, vmas: list[Vma], start: int, entries: bytes) -> None:
        """Take in the corrected entries from page `start` on."""
        kinds = entries[FLAGS::WORD].translate(KINDS)
        at = kinds.find(ANON_EXCLUSIVE)
        if at >= 0:
            self.private += kinds.count(ANON_EXCLUSIVE)
            self.witness = self.witness or (start + at, pfns_of(entries[at * WORD :][:WORD])[0])
        shareable = kinds.translate(SHAREABLE)
        low, high = bisect(vmas, (start + 1,)), bisect(vmas, (start + len(kinds),))
        for vma in vmas[max(0, low - 1) : high]:
            first, end = max(0, vma.start - start), max(0, vma.end - start)
            first, end = shareable.find(0x80, first, end), shareable.rfind(0x80, first, end) + 1
            if end:
                self.pieces.append((vma, start + first, entries[first * WORD : end * WORD]))


class Reader:
    def __init__(self, machine: Machine, kernel: Any, columns: set[str], processes: int) -> None:
        self.machine, self.kernel, self.columns = machine, kernel, columns
        self.witnesses: dict[Pair, tuple[int, str]] = {}  # last row that has it, its pagemap's path
        self.processes, self.pages, self.eraser = processes, 0, ""
        self.next_line = time.monotonic() + 1

    def _tell_progress(self, done: int, pages: int) -> None:
        """A line on stderr if that is a terminal and it takes long; `eraser` takes it away."""
        self.pages += pages
        if time.monotonic() > self.next_line and sys.stderr and sys.stderr.isatty():
            write(f"\r{done} of {self.processes} processes, {self.pages} pages\033[K", sys.stderr)
            self.eraser, self.next_line = "\r\033[K", time.monotonic() + 0.1

    def read(self, row: int, node: Node) -> Process | None:
        """The process, or None if it exited; one that calls exec meanwhile is read again."""
        for _ in range(3):
            process = Process(row, node)
            try:
                self._read(process)
                return process
            except PermissionError as error:
                process.cells["unread"] = reason(error)
                return process
            except VANISHED:
                stat = self.machine.stat(node.pid)
            if not stat or stat.image[0] != node.stat.image[0]:  # it started at another time
                return None
            if stat.flags & PF_EXITING and stat.threads == 1 and stat.state not in ENDED:
                return None  # it tears down its mm, which can take long; no zombie yet
            node = node._replace(stat=stat)
        process.cells["unread"] = "it changed whenever it was read"
        return process

    def _read(self, process: Process) -> None:
        """Raises one of VANISHED if it ends or calls exec.

        Its files are opened by way of one descriptor of its directory, between two looks at its
        stat.  So they belong to one process and to one mm, and are empty once that is gone.
        """
        machine, columns, pid, stat = self.machine, self.columns, process.pid, process.stat
        with machine.opened(f"{machine.proc}/{pid}") as directory:
            thread = living_thread(machine, pid, stat)
            if "command" in columns:
                cmdline = machine.read(f"{thread or ''}cmdline", directory, COMMAND_LIMIT + 1)
                process.cells["command"] = command_line(cmdline, stat.name)
            if "user" in columns:
                process.cells["user"] = psutil.Process(pid).username()
            if "pte" in columns:
                status = machine.read(f"{thread or ''}status", directory)
                process.cells["pte"] = size_of(b"VmPTE", status)
            if self.kernel and thread is not None:
                self._read_pages(process, thread, directory)
            if parse_stat(machine.read("stat", directory)).image != stat.image:
                raise ProcessLookupError
        if process.witness:  # not earlier: read again, it would be its own sibling
            self.witnesses[process.witness] = process.row, f"{machine.proc}/{pid}/{thread}pagemap"

    def _read_pages(self, process: Process, thread: str, directory: int) -> None:
        machine, size = self.machine, max(SPAN, self.kernel.pmd_pages)
        with machine.opened(f"{thread}pagemap", directory) as pagemap:
            areas, files = layout_of(machine.read(f"{thread}maps", directory), machine.page_size)
            for start, end in areas:
                while start < end:
                    if end - start > size:
                        start = machine.next_resident(pagemap, start, end)
                    stop = min((start // size + 1) * size, end)
                    entries = machine.words(pagemap, start, stop - start)
                    if len(entries) != (stop - start) * WORD:
                        raise ProcessLookupError
                    process.add(files, start, self.kernel.corrected(start, entries))
                    self._tell_progress(process.row - 1, stop - start)
                    start = stop
            if process.witness:
                process.sibling = self._find_vm_sibling(process.witness, pagemap)

    def _find_vm_sibling(self, witness: Pair, pagemap: int) -> int:
        """The last row that has the same ANON_EXCLUSIVE frame there at the time (CLONE_VM)."""
        row, path = self.witnesses.get(witness, (NOBODY, ""))
        if row:
            with contextlib.suppress(OSError), self.machine.opened(path) as other:
                there = self.machine.words(other, witness[0], 1)
                if there and there == self.machine.words(pagemap, witness[0], 1):
                    return row if KINDS[there[FLAGS]] == ANON_EXCLUSIVE else NOBODY
        return NOBODY


def reason(error: OSError) -> str:
    name = f"{os.path.basename(error.filename)}: " if error.filename else ""
    return f"{name}{error.strerror} (another user's process takes CAP_SYS_PTRACE)"


def living_thread(machine: Machine, pid: int, stat: Stat) -> str | None:
    """Path from /proc/PID to a live thread's files; "" if the first lives, None without an mm."""
    if stat.flags & PF_KTHREAD:
        return None
    if stat.state not in ENDED:
        return ""
    for tid in os.listdir(f"{machine.proc}/{pid}/task") if stat.threads > 1 else ():
        thread = machine.stat(pid, f"task/{tid}/")
        if thread and thread.state not in ENDED:
            return f"task/{tid}/"
    return None


def kernel_figures(machine: Machine, pid: int, stat: Stat) -> Row:
    """RSS, PSS and USS from smaps_rollup; one of VANISHED if it exited or called exec."""
    thread = living_thread(machine, pid, stat)
    text = b"" if thread is None else machine.read(f"{machine.proc}/{pid}/{thread}smaps_rollup")
    now = machine.stat(pid)
    if not now or now.image != stat.image or (thread is not None and not text):
        raise ProcessLookupError
    return {name: size_of(field, text) for name, field in ROLLUP.items()}


# ---- Counting -----------------------------------------------------------------------------------

# Marks of PFNs.  0: not known.  UNREAL: no memory.  SINGLE: known by itself.  Others: in a Block.
UNREAL, SINGLE, *OF_BLOCKS = range(1, 256)
MARKS_GROWTH, UNMARKED = 1 << 20, bytes(1 << 12)  # marks grow by these, are searched by those
RUNS_APART = b"\x80" * 64  # unknown PFNs; fewer cost less to read over than another call
LANES = 1 << 12  # pages of a Block; with half of them, shared memory takes an eighth longer
ALL_LANES = int.from_bytes(b"\x80" * LANES, "little")
FEW = 16  # so many pages take less memory one by one than in a Block
MAX_ROWS = 16  # with more rows in a Block, its frames take less time one by one
SINGLES = 1 << 6  # PFNs to an array of single frames


def as_bytes(lanes: int) -> bytes:
    """Lanes as bytes, trailing zeros stripped."""
    return lanes.to_bytes((lanes.bit_length() + 7) // 8, "little")


def how_many(lanes: int) -> int:
    return as_bytes(lanes).count(0x80)


def lazy_bytes(size: int) -> mmap.mmap:
    """Zeros that take memory only once they are written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class Block:
    """The frames of LANES neighbouring pages, one for each as far as known.

    A lane is a page's byte in an integer of LANES bytes, marked by 0x80: one operation for all.
    """

    def __init__(self, mark: int) -> None:
        self.mark = mark  # of its PFNs
        self.planes = [0] * PFN_BYTES  # the PFNs: all lanes' lowest bytes, then the next
        # By row: lanes whose frames it was first to have, or last.  last[NOBODY]: without a frame.
        self.first: dict[int, int] = {}
        self.last = {NOBODY: ALL_LANES}
        # How often the set maps each lane's frame: a new sum after every 255 additions.
        self.mapped: list[int] = []
        self.additions = 0

    def same(self, planes: list[int], lanes: int) -> int:
        """Those of the lanes in which this Block has the same frames as the planes."""
        lanes &= ~self.last.get(NOBODY, 0)
        differ = 0
        for one, other in zip(planes, self.planes) if lanes else ():
            differ |= one ^ other
        sevens = lanes - (lanes >> 7)  # 0x7F in each of these lanes
        differ |= (differ & sevens) + sevens  # the top bit tells that a lane is not 0
        return lanes & ~differ

    def enter(self, row: int, planes: list[int], lanes: int) -> None:
        """Know these PFNs in lanes that had none; the row is the first to have them."""
        fill = (lanes << 1) - (lanes >> 7)  # 0xFF in each of these lanes
        self.planes = [old ^ (old ^ new) & fill for old, new in zip(self.planes, planes)]
        self.first[row] = self.first.get(row, 0) | lanes

    def see(self, row: int, lanes: int, seen: dict[int, int], once: bool) -> None:
        """The row has the frames in these lanes.  Count them in `seen`, by who had them last."""
        if once:
            if self.additions % 255 == 0:
                self.mapped.append(0)
            self.additions += 1
            self.mapped[-1] += lanes >> 7
        own = self.last.pop(row, 0)  # what the row had already, it maps twice
        others, self.last = self.last, {row: own | lanes}
        for other, theirs in others.items():
            both = theirs & lanes
            if both:
                seen[other] += how_many(both)
            if both != theirs:
                self.last[other] = theirs ^ both

    def by_rows(self) -> Iterator[tuple[int, int, int]]:
        """First row, last row, and the lanes with frames that have both."""
        for first, these in self.first.items():
            for last, those in self.last.items():
                if these & those:
                    yield first, last, these & those

    def pfns(self) -> list[int]:
        """The PFNs, from the first lane on; 0 where there is no frame."""
        entries = bytearray(len(as_bytes(ALL_LANES ^ self.last.get(NOBODY, 0))) * WORD)
        for i, plane in enumerate(self.planes):
            low = as_bytes(plane)
            entries[i : len(low) * WORD : WORD] = low
        return pfns_of(bytes(entries))

    def mappings(self) -> list[int]:
        """How often the set maps each lane's frame."""
        sums = [mapped.to_bytes(LANES, "little") for mapped in self.mapped]
        return [*sums[0]] if len(sums) == 1 else [*map(sum, zip(bytes(LANES), *sums))]

    def mapped_by_nobody_else(self, mapcounts: memoryview) -> int:
        """The lanes mapped at most as often as the set maps them; some may have no frame."""
        there = itemgetter(0, 0, *self.pfns())(mapcounts)[2:]  # with one key it would be no tuple
        return int.from_bytes(map(le, there, self.mappings()), "little") << 7


class Ledger:
    """Counts frames of anonymous memory, or of files, or the slots of a swap area, each once.

    A frame that may be shared is entered in a Block, at the place where it is first met: an
    address, or a page of a file.  Forked processes, and those that map the file, have it there.
    A PFN is known at one place only, as `marks` tells.  If it is met elsewhere (KSM, mremap), its
    Block is dissolved: its frames become single, known one by one.  So is what a process has in
    place of a known frame (copy-on-write).

    Rows come depth first: the lowest common ancestor of all rows with a frame is that of the first
    and the last.  In TREE, every row with a frame adds it, and each but the first takes it off at
    its lowest common ancestor with the row that had it just before.
    """

    def __init__(self, parents: list[int], zero_pages: Sequence[int] = ()) -> None:
        self.parents = parents
        self.marks = lazy_bytes(max(zero_pages, default=0) + MARKS_GROWTH)  # a byte for each PFN
        self.blocks: dict[Place, Block | None] = {}  # None: its frames are single
        self.marked: dict[int, list[Place]] = defaultdict(list)  # places of Blocks by their mark
        # By PFN // SINGLES: first row, last row and number of mappings of each, or 0s; interleaved.
        self.singles: dict[int, array.array[int]]
        self.singles = defaultdict(lambda: array.array("i", bytes(12 * SINGLES)))
        # An address space, by the last row that shares it: the first, and its private frames.
        self.spaces: dict[int, Pair] = {}
        # By row: what it has; what no row above has; and what add_up() sums over subtrees.
        self.own, self.new, self.tree, self.freed = ([0] * len(parents) for _ in range(4))
        for pfn in zero_pages:
            self.marks[pfn] = UNREAL

    def begin(self, row: int, sibling: int) -> None:
        self.row, self.sibling = row, sibling  # with a sibling, its mappings are counted already
        self.seen: dict[int, int] = defaultdict(int)  # how many it has, by who had them last
        self.astray: list[int] = []  # PFNs that it has away from their Blocks

    def marked_runs(self) -> Iterator[Pair]:
        """First PFN and length of runs of PFNs that are known, with short gaps."""
        for start in range(0, len(self.marks), len(UNMARKED)):
            part = self.marks[start : start + len(UNMARKED)]
            unknown = part.translate(EQUALS[0]) + RUNS_APART if part != UNMARKED else RUNS_APART
            first = unknown.find(0)
            while first >= 0:
                end = unknown.find(RUNS_APART, first)
                yield start + first, end - first
                first = unknown.find(0, end)

    def add_private(self, frames: int) -> None:
        """Take in private frames, which siblings have in common."""
        first, counted = self.spaces.pop(self.sibling, (self.row, 0))
        self.seen[self.sibling] += min(frames, counted)
        self.seen[NOBODY] += frames - min(frames, counted)
        self.spaces[self.row] = first, max(frames, counted)

    def add(self, file: bytes | None, page: int, entries: bytes, chosen: bytes) -> None:
        """Take in the row's entries that `chosen` marks by 0x80, which begin at this page."""
        low = chosen.find(0x80)
        while low >= 0:
            group, lane = divmod(page + low, LANES)
            stop = low - lane + LANES
            high = chosen.rfind(0x80, low, stop) + 1
            part, left, place = entries[low * WORD : high * WORD], chosen[low:high], (file, group)
            if place not in self.blocks and left.count(0x80) > FEW:
                mark = OF_BLOCKS[len(self.blocks) % len(OF_BLOCKS)]
                self.blocks[place] = Block(mark)
                self.marked[mark].append(place)
            block = self.blocks.get(place)
            if block:
                left = self._add_to(block, lane, part, left)
                if max(len(block.first), len(block.last)) > MAX_ROWS:
                    self._dissolve(place)
            if left:
                self._look_at(self._pfns(part, left))
            low = chosen.find(0x80, stop)

    def _add_to(self, block: Block, lane: int, entries: bytes, chosen: bytes) -> bytes:
        """Take in what a Block knows or can know, from a lane on.  Returns what is left."""
        up = 8 * lane
        planes = [int.from_bytes(entries[i::WORD], "little") << up for i in range(PFN_BYTES)]
        lanes = int.from_bytes(chosen, "little") << up
        here = block.same(planes, lanes)
        fresh = as_bytes((lanes & block.last.get(NOBODY, 0)) >> up)
        if fresh:
            new, marks, mark = bytearray(fresh), self.marks, block.mark
            for at, pfn in zip(compress(count(), fresh), self._pfns(entries, fresh)):
                if marks[pfn]:
                    new[at] = 0
                else:
                    marks[pfn] = mark
            entered = int.from_bytes(new, "little") << up
            if entered:
                block.enter(self.row, planes, entered)
                here |= entered
        if here:
            block.see(self.row, here, self.seen, self.sibling == NOBODY)
        return as_bytes((lanes ^ here) >> up)

    def _pfns(self, entries: bytes, chosen: bytes) -> list[int]:
        """The PFNs of the chosen entries, at least one; and room for their marks."""
        pfns = list(compress(pfns_of(entries[: len(chosen) * WORD]), chosen))
        if max(pfns) >= len(self.marks):
            self.marks.resize(max(pfns) + MARKS_GROWTH)
        return pfns

    def _look_at(self, pfns: list[int]) -> None:
        """Take in the row's frames one by one; those of Blocks wait until finish()."""
        row, marks, singles, once = self.row, self.marks, self.singles, self.sibling == NOBODY
        for pfn in pfns:
            mark = marks[pfn]
            if mark > SINGLE:
                self.astray.append(pfn)
            elif mark != UNREAL:
                frames, at = singles[pfn // SINGLES], pfn % SINGLES * 3
                if mark != SINGLE:
                    marks[pfn], frames[at] = SINGLE, row
                last = frames[at + 1]
                if last != row:
                    self.seen[last] += 1
                    frames[at + 1] = row
                frames[at + 2] += once

    def _dissolve(self, place: Place) -> None:
        """Make the frames of a Block single, unless that was done."""
        block, self.blocks[place] = self.blocks[place], None
        if block:
            pfns, mapped = block.pfns(), block.mappings()
            for first, last, lanes in block.by_rows():
                for lane in compress(count(), as_bytes(lanes)):
                    frames, at = self.singles[pfns[lane] // SINGLES], pfns[lane] % SINGLES * 3
                    frames[at : at + 3] = array.array("i", [first, last, mapped[lane]])
                    self.marks[pfns[lane]] = SINGLE

    def finish(self) -> None:
        """The row is complete: Blocks with frames that were met elsewhere are dissolved."""
        for mark in {self.marks[pfn] for pfn in self.astray} - {SINGLE}:
            for place in self.marked.pop(mark):  # seldom more than one: there are 253 marks
                self._dissolve(place)
        self._look_at([*self.astray])
        self.own[self.row] = self.tree[self.row] = sum(self.seen.values())
        self.new[self.row] = self.seen.pop(NOBODY, 0)
        for other, number in self.seen.items():
            self.tree[self._common_ancestor(other, self.row)] -= number

    def _common_ancestor(self, first: int, last: int) -> int:
        """The lowest row that has both below it, or is one of them: subtrees are intervals."""
        while last > first:
            last = self.parents[last]
        return last

    def add_up(self, mapcounts: memoryview | None) -> None:
        """All rows are counted: sum over subtrees; `freed` only with mapcounts."""
        for first, last, number in self._freed(mapcounts) if mapcounts else ():
            self.freed[self._common_ancestor(first, last)] += number
        for figures in (self.tree, self.freed):
            for row in range(len(figures) - 1, 0, -1):
                figures[self.parents[row]] += figures[row]
        self.own[0], self.new[0] = self.tree[0], sum(self.new)

    def _freed(self, mapcounts: memoryview) -> Iterator[tuple[int, int, int]]:
        """First row, last row, and how many of their frames nobody outside of the set maps."""
        for last, (first, private) in self.spaces.items():
            yield first, last, private
        # The mapcount of such frames is what the set maps, or less if a process ended meanwhile.
        for block in filter(None, self.blocks.values()):
            alone = block.mapped_by_nobody_else(mapcounts)
            for first, last, lanes in block.by_rows():
                yield first, last, how_many(lanes & alone)
        for group, records in self.singles.items():
            each = zip(count(group * SINGLES), records[::3], records[1::3], records[2::3])
            for pfn, first, last, mappings in each:
                if mappings and mapcounts[pfn] <= mappings:  # 0: not in use, or only a sibling's
                    yield first, last, 1


class Census:
    """The count over all rows, which come depth first; row 0 is TOTAL, above all."""

    def __init__(self, kernel: Any, page_size: int, nodes: list[Node]) -> None:
        self.kernel, self.page_size = kernel, page_size
        self.parents = [0, *(node.parent for node in nodes)]
        # A frame can be freed, and used anew as the other sort, meanwhile: each has its own marks.
        zero_pages = kernel.zero_pages if kernel else ()
        self.anon, self.file = Ledger(self.parents, zero_pages), Ledger(self.parents, zero_pages)
        self.slots: dict[int, Ledger] = {}  # by swap type

    def count(self, process: Process) -> None:
        """Count what a process has: what is a file's by its place there, else by address."""
        for ledger in (self.anon, self.file, *self.slots.values()):
            ledger.begin(process.row, process.sibling)
        self.anon.add_private(process.private)
        for vma, start, entries in process.pieces:
            kinds = entries[FLAGS::WORD].translate(KINDS)
            if FILE_PAGE in kinds:
                of_file = kinds.translate(EQUALS[FILE_PAGE])
                self.file.add(vma.file, start + vma.shift, entries, of_file)
            if ANON_OR_DEVICE in kinds:
                anon = bytearray(kinds.translate(EQUALS[ANON_OR_DEVICE]))
                # In a file's VMA it is a driver's memory, which is left out, or copies of the file.
                for at, pfn in compress(enumerate(pfns_of(entries)), anon) if vma.file else ():
                    known = pfn < len(self.anon.marks) and self.anon.marks[pfn]
                    if not known and not self.kernel.flags_of(pfn) & KPF_ANON:
                        anon[at] = 0
                self.anon.add(None, start, entries, bytes(anon))
            if IN_SWAP in kinds:
                self._add_swapped(start, entries, kinds.translate(EQUALS[IN_SWAP]))
        process.pieces.clear()  # before those of the next one are read
        for ledger in (self.anon, self.file, *self.slots.values()):
            ledger.finish()

    def _add_swapped(self, start: int, entries: bytes, chosen: bytes) -> None:
        """Take in swap slots: by type, and in each their offsets, which lie as close as PFNs."""
        types, lanes = entries[::WORD].translate(SWAP_TYPE_OF), int.from_bytes(chosen, "little")
        shifted = int.from_bytes(entries, "little") >> SWAP_TYPE_BITS
        offsets = shifted.to_bytes(len(entries), "little")
        for swap_type in {*compress(types, chosen)} & {*range(SWAP_TYPES)}:
            if swap_type not in self.slots:
                self.slots[swap_type] = Ledger(self.parents)
                self.slots[swap_type].begin(self.anon.row, self.anon.sibling)
            of_type = lanes & int.from_bytes(types.translate(EQUALS[swap_type]), "little")
            self.slots[swap_type].add(None, start, offsets, as_bytes(of_type))

    def add_up(self, with_freed: bool) -> None:
        """All rows are counted.  FREED also takes how often the whole machine maps each frame."""
        mapcounts = mapcounts_of(self.kernel, self.anon, self.file) if with_freed else None
        for ledger in (self.anon, self.file, *self.slots.values()):
            ledger.add_up(mapcounts if ledger in (self.anon, self.file) else None)

    def figures(self, row: int) -> dict[str, int]:
        """What was counted of a row; after add_up()."""
        anon, file, page = self.anon, self.file, self.page_size
        frames = anon.own[row] + file.own[row]
        return {
            "frames": frames,
            "unique": anon.new[row] + file.new[row],
            "size": frames * page,
            "tree": (anon.tree[row] + file.tree[row]) * page,
            "freed": (anon.freed[row] + file.freed[row]) * page,
            "anon": anon.own[row] * page,
            "file": file.own[row] * page,
            "swap": sum(ledger.own[row] for ledger in self.slots.values()) * page,
        }


def mapcounts_of(kernel: Kernel, *ledgers: Ledger) -> memoryview:
    """By PFN, how often processes other than memuse map the frame (kpagecount, pagemap.rst)."""
    highest = max(len(ledger.marks) for ledger in ledgers)
    mapcounts = memoryview(lazy_bytes(4 * highest)).cast("I")
    own = Counter(kernel.own_pfns(FILE_PAGE))
    for _ in range(3):  # again if memuse came to map more: code, when it first runs
        for first, number in chain.from_iterable(ledger.marked_runs() for ledger in ledgers):
            counts = low_halves(kernel.machine.words(kernel.kpagecount, first, number))
            mapcounts[first : first + len(counts)] = counts
        before, own = own, Counter(kernel.own_pfns(FILE_PAGE))
        if own == before:
            break
    for pfn, times in own.items():
        if pfn < highest:
            mapcounts[pfn] = max(0, mapcounts[pfn] - times)
    return mapcounts


# ---- The report ---------------------------------------------------------------------------------

COLUMNS = {
    "pid": ("PID", "process"),
    "ppid": ("PPID", "its parent"),
    "user": ("USER", "its owner"),
    "frames": ("FRAMES", "distinct page frames that hold its memory"),
    "unique": ("+UNIQUE", "frames not already counted in a row above"),
    "size": ("SIZE", "FRAMES as memory"),
    "tree": ("TREE", "memory that it and all below it occupy together"),
    "freed": ("FREED", "the part of TREE that is freed when these all exit"),
    "anon": ("ANON", "the part of SIZE that is anonymous memory"),
    "file": ("FILE", "the part of SIZE that is files and shared memory"),
    "rss": ("RSS", "resident memory, the kernel's figure"),
    "pss": ("PSS", "RSS with each page divided by its mappings, the kernel's figure"),
    "uss": ("USS", "the part of RSS that it alone maps, the kernel's figure"),
    "pte": ("PTE", "its page tables, which no other column has"),
    "swap": ("SWAP", "distinct swap slots as memory"),
    "command": ("COMMAND", "command line, drawn as a tree"),
}
FROM_PAGEMAP = {"frames", "unique", "size", "tree", "freed", "anon", "file", "swap"}
ROLLUP = {"rss": b"Rss", "pss": b"Pss", "uss": b"Private"}  # fields that begin so are added up
SUMS = {"rss", "pss", "pte"}  # TOTAL has the sum
FIGURES = FROM_PAGEMAP | ROLLUP.keys() | SUMS
SIZES, TEXTS = FIGURES - {"frames", "unique"}, {"user", "command"}
IN_TABLE = ["pid", "frames", "unique", "size", "tree", "freed", "pss", "swap", "command"]
IN_JSON = ["pid", "ppid", "depth", "frames", "unique", "size", "tree", "freed", "anon", "file"]
IN_JSON += ["rss", "pss", "uss", "swap", "command"]


def survey(machine: Machine, kernel: Any, columns: set[str], nodes: list[Node]) -> list[Row]:
    """Read and count these processes as one set; without a kernel, no frames.

    Returns a row for each that has not exited, and TOTAL.  "unread" tells why one was not read.
    """
    figures: dict[int, Row] = {}
    with_figures = not columns.isdisjoint(ROLLUP)

    def read_figures() -> None:
        for row, node in enumerate(nodes, 1):
            with contextlib.suppress(OSError, MemoryError):  # the main thread asks again
                figures[row] = kernel_figures(machine, node.pid, node.stat)

    # Half of the kernel's work, done while we count: its calls hold no interpreter lock.
    thread = threading.Thread(target=read_figures, daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread is to be had: all is read below
        if with_figures:
            thread.start()
    reader = Reader(machine, kernel, columns, len(nodes))
    census = Census(kernel, machine.page_size, nodes)
    processes: list[Process] = []
    depths = [-1]
    for row, node in enumerate(nodes, 1):
        process = reader.read(row, node)
        depths.append(depths[node.parent] + bool(process))  # children of one that exited move up
        if process:
            processes.append(process)
            if "unread" not in process.cells:
                census.count(process)
    census.add_up(kernel is not None and "freed" in columns)
    if thread.is_alive():
        thread.join()
    write(reader.eraser, sys.stderr)

    rows: list[Row] = []
    for process in processes:
        cells = {**process.cells, "depth": depths[process.row], **census.figures(process.row)}
        if with_figures:
            early = figures.get(process.row) if process.stat is nodes[process.row - 1].stat else {}
            try:
                cells.update(early or kernel_figures(machine, process.pid, process.stat))
            except PermissionError as error:
                cells.setdefault("unread", reason(error))
            except VANISHED:
                pass  # its frames stay counted
        if "unread" in cells:
            cells = {name: cells[name] for name in cells.keys() - FIGURES}
        rows.append(cells)
    sums = {name: [cells[name] for cells in rows if name in cells] for name in SUMS & columns}
    total = {name: sum(values) for name, values in sums.items() if values}
    return [*rows, {**total, **census.figures(0)}]


def kib(size: int) -> str:
    return str(size // 1024)


def human(size: int) -> str:
    """A size like 6.9M, in powers of 1024; to the nearest, where du rounds up."""
    value, power = float(size), 0
    while round(value) >= 1024:
        value, power = value / 1024, power + 1
    digits = 1 if power and round(value, 1) < 10 else 0
    return f"{value:.{digits}f}{' KMGTPE'[power].strip()}"


UNITS = {kib: "KiB, ", str: "bytes, ", human: ""}
# How a tree is drawn: further down, a child, the last child; and what stands for a cut path.
LINES, ASCII = ("│  ", "├─ ", "└─ ", "…"), ("|  ", "|- ", "`- ", "~")


def plural(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def tree_lines(depths: list[int], drawing: Sequence[str]) -> list[str]:
    """What stands before each row's command to draw the tree."""
    down, tee, corner, _ = drawing
    lines = []
    later: set[int] = set()  # depths at which a row further down has the same parent
    for depth in reversed(depths):
        line = "".join(down if above in later else "   " for above in range(1, depth))
        lines.append(f" {line}{tee if depth in later else corner}" if depth else "")
        later = later - {depth + 1} | {depth}  # its children are all drawn
    return lines[::-1]


def table(rows: list[Row], columns: list[str], size: Callable[[int], str], width: int) -> list[str]:
    """Header, processes, TOTAL.  Of lines longer than `width`, if any, only the command is cut."""
    encoding = sys.stdout.encoding

    def cell(row: Row, name: str) -> str:
        if name not in row:
            return "-"
        text = size(row[name]) if name in SIZES else str(row[name])
        return text.encode(encoding, "backslashreplace").decode(encoding)

    skipped = sum("unread" in row for row in rows)
    about = plural(len(rows) - 1) + (f", {skipped} unread" if skipped else "")
    rows = [*rows[:-1], {**rows[-1], "pid": "TOTAL", "command": UNITS[size] + about, "depth": 0}]
    cells = {name: [COLUMNS[name][0], *(cell(row, name) for row in rows)] for name in columns}
    if "command" in columns:
        others = sum(max(map(columns_of, cells[name])) + 1 for name in columns if name != "command")
        room = max(width - others, len("COMMAND")) if width else 0
        signs = "".join(LINES)
        drawing = LINES if signs.encode(encoding, "ignore").decode(encoding) == signs else ASCII
        drawn = zip(tree_lines([0, *(row["depth"] for row in rows)], drawing), cells["command"])
        cells["command"] = [shortened(tree, command, room, drawing[3]) for tree, command in drawn]
    for name in columns[:-1] if columns[-1] in TEXTS else columns:
        wide = max(map(columns_of, cells[name]))
        blanks = [" " * (wide - columns_of(text)) for text in cells[name]]
        pairs = zip(cells[name], blanks) if name in TEXTS else zip(blanks, cells[name])
        cells[name] = ["".join(pair) for pair in pairs]
    return [" ".join(line).rstrip() for line in zip(*cells.values())]


def shortened(tree: str, command: str, room: int, dots: str) -> str:
    """The command behind its tree, in so many columns of a terminal; all of it if that is 0."""
    over = columns_of(tree) + columns_of(command) - room if room else 0
    # The program's name and its first arguments tell processes apart best.
    directory = command.partition(" ")[0].rpartition("/")[0]
    if over > 0 and directory and command[0] != "[":  # a kernel thread's name is no path
        left = cut(directory, columns_of(directory) - over - 1)
        command = left + dots + command[len(directory) :]
    return cut(tree + command, room) if room else tree + command


def columns_of(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    import unicodedata  # not above: few need it

    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def cut(text: str, room: int) -> str:
    ends = accumulate(map(columns_of, text))
    return text[: len([*takewhile(lambda end: end <= room, ends)])]


def as_json(rows: list[Row], columns: list[str], page_size: int) -> str:
    import json  # not above: it would be a part of every start

    content = {
        "page_size": page_size,
        "processes": [{name: row.get(name) for name in columns} for row in rows[:-1]],
        "total": {name: rows[-1].get(name) for name in columns if name in FIGURES},
        "skipped": [{"pid": r["pid"], "reason": r["unread"]} for r in rows if "unread" in r],
    }
    return json.dumps(content)


def write(text: str, stream: TextIO | None) -> None:
    """Error if stdout cannot take it, except on a closed pipe."""
    if stream is None:  # stderr is closed
        return
    # Not by the stream: without a buffer (python -u) it takes a part for the whole.
    left = text.encode(stream.encoding, "backslashreplace")
    try:
        while left:
            left = left[os.write(stream.fileno(), left) :]
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise Error(f"cannot write: {error.strerror}") from None


def complain(*messages: str) -> None:
    write("".join(f"memuse: {escaped(message)}\n" for message in messages), sys.stderr)


# ---- The command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see memuse --help")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        write(message, file)


def parse_args(argv: list[str]) -> argparse.Namespace:
    about_columns = "".join(f"  {name:8} {about}\n" for name, (_, about) in COLUMNS.items())
    parser = Parser(
        prog="memuse",
        add_help=False,
        allow_abbrev=False,
        # With a width given, argparse need not import what tells the terminal's.
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=80),
        description="Count the physical memory that a tree of processes really occupies.",
        epilog=f"columns (sizes in KiB; default: {','.join(IN_TABLE)}):\n{about_columns}\n"
        "examples:\n"
        "  sudo memuse $(pgrep -o nginx)               a server, with all below it\n"
        "  sudo memuse -g system.slice/nginx.service   a unit, or a container\n"
        "  sudo memuse -o tree,freed,pid,command 1 | sort -rn | head   the biggest branches",
    )
    add, unit = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    common: Any = {"dest": "size", "action": "store_const", "default": kib}
    unit("-b", "--bytes", const=str, help="sizes in bytes", **common)
    unit("-h", "--human-readable", const=human, help="sizes like 6.9M, powers of 1024", **common)
    add("-J", "--json", action="store_true", help="JSON, sizes in bytes")
    add("-o", "--output", metavar="COLUMNS", help="columns to show; +COLUMNS adds to the default")
    add("-g", "--cgroup", metavar="PATH", action="append", help="a control group with all below it")
    add("--help", action="help", help="show this and exit")
    add("-V", "--version", action="version", version=f"memuse {__version__}")
    add("pids", metavar="PID", nargs="*", help="a process, with all below it")
    arguments = parser.parse_args(argv)
    if not arguments.pids and not arguments.cgroup:
        parser.error("a PID is missing")
    for text in arguments.pids:
        if not re.fullmatch("0*[1-9][0-9]{0,17}", text):
            parser.error(f"{text!r} is not a PID")

    names = default = IN_JSON if arguments.json else IN_TABLE
    if arguments.output is not None:
        names = arguments.output.lower().lstrip("+").split(",")
        for name in names:
            if name not in COLUMNS:
                parser.error(f"there is no column {name!r}; there are {', '.join(COLUMNS)}")
        if arguments.output.startswith("+"):
            names = [*default[:-1], *names, default[-1]]  # before the command
    arguments.columns = list(dict.fromkeys(names))
    return arguments


def refusal(machine: Machine, refused: OSError, nodes: list[Node], argv: list[str]) -> Error:
    """What to run where a file about page frames cannot be read."""
    import shlex  # not above: few need it

    program, path = sys.argv[0], refused.filename or f"{machine.proc}/self/pagemap"
    if isinstance(refused, FileNotFoundError):
        return Error(f"no {path}: a kernel without CONFIG_PROC_PAGE_MONITOR")
    needs = f"{path} shows no page frames without CAP_SYS_ADMIN"
    if not path.endswith("pagemap"):
        needs = f"{path} is root's, and takes CAP_DAC_READ_SEARCH besides CAP_SYS_ADMIN"
    ns = f"{machine.proc}/self/ns"  # where a kernel may be without some
    inodes = {os.stat(f"{ns}/{name}").st_ino for name in {"pid", "user"} & {*os.listdir(ns)}}
    if inodes - FIRST_NAMESPACES:
        return Error(f"{needs}: run it on the host, with its PID there: sudo {program} PID")
    line = f"{needs}: run sudo {program} {shlex.join(argv)}"
    if os.geteuid() and all(os.access(f"{machine.proc}/{node.pid}/fd", os.R_OK) for node in nodes):
        pids = " ".join(str(node.pid) for node in nodes if not node.parent)
        line += f"; or, for the kernel's figures alone, {program} -o pid,rss,pss,command {pids}"
    return Error(line)


def width_of_output() -> int:
    """COLUMNS of the environment, as ps has it; else the terminal's; 0 if nobody has told any."""
    asked = re.fullmatch("0*[1-9][0-9]{0,8}", os.environ.get("COLUMNS", ""))
    if asked:
        return int(asked[0])
    return os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0


def run(machine: Machine, argv: list[str]) -> int:
    """Print what is asked for, then what is missing in it.  Error if there is nothing to print."""
    arguments = parse_args(argv)
    columns, roots = arguments.columns, list(dict.fromkeys(map(int, arguments.pids)))
    members = {pid for path in arguments.cgroup or () for pid in cgroup_members(machine, path)}
    nodes = find_processes(machine, roots, members)
    with contextlib.ExitStack() as files:
        try:
            kernel = Kernel(machine, files) if nodes and FROM_PAGEMAP & {*columns} else None
        except (PermissionError, FileNotFoundError) as error:
            raise refusal(machine, error, nodes, argv) from None
        rows = survey(machine, kernel, {*columns}, nodes)

    found, shown = {node.pid for node in nodes}, {row["pid"] for row in rows[:-1]}
    failures = [why_missing(machine, pid) for pid in roots if pid not in found]
    exited = found - shown
    failures += [f"process {pid} exited while it was being read" for pid in roots if pid in exited]
    skipped = {row["pid"]: row["unread"] for row in rows if "unread" in row}
    for why in dict.fromkeys(skipped.values()):
        pids = [str(pid) for pid in skipped if skipped[pid] == why]
        failures.append(f"process{'es' * (len(pids) > 1)} {', '.join(pids)} not read: {why}")
    if shown <= skipped.keys():
        raise Error("; ".join(failures) or "none of the processes is left")
    if arguments.json:
        lines = [as_json(rows, columns, machine.page_size)]
    else:
        lines = table(rows, columns, arguments.size, width_of_output())
    write("".join(f"{line}\n" for line in lines), sys.stdout)
    others = len(exited - {*roots})
    notes = [f"{plural(others)} exited while being read"] if others else []
    complain(*failures, *notes)
    return 1 if failures else 0


def main(argv: list[str] | None = None, machine: Machine | None = None) -> int:
    """Exit status: 0 done, 1 failed or incomplete, 2 wrong usage, 130 interrupted."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for a script's background jobs
        # At once: an exception could be lost in a destructor, or tell its traceback at exit.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        if sys.stdout is None:
            raise Error("standard output is closed")
        return run(machine or Machine(), sys.argv[1:] if argv is None else argv)
    except Error as error:
        complain(str(error))
    except (MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
            complain("there is not enough memory")
        else:
            complain(f"{error.filename or 'reading'}: {error.strerror}")
    return 1


if __name__ == "__main__":
    # All is written.  To take the interpreter apart would be a tenth of a short run.
    os._exit(main())
