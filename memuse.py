#!/usr/bin/env python3
"""Count the physical memory that a tree of processes really occupies.

The file has this order: constants, the table of columns first; parsing, which reads nothing; the
Machine, which is read; the Kernel, which knows frames; which processes; files that are memory;
huge pages that are partly mapped; reading a process; counting; the report; the command line.

find_processes() turns PIDs and control groups into Nodes, one for each row.  survey() reads each
into a Process, and a Census counts it, in one Ledger for anonymous memory, one for files and one
for each swap area; meanwhile a second thread reads the kernel's own figures.  Then the Census adds
up TREE and FREED, survey() makes a Result of each row, and table() or as_json() makes the output.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain, compress, count, groupby, takewhile
from operator import itemgetter, le
from stat import S_ISREG
from typing import Any, NamedTuple, NoReturn, Optional, TextIO, Union

try:
    import fcntl

    import psutil
except ImportError as missing:
    raise SystemExit(
        f"memuse: {sys.executable}: {missing}; memuse needs Linux and psutil. Install it for this"
        f" interpreter ({sys.executable} -m pip install psutil), or run memuse by one that has it"
        f" (after apt install python3-psutil: sudo /usr/bin/python3 {sys.argv[0]} PID)"
    ) from None

__version__ = "3.0.0"

Pair = tuple[int, int]
Place = tuple[Optional[bytes], int]  # a file, or None for the address space; a group of pages
Cells = dict[str, Union[int, str]]  # by column; what was not read has no key

VANISHED = (FileNotFoundError, ProcessLookupError, psutil.Error)  # it ended, or called exec


class Error(Exception):
    """What can be expected to go wrong, told in the one line that the user sees."""


# ---- Constants ----------------------------------------------------------------------------------

# What a column is read from: a file of /proc/PID; or OWNER, by psutil.
STAT, CMDLINE, STATUS, ROLLUP, PAGEMAP = "stat", "cmdline", "status", "smaps_rollup", "pagemap"
OWNER = "owner"


class Column(NamedTuple):
    """All that is known of a column.

    s: it is a size, in bytes.  +: TOTAL is the sum; from PAGEMAP, it is a count of its own.
    t, j: a table, or JSON, has it by default.
    """

    header: str  # "": only JSON can have it
    source: str
    field: bytes  # of that file; what begins so is added up
    ways: str
    about: str


COLUMNS = {
    "pid": Column("PID", STAT, b"", "tj", "process"),
    "ppid": Column("PPID", STAT, b"", "j", "its parent"),
    "depth": Column("", STAT, b"", "j", "how far it is below its topmost row"),
    "user": Column("USER", OWNER, b"", "", "its owner"),
    "frames": Column("FRAMES", PAGEMAP, b"", "tj", "distinct page frames that hold its memory"),
    "unique": Column("+UNIQUE", PAGEMAP, b"", "tj", "frames not already counted in a row above"),
    "size": Column("SIZE", PAGEMAP, b"", "stj", "FRAMES as memory"),
    "tree": Column("TREE", PAGEMAP, b"", "stj", "memory that it and all below it occupy together"),
    "freed": Column("FREED", PAGEMAP, b"", "stj", "memory that comes free when these all exit"),
    "anon": Column("ANON", PAGEMAP, b"", "sj", "the part of SIZE that is anonymous memory"),
    "shmem": Column("SHMEM", PAGEMAP, b"", "sj", "the part of SIZE that is shared memory"),
    "file": Column("FILE", PAGEMAP, b"", "sj", "the rest of SIZE: files and drivers' memory"),
    "rss": Column("RSS", ROLLUP, b"Rss:", "s+j", "resident memory, the kernel's figure"),
    "pss": Column("PSS", ROLLUP, b"Pss:", "s+tj", "RSS with each page divided by its mappings"),
    "uss": Column("USS", ROLLUP, b"Private_", "sj", "the part of RSS that it alone maps"),
    "lazyfree": Column("LAZYFREE", ROLLUP, b"LazyFree:", "s+", "the part that MADV_FREE gave back"),
    "pte": Column("PTE", STATUS, b"VmPTE:", "s+", "its page tables, which no other column has"),
    "swap": Column("SWAP", PAGEMAP, b"", "stj", "distinct swap slots as memory"),
    "command": Column("COMMAND", CMDLINE, b"", "tj", "command line, drawn as a tree"),
}
IN_TABLE, IN_JSON = ([name for name in COLUMNS if way in COLUMNS[name].ways] for way in "tj")


def columns_from(source: str) -> set[str]:
    return {name for name, column in COLUMNS.items() if column.source == source}


WORD = 8  # bytes: an entry of pagemap, kpageflags or kpagecount is a u64 in native order

# A pagemap entry (pagemap.rst).  Bits 0-54 hold the PFN, or swap type (0-4) and offset.
PFN_BYTES = 5  # for addresses of 52 bits, the most on x86-64 and arm64; swap has fewer slots
PFN_MASK = (1 << 8 * PFN_BYTES) - 1
SWAP_TYPE_BITS = 5
SWAP_TYPES = 23  # from here up: migration, poison, device, markers (MAX_SWAPFILES, linux/swap.h)
FLAGS = 7  # the byte that holds bits 56-63, where the least significant comes first
# Names as in the kernel's fs/proc/task_mmu.c; here they are bits of that byte.
PM_MMAP_EXCLUSIVE, PM_GUARD_REGION, PM_FILE, PM_SWAP, PM_PRESENT = (
    1 << bit - 56 for bit in (56, 58, 61, 62, 63)
)
# Of /proc/kpageflags (pagemap.rst).
KPF_ANON, KPF_SWAPBACKED, KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_HUGE, KPF_THP, KPF_ZERO_PAGE = (
    1 << bit for bit in (12, 14, 15, 16, 17, 22, 24)
)
SHM_DEST = 0o1000  # in a System V segment's mode: it was removed (linux/shm.h)
MEMORY_FILE_SYSTEMS = (b"tmpfs", b"devtmpfs", b"hugetlbfs")
PAGEMAP_SCAN = 0xC0606610  # ioctl (pagemap.rst, since Linux 6.7)
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4
MAP_HUGETLB, MAP_HUGE_SHIFT = 0x40000, 26  # asm-generic/mman-common.h, hugetlb_encode.h
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13 (mmap(2))
PF_EXITING, PF_KTHREAD = 0x4, 0x00200000  # in /proc/PID/stat's flags (include/linux/sched.h)
ENDED = (b"Z", b"X")  # the states in it of what has ended (proc.rst, table 1-4)
FIRST_NAMESPACES = {0xEFFFFFFC, 0xEFFFFFFD}  # inodes: PID and user (include/linux/proc_ns.h)

# What an entry stands for.  ANON_EXCLUSIVE: anonymous memory, mapped once in the whole machine.
# ANON_OR_DEVICE: copies-on-write, KSM, a zero page, a device.  FILE_PAGE: also shared memory.
NOTHING, ANON_EXCLUSIVE, ANON_OR_DEVICE, FILE_PAGE, IN_SWAP = range(5)
COPY_OR_DEVICE = 5  # ANON_OR_DEVICE in a VMA of a file: private copies, or a driver's memory


def kind_of(flags: int) -> int:
    """What an entry with these flags (its bits 56-63) stands for."""
    if flags & PM_PRESENT:
        if flags & PM_FILE:
            return FILE_PAGE
        return ANON_EXCLUSIVE if flags & PM_MMAP_EXCLUSIVE else ANON_OR_DEVICE
    return IN_SWAP if flags & PM_SWAP and not flags & PM_GUARD_REGION else NOTHING


YES = 0x80  # a byte that says yes, where 0 says no: the lanes of a Block need its top bit

# Tables for bytes.translate.
KINDS = bytes(map(kind_of, range(256)))  # of flags
EQUALS = [bytes(byte) + bytes([YES]) + bytes(255 - byte) for byte in range(256)]  # for one byte
ANONYMOUS_KINDS = bytes([0, YES, YES]) + bytes(253)  # for kinds
SHAREABLE = bytes([0, 0]) + bytes([YES]) * 254  # for the kinds of what others may have, too
SWAP_TYPE_OF = bytes(low % (1 << SWAP_TYPE_BITS) for low in range(256))  # of the lowest byte


# ---- Parsing ------------------------------------------------------------------------------------

MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+ \d+) *(.*)\n", re.M)
SHARED_SWAP = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ...s .*\n(?:.*\n)*?Swap: +(\d{1,15})", re.M)
SYSTEM_V = b"/SYSV"  # how names of its segments begin
ANONYMOUS = (b"[heap]", b"[stack", b"[anon:")  # anonymous mappings that have a name
AREAS_APART = 256  # pages: reading over a smaller gap is cheaper than another read
STREWN = 8  # pages are strewn where less than one in so many is chosen
PACKED = 64  # where not even one in so many is, no other entries are kept
CHOSEN = re.compile(bytes([YES]))
KIB_FIELD = re.compile(rb"^(\w+:)\s+(\d{1,15}) kB$", re.M)
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


def pfn_at(entries: bytes, at: int) -> int:
    """The PFN in one of the entries."""
    return int.from_bytes(entries[at * WORD : (at + 1) * WORD], "little") & PFN_MASK


def are_strewn(chosen: bytes) -> bool:
    return chosen.count(YES) < len(chosen) // STREWN


def places_of(chosen: bytes) -> list[int]:
    """Where the chosen ones are; fast if they are few."""
    return [found.start() for found in CHOSEN.finditer(chosen)]


def chosen_pfns(entries: bytes, chosen: bytes) -> list[int]:
    """The PFNs in those of the entries that are chosen."""
    if are_strewn(chosen):  # in half the time
        return [pfn_at(entries, at) for at in places_of(chosen)]
    return list(compress(pfns_of(entries[: len(chosen) * WORD]), chosen))


class Part(NamedTuple):
    """Entries of neighbouring pages, and which of them are meant."""

    file: bytes | None  # whose pages they are: see Vma
    page: int  # the first one's: of the file, or of the address space
    entries: bytes  # little-endian
    chosen: bytes  # YES for each that is meant, at least one

    def packed(self) -> Part:
        """The same part; if few pages are chosen, it keeps the entries of these alone."""
        if self.chosen.count(YES) > len(self.chosen) // PACKED:
            return self
        each = [self.entries[at * WORD : (at + 1) * WORD] for at in places_of(self.chosen)]
        return self._replace(entries=b"".join(each))

    def unpacked(self) -> Part:
        """The part as it was, with zeros for the entries of others."""
        if len(self.entries) >= len(self.chosen) * WORD:
            return self
        entries = bytearray(len(self.chosen) * WORD)
        for i, at in enumerate(places_of(self.chosen)):
            entries[at * WORD : (at + 1) * WORD] = self.entries[i * WORD : (i + 1) * WORD]
        return self._replace(entries=bytes(entries))


class Vma(NamedTuple):
    """A line of /proc/PID/maps, or several that go on as one; counted in pages."""

    start: int
    end: int
    shift: int  # from its pages to those of the file
    # Device and inode; with the IPC namespace of System V's, whose inodes are numbered by each; or
    # a special mapping's name.  None: anonymous memory.
    file: bytes | None
    name: bytes = b""  # of a single line


def parse_maps(maps: bytes, page_size: int, ipc: bytes = b"") -> list[Vma]:
    """The VMAs in /proc/PID/maps (proc.rst) of this IPC namespace.  Error on a malformed line."""
    lines = MAPPING.findall(maps)
    if len(lines) != maps.count(b"\n"):
        raise Error("cannot make out the kernel's list of mappings")
    vmas, any_system_v = [], SYSTEM_V in maps
    for low, high, offset, file, name in lines:
        if name == b"[vsyscall]":  # which pagemap does not cover
            continue
        if any_system_v and name.startswith(SYSTEM_V):  # of which the first is inode 0
            file += b" " + ipc
        elif file.endswith(b" 0"):  # no inode, so no file
            file = b"" if name.startswith(ANONYMOUS) else name
        start, end = int(low, 16) // page_size, int(high, 16) // page_size
        shift = int(offset, 16) // page_size - start if file else 0
        vmas.append(Vma(start, end, shift, file or None, name))
    return vmas


def areas_of(vmas: list[Vma]) -> list[Pair]:
    """Where anything is mapped; areas that are not far apart are one."""
    areas: list[Pair] = []
    for vma in vmas:
        if areas and vma.start - areas[-1][1] < AREAS_APART:
            areas[-1] = areas[-1][0], vma.end
        else:
            areas.append((vma.start, vma.end))
    return areas


def joined(vmas: list[Vma]) -> list[Vma]:
    """The same VMAs; neighbours are joined if all are anonymous, or map one file with one shift."""
    runs = [(alike, [*run]) for alike, run in groupby(vmas, itemgetter(2, 3))]
    return [Vma(run[0].start, run[-1].end, *alike) for alike, run in runs]


Files = dict[bytes, list[Vma]]  # a process's VMAs of each file


def layout_of(maps: bytes, page_size: int, ipc: bytes) -> tuple[list[Pair], list[Vma], Files]:
    """Where a process has anything, its VMAs, joined, and those of each file as they are."""
    vmas = parse_maps(maps, page_size, ipc)
    files: Files = defaultdict(list)
    for vma in vmas:
        if vma.file:
            files[vma.file].append(vma)
    return areas_of(vmas), joined(vmas), files


def is_unnamed(name: bytes) -> bool:
    """Whether a mapping or link with this name may be of a file without a name."""
    return name.endswith(b" (deleted)") or name.startswith(b"[anon_shmem:")


def swap_of_shared(smaps: bytes, page_size: int) -> dict[Pair, int]:
    """In /proc/PID/smaps (proc.rst): bytes that are swapped out of each shared mapping's file.

    By its first page and its end.  Of a private one, the figure has swapped copies as well.
    """
    return {
        (int(low, 16) // page_size, int(high, 16) // page_size): int(kib) * 1024
        for low, high, kib in SHARED_SWAP.findall(smaps)
    }


def memory_mounts(mountinfo: bytes) -> dict[bytes, bytes]:
    """In /proc/PID/mountinfo (proc.rst): the device of each mount, by ID; b"" if not memory."""
    mounts = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(b" - ")
        fields = before.split()
        memory = after.startswith(MEMORY_FILE_SYSTEMS)
        mounts[fields[0]] = device_of(*map(int, fields[2].split(b":"))) if memory else b""
    return mounts


def device_of(major: int, minor: int) -> bytes:
    """As /proc/PID/maps has it."""
    return b"%02x:%02x" % (major, minor)


def sizes_of(source: str, text: bytes) -> Cells:
    """The columns that are read from this file, smaps_rollup or status (proc.rst), in bytes."""
    fields = KIB_FIELD.findall(text)
    return {
        name: sum(int(kib) * 1024 for field, kib in fields if field.startswith(COLUMNS[name].field))
        for name in columns_from(source)
    }


class Stat(NamedTuple):
    """Of /proc/PID/stat (proc.rst, table 1-4)."""

    name: bytes
    state: bytes
    ppid: int
    flags: int
    threads: int
    started: bytes  # when, in ticks since boot: tells processes apart that had the same PID
    layout: tuple[bytes, ...]  # where exec put code, stack, data and arguments

    def same_image(self, other: Stat) -> bool:
        """Whether this is still the same process, and has not called exec."""
        return (self.started, self.layout) == (other.started, other.layout)


def parse_stat(text: bytes) -> Stat:
    name, _, rest = text.partition(b"(")[2].rpartition(b")")  # which may hold anything
    fields = rest.split()  # from the third on
    layout = (*fields[23:26], *fields[42:49])
    numbers = int(fields[1]), int(fields[6]), int(fields[17])
    return Stat(name, fields[0], *numbers, fields[19], layout)


def command_line(cmdline: bytes, name: bytes) -> str:
    """The arguments joined by spaces or, without any, the name in brackets as ps has it."""
    line = cmdline.rstrip(b"\0").replace(b"\0", b" ")
    line = line if line.strip() else b"[%s]" % name
    # With these signs a tree is drawn, in ASCII with the next.
    shown = escaped(line[:COMMAND_LIMIT].decode("utf-8", "surrogateescape"), "│├└─")
    shown = re.sub(r"^( *)([|`])", r"\1\\\2", shown)
    return shown + "..." if len(line) > COMMAND_LIMIT else shown


def escaped(text: str, signs: str = "") -> str:
    """The text with what a terminal might obey, or not show, and these signs, as escapes."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # PEP 383
    harmless = {c for c in {*text} if c.isprintable()} - {*signs}
    return "".join(c if c in harmless else c.encode("unicode_escape").decode() for c in text)


# ---- The machine --------------------------------------------------------------------------------


class Descriptor(int):
    """A file descriptor, and the path that was opened; `with` closes it at its end."""

    path: str

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self)


class Machine:
    """What memuse reads of /proc and /sys; tests put made-up machines in its place.

    Only a directory's names, symbolic links and a file's owner are asked of os and psutil.
    """

    proc, sysfs = "/proc", "/sys"
    page_size = os.sysconf("SC_PAGE_SIZE")
    byteorder = sys.byteorder

    def pids(self) -> list[int]:
        return psutil.pids()

    def listed(self, path: str) -> list[str]:
        """What a directory has in it."""
        return os.listdir(path)

    def link(self, path: str) -> bytes:
        """What a symbolic link says; nothing waits for what it leads to."""
        return os.readlink(os.fsencode(path))

    def ipc_namespace(self, process: str) -> bytes:
        """That of a process, by its directory in /proc; b"" where the kernel has but one."""
        with contextlib.suppress(FileNotFoundError):
            return self.link(f"{process}/ns/ipc")
        return b""

    def stat_memory(self, path: str) -> os.stat_result:
        """What a link in /proc leads to, which must be on a file system that is memory."""
        return os.stat(path)

    def kernel_mounts(self) -> dict[bytes, bytes]:
        """The mounts of memory that only the kernel sees: as memory_mounts()."""
        sizes, folder = [0], f"{self.sysfs}/kernel/mm/hugepages"
        with contextlib.suppress(FileNotFoundError):  # a kernel without huge pages
            sizes += [int(name[10:-2]) << 10 for name in self.listed(folder)]
        mounts = {}
        for size in sizes:
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
            if size:
                flags |= MAP_HUGETLB | (size.bit_length() - 1) << MAP_HUGE_SHIFT | MAP_NORESERVE
            with contextlib.suppress(OSError):  # more than the pool has
                before = self.read("/proc/self/maps")
                with mmap.mmap(-1, size or mmap.PAGESIZE, flags=flags):
                    lines = {*self.read("/proc/self/maps").splitlines()} - {*before.splitlines()}
                    for line in (line.split() for line in lines if b"(deleted)" in line):
                        with self.opened(f"/proc/self/map_files/{line[0].decode()}") as fd:
                            mounts[self.mount_id("/proc/self", str(int(fd)))] = line[3]
        return mounts

    def mount_id(self, process: str, fd: str) -> bytes:
        """The ID of the mount that an open file is on (proc.rst, 3.8)."""
        fdinfo = self.read(f"{process}/fdinfo/{fd}")
        return fdinfo.partition(b"\nmnt_id:\t")[2].partition(b"\n")[0]

    def opened(self, path: str, directory: Descriptor | None = None) -> Descriptor:
        """A file, or a directory; the path may be relative to one that is open."""
        fd = Descriptor(os.open(path, os.O_RDONLY, dir_fd=directory))
        fd.path = path if directory is None else f"{directory.path}/{path}"
        return fd

    def read(self, path: str, directory: Descriptor | None = None, at_most: int = -1) -> bytes:
        """A file's bytes; with `at_most`, what a single read of so many gives."""
        with self.opened(path, directory) as fd:
            if at_most > 0:
                return os.read(fd, at_most)
            return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))

    def pread(self, fd: Descriptor, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)

    def words(self, fd: Descriptor, first: int, number: int) -> bytes:
        """Words of pagemap or /proc/kpage*, as little-endian; fewer where the file ends."""
        words = array.array("Q", self.pread(fd, number * WORD, first * WORD))
        if self.byteorder == "big":
            words.byteswap()
        return words.tobytes()

    def next_resident(self, pagemap: Descriptor, start: int, end: int) -> int:
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
            return int(self.link(f"{self.proc}/self"))
        except OSError:
            raise Error(f"no {self.proc}/self: mount the /proc of this PID namespace") from None

    def stat(self, pid: int, mm_files: str = "") -> Stat | None:
        """Of a process, or of a thread of it: see mm_files_of()."""
        with contextlib.suppress(*VANISHED, PermissionError):  # hidepid=1 lists what it hides
            return parse_stat(self.read(f"{self.proc}/{pid}/{mm_files}stat"))
        return None


GROWTH = 1 << 20  # bytes: a table grows by so many, a multiple of what any PMD maps


def lazy_bytes(size: int) -> mmap.mmap:
    """Zeros that take memory only once they are written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def make_room(table: mmap.mmap, places: Sequence[int]) -> None:
    """Let a table of lazy_bytes() have these places."""
    size = max(places, default=0) + 1
    if size > len(table):
        table.resize(-(-size // GROWTH) * GROWTH)


def items_at(table: mmap.mmap | memoryview, places: Sequence[int]) -> tuple[int, ...]:
    """What stands at these places, in half the time of a loop."""
    items: tuple[int, ...] = itemgetter(0, 0, *places)(table)  # a single place would give no tuple
    return items[2:]


# ---- The kernel ---------------------------------------------------------------------------------


class Kernel:
    """What the kernel tells of frames: /proc/kpageflags and /proc/kpagecount, held open."""

    def __init__(self, machine: Machine, files: contextlib.ExitStack) -> None:
        """PermissionError, or FileNotFoundError, naming a file of frames that cannot be opened."""
        self.machine = machine
        # Memory that is only read maps a zero page; s390 has up to 128 (arch/s390/mm/init.c).
        with lazy_bytes(128 * mmap.PAGESIZE) as memory:
            memory[:: mmap.PAGESIZE]
            own = {*self._own_pfns()}
        if not any(own):  # without CAP_SYS_ADMIN pagemap opens, but shows none
            raise PermissionError(errno.EPERM, "no PFNs", f"{machine.proc}/self/pagemap")
        self.kpageflags = files.enter_context(machine.opened(f"{machine.proc}/kpageflags"))
        self.kpagecount = files.enter_context(machine.opened(f"{machine.proc}/kpagecount"))
        for file in (self.kpageflags, self.kpagecount):
            if not machine.pread(file, WORD, 0):
                raise Error(f"{file.path} reads empty, so that no frame can be counted")
        self.zero_pages = [pfn for pfn in own if self.flags_of(pfn) & KPF_ZERO_PAGE]
        self.pmd_pages = 0  # pages in a PMD-mapped huge page, if there are any (transhuge.rst)
        with contextlib.suppress(FileNotFoundError):
            size = machine.read(f"{machine.sysfs}/kernel/mm/transparent_hugepage/hpage_pmd_size")
            self.pmd_pages = int(size) // machine.page_size
        ramp = struct.pack(f"<{self.pmd_pages}Q", *range(self.pmd_pages))
        self.ramp = int.from_bytes(ramp, "little")

    def _own_pfns(self) -> list[int]:
        """The PFNs of memuse's own pages that may be zero pages."""
        machine, pfns = self.machine, list[int]()
        vmas = parse_maps(machine.read(f"{machine.proc}/self/maps"), machine.page_size)
        with machine.opened(f"{machine.proc}/self/pagemap") as pagemap:
            for start, end in areas_of(vmas):
                entries = machine.words(pagemap, start, end - start)
                chosen = entries[FLAGS::WORD].translate(KINDS).translate(EQUALS[ANON_OR_DEVICE])
                pfns += compress(pfns_of(entries), chosen)
        return pfns

    def corrected(self, start: int, entries: bytes) -> bytes:
        """The entries from page `start` on, without huge zero pages and with their true bits.

        All entries of a PMD-mapped huge page have its first page's PM_MMAP_EXCLUSIVE (before Linux
        6.11, and seen again in 6.18), while others may have its other pages: their mapcounts tell.
        A file's can lack PM_FILE (seen in 5.10): kpageflags tells.
        """
        pages, size = self.pmd_pages, self.pmd_pages * WORD
        if not pages:
            return entries
        for at in range(-start % pages * WORD, len(entries) - size + 1, size):
            entry = int.from_bytes(entries[at : at + WORD], "little")
            pfn, kind = entry & PFN_MASK, KINDS[entry >> 56]
            if kind == NOTHING or pfn % pages or entries[at : at + size] != self.huge_page(entry):
                continue
            flags = self.flags_of(pfn)
            if flags & KPF_ZERO_PAGE:
                right = bytes(size)
            elif kind != FILE_PAGE and flags & (KPF_THP | KPF_ANON) == KPF_THP:
                right = self.huge_page(entry | PM_FILE << 56)
            elif kind == ANON_EXCLUSIVE and {*self.mapcounts(pfn, pages)} != {1}:
                right = self.huge_page(entry & ~(PM_MMAP_EXCLUSIVE << 56))
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

    def is_shared_memory(self, pfn: int) -> bool:
        """Whether a file's frame is of tmpfs or hugetlbfs, as the kernel's RssShmem counts it."""
        while self.flags_of(pfn) & (KPF_COMPOUND_TAIL | KPF_HUGE) == KPF_COMPOUND_TAIL:
            pfn -= 1  # older kernels know the flags of a huge page's head alone
        return bool(self.flags_of(pfn) & (KPF_SWAPBACKED | KPF_HUGE))

    def mapcounts(self, first: int, number: int) -> memoryview:
        """How often the machine maps each of these frames (/proc/kpagecount, pagemap.rst)."""
        return low_halves(self.machine.words(self.kpagecount, first, number))

    def smallest_partly_mapped(self) -> int:
        """Pages of the smallest anonymous huge pages of which some are partly mapped; 0 if none.

        By the kernel's statistics (transhuge.rst).  Before Linux 6.12 it told only how many there
        have been since boot, and only of those that a PMD can map.
        """
        machine, counted = self.machine, dict[int, int]()
        if not self.pmd_pages:
            return 0
        folder = f"{machine.sysfs}/kernel/mm/transparent_hugepage"
        for name in machine.listed(folder):
            if name.startswith("hugepages-"):
                with contextlib.suppress(FileNotFoundError):
                    number = machine.read(f"{folder}/{name}/stats/nr_anon_partially_mapped")
                    counted[(int(name[10:-2]) << 10) // machine.page_size] = int(number)
        if counted:
            return min((pages for pages, number in counted.items() if number), default=0)
        with contextlib.suppress(FileNotFoundError):  # a kernel without CONFIG_VM_EVENT_COUNTERS
            vmstat = machine.read(f"{machine.proc}/vmstat")
            if re.search(rb"^thp_deferred_split_page [1-9]", vmstat, re.M):
                return self.pmd_pages
        return 0

    def partly_mapped(self, first: int, smallest: int) -> dict[Pair, Pair]:
        """Anonymous huge pages of which nobody maps some page, by first PFN and number of pages.

        Of so many pages at least, in these frames, of which there are as many as a PMD maps.  For
        each: how often the machine maps pages of it, and how many of them nobody maps.
        """
        head, found = KPF_COMPOUND_HEAD | KPF_THP | KPF_ANON, dict[Pair, Pair]()
        if smallest == self.pmd_pages and self.flags_of(first) & head != head:
            return found
        flags = low_halves(self.machine.words(self.kpageflags, first, self.pmd_pages)).tolist()
        heads = [at for at, flag in enumerate(flags) if flag & head == head]
        mapcounts = self.mapcounts(first, self.pmd_pages).tolist() if heads else []
        for at in heads:
            pages = 1 + sum(1 for _ in takewhile(KPF_COMPOUND_TAIL.__and__, flags[at + 1 :]))
            of_it = mapcounts[at : at + pages]
            if pages >= smallest and 0 in of_it:
                found[first + at, pages] = sum(of_it), of_it.count(0)
        return found


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
    in between.  memuse is left out.  So are those right above that only wait, and kernel
    threads, unless they are roots.
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
    left_out = {pid for pid, stat in stats.items() if stat.flags & PF_KTHREAD}
    child, pid = own_pid, stats[own_pid].ppid if own_pid in stats else 0
    while pid in stats and stats[pid].name in WAITERS and children[pid] == [child]:
        left_out.add(pid)
        child, pid = pid, stats[pid].ppid
    chosen = (chosen | members) & stats.keys() - (left_out - {*roots}) - {own_pid}

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
            return f"{pid} is a thread of process {process}: measure {process}"
        if pid == machine.own_pid():
            return f"{pid} is memuse itself"
    return f"there is no process {pid}"


def find_groups(machine: Machine, text: str) -> list[str]:
    """Directories of the control group that this path or part of a name means: v2's, then v1's."""
    path = re.sub(r"^\d+:[^/]*:(?=/)|/cgroup\.procs$", "", text)  # as /proc/PID/cgroup has it
    if path and os.path.exists(f"{path}/cgroup.procs"):
        return [path]
    if not path.strip("./") and not path.startswith("/"):
        raise Error(f"{text!r} is no control group; -g / is the whole machine")
    lines = os.fsdecode(machine.read(f"{machine.proc}/self/mounts"))
    mounts = re.findall(r"^\S* (\S+) (cgroup2?) ", lines, re.M)
    mounts.sort(key=itemgetter(1), reverse=True)
    if not path.strip("/"):
        return [mount for mount, _ in mounts[:1]]
    groups = [f"{mount}/{path.strip('/')}" for mount, _ in mounts]
    groups = [group for group in groups if os.path.exists(f"{group}/cgroup.procs")]
    if groups:
        return groups
    found: dict[str, list[str]] = {}  # by path below the mount
    for mount, _ in mounts:
        for directory, _, _ in os.walk(mount):
            if directory != mount and path in os.path.basename(directory):
                found.setdefault(directory[len(mount) :], []).append(directory)
    found = {at: found[at] for at in found if os.path.basename(at) == path} or found
    if not found:
        raise Error(f"there is no control group {text!r}; cat /proc/PID/cgroup shows a process's")
    if len(found) > 1:
        some = ", ".join(sorted(found)[:5]) + ", ..." * (len(found) > 5)
        raise Error(f"{len(found)} control groups have {text!r} in their names: {some}")
    return found.popitem()[1]


def cgroup_members(machine: Machine, text: str) -> tuple[set[int], list[str]]:
    """The PIDs in a control group and in all below it, and its directories.  Error if none."""
    groups = find_groups(machine, text)
    for _ in range(3):  # members that come and go are no difference between hierarchies
        members = [(pids_in(machine, group), group) for group in groups]
        members = [(pids, group) for pids, group in members if pids]
        if all(pids == members[0][0] for pids, _ in members):
            break
    else:
        directories = ", ".join(group for _, group in members)
        raise Error(f"{text!r} has other processes in each of {directories}: name one of these")
    if not members:
        raise Error(f"the control group {text!r} has no process")
    return members[0][0], [group for _, group in members]


def pids_in(machine: Machine, group: str) -> set[int]:
    """The PIDs in a control group's directory and in all below it (cgroup-v2.rst)."""
    pids: set[int] = set()
    for directory, _, _ in os.walk(group):
        try:
            pids.update(map(int, machine.read(f"{directory}/cgroup.procs").split()))
        except ValueError:
            raise Error(f"{directory}/cgroup.procs has something else than PIDs") from None
        except OSError as error:
            # Groups below come and go; what is in threaded ones, the one above them lists.
            if directory == group:
                threaded = error.errno == errno.EOPNOTSUPP
                why = "a threaded group; name the one above it" if threaded else error.strerror
                raise Error(f"{directory}/cgroup.procs: {why}") from None
    return pids - {0}  # which stands for those of another PID namespace


def memory_current(machine: Machine, directories: list[str]) -> int | None:
    """What the kernel charges to a control group, in bytes: v2's figure, or v1's."""
    for directory in directories:
        for name in ("memory.current", "memory.usage_in_bytes"):
            with contextlib.suppress(OSError):
                return int(machine.read(f"{directory}/{name}"))
    return None


# ---- Files that are memory ----------------------------------------------------------------------


class Memory:
    """Which files are memory: of tmpfs and hugetlbfs, with a name or without."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # As memory_mounts(); a mount's ID is the same for all, whatever namespace they live in.
        self.mounts: dict[bytes, bytes] = {}
        self.devices: set[bytes] = set()  # that are memory
        self.views: set[tuple[bytes, bytes]] = set()  # whose mounts are known
        self.knows_all = False

    def _know(self, mounts: dict[bytes, bytes]) -> None:
        self.mounts.update(mounts)
        self.devices.update(filter(None, mounts.values()))

    def _look(self, process: str) -> None:
        """Know the mounts that a process sees: of its namespace, those below its root."""
        with contextlib.suppress(OSError):
            view = self.machine.link(f"{process}/ns/mnt"), self.machine.link(f"{process}/root")
            if view not in self.views:
                self._know(memory_mounts(self.machine.read(f"{process}/mountinfo")))
                self.views.add(view)

    def _looks(self, process: str) -> Iterator[None]:
        """Know more mounts at each step: the kernel's own, the process's, everybody's.

        What a process has open since before chroot or unshare is on none that it sees.
        """
        if not self.mounts:
            self._know(self.machine.kernel_mounts())
        yield
        self._look(process)
        yield
        if not self.knows_all:
            self.knows_all = True
            for pid in self.machine.pids():
                self._look(f"{self.machine.proc}/{pid}")
        yield

    def is_memory(self, device: bytes, process: str) -> bool:
        """Whether a device is memory, of which a process (its directory in /proc) maps a file."""
        return any(device in self.devices for _ in self._looks(process))

    def open_files(self, process: str) -> dict[bytes, str]:
        """Files of memory without a name that a process has open, and a link to each.

        Only links are read, until the mount tells that a look at the file waits for nothing.
        """
        found = {}
        for fd in self.machine.listed(f"{process}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile, or its path has over 4,096 bytes
                link = f"{process}/fd/{fd}"
                if is_unnamed(self.machine.link(link)) and self._is_on_memory(process, fd):
                    stat = self.machine.stat_memory(link)
                    if S_ISREG(stat.st_mode):
                        found[key_of(stat)] = link
        return found

    def _is_on_memory(self, process: str, fd: str) -> bool:
        mount = self.machine.mount_id(process, fd)
        return any(mount in self.mounts for _ in self._looks(process)) and bool(self.mounts[mount])


def key_of(stat: os.stat_result) -> bytes:
    """Device and inode, as in Vma."""
    return b"%s %d" % (device_of(os.major(stat.st_dev), os.minor(stat.st_dev)), stat.st_ino)


# ---- Huge pages that are partly mapped ----------------------------------------------------------

UNKNOWN, NONE = 0, 255  # in place of the order of a huge page, which is 1 to 13


class PartlyMapped:
    """Anonymous huge pages of which nobody maps some page.

    The kernel keeps such a huge page whole, until it is short of memory (transhuge.rst, "Partial
    unmap and deferred_folio_split()").  What nobody maps comes free with the last that maps any.
    """

    def __init__(self, kernel: Kernel, smallest: int) -> None:
        self.kernel, self.smallest = kernel, smallest  # pages of the smallest such huge page
        # By PFN: the order of the one that the frame is in, which has 2 ** order pages; or NONE.
        self.orders = lazy_bytes(GROWTH)
        # Of each: the first and the last row that maps any of it, and how many mappings.
        self.mapped: dict[Pair, tuple[int, int, int]] = {}

    def within(self, entries: bytes) -> Counter[Pair]:
        """How many pages of each these entries map."""
        chosen = entries[FLAGS::WORD].translate(KINDS).translate(ANONYMOUS_KINDS)
        pfns, mapped = pfns_of(entries), Counter[Pair]()
        if 0 in chosen:
            pfns = list(compress(pfns, chosen))
        make_room(self.orders, pfns)
        orders = bytes(items_at(self.orders, pfns))
        if UNKNOWN in orders:
            for pfn in compress(pfns, orders.translate(EQUALS[UNKNOWN])):
                if self.orders[pfn] == UNKNOWN:
                    self._look(pfn)
            orders = bytes(items_at(self.orders, pfns))
        if orders.count(NONE) < len(pfns):
            for pfn, order in zip(pfns, orders):
                if order != NONE:
                    mapped[pfn >> order << order, 1 << order] += 1
        return mapped

    def _look(self, pfn: int) -> None:
        """Learn the orders of a frame, and of all those around it that one PMD could map."""
        pages = self.kernel.pmd_pages
        first = pfn - pfn % pages
        known = bytearray([NONE]) * pages
        for start, number in self.kernel.partly_mapped(first, self.smallest):
            order = number.bit_length() - 1
            known[start - first : start - first + number] = bytes([order]) * number
        self.orders[first : first + pages] = bytes(known)

    def count(self, process: Process) -> None:
        """Take in what a process maps of such huge pages."""
        own_mm = process.shares_mm_with == NOBODY  # else its mappings were counted already
        for huge_page, number in process.partly_mapped.items():
            first, _, mappings = self.mapped.get(huge_page, (process.row, NOBODY, 0))
            self.mapped[huge_page] = first, process.row, mappings + number * own_mm

    def unmapped(self) -> Iterator[tuple[int, int, int]]:
        """First and last row that map any of one, and how many of its pages nobody maps.

        Of those that nobody else maps, and that are still partly mapped.
        """
        partly_mapped = lru_cache(maxsize=1)(self.kernel.partly_mapped)  # neighbours ask the same
        for huge_page, (first, last, mappings) in sorted(self.mapped.items()):
            around = huge_page[0] - huge_page[0] % self.kernel.pmd_pages
            by_all, unmapped = partly_mapped(around, self.smallest).get(huge_page, (0, 0))
            if unmapped and by_all <= mappings:
                yield first, last, unmapped


# ---- Reading a process --------------------------------------------------------------------------

SPAN = 1 << 13  # pages read at a time; what is larger is searched for what is resident
NOBODY = 0  # instead of a row: TOTAL's, which has nothing of its own


class Process:
    """What was read of one process; it is counted only once all of it is read."""

    def __init__(self, row: int, node: Node) -> None:
        self.row, self.node = row, node
        self.cells: Cells = {"pid": node.pid, "ppid": node.stat.ppid}
        self.unread = ""  # why it could not be read
        self.private = 0  # how many frames are ANON_EXCLUSIVE
        self.parts: dict[int, list[Part]] = defaultdict(list)  # by kind; what others may have
        self.partly_mapped = Counter[Pair]()  # pages it maps of each such huge page
        self.files: Files = {}
        self.opened: dict[bytes, str] = {}  # files of memory that it has open, with their links
        self.directory = ""  # in /proc, of a thread that has its mm: only there is map_files
        self.witness: Pair | None = None  # its first ANON_EXCLUSIVE page, and the PFN
        self.shares_mm_with = NOBODY  # the last row before that shares the address space

    def forget(self) -> None:
        """Keep only what its row says: the rest is large, and was counted."""
        self.parts, self.files, self.opened, self.partly_mapped = {}, {}, {}, Counter()

    def add(self, vmas: list[Vma], start: int, entries: bytes) -> None:
        """Take in the corrected entries from page `start` on."""
        kinds = entries[FLAGS::WORD].translate(KINDS)
        at = kinds.find(ANON_EXCLUSIVE)
        if at >= 0:
            self.private += kinds.count(ANON_EXCLUSIVE)
            self.witness = self.witness or (start + at, pfn_at(entries, at))
        shareable = kinds.translate(SHAREABLE)
        low, high = bisect(vmas, (start + 1,)), bisect(vmas, (start + len(kinds),))
        for vma in vmas[max(0, low - 1) : high]:
            bounds = max(0, vma.start - start), max(0, vma.end - start)
            first, last = shareable.find(YES, *bounds), shareable.rfind(YES, *bounds)
            if first >= 0:
                part = entries[first * WORD : (last + 1) * WORD]
                self._add_part(vma, start + first, part, kinds[first : last + 1])

    def _add_part(self, vma: Vma, page: int, entries: bytes, kinds: bytes) -> None:
        """Take in the entries of one VMA from a page on, with what they stand for."""
        if FILE_PAGE in kinds:
            chosen = kinds.translate(EQUALS[FILE_PAGE])
            part = Part(vma.file, page + vma.shift, entries, chosen)
            self.parts[FILE_PAGE].append(part.packed())
        for kind in (ANON_OR_DEVICE, IN_SWAP):
            if kind in kinds:
                chosen = kinds.translate(EQUALS[kind])
                copies = kind == ANON_OR_DEVICE and vma.file
                part = Part(None, page, entries, chosen)
                self.parts[COPY_OR_DEVICE if copies else kind].append(part.packed())


class Reader:
    """Reads processes one by one, in the order of their rows."""

    def __init__(
        self,
        machine: Machine,
        kernel: Kernel | None,
        columns: set[str],
        memory: Memory,
        partly_mapped: PartlyMapped | None,
        progress: Progress,
    ) -> None:
        self.machine, self.kernel, self.columns = machine, kernel, columns
        self.memory, self.partly_mapped, self.progress = memory, partly_mapped, progress
        self.witnesses: dict[Pair, tuple[int, str]] = {}  # last row that has it, its pagemap's path

    def read(self, row: int, node: Node) -> Process | None:
        """The process, or None if it exited; one that calls exec meanwhile is read again."""
        for _ in range(3):
            process = Process(row, node)
            try:
                self._read(process)
                return process
            except PermissionError as error:
                process.unread = reason(error, node.pid)
                return process
            except VANISHED:
                stat = self.machine.stat(node.pid)
            if not stat or stat.started != node.stat.started:
                return None
            if stat.flags & PF_EXITING and stat.threads == 1 and stat.state not in ENDED:
                return None  # it tears down its mm, which can take long; no zombie yet
            node = node._replace(stat=stat)
        process.unread = "it changed whenever it was read"
        return process

    def _read(self, process: Process) -> None:
        """Raises one of VANISHED if it ends or calls exec.

        Its files are opened by way of one descriptor of its directory, between two looks at its
        stat.  So they belong to one process and to one mm, and are empty once that is gone.
        """
        machine, columns, (pid, stat, _) = self.machine, self.columns, process.node
        with machine.opened(f"{machine.proc}/{pid}") as directory:
            mm_files = mm_files_of(machine, pid, stat)
            if "command" in columns:
                cmdline = machine.read(f"{mm_files or ''}cmdline", directory, COMMAND_LIMIT + 1)
                process.cells["command"] = command_line(cmdline, stat.name)
            if "user" in columns:
                process.cells["user"] = psutil.Process(pid).username()
            if columns_from(STATUS) & columns:
                status = machine.read(f"{mm_files or ''}status", directory)
                process.cells.update(sizes_of(STATUS, status))
            if self.kernel and mm_files is not None:
                self._read_pages(self.kernel, process, mm_files, directory)
                if {"tree", "freed"} & columns:
                    process.directory = thread_directory(machine, pid, mm_files)
                    process.opened = self.memory.open_files(process.directory)
            if not parse_stat(machine.read("stat", directory)).same_image(stat):
                raise ProcessLookupError
        if process.witness:  # not earlier: read again, it would share its mm with itself
            path = f"{machine.proc}/{pid}/{mm_files}pagemap"
            self.witnesses[process.witness] = process.row, path

    def _read_pages(
        self, kernel: Kernel, process: Process, mm_files: str, directory: Descriptor
    ) -> None:
        machine, size = self.machine, max(SPAN, kernel.pmd_pages)
        with machine.opened(f"{mm_files}pagemap", directory) as pagemap:
            maps, ipc = machine.read(f"{mm_files}maps", directory), b""
            if SYSTEM_V in maps:
                ipc = machine.ipc_namespace(f"{directory.path}/{mm_files}")
            areas, vmas, process.files = layout_of(maps, machine.page_size, ipc)
            for start, end in areas:
                while start < end:
                    if end - start > size:
                        start = machine.next_resident(pagemap, start, end)
                    stop = min((start // size + 1) * size, end)
                    entries = machine.words(pagemap, start, stop - start)
                    if len(entries) != (stop - start) * WORD:
                        raise ProcessLookupError
                    entries = kernel.corrected(start, entries)
                    process.add(vmas, start, entries)
                    if self.partly_mapped:
                        process.partly_mapped.update(self.partly_mapped.within(entries))
                    self.progress.tell(process.row - 1, stop - start)
                    start = stop
            if process.witness:
                process.shares_mm_with = self._find_mm_sharer(process.witness, pagemap)

    def _find_mm_sharer(self, witness: Pair, pagemap: Descriptor) -> int:
        """The last row that has the same ANON_EXCLUSIVE frame there at the time (CLONE_VM)."""
        row, path = self.witnesses.get(witness, (NOBODY, ""))
        if row != NOBODY:
            with contextlib.suppress(OSError), self.machine.opened(path) as other:
                there = self.machine.words(other, witness[0], 1)
                if there and there == self.machine.words(pagemap, witness[0], 1):
                    return row if KINDS[there[FLAGS]] == ANON_EXCLUSIVE else NOBODY
        return NOBODY


def reason(error: OSError, pid: int) -> str:
    """What of a process was refused, by its path below /proc/PID."""
    path = os.fsdecode(error.filename or "").rpartition(f"/{pid}/")[2]
    return f"{path or 'memory'}: {error.strerror} (needs CAP_SYS_PTRACE)"


def mm_files_of(machine: Machine, pid: int, stat: Stat) -> str | None:
    """Path from /proc/PID to files that tell of its mm: "", or of a thread; None without an mm.

    Those of a process whose first thread has ended are empty; a thread that lives has them.
    """
    if stat.flags & PF_KTHREAD:
        return None
    if stat.state not in ENDED:
        return ""
    if stat.threads > 1:
        for tid in machine.listed(f"{machine.proc}/{pid}/task"):
            thread = machine.stat(pid, f"task/{tid}/")
            if thread and thread.state not in ENDED:
                return f"task/{tid}/"
    return None


def thread_directory(machine: Machine, pid: int, mm_files: str) -> str:
    """The directory in /proc, which lists processes alone, of the process or this thread of it."""
    return f"{machine.proc}/{mm_files.split('/')[1] if mm_files else pid}"


class KernelFigures:
    """RSS and such of all processes, read by a thread while others are counted.

    That is half of the kernel's work, and its calls hold no interpreter lock.
    """

    def __init__(self, machine: Machine, nodes: list[Node]) -> None:
        self.machine, self.nodes = machine, nodes
        self.early: dict[Node, Cells] = {}
        self.thread = threading.Thread(target=self._read_all, daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread is to be had: get() reads them
            self.thread.start()

    def _read_all(self) -> None:
        for node in self.nodes:
            with contextlib.suppress(OSError, MemoryError):  # get() asks again
                self.early[node] = self._read(node)

    def get(self, node: Node) -> Cells:
        """Those of a process as it was counted; one of VANISHED if it exited or called exec."""
        if self.thread.is_alive():
            self.thread.join()
        return self.early.get(node) or self._read(node)

    def _read(self, node: Node) -> Cells:
        machine, mm_files = self.machine, mm_files_of(self.machine, node.pid, node.stat)
        text = b""
        if mm_files is not None:
            text = machine.read(f"{machine.proc}/{node.pid}/{mm_files}{ROLLUP}")
        now = machine.stat(node.pid)
        if not now or not now.same_image(node.stat) or (mm_files is not None and not text):
            raise ProcessLookupError
        return sizes_of(ROLLUP, text)


# ---- Counting -----------------------------------------------------------------------------------
#
# A Ledger counts frames of one sort, each once.  It takes in rows in their order, which is depth
# first.  An example: row 1 has six pages, and two children that were forked from it.  Row 2 wrote
# to page 3, which was copied.  Row 3 moved what was on page 4 to page 5 (mremap).
#
#     page    0   1   2   3   4   5
#     row 1  10  11  12  13  14  15     the frames (PFNs) that the pages have
#     row 2  10  11  12  23  14  15
#     row 3  10  11  12  13   -  14
#
# Row 1 is visited.  All six PFNs are unmarked, so unknown.  They are entered in a new Block at this
# place, each in the lane of its page, and marked by the Block's mark (3, say).  A Block knows the
# PFNs, and of each lane the row that was first to have the frame and the one that had it last:
#     first {1: lanes 0-5}            last {1: lanes 0-5}         seen {NOBODY: 6}
# `seen` belongs to the visit: how many frames the row has, by who had them last before.
#
# Row 2 is visited.  Its part is compared with the Block: five lanes are the same.  In place of 13
# it has frame 23, which is unmarked, but the lane is taken: 23 becomes a single frame, known by
# itself, as a record (first row, last row, mappings) = (2, 2, 1), and is marked SINGLE.
#     first {1: lanes 0-5}            last {1: lane 3, 2: the others}     seen {1: 5, NOBODY: 1}
#
# Row 3 is visited.  Lanes 0 to 3 are the same.  On page 5 it has frame 14, not 15; 14 has the mark
# of a Block, but is not met at its place: it is astray.  What is astray waits until all parts of
# the row are compared.  Then the Block it is in is dissolved: all its frames become single.
# 14 is looked at once more, as a single frame.          seen {1: 1, 2: 4}
#     single: 10, 11, 12 and 14 (1, 3, 3), 13 (1, 3, 2), 15 (1, 2, 2), 23 (2, 2, 1)
#
# FRAMES of a row is the sum of its seen: 6, 6, 5.  +UNIQUE is seen[NOBODY]: 6, 1, 0.
# TREE of a row adds up FRAMES over its subtree, and takes off what is repeated there.  A row with
# seen[other] = n has n frames that `other` had, too; n are taken off at the lowest common ancestor
# of both, and so from all rows above that.  Here all of 5 + 1 + 4 go off row 1: 6 + 6 + 5 - 10 = 7.
# FREED: a frame is freed with row v if the machine maps it no more often than the set does, and if
# all who map it are below v.  The lowest row that has all of them below it is the lowest common
# ancestor of the first and the last, since subtrees are intervals of rows: with it, the frame is
# credited, and then added up over subtrees.  If the machine maps frame 12 four times, as some
# process outside does, and the others as often as here: FREED is 6, 1 (frame 23), 0.

# Marks of PFNs.  UNREAL: no memory.  SINGLE: known by itself.  OF_BLOCKS: known in a Block.
UNMARKED, UNREAL, SINGLE, *OF_BLOCKS = range(256)
UNMARKED_PART = bytes(1 << 12)  # marks are searched by parts of this size
MARKED_RUN = re.compile(rb"[^\0]+(?:\0{1,63}[^\0]+)*")  # a longer gap is worth another read
LANES = 1 << 12  # pages of a Block; with half of them, shared memory takes an eighth longer
ALL_LANES = int.from_bytes(bytes([YES]) * LANES, "little")
FEW = 16  # so many pages make no Block
MAX_ROWS = 16  # with more rows in a Block, its frames take less time one by one
MAX_SUM = 255  # a byte of a sum holds so many additions; fewer sums: a sixth less for `many`
SINGLES = 1 << 6  # PFNs to an array of single frames: with a record each, they take more memory


def as_bytes(lanes: int) -> bytes:
    """Lanes as bytes, trailing zeros stripped."""
    return lanes.to_bytes((lanes.bit_length() + 7) // 8, "little")


def how_many(lanes: int) -> int:
    return as_bytes(lanes).count(YES)


class Tree:
    """Rows below rows, numbered depth first: a subtree is an interval.  Row 0 is above all."""

    def __init__(self, parents: list[int]) -> None:
        self.parents = parents  # by row

    def common_ancestor(self, first: int, last: int) -> int:
        """The lowest row that has both below it, or is one of them."""
        while last > first:
            last = self.parents[last]
        return last

    def add_up(self, figures: list[int]) -> None:
        """Add to each row's figure those of all rows below it."""
        for row in range(len(figures) - 1, 0, -1):
            figures[self.parents[row]] += figures[row]


class Visit:
    """A count of one row in one Ledger, while it lasts; the row may visit it again."""

    def __init__(self, row: int, shares_mm_with: int, by_mapcount: bool = False) -> None:
        self.row, self.shares_mm_with = row, shares_mm_with
        # Which tell when a frame is freed.  Those of a shared mm are counted with its first row.
        self.counts_mappings = by_mapcount and shares_mm_with == NOBODY
        self.seen: dict[int, int] = defaultdict(int)  # how many it has, by who had them last
        self.astray: list[int] = []  # PFNs away from their Blocks


def is_worth_a_block(chosen: bytes) -> bool:
    """Whether these pages take less memory in a Block than one by one."""
    return chosen.count(YES) > FEW and not are_strewn(chosen)


class Block:
    """The frames of LANES neighbouring pages, one for each as far as known.

    A lane is a page's byte in an integer of LANES bytes; lanes are chosen by YES in each of them.
    So one operation is for all of them: counted one by one, they take three times as long.
    """

    def __init__(self, mark: int) -> None:
        self.mark = mark  # of its PFNs
        self.planes = [0] * PFN_BYTES  # the PFNs: all lanes' lowest bytes, then the next
        # By row: lanes whose frames it was first to have, or last.  last[NOBODY]: without a frame.
        self.first: dict[int, int] = {}
        self.last = {NOBODY: ALL_LANES}
        # How often the set maps each lane's frame: a new sum after every MAX_SUM additions.
        self.mapped: list[int] = []
        self.additions = 0

    def same(self, planes: list[int], lanes: int) -> int:
        """Those of the lanes in which this Block has the same frames as the planes."""
        lanes &= ~self.last.get(NOBODY, 0)
        if not lanes:
            return 0
        differ = 0
        for one, other in zip(planes, self.planes):
            differ |= one ^ other
        sevens = lanes - (lanes >> 7)  # 0x7F in each of these lanes
        differ |= (differ & sevens) + sevens  # the top bit tells that a lane is not 0
        return lanes & ~differ

    def enter(self, row: int, planes: list[int], lanes: int) -> None:
        """Know these PFNs in lanes that had none; the row is the first to have them."""
        fill = (lanes << 1) - (lanes >> 7)  # 0xFF in each of these lanes
        self.planes = [old ^ (old ^ new) & fill for old, new in zip(self.planes, planes)]
        self.first[row] = self.first.get(row, 0) | lanes

    def see(self, visit: Visit, lanes: int) -> None:
        """The visited row has the frames in these lanes."""
        if visit.counts_mappings:
            if self.additions % MAX_SUM == 0:
                self.mapped.append(0)
            self.additions += 1
            self.mapped[-1] += lanes >> 7
        own = self.last.pop(visit.row, 0)  # what the row had already, it maps twice
        others, self.last = self.last, {visit.row: own | lanes}
        for other, theirs in others.items():
            both = theirs & lanes
            if both:
                visit.seen[other] += how_many(both)
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
        alone = map(le, items_at(mapcounts, self.pfns()), self.mappings())
        return int.from_bytes(bytes(alone), "little") * YES


class Ledger:
    """Counts frames of anonymous memory, or of files, or the slots of a swap area, each once.

    A frame that may be shared is entered in a Block, at the place where it is first met: an
    address, or a page of a file.  Forked processes, and those that map the file, have it there.
    A PFN is known at one place only, as `marks` tells.  If it is met elsewhere (KSM, mremap), its
    Block is dissolved.  The example above shows all of this.
    """

    def __init__(self, tree: Tree, zero_pages: Sequence[int] = ()) -> None:
        self.tree = tree
        self.marks = lazy_bytes(GROWTH)  # a byte for each PFN
        self.blocks: dict[Place, Block] = {}
        self.dissolved: set[Place] = set()
        # Places of Blocks by mark: to look through all Blocks instead took 13.7 s for 5.0 where KSM
        # had moved everything.
        self.marked: dict[int, list[Place]] = defaultdict(list)
        # By PFN // SINGLES: first row, last row and number of mappings of each, or 0s; interleaved.
        self.singles: dict[int, array.array[int]]
        self.singles = defaultdict(lambda: array.array("i", bytes(12 * SINGLES)))
        # An address space, by the last row that shares it: the first, and its private frames.
        self.spaces: dict[int, Pair] = {}
        self.frames_of: dict[bytes | None, int] = defaultdict(int)  # distinct ones of each file
        # By row: what it has; what no row above has; and what add_up() sums over subtrees.
        rows = len(tree.parents)
        self.own, self.new, self.of_tree, self.freed = ([0] * rows for _ in range(4))
        make_room(self.marks, zero_pages)
        for pfn in zero_pages:
            self.marks[pfn] = UNREAL

    def count(self, visit: Visit, parts: Iterable[Part], private: int = 0) -> None:
        """Count a row's parts, and so many frames that only its address space has."""
        if private:
            self._count_private(visit, private)
        for part in parts:
            before = visit.seen[NOBODY]
            self._count_part(visit, part.unpacked())
            self.frames_of[part.file] += visit.seen[NOBODY] - before
        if visit.astray:
            for mark in {self.marks[pfn] for pfn in visit.astray} - {SINGLE}:
                for place in self.marked.pop(mark):  # seldom more than one: there are 253 marks
                    self._dissolve(place)
            self._count_singly(visit, visit.astray)
        self.own[visit.row] += sum(visit.seen.values())
        self.of_tree[visit.row] += sum(visit.seen.values())
        self.new[visit.row] += visit.seen.pop(NOBODY, 0)
        for other, number in visit.seen.items():
            self.of_tree[self.tree.common_ancestor(other, visit.row)] -= number

    def _count_private(self, visit: Visit, frames: int) -> None:
        first, known = visit.row, 0
        if visit.shares_mm_with != NOBODY:
            first, known = self.spaces.pop(visit.shares_mm_with)
            visit.seen[visit.shares_mm_with] += min(frames, known)
        visit.seen[NOBODY] += max(frames - known, 0)
        self.spaces[visit.row] = first, max(frames, known)

    def _count_part(self, visit: Visit, part: Part) -> None:
        """Count a part: by Blocks what is, or can be, in one; the rest frame by frame."""
        low = part.chosen.find(YES)
        while low >= 0:
            group, lane = divmod(part.page + low, LANES)
            stop = low - lane + LANES
            high = part.chosen.rfind(YES, low, stop) + 1
            entries, chosen = part.entries[low * WORD : high * WORD], part.chosen[low:high]
            place = part.file, group
            block = self.blocks.get(place)
            if not block and place not in self.dissolved and is_worth_a_block(chosen):
                block = self._new_block(place)
            if block:
                chosen = self._count_in_block(visit, block, lane, entries, chosen)
                if max(len(block.first), len(block.last)) > MAX_ROWS:
                    self._dissolve(place)
            if chosen:
                self._count_singly(visit, self._pfns(entries, chosen))
            low = part.chosen.find(YES, stop)

    def _new_block(self, place: Place) -> Block:
        mark = OF_BLOCKS[(len(self.blocks) + len(self.dissolved)) % len(OF_BLOCKS)]
        self.blocks[place] = Block(mark)
        self.marked[mark].append(place)
        return self.blocks[place]

    def _count_in_block(
        self, visit: Visit, block: Block, lane: int, entries: bytes, chosen: bytes
    ) -> bytes:
        """Count what a Block knows or can know, from a lane on.  Returns what else is chosen."""
        up = 8 * lane
        planes = [int.from_bytes(entries[i::WORD], "little") << up for i in range(PFN_BYTES)]
        lanes = int.from_bytes(chosen, "little") << up
        here = block.same(planes, lanes)
        fresh = as_bytes((lanes & block.last.get(NOBODY, 0)) >> up)
        if fresh:
            pfns, marks = self._pfns(entries, fresh), self.marks
            if any(items_at(marks, pfns)) or len({*pfns}) < len(pfns):
                new = bytearray(fresh)
                for at, pfn in zip(compress(count(), fresh), pfns):
                    if marks[pfn] != UNMARKED:
                        new[at] = 0
                    else:
                        marks[pfn] = block.mark
                fresh = bytes(new)
            else:  # nearly always, and a tenth of a run faster where much is shared
                for pfn in pfns:
                    marks[pfn] = block.mark
            entered = int.from_bytes(fresh, "little") << up
            if entered:
                block.enter(visit.row, planes, entered)
                here |= entered
        if here:
            block.see(visit, here)
        return as_bytes((lanes ^ here) >> up)

    def _pfns(self, entries: bytes, chosen: bytes) -> list[int]:
        """The PFNs in the chosen entries, and room for their marks."""
        pfns = chosen_pfns(entries, chosen)
        make_room(self.marks, pfns)
        return pfns

    def _count_singly(self, visit: Visit, pfns: list[int]) -> None:
        """Count frames one by one; what is in a Block is astray."""
        row, seen, marks, singles = visit.row, visit.seen, self.marks, self.singles
        mappings = int(visit.counts_mappings)
        for pfn in pfns:
            mark = marks[pfn]
            if mark > SINGLE:
                visit.astray.append(pfn)
            elif mark != UNREAL:
                records, at = singles[pfn // SINGLES], pfn % SINGLES * 3
                if mark != SINGLE:
                    marks[pfn], records[at] = SINGLE, row
                last = records[at + 1]  # NOBODY in a new record
                if last != row:
                    seen[last] += 1
                    records[at + 1] = row
                records[at + 2] += mappings

    def _dissolve(self, place: Place) -> None:
        """Make the frames of a Block single, if it still is one."""
        block = self.blocks.pop(place, None)
        if block:
            self.dissolved.add(place)
            pfns, mapped = block.pfns(), block.mappings()
            for first, last, lanes in block.by_rows():
                for lane in compress(count(), as_bytes(lanes)):
                    records, at = self.singles[pfns[lane] // SINGLES], pfns[lane] % SINGLES * 3
                    records[at : at + 3] = array.array("i", [first, last, mapped[lane]])
                    self.marks[pfns[lane]] = SINGLE

    def marked_runs(self) -> Iterator[Pair]:
        """First PFN and length of runs of PFNs that are known, with short gaps."""
        for start in range(0, len(self.marks), len(UNMARKED_PART)):
            part = self.marks[start : start + len(UNMARKED_PART)]
            if part != UNMARKED_PART:  # faster than the search
                for run in MARKED_RUN.finditer(part):
                    yield start + run.start(), len(run[0])

    def add_up(self, mapcounts: memoryview | None) -> None:
        """All rows are counted: sum over subtrees; what is freed frame by frame takes mapcounts."""
        if mapcounts:
            for first, last, number in self._freed(mapcounts):
                self.freed[self.tree.common_ancestor(first, last)] += number
        self.tree.add_up(self.of_tree)
        self.tree.add_up(self.freed)
        self.own[0] = self.new[0] = sum(self.new)

    def _freed(self, mapcounts: memoryview) -> Iterator[tuple[int, int, int]]:
        """First row, last row, and how many of their frames nobody outside of the set maps."""
        for last, (first, private) in self.spaces.items():
            yield first, last, private
        # The mapcount of such frames is what the set maps, or less if a process ended meanwhile.
        for block in self.blocks.values():
            if not block.mapped:
                continue
            alone = block.mapped_by_nobody_else(mapcounts)
            for first, last, lanes in block.by_rows():
                yield first, last, how_many(lanes & alone)
        for group, records in self.singles.items():
            each = zip(count(group * SINGLES), records[::3], records[1::3], records[2::3])
            for pfn, first, last, mappings in each:
                # No mappings: no such frame, or one of an mm whose mappings another row counted.
                if mappings and mapcounts[pfn] <= mappings:
                    yield first, last, 1


# Sorts of files.  FREED_BY_PAGE: drivers', and deleted ones on disk.
SHARED_MEMORY, KEPT_IN_CACHE, FREED_BY_PAGE = 1, 2, 3


class MemoryObject:
    """Memory that is an inode's without a name: memfd, shared anonymous, System V, unlinked file.

    All of it is freed at once, when nobody maps the inode any more, or has it open.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.is_system_v = key.count(b" ") == 2
        self.rows: list[int] = []  # of those that hold it
        self.links: dict[str, Vma | None] = {}  # in /proc, that lead to it; of a VMA, or opened
        self.attached = 0  # by how many VMAs of the set's address spaces
        self.sample: Pair | None = None  # a page of it, and the PFN
        self.sample_mappings = 0  # how often the set maps that page


class Objects:
    """The memory objects that processes of the set hold, and whether others hold them, too."""

    def __init__(self, machine: Machine, kernel: Kernel, memory: Memory) -> None:
        self.machine, self.kernel, self.memory = machine, kernel, memory
        self.found: dict[bytes, MemoryObject] = {}
        self.swap: dict[str, dict[Pair, int]] = {}  # by process: swap_of_shared()
        self.refused = ""  # why a file could not be looked at

    def add(self, process: Process, sorts: dict[bytes | None, int]) -> None:
        """Take in what a process maps and has open; the sorts of files, as far as known."""
        directory = process.directory
        for key, vmas in process.files.items():
            device, _, _ = key.partition(b" ")
            sort = sorts.get(key)  # None: no page of it was met
            if is_unnamed(vmas[0].name) and (
                sort == SHARED_MEMORY or (not sort and self.memory.is_memory(device, directory))
            ):
                found = self._held(key, process)
                found.attached += len(vmas) * (process.shares_mm_with == NOBODY)
                size = self.machine.page_size
                vma = max(vmas, key=lambda vma: vma.end - vma.start)
                found.links[f"{directory}/map_files/{vma.start * size:x}-{vma.end * size:x}"] = vma
        for key, link in process.opened.items():
            self._held(key, process).links[link] = None
        for part in process.parts[FILE_PAGE] if self.found else []:
            if part.file in self.found and process.shares_mm_with == NOBODY:
                self._count_sample(self.found[part.file], part.unpacked())

    def _held(self, key: bytes, process: Process) -> MemoryObject:
        held = self.found.setdefault(key, MemoryObject(key))
        held.rows.append(process.row)
        return held

    def _count_sample(self, held: MemoryObject, part: Part) -> None:
        if not held.sample:
            at = part.chosen.find(YES)
            held.sample = part.page + at, pfn_at(part.entries, at)
        page, pfn = held.sample
        at = page - part.page
        if 0 <= at < len(part.chosen) and part.chosen[at]:
            held.sample_mappings += pfn_at(part.entries, at) == pfn

    def alone(self, nodes: list[Node]) -> Iterator[tuple[MemoryObject, int]]:
        """Those that only the set holds, and how much memory they have, in bytes."""
        sizes = {key: self._size(held) for key, held in self.found.items()}
        asked = {key: held for key, held in self.found.items() if sizes[key]}
        own = self.machine.ipc_namespace(f"{self.machine.proc}/self") if asked else b""
        unsure = set()
        for key, held in [*asked.items()]:
            in_own = held.is_system_v and key.endswith(own)
            if self._is_mapped_outside(held) or (in_own and self._is_kept(held)):
                del asked[key]
            elif not in_own:
                unsure.add(key)
            if held.is_system_v and not in_own:  # all who live in its namespace hold it
                rows = enumerate(nodes, 1)
                held.rows += [row for row, node in rows if self._lives_in(node.pid, key)]
        if unsure:
            for key in self._held_outside(unsure, {node.pid for node in nodes}):
                del asked[key]
        for key, held in asked.items():
            yield held, sizes[key]

    def _size(self, held: MemoryObject) -> int:
        """Its memory in bytes, in page tables or not; 0 if it is gone, or has a name."""
        for link in held.links:
            try:
                stat = self.machine.stat_memory(link)
            except PermissionError as error:
                self.refused = f"{link}: {error.strerror} (needs CAP_SYS_ADMIN)"
            except OSError:
                pass  # its holder ended, or unmapped it
            else:
                named = stat.st_nlink and not held.is_system_v
                swapped = self._swapped(held, stat.st_size)
                return 0 if named else max(0, stat.st_blocks * 512 - swapped)
        return 0

    def _swapped(self, held: MemoryObject, size: int) -> int:
        """How much of it is swapped out, in bytes, where a shared mapping has all of its size."""
        page = self.machine.page_size
        with contextlib.suppress(OSError):
            if self.machine.read(f"{self.machine.proc}/swaps").count(b"\n") > 1:
                for link, vma in held.links.items():
                    if vma and vma.start + vma.shift == 0 and (vma.end - vma.start) * page >= size:
                        swap = self._swap_of(link.partition("/map_files/")[0])
                        if (vma.start, vma.end) in swap:
                            return swap[vma.start, vma.end]
        return 0

    def _swap_of(self, process: str) -> dict[Pair, int]:
        """What is swapped out of each of its shared mappings; its smaps are read only once."""
        if process not in self.swap:
            self.swap[process] = {}
            with contextlib.suppress(OSError):  # it ended
                smaps = self.machine.read(f"{process}/smaps")
                self.swap[process] = swap_of_shared(smaps, self.machine.page_size)
        return self.swap[process]

    def _is_mapped_outside(self, held: MemoryObject) -> bool:
        """Whether a page of it is mapped more often than the set maps it: a cheap question."""
        if not held.sample:
            return False
        _, pfn = held.sample
        if self.kernel.flags_of(pfn) & (KPF_COMPOUND_HEAD | KPF_COMPOUND_TAIL):
            return False  # of which some kernels tell averages
        return self.kernel.mapcounts(pfn, 1)[0] > held.sample_mappings

    def _is_kept(self, held: MemoryObject) -> bool:
        """Whether a System V segment stays by its ID, or is attached by an outsider."""
        machine = self.machine
        with contextlib.suppress(OSError):
            forced = machine.read(f"{machine.proc}/sys/kernel/shm_rmid_forced").strip() != b"0"
            for line in machine.read(f"{machine.proc}/sysvipc/shm").splitlines()[1:]:
                _, shmid, mode, _, _, _, attached, *_ = line.split()
                if shmid == held.key.split()[1]:
                    kept = not int(mode, 8) & SHM_DEST and not forced
                    return kept or int(attached) > held.attached
        return False

    def _lives_in(self, pid: int, key: bytes) -> bool:
        with contextlib.suppress(OSError):
            return key.endswith(b" " + self.machine.ipc_namespace(f"{self.machine.proc}/{pid}"))
        return False

    def _held_outside(self, keys: set[bytes], members: set[int]) -> set[bytes]:
        """Which of these objects any other process maps or has open."""
        held: set[bytes] = set()
        for pid in {*self.machine.pids()} - members - {self.machine.own_pid()}:
            with contextlib.suppress(OSError, psutil.Error):
                held |= self._held_by(pid, keys - held)
            if held == keys:
                break
        return held

    def _held_by(self, pid: int, keys: set[bytes]) -> set[bytes]:
        machine, process = self.machine, f"{self.machine.proc}/{pid}"
        maps = machine.read(f"{process}/maps")
        if not maps:  # a kernel thread, a zombie, or one whose first thread has ended
            stat = machine.stat(pid)
            mm_files = mm_files_of(machine, pid, stat) if stat else None
            if not mm_files:
                return set()
            process = thread_directory(machine, pid, mm_files)
            maps = machine.read(f"{process}/maps")
        system_v = {key for key in keys if self.found[key].is_system_v}
        held = {key for key in system_v if self._lives_in(pid, key)}
        likely = {key for key in keys - system_v if b" %s " % key in maps}
        if likely:  # numbers of System V's inodes are those of others, too
            lines = MAPPING.findall(maps)
            held |= likely & {line[3] for line in lines if not line[4].startswith(SYSTEM_V)}
        if keys - system_v - held:
            held |= keys & self.memory.open_files(process).keys()
        return held


class Census:
    """The count over all rows, which come depth first; row 0 is TOTAL, above all."""

    def __init__(
        self,
        machine: Machine,
        kernel: Kernel,
        memory: Memory,
        partly_mapped: PartlyMapped | None,
        nodes: list[Node],
    ) -> None:
        self.machine, self.kernel, self.nodes = machine, kernel, nodes
        self.tree = Tree([0, *(node.parent for node in nodes)])
        # A frame can be freed, and used anew as another sort, meanwhile: each has its own marks.
        self.anon, self.shmem, self.file = (Ledger(self.tree, kernel.zero_pages) for _ in range(3))
        self.slots: dict[int, Ledger] = {}  # by swap type
        self.sorts: dict[bytes | None, int] = {}  # by file
        self.objects = Objects(machine, kernel, memory)
        self.partly_mapped = partly_mapped

    def count(self, process: Process) -> None:
        """Count what a process has."""
        whose, parts = (process.row, process.shares_mm_with), process.parts
        anon = chain(parts[ANON_OR_DEVICE], self._without_devices(parts[COPY_OR_DEVICE]))
        self.anon.count(Visit(*whose, by_mapcount=True), anon, process.private)
        by_sort: dict[int, list[Part]] = defaultdict(list)
        for part in parts[FILE_PAGE]:
            by_sort[self.sorts.get(part.file) or self._sort_of(process, part)].append(part)
        self.shmem.count(Visit(*whose), by_sort[SHARED_MEMORY])
        self.file.count(Visit(*whose), by_sort[KEPT_IN_CACHE])
        self.file.count(Visit(*whose, by_mapcount=True), by_sort[FREED_BY_PAGE])
        if self.partly_mapped:
            self.partly_mapped.count(process)
        if process.directory:  # else neither TREE nor FREED is wanted
            self.objects.add(process, self.sorts)
        for swap_type, slots in chain.from_iterable(map(slots_of, parts[IN_SWAP])):
            if swap_type not in self.slots:
                self.slots[swap_type] = Ledger(self.tree)
            self.slots[swap_type].count(Visit(*whose), [slots])

    def _sort_of(self, process: Process, part: Part) -> int:
        """The sort of a file, as one of its frames tells and the name that it is first met by."""
        sort = KEPT_IN_CACHE
        whole = part.unpacked()
        if self.kernel.is_shared_memory(pfn_at(whole.entries, whole.chosen.find(YES))):
            sort = SHARED_MEMORY
        elif part.file and b" " in part.file:  # it has an inode: it is not [vdso] and such
            name = process.files[part.file][0].name
            if is_unnamed(name) or not name.startswith(b"/") or name.startswith(b"/dev/"):
                sort = FREED_BY_PAGE
        self.sorts[part.file] = sort
        return sort

    def _without_devices(self, parts: list[Part]) -> Iterator[Part]:
        """In a file's VMA, what seems anonymous is a driver's memory, or copies of the file."""
        marks = self.anon.marks
        for part in parts:
            part = part.unpacked()
            pfns, chosen = chosen_pfns(part.entries, part.chosen), bytearray(part.chosen)
            for at, pfn in zip(compress(count(), part.chosen), pfns):
                # No room is made: a driver's memory can lie far above all other.
                known = pfn < len(marks) and marks[pfn] != UNMARKED
                if not known and not self.kernel.flags_of(pfn) & KPF_ANON:
                    chosen[at] = 0
            if any(chosen):
                yield part._replace(chosen=bytes(chosen))

    def add_up(self, columns: set[str]) -> None:
        """All rows are counted.  FREED also takes how often the whole machine maps each frame."""
        if {"tree", "freed"} & columns:
            for held, size in self.objects.alone(self.nodes):
                row = self.tree.common_ancestor(min(held.rows), max(held.rows))
                pages = size // self.machine.page_size
                self.shmem.freed[row] += pages
                self.shmem.of_tree[row] += max(0, pages - self.shmem.frames_of[held.key])
        if self.partly_mapped:
            for first, last, pages in self.partly_mapped.unmapped():
                row = self.tree.common_ancestor(first, last)
                self.anon.freed[row] += pages
                self.anon.of_tree[row] += pages
        asked = [self.anon, self.file] if FREED_BY_PAGE in self.sorts.values() else [self.anon]
        mapcounts = mapcounts_of(self.kernel, asked) if "freed" in columns else None
        for ledger in (self.anon, self.shmem, self.file, *self.slots.values()):
            ledger.add_up(mapcounts if ledger in asked else None)

    def figures(self, row: int) -> Cells:
        """What was counted of a row; after add_up()."""
        sorts, page = (self.anon, self.shmem, self.file), self.machine.page_size
        frames = sum(ledger.own[row] for ledger in sorts)
        return {
            "frames": frames,
            "unique": sum(ledger.new[row] for ledger in sorts),
            "size": frames * page,
            "tree": sum(ledger.of_tree[row] for ledger in sorts) * page,
            "freed": sum(ledger.freed[row] for ledger in sorts) * page,
            "anon": self.anon.own[row] * page,
            "shmem": self.shmem.own[row] * page,
            "file": self.file.own[row] * page,
            "swap": sum(slots.own[row] for slots in self.slots.values()) * page,
        }


def slots_of(part: Part) -> Iterator[tuple[int, Part]]:
    """By swap type, the swap slots of a part: their offsets, which lie as close as PFNs do."""
    part = part.unpacked()
    types = part.entries[::WORD].translate(SWAP_TYPE_OF)
    lanes = int.from_bytes(part.chosen, "little")
    shifted = int.from_bytes(part.entries, "little") >> SWAP_TYPE_BITS
    offsets = shifted.to_bytes(len(part.entries), "little")
    for swap_type in {*compress(types, part.chosen)} & {*range(SWAP_TYPES)}:
        of_type = lanes & int.from_bytes(types.translate(EQUALS[swap_type]), "little")
        yield swap_type, part._replace(entries=offsets, chosen=as_bytes(of_type))


def mapcounts_of(kernel: Kernel, ledgers: list[Ledger]) -> memoryview:
    """By PFN, how often the whole machine maps the frame."""
    highest = max(len(ledger.marks) for ledger in ledgers)
    mapcounts = memoryview(lazy_bytes(4 * highest)).cast("I")
    for first, number in chain.from_iterable(ledger.marked_runs() for ledger in ledgers):
        counts = kernel.mapcounts(first, number)
        mapcounts[first : first + len(counts)] = counts
    return mapcounts


# ---- The report ---------------------------------------------------------------------------------


class Result(NamedTuple):
    """A row of the report: a process's or, as the last, TOTAL's."""

    cells: Cells
    depth: int  # how far below its topmost row
    unread: str = ""  # why the process could not be read


def survey(
    machine: Machine,
    kernel: Kernel | None,
    columns: set[str],
    nodes: list[Node],
    progress: Progress,
) -> tuple[list[Result], str]:
    """Read and count these processes as one set; without a kernel, no frames.

    Returns a result for each that has not exited, and TOTAL's; and what was refused, or "".
    """
    figures = KernelFigures(machine, nodes) if columns_from(ROLLUP) & columns else None
    memory = Memory(machine)
    partly_mapped = None
    if kernel and {"tree", "freed"} & columns:
        smallest = kernel.smallest_partly_mapped()
        partly_mapped = PartlyMapped(kernel, smallest) if smallest else None
    census = Census(machine, kernel, memory, partly_mapped, nodes) if kernel else None
    reader = Reader(machine, kernel, columns, memory, partly_mapped, progress)
    processes, depths = [], [-1]
    for row, node in enumerate(nodes, 1):
        process = reader.read(row, node)
        depths.append(depths[node.parent] + bool(process))  # children of one that exited move up
        if process:
            processes.append(process)
            if census and not process.unread:
                census.count(process)
            process.forget()  # before the next one is read
    if census:
        census.add_up(columns)
    results = [merged(process, depths[process.row], census, figures) for process in processes]
    refused = census.objects.refused if census else ""
    return [*results, total(results, census, columns)], refused


def merged(
    process: Process, depth: int, census: Census | None, figures: KernelFigures | None
) -> Result:
    """A process's result: what was read of it, counted, and told by the kernel."""
    cells, unread = {**process.cells}, process.unread
    if figures:
        try:
            cells.update(figures.get(process.node))
        except PermissionError as error:
            unread = unread or reason(error, process.node.pid)
        except VANISHED:
            pass  # its frames stay counted
    if census:
        cells.update(census.figures(process.row))
    if unread:
        cells = {name: cell for name, cell in cells.items() if not is_figure(name)}
    return Result(cells, depth, unread)


def is_figure(name: str) -> bool:
    """Whether cells of this column are numbers of bytes or frames."""
    return COLUMNS[name].source in (PAGEMAP, ROLLUP, STATUS)


def total(results: list[Result], census: Census | None, columns: set[str]) -> Result:
    cells: Cells = {}
    for name in columns:
        if "+" in COLUMNS[name].ways:
            values = [int(result.cells[name]) for result in results if name in result.cells]
            if values:
                cells[name] = sum(values)
    if census:
        cells.update(census.figures(0))
    return Result(cells, 0)


class Progress:
    """A line on stderr, if that is a terminal and it takes long."""

    def __init__(self, processes: int) -> None:
        self.processes, self.pages, self.eraser = processes, 0, ""
        self.next_line = time.monotonic() + 1

    def tell(self, done: int, pages: int) -> None:
        """So many processes are done, and so many pages more were read."""
        self.pages += pages
        if time.monotonic() > self.next_line and sys.stderr and sys.stderr.isatty():
            write(f"\r{done} of {self.processes} processes, {self.pages} pages\033[K", sys.stderr)
            self.eraser, self.next_line = "\r\033[K", time.monotonic() + 0.1

    def erase(self) -> None:
        write(self.eraser, sys.stderr)


def kib(size: int) -> str:
    return str(size // 1024)


def human(size: int) -> str:
    """A size like 6.9M, in powers of 1024; to the nearest, where du rounds up."""
    value, power = float(size), 0
    while round(value) >= 1024:
        value, power = value / 1024, power + 1
    digits = 1 if power and round(value, 1) < 10 else 0
    return f"{value:.{digits}f}{' KMGTPE'[power].strip()}"


TEXTS = {"user", "command"}  # to the left
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


def last_words(results: list[Result], size: Callable[[int], str], charged: int | None) -> str:
    """What stands at the end of the table: its unit, and how many processes it is about."""
    unread = sum(bool(result.unread) for result in results)
    words = UNITS[size] + plural(len(results) - 1) + (f", {unread} unread" if unread else "")
    return words if charged is None else f"{words}, memory.current {size(charged)}"


def table(
    results: list[Result], columns: list[str], size: Callable[[int], str], width: int, words: str
) -> list[str]:
    """Header, processes, TOTAL.  Of lines longer than `width`, if any, only the command is cut."""
    at_command = columns[0] != "pid" and "command" in columns
    cells = {"command": f"TOTAL {words}"} if at_command else {"pid": "TOTAL", "command": words}
    results = [*results[:-1], results[-1]._replace(cells={**results[-1].cells, **cells})]
    shown = {
        name: [COLUMNS[name].header, *(cell_text(result, name, size) for result in results)]
        for name in columns
    }
    if "command" in columns:
        others = [name for name in columns if name != "command"]
        taken = sum(max(map(columns_of, shown[name])) + 1 for name in others)
        room = max(width - taken, len("COMMAND")) if width else 0
        signs, encoding = "".join(LINES), sys.stdout.encoding
        drawing = LINES if signs.encode(encoding, "ignore").decode(encoding) == signs else ASCII
        drawn = zip(
            tree_lines([0, *(result.depth for result in results)], drawing), shown["command"]
        )
        shown["command"] = [shortened(tree, command, room, drawing[3]) for tree, command in drawn]
    for name in columns[:-1] if columns[-1] in TEXTS else columns:
        wide = max(map(columns_of, shown[name]))
        blanks = [" " * (wide - columns_of(text)) for text in shown[name]]
        pairs = zip(shown[name], blanks) if name in TEXTS else zip(blanks, shown[name])
        shown[name] = ["".join(pair) for pair in pairs]
    lines = [" ".join(line).rstrip() for line in zip(*shown.values())]
    if not {"pid", "command"} & {*columns}:
        lines[-1] += " TOTAL"
    return lines


def cell_text(result: Result, name: str, size: Callable[[int], str]) -> str:
    """What stands in a cell, in what stdout can show."""
    if name not in result.cells:
        return "-"
    cell, encoding = result.cells[name], sys.stdout.encoding
    text = size(int(cell)) if "s" in COLUMNS[name].ways else str(cell)
    return text.encode(encoding, "backslashreplace").decode(encoding)


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


def as_json(
    results: list[Result],
    columns: list[str],
    page_size: int,
    skipped: dict[int, str],
    charged: int | None = None,
) -> str:
    import json  # not above: it would be a part of every start

    *rows, total = [{**result.cells, "depth": result.depth} for result in results]
    content: dict[str, Any] = {
        "page_size": page_size,
        "processes": [{name: row.get(name) for name in columns} for row in rows],
        "total": {name: total.get(name) for name in columns if is_figure(name)},
        "skipped": [{"pid": pid, "reason": reason} for pid, reason in skipped.items()],
    }
    if charged is not None:
        content["memory_current"] = charged
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


# Options of ps, and what to type instead.
INSTEAD = {
    "-p": ": type the PID alone",
    "-a": ": type -g / for the whole machine",
    "--sort": ": append | sort -k5,5nr to sort by TREE",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"{message}; see memuse --help")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        write(message, file)


def parse_args(argv: list[str]) -> argparse.Namespace:
    names_of_all = [name for name, column in COLUMNS.items() if column.header]
    about_columns = "".join(f"  {name:8} {COLUMNS[name].about}\n" for name in names_of_all)
    parser = Parser(
        prog="memuse",
        add_help=False,
        allow_abbrev=False,
        # With a width given, argparse need not import what tells the terminal's.
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=80),
        description="Count the physical memory that a tree of processes really occupies, as root.",
        epilog=f"columns (sizes in KiB):\n{about_columns}default:\n  {','.join(IN_TABLE)}\n\n"
        "examples:\n"
        "  sudo memuse $(pgrep -o nginx)    a server, with all below it\n"
        "  sudo memuse -g nginx.service     a unit; or a container, by its ID\n"
        "  sudo memuse -g /                 the whole machine\n\n"
        "exit status: 0 success, even if descendants exited during the run; 1 failed or\n"
        "incomplete, and stderr says why; 2 wrong usage; 130 interrupted",
    )
    add, unit = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    common: Any = {"dest": "size", "action": "store_const", "default": kib}
    unit("-b", "--bytes", const=str, help="sizes in bytes", **common)
    unit("-h", "--human-readable", const=human, help="sizes like 6.9M, powers of 1024", **common)
    add("-J", "--json", action="store_true", help="JSON, sizes in bytes")
    add("-o", "--output", metavar="COLUMNS", help="columns to show; +COLUMNS adds to the default")
    depth: Any = {"metavar": "N", "type": int, "default": sys.maxsize}
    add("-d", "--max-depth", help="show only N levels of rows below the topmost", **depth)
    add("-g", "--cgroup", metavar="GROUP", action="append", help="a control group; may be repeated")
    add("--help", action="help", help="show this and exit")
    add("-V", "--version", action="version", version=f"memuse {__version__}")
    add("pids", metavar="PID", nargs="*", help="a process, with all below it; may be repeated")
    arguments, unknown = parser.parse_known_args(argv)
    for option in unknown:
        hints = [INSTEAD[known] for known in INSTEAD if option.startswith(known)]
        parser.error(f"there is no option {option!r}{''.join(hints)}")
    names = default = IN_JSON if arguments.json else IN_TABLE
    if arguments.output is not None:
        names = arguments.output.lower().lstrip("+").split(",")
        for name in names:
            if name not in names_of_all:
                there_are = f"there is no column {name!r}; there are {', '.join(names_of_all)}"
                parser.error(f"{arguments.output!r} was taken as COLUMNS: {there_are}")
        if arguments.output.startswith("+"):
            names = [*default[:-1], *names, default[-1]]  # before the command
    arguments.pids = " ".join(arguments.pids).replace(",", " ").split()  # as pgrep writes them
    if not arguments.pids and not arguments.cgroup:
        depth_given = arguments.max_depth != sys.maxsize
        taken = f": {arguments.max_depth} was taken as N of -d" if depth_given else ""
        parser.error(f"no PID given{taken}")
    for text in arguments.pids:
        if not re.fullmatch("0*[1-9][0-9]{0,17}", text):
            script = "-f " if re.search("[./]", text) else ""  # else pgrep knows names of programs
            hint = f": try sudo memuse $(pgrep -o {script}{text}), or -g {text} for a unit"
            parser.error(f"{text!r} is not a PID{hint if text[0].isalpha() else ''}")
    if arguments.max_depth < 0:
        parser.error("a depth is 0 or more")
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
        needs = f"{path} is root's, and needs CAP_DAC_READ_SEARCH besides CAP_SYS_ADMIN"
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
    groups = [cgroup_members(machine, text) for text in arguments.cgroup or ()]
    members = {pid for pids, _ in groups for pid in pids}
    charged = memory_current(machine, groups[0][1]) if len(groups) == 1 and not roots else None
    nodes = find_processes(machine, roots, members)
    with contextlib.ExitStack() as files:
        try:
            from_frames = columns_from(PAGEMAP) & {*columns}
            kernel = Kernel(machine, files) if nodes and from_frames else None
        except (PermissionError, FileNotFoundError) as error:
            raise refusal(machine, error, nodes, argv) from None
        progress = Progress(len(nodes))
        files.callback(progress.erase)  # before an error is told, too
        results, refused = survey(machine, kernel, {*columns}, nodes, progress)

    found, shown = {node.pid for node in nodes}, {result.cells["pid"] for result in results[:-1]}
    exited = found - shown
    missing = {pid: why_missing(machine, pid) for pid in roots if pid not in found}
    ended = {pid: f"process {pid} exited while it was being read" for pid in roots if pid in exited}
    unread = {int(result.cells["pid"]): result.unread for result in results if result.unread}
    failures = [*missing.values(), *([refused] if refused else []), *ended.values()]
    for why in dict.fromkeys(unread.values()):
        pids = [str(pid) for pid in unread if unread[pid] == why]
        failures.append(f"process{'es' * (len(pids) > 1)} {', '.join(pids)} not read: {why}")
    if shown <= unread.keys():
        raise Error("; ".join(failures) or "none of the processes is left")
    rows = [result for result in results if result.depth <= arguments.max_depth]
    if arguments.json:
        skipped = {**missing, **ended, **unread}
        lines = [as_json(rows, columns, machine.page_size, skipped, charged)]
    else:
        words = last_words(results, arguments.size, charged)
        lines = table(rows, columns, arguments.size, width_of_output(), words)
    write("".join(f"{line}\n" for line in lines), sys.stdout)
    others = len(exited - {*roots})
    notes = [f"{plural(others)} exited while being read"] if others else []
    complain(*failures, *notes)
    return 1 if failures else 0


def main(argv: list[str] | None = None, machine: Machine | None = None) -> int:
    """Exit status: 0 success, 1 failed or incomplete, 2 wrong usage, 130 interrupted."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for a script's background jobs
        # By its default action, which also ends a wait for a stuck process's lock; a handler would
        # not, and an exception could be lost in a destructor, or tell its traceback at exit.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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
