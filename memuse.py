#!/usr/bin/env python3
"""Count the physical memory that a tree of processes really occupies.

    sudo ./memuse.py PID

RSS, summed over forked processes, counts shared and copy-on-write pages again
and again; PSS estimates.  memuse reads the page tables of every process in the
tree and counts each physical page frame once.

It needs Linux, Python 3.9, psutil, and CAP_SYS_ADMIN: the kernel shows page
frame numbers (PFNs) to nobody else.  It reads, and changes nothing.

The kernel's interface is described in its Documentation/admin-guide/mm/pagemap.rst
and Documentation/filesystems/proc.rst, "pagemap.rst" and "proc.rst" below.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Until main() can do better: Ctrl-C during the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import array
import contextlib
import errno
import functools
import marshal
import mmap
import os
import re
import select
import struct
import sys
import time
from bisect import bisect
from collections import Counter, defaultdict, namedtuple
from itertools import chain, compress, count, islice

try:
    import fcntl

    import psutil
except (ImportError, MemoryError, OSError) as error:
    needs = "it needs Linux, and psutil (apt install python3-psutil, or pip install psutil)"
    raise SystemExit(f"memuse: {str(error) or 'not enough memory'}; {needs}") from None

TYPE_CHECKING = False  # the module typing alone would take a tenth of a short run
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, NoReturn, TextIO

    Span = tuple[int, int]  # from a page up to another
    # From a page up to another; the shift from them to pages of the file; the file: its
    # device and inode, or a special mapping's name.
    FileVma = tuple[int, int, int, bytes]
    # What is mapped, to be read whole; or, with the shift from pages to places, by stripes.
    Area = tuple[int, int, int | None]
    Place = tuple[bytes | None, int]  # a file, or None for the address space; a page in it
    Tell = Callable[[int, int], None]  # of processes and pages read
    Row = dict[str, Any]  # by names of columns; sizes in bytes
    Outcome = Row | str | None  # why a process is left out, or None if it exited
    Found = tuple["Block", int, int]  # lanes in which entries equal it, and how many
    Known = tuple[list[Found], list[int]]  # and the strays among them

__version__ = "1.0.0"


class Error(Exception):
    """What can be expected to go wrong, told in the one line that the user sees."""


class Unfit(Exception):
    """What two processes counted cannot be added up: one has to count everything anew."""


# What reading a process raises once it has ended or called exec.
VANISHED = (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess)


# ---- The kernel's interface ---------------------------------------------------

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
WORD = 8  # bytes: an entry of pagemap, kpageflags or kpagecount is a u64 in native order
PMD_PAGES = PAGE_SIZE // WORD  # pages under one page table, and so in a PMD-mapped huge page

# A pagemap entry (pagemap.rst).  Bits 0-54 hold the PFN, or swap type (0-4) and offset.
# Physical addresses have 52 bits at the most, so a PFN has 40; no swap area has more slots.
NUMBER_BYTES = 5
NUMBER_MASK = (1 << 8 * NUMBER_BYTES) - 1
# Swap types from here up are migration, poison, device and marker entries
# (MAX_SWAPFILES, include/linux/swap.h).
SWAP_TYPE_BITS, SWAP_TYPES = 5, 23
FLAGS = 7  # the byte that holds bits 56-63, where the least significant comes first
EXCLUSIVE, GUARD, FILE, SWAPPED, PRESENT = 1 << 0, 1 << 2, 1 << 5, 1 << 6, 1 << 7

# /proc/kpageflags (pagemap.rst)
KPF_ANON, KPF_ZERO_PAGE = 1 << 12, 1 << 24

# ioctl PAGEMAP_SCAN (pagemap.rst): struct pm_scan_arg is twelve u64
PAGEMAP_SCAN = 0xC0606610
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4

MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h; Python has no name for it
PF_EXITING, PF_KTHREAD = 0x4, 0x00200000  # in /proc/PID/stat's flags (include/linux/sched.h)
ENDED = (b"Z", b"X")  # its states (proc.rst, table 1-4)

# What an entry stands for, told from its flags.
NOTHING, ANON_EXCLUSIVE, ANON_OR_DEVICE, FILE_PAGE, IN_SWAP = range(5)


def kind_of(flags: int) -> int:
    """What an entry with these flags (its bits 56-63) stands for.

    ANON_EXCLUSIVE is anonymous memory mapped by one process alone, and once: nobody else
    has the frame.  ANON_OR_DEVICE is other memory that is no file's: copy-on-write, KSM, but
    also the zero page and device memory.
    """
    if flags & PRESENT:
        if flags & FILE:
            return FILE_PAGE
        return ANON_EXCLUSIVE if flags & EXCLUSIVE else ANON_OR_DEVICE
    return IN_SWAP if flags & SWAPPED and not flags & GUARD else NOTHING


# Tables for bytes.translate: flags to kinds; one byte to 0x80 and all others to 0; an entry's
# lowest byte to its swap type.
KINDS = bytes(map(kind_of, range(256)))
EQUALS = [bytes(byte) + b"\x80" + bytes(255 - byte) for byte in range(256)]
SWAP_TYPE_OF = bytes(low % (1 << SWAP_TYPE_BITS) for low in range(256))


# ---- Columns ------------------------------------------------------------------

COLUMNS = {
    "pid": ("PID", "process"),
    "ppid": ("PPID", "its parent"),
    "user": ("USER", "its owner"),
    "frames": ("FRAMES", "distinct page frames that hold its memory"),
    "unique": ("+UNIQUE", "those of them that no row above has counted"),
    "size": ("SIZE", "FRAMES as memory"),
    "rss": ("RSS", "resident memory, the kernel's figure"),
    "uss": ("USS", "what it alone maps; in TOTAL, what nobody outside maps"),
    "pss": ("PSS", "resident memory divided by those who map it, the kernel's figure"),
    "swap": ("SWAP", "distinct swap slots as memory"),
    "command": ("COMMAND", "command line, drawn as a tree"),
}
FROM_PAGEMAP, FROM_SMAPS = {"frames", "unique", "size", "swap"}, {"rss", "uss", "pss"}
SIZES, TEXTS = {"size", "rss", "uss", "pss", "swap"}, {"user", "command"}
IN_TABLE = "pid,frames,unique,size,uss,pss,swap,command"
IN_JSON = "pid,ppid,depth,frames,unique,size,rss,pss,uss,swap,command"


# ---- Parsing ------------------------------------------------------------------

ANONYMOUS = (b"[heap]", b"[stack", b"[anon:")  # anonymous mappings that have a name
VSYSCALL = (1 << 63) // PAGE_SIZE  # above what pagemap covers
HOLE = 256  # pages that cost less to read over than another call
MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (.*)\n", re.M)
FIGURE = re.compile(rb"^(Rss|Pss|Private_(?:Clean|Dirty|Hugetlb)): +([0-9]{1,15}) kB$", re.M)


@functools.lru_cache(1024)  # the same libraries, in process after process
def parse_mapping(rest: bytes) -> tuple[int, bytes | None]:
    """Offset in pages and file, from what follows the addresses in a line of /proc/PID/maps."""
    _, offset, device, inode, *name = rest.split(None, 4)
    file = None
    if inode != b"0":
        file = device + b" " + inode
    elif name and not name[0].startswith(ANONYMOUS):
        file = name[0]
    return int(offset, 16) // PAGE_SIZE, file


# When two processes of memuse share the work, a stripe is so many pages of a file or, for what is
# no file's, of the address space; its number says whose it is.
STRIPE, STRIPES = 1 << 13, range(16)


def among(stripe: int, stripes: range) -> bool:
    """Whether these, of STRIPES, have the stripe's number; neighbours are mostly taken in turn."""
    return stripe * 9 % len(STRIPES) in stripes


def parse_maps(maps: bytes, stripes: range | None = None) -> tuple[list[Area], list[FileVma]]:
    """Where anything is mapped, and where files are, in /proc/PID/maps (proc.rst).

    If only some stripes are to be read, areas that have none of them are left out.  Areas
    with less than a HOLE between them are one, and so are mappings where the file goes on
    as the addresses do.  Error at a line that cannot be made out.
    """
    areas: list[Area] = []
    files: list[FileVma] = []
    before: tuple[int, bytes | None] = 0, None
    edge, end, last_high = -HOLE, 0, b""  # edge: where an area ends that may go on
    found = MAPPING.findall(maps)
    try:
        if len(found) != maps.count(b"\n"):
            raise ValueError
        for low, high, rest in found:
            start = end if low == last_high else int(low, 16) // PAGE_SIZE
            end, last_high = int(high, 16) // PAGE_SIZE, high
            if start >= VSYSCALL:
                break
            offset, file = parse_mapping(rest)
            shift = offset - start
            if file:
                joined = before == (shift, file)
                files.append((files.pop()[0] if joined else start, end, shift, file))
            before = shift, file
            if stripes is not None:
                if not file:
                    shift = 0
                elif rest[3:4] == b"p":
                    # Of /dev/zero, huge pages can begin anywhere in the file: do not cut them.
                    shift += -shift % PMD_PAGES
                stripe, last = (start + shift) // STRIPE, (end - 1 + shift) // STRIPE
                if stripe < last:
                    areas.append((start, end, shift))
                if stripe < last or not among(stripe, stripes):
                    edge = -HOLE
                    continue
            areas.append((areas.pop()[0] if start - edge < HOLE else start, end, None))
            edge = end
    except ValueError:
        raise Error("cannot make out the kernel's list of mappings") from None
    return areas, files


def parse_figures(smaps: bytes) -> Row:
    """RSS, PSS and USS in bytes: sums over smaps or smaps_rollup (proc.rst)."""
    kib: dict[bytes, int] = defaultdict(int)
    for name, number in FIGURE.findall(smaps):
        kib[name] += int(number)
    private = kib[b"Private_Clean"] + kib[b"Private_Dirty"] + kib[b"Private_Hugetlb"]
    return {"rss": kib[b"Rss"] * 1024, "pss": kib[b"Pss"] * 1024, "uss": private * 1024}


NO_FIGURES = parse_figures(b"")

# Of /proc/PID/stat (proc.rst, table 1-4): `started` in clock ticks since boot, `rss` in pages,
# `image` where exec put code, stack, data and arguments.
Stat = namedtuple("Stat", "state ppid flags threads started rss image name")


def parse_stat(text: bytes) -> Stat:
    name, _, rest = text.partition(b"(")[2].rpartition(b")")  # which may hold anything
    fields = rest.split()  # from the third on
    ppid, flags, threads = int(fields[1]), int(fields[6]), int(fields[17])
    started, rss, image = int(fields[19]), int(fields[21]), fields[23:26] + fields[42:49]
    return Stat(fields[0], ppid, flags, threads, started, rss, image, name)


COMMAND_LIMIT = 1 << 16  # bytes: a process can claim any of its memory to be arguments


def command_line(cmdline: bytes, name: bytes) -> str:
    """The arguments joined by spaces or, without any, the name in brackets as ps has it."""
    line = cmdline.rstrip(b"\0").replace(b"\0", b" ")
    line = line if line.strip() else b"[%s]" % name
    shown = escaped(line[:COMMAND_LIMIT].decode("utf-8", "surrogateescape"))
    return shown + "..." if len(line) > COMMAND_LIMIT else shown


def escaped(text: str) -> str:
    """The text with what a terminal might obey, or not show, written as escapes."""
    if text.isprintable():
        return text
    # A byte that is not UTF-8 stands in it as a surrogate (PEP 383).
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- Reading ------------------------------------------------------------------


def proc(name: str) -> str:
    """The path of a file in /proc, or in what psutil takes for it."""
    return f"{psutil.PROCFS_PATH}/{name}"


def own_pid() -> int:
    """Our PID as this /proc shows it, whose PID namespace need not be ours."""
    try:
        return int(os.readlink(proc("self")))
    except OSError:
        raise Error(f"no {proc('self')}: mount the /proc of this PID namespace") from None


def read_file(name: str, directory: int | None = None, at_most: int = 0) -> bytes:
    """A file's bytes, its name relative to a directory that is open, if one is given.

    With `at_most`, what a single read of so many bytes gives.  By os.read(), for file
    objects would cost as much again.
    """
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        if at_most:
            return os.read(fd, at_most)
        return b"".join(iter(functools.partial(os.read, fd, 1 << 16), b""))
    finally:
        os.close(fd)


def read_words(fd: int, first: int, number: int) -> bytes:
    """Words of pagemap or /proc/kpage* from the `first` on, each least significant byte first.

    Fewer than `number`, or none, if the file ends or the process is gone; else OSError.
    """
    try:
        words = os.pread(fd, number * WORD, first * WORD)
    except ProcessLookupError:
        return b""
    if sys.byteorder == "big":
        swapped = array.array("Q", words)
        swapped.byteswap()
        words = swapped.tobytes()
    return words


def unpack(words: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(words) // WORD}Q", words)


def numbers_of(words: bytes) -> list[int]:
    """The PFNs in entries, or what stands in their bits."""
    if words[4::WORD].count(0) == len(words) // WORD and sys.byteorder == "little":
        return memoryview(words).cast("I")[::2].tolist()  # in a quarter of the time
    return [word & NUMBER_MASK for word in unpack(words)]


def next_resident(pagemap: int, start: int, end: int) -> int:
    """The first page from `start` on that is present or swapped, else `end` (PAGEMAP_SCAN).

    Just `start` before Linux 6.7, which cannot tell.
    """
    region, which = array.array("Q", [0, 0, 0]), PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    # size flags start end walk_end vec vec_len max_pages; category_inverted _mask _anyof_mask,
    # return_mask
    head = (12 * WORD, 0, start * PAGE_SIZE, end * PAGE_SIZE, 0, region.buffer_info()[0], 1, 1)
    try:
        fcntl.ioctl(pagemap, PAGEMAP_SCAN, struct.pack("=12Q", *head, 0, 0, which, which))
    except OSError:
        return start
    return region[0] // PAGE_SIZE if region[1] else end  # the kernel has filled in start and end


class Kernel:
    """What the kernel tells of frames: its open files, and its zero pages."""

    def __init__(self, arguments: str) -> None:
        """Error if that may not be seen; it tells what to run instead."""
        with open("/dev/zero", "rb") as file:
            page = mmap.mmap(file.fileno(), PAGE_SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ)
        page.read(1)  # so that it has the zero page
        mapping = re.search(rb"^([0-9a-f]+)-.* /dev/zero$", read_file(proc("self/maps")), re.M)
        at = int(mapping[1], 16) // PAGE_SIZE if mapping else 0
        try:
            pagemap = os.open(proc("self/pagemap"), os.O_RDONLY)
            zero = numbers_of(read_words(pagemap, at, 1))[0]
            os.close(pagemap)
            if not zero:
                raise PermissionError
            self.kpageflags = os.open(proc("kpageflags"), os.O_RDONLY)
            self.kpagecount = os.open(proc("kpagecount"), os.O_RDONLY)
        except PermissionError:
            name = sys.argv[0]
            where = "on the host, outside of any container, " if os.geteuid() == 0 else ""
            raise Error(
                f"seeing page frames takes CAP_SYS_ADMIN: {where}run sudo {name} {arguments}; or,"
                f" for the kernel's figures alone, {name} -o pid,rss,pss,command {arguments}"
            ) from None
        except FileNotFoundError as error:
            raise Error(f"a kernel without CONFIG_PROC_PAGE_MONITOR: {error}") from None
        page.close()
        # Some architectures have several in a row, and choose one by the address.
        first = max(0, zero - 256)
        flags = unpack(read_words(self.kpageflags, first, 512))
        self.zero_pages = [first + i for i, word in enumerate(flags) if word & KPF_ZERO_PAGE]

    def has(self, pfn: int, flag: int) -> bool:
        """A frame's flag in /proc/kpageflags; a device's frame may be past its end."""
        return any(word & flag for word in unpack(read_words(self.kpageflags, pfn, 1)))


def stat_of(pid: int) -> Stat | None:
    with contextlib.suppress(*VANISHED, PermissionError):  # hidepid=1 lists what it hides
        return parse_stat(read_file(proc(f"{pid}/stat")))
    return None


def is_exiting(stat: Stat) -> bool:
    """Whether it gives up its memory, which can take long, and is not a zombie yet."""
    return bool(stat.flags & PF_EXITING) and stat.threads == 1 and stat.state not in ENDED


# A process in the tree; when it was found, `stat` was so.
Node = namedtuple("Node", "pid stat depth")

# nodes: the processes; columns: names of what is wanted; kernel: None to read no pagemap;
# stripes: None for all; smaps_of: PIDs of those whose smaps to read.
Job = namedtuple("Job", "nodes columns kernel stripes smaps_of")


def living_thread(node: Node, directory: int) -> str | None:
    """Where in its directory the files about its memory are: if its first thread has ended, by
    another; None if it has no memory.
    """
    if node.stat.flags & PF_KTHREAD:
        return None
    if node.stat.state not in ENDED:
        return ""
    for tid in os.listdir(proc(f"{node.pid}/task")) if node.stat.threads > 1 else ():
        with contextlib.suppress(*VANISHED):
            if parse_stat(read_file(f"task/{tid}/stat", directory)).state not in ENDED:
                return f"task/{tid}/"
    return None


class Reading:
    """A process while it is read: raises one of VANISHED if it ends or calls exec.

    All its files are opened by way of one descriptor of its directory and before
    another look at its stat.  So they belong to the node's process and to one mm; if it
    calls exec, or its PID is used anew, there is nothing more in them.
    """

    def __init__(self, node: Node, job: Job, opened: list[int]) -> None:
        """Page tables if the job has a kernel, and figures if any of FROM_SMAPS are wanted.

        `opened` gets what the caller has to close.
        """
        self.files: list[FileVma] = []
        self.spans: Iterable[Span] = ()
        directory = os.open(proc(str(node.pid)), os.O_RDONLY)
        opened.append(directory)
        self.row: Row = {"pid": node.pid, "ppid": node.stat.ppid, "depth": node.depth}
        if "command" in job.columns:
            # Not psutil's: it reads all that a process may claim, and by way of its PID.
            cmdline = read_file("cmdline", directory, COMMAND_LIMIT + 1)
            self.row["command"] = command_line(cmdline, node.stat.name)
        if "user" in job.columns:
            self.row["user"] = psutil.Process(node.pid).username()
        alive, figures = living_thread(node, directory), NO_FIGURES
        if alive is not None and job.columns & FROM_SMAPS and node.pid in job.smaps_of:
            try:
                smaps = read_file(alive + "smaps_rollup", directory)
            except FileNotFoundError:  # before 4.14, or the process is gone
                smaps = read_file(alive + "smaps", directory)
            if not smaps:  # as after exit and exec
                raise ProcessLookupError
            figures = parse_figures(smaps)
        self.row |= figures
        if alive is not None and job.kernel:
            self.path = proc(f"{node.pid}/{alive}pagemap")
            self.pagemap = os.open(alive + "pagemap", os.O_RDONLY, dir_fd=directory)
            opened.append(self.pagemap)
            maps = read_file(alive + "maps", directory)
            if not maps:
                raise ProcessLookupError
            areas, self.files = parse_maps(maps, job.stripes)
            self.spans = spans_of(areas, job.stripes, self.pagemap)
        stat = parse_stat(read_file("stat", directory))
        if (stat.started, stat.image) != (node.stat.started, node.stat.image):
            raise ProcessLookupError

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """First pages, and the pagemap entries from there on, in order of address."""
        for start, end in self.spans:
            words = read_words(self.pagemap, start, end - start)
            if len(words) != (end - start) * WORD:
                raise ProcessLookupError
            yield start, words


# How many entries to ask for at a time: few where memory is sparse.
MAX_READ, MIN_READ = 1 << 15, PMD_PAGES
READ_WHOLE = 1 << 13  # pages that are read without a look for what is resident


def spans_of(areas: list[Area], stripes: range | None, pagemap: int) -> Iterator[Span]:
    """Spans of pages that hold whatever is resident and little else.

    They end at multiples of PMD_PAGES, if an area goes on there: no huge page is cut.
    """
    for start, last, shift in areas:
        size = MIN_READ
        while start < last:
            found = next_resident(pagemap, start, last) if last - start > READ_WHOLE else start
            if found == last:
                if not read_words(pagemap, 0, 1):  # gone, which PAGEMAP_SCAN may not tell
                    raise ProcessLookupError
                break
            limit = last
            if stripes is not None and shift is not None:  # up to the end of the stripe, if ours
                stripe, page = divmod(found + shift, STRIPE)
                limit = min(found + STRIPE - page, last)
                if not among(stripe, stripes):
                    start = limit
                    continue
            size = min(2 * size, MAX_READ) if found == start else MIN_READ
            start = min((found + size) // PMD_PAGES * PMD_PAGES, limit)
            if limit - found <= READ_WHOLE:
                start = limit
            yield found, start


# ---- Counting -----------------------------------------------------------------

LANES = 4 * PMD_PAGES  # pages to a Block; other sizes were no faster
# As 64-bit words: ones; and 0, 1, 2 and so on.
ONES = int.from_bytes((1).to_bytes(WORD, "little") * PMD_PAGES, "little")
RAMP = int.from_bytes(struct.pack(f"<{PMD_PAGES}Q", *range(PMD_PAGES)), "little")
MAX_LONE = 16  # up to so many numbers at a place take less memory in a dictionary than a Block
# Marks: no memory; met as part of an ANON_EXCLUSIVE huge page; in no Block; others are of Blocks.
UNREAL, CLAIMED, LONE, *OF_BLOCKS = range(1, 256)
RECENT = 1 << 14  # pieces of memory, of up to LANES pages, that are known by their digest
# Python keys its hash of bytes anew in every run: two pieces have the same as likely as 1 in
# 2**64.  A hash of 32 bits would not do.
DIGEST: Any = hash if sys.hash_info.width >= 64 else tuple
MARKS_GROWTH = 1 << 20  # so many marks are added at a time
MARKS_PART = 1 << 12  # so many are looked through in one go
UNMARKED = bytes(MARKS_PART)
REAL = bytes([0, 0]) + b"\xff" * 254  # for bytes.translate: marks but UNREAL to all bits
GAP = bytes(64)  # numbers without a mark; fewer cost less to read over than another call
MANY = 255  # mapcounts from here on do not fit in a byte


def octets(lanes: int) -> bytes:
    """A byte a lane, without those after the last that is not 0."""
    return lanes.to_bytes((lanes.bit_length() + 7) // 8, "little")


def how_many(lanes: int) -> int:
    """How many lanes are marked."""
    return octets(lanes).count(0x80)


def filled(lanes: int) -> int:
    """0xFF where lanes are marked by 0x80."""
    return (lanes << 1) - (lanes >> 7)


def planes_of(words: bytes, at: int) -> list[int]:
    """The numbers in entries: from lane `at` on the lowest bytes of all, then the next."""
    return [int.from_bytes(words[i::WORD], "little") << 8 * at for i in range(NUMBER_BYTES)]


def lazy_bytes(size: int) -> mmap.mmap:
    """Zeros that take memory only once they are written to."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


class Block:
    """One number for each of LANES neighbouring pages, as far as known.

    A lane is one page's byte in an integer of LANES bytes, so that one operation
    treats all pages; a lane is marked by 0x80.  `known` marks those that have a number;
    `planes` are the numbers: all lanes' lowest bytes, then the next.  `inside` counts
    how often the set maps each: the sum of integers with a byte a lane, each for as many
    additions as a byte can count.
    """

    def __init__(self, mark: int) -> None:
        self.mark = mark  # of its numbers
        self.known = 0
        self.planes = [0] * NUMBER_BYTES
        self.inside: list[int] = []
        self.additions = 0

    def same(self, planes: list[int], lanes: int) -> int:
        """Those of the lanes that are known, and have the same numbers here as there."""
        lanes &= self.known
        if lanes:
            differ = 0
            for one, other in zip(planes, self.planes):
                differ |= one ^ other
            sevens = filled(lanes) ^ lanes
            differ |= (differ & sevens) + sevens  # the top bit tells that a lane is not 0
            lanes &= ~differ
        return lanes

    def enter(self, planes: list[int], lanes: int) -> None:
        """Know these numbers, in lanes not known before."""
        fill = filled(lanes)
        self.planes = [old ^ (old ^ new) & fill for old, new in zip(self.planes, planes)]
        self.known |= lanes

    def numbers(self, lanes: int) -> list[int]:
        """The numbers known in these lanes."""
        marked = octets(lanes)
        words = bytearray(len(marked) * WORD)
        for i, plane in enumerate(self.planes):
            low = octets(plane)[: len(marked)]
            words[i : len(low) * WORD : WORD] = low
        return list(compress(numbers_of(bytes(words)), marked))

    def add_inside(self, lanes: int) -> None:
        """Once more, the set maps these lanes."""
        if self.additions % 255 == 0:
            self.inside.append(0)
        self.additions += 1
        self.inside[-1] += lanes >> 7

    def mappings(self) -> list[int]:
        """How often the set maps each of the numbers known."""
        known = octets(self.known)
        each = (compress(octets(lanes).ljust(len(known), b"\0"), known) for lanes in self.inside)
        return list(map(sum, zip(*each))) if len(self.inside) > 1 else list(*each)


class Ledger:
    """Numbers that may be shared, PFNs or offsets of swap slots, each counted once.

    Forked processes have the same page at the same address, and processes that map
    a file have the same page at the same place in it.  So a number is entered in a
    Block, at the place where it is first met; what another process has there is
    compared for all lanes at once.  Where it is not the same, as after copy-on-write,
    there is another Block for the same place, and so on.

    This is exact because a number is entered at one place only: `marks` tells which
    are.  The lanes in which a process equals the Blocks are that many different
    numbers, unless it maps a place twice, which `matches` shows.  A number met elsewhere
    than where it was entered (KSM, mremap, buffers of drivers) is a stray, and
    strays are few enough for a dictionary.  So are lone numbers, at places where
    there are too few for a Block: they are in none, and strays from the first.
    """

    def __init__(self, uss: bool) -> None:
        self.uss = uss  # whether TOTAL's is wanted
        self.blocks: defaultdict[Place, list[Block]] = defaultdict(list)
        self.of_file: dict[bytes | None, int] = {}  # marks: one a file, as far as there are
        # What _find() told of entries last met, by their DIGEST, if few of them are strays.
        self.recent: dict[int, Known] = {}
        self.marks = lazy_bytes(MARKS_GROWTH)  # a byte for each number; see reach()
        self.mapped: Counter[int] = Counter()  # by mark, how often the set maps the numbers
        self.claimed: list[int] = []  # first PFNs of ANON_EXCLUSIVE huge pages
        self.stray_mappings: Counter[int] = Counter()  # how often the set maps each stray
        self._begin()

    def _begin(self) -> None:
        # Of the current process: lanes in which it equals Blocks, and how many; those it
        # entered; strays; new ones of these, which are lone; first PFNs of huge pages.
        self.matches: defaultdict[Block, list[tuple[int, int]]] = defaultdict(list)
        self.entered: defaultdict[Block, int] = defaultdict(int)
        self.strays: defaultdict[int, int] = defaultdict(int)
        self.lone: list[int] = []
        self.claims: list[int] = []

    def mark_of(self, number: int) -> int:
        return self.marks[number] if number < len(self.marks) else 0

    def marked_runs(self) -> Iterator[tuple[int, bytes]]:
        """Runs of marked numbers, a GAP or more apart: the first, and the marks from there on."""
        for start in range(0, len(self.marks), MARKS_PART):
            marks, at = self.marks[start : start + MARKS_PART], start
            for piece in marks.split(GAP) if marks != UNMARKED else ():
                run = piece.lstrip(b"\0")
                if run:
                    yield at + len(piece) - len(run), run.rstrip(b"\0")
                at += len(piece) + len(GAP)

    def meets(self, start: int, marks: bytes) -> bool:
        """Whether any number that is marked in another ledger is marked here too."""
        here, there = self.marks[start : start + len(marks)], marks.translate(REAL)
        return bool(int.from_bytes(here, "little") & int.from_bytes(there, "little"))

    def reach(self, number: int) -> None:
        """Have marks for numbers up to this one."""
        if number >= len(self.marks):
            self.marks.resize((number // MARKS_GROWTH + 1) * MARKS_GROWTH)

    def add(self, words: bytes, chosen: bytes, first: int, end: int, place: Place) -> None:
        """Take in the process's entries from `first` up to `end`, as far as they are chosen.

        `place` is where entry 0 is, or would be.
        """
        file, index = place
        low = chosen.find(0x80, first, end)
        while low >= 0:
            group, at = divmod(index + low, LANES)
            stop = min(low - at + LANES, end)
            # Up to the last that is chosen: what is a process's own beside them differs.
            high = chosen.rfind(0x80, low, stop) + 1
            key, part, which = (file, group), words[low * WORD : high * WORD], chosen[low:high]
            content = DIGEST((key, at, part, which))
            known = self.recent.pop(content, None)
            if not known:
                known = self._find(key, part, which, at)
                if len(self.recent) >= min(2 * len(self.blocks), RECENT):
                    del self.recent[next(iter(self.recent))]
            low = chosen.find(0x80, stop, end)
            found, strays = known
            if len(strays) <= MAX_LONE:  # more would take too much memory
                self.recent[content] = known  # now the last to go
            for number in strays:
                self.strays[number] += 1
            for block, same, number in found:
                matches = self.matches[block]
                if matches and not matches[-1][0] & same:  # so that few are kept
                    others, many = matches.pop()
                    same, number = same | others, number + many
                matches.append((same, number))

    def _find(self, key: Place, words: bytes, chosen: bytes, at: int) -> Known:
        """Where the chosen entries, from lane `at` on, were entered; what is new, is entered."""
        found: list[Found] = []
        blocks, depth = self.blocks[key], 0
        if not blocks and chosen.count(0x80) <= MAX_LONE:  # without what is made for many
            return found, self._enter_lone(words, chosen)
        strays: list[int] = []
        left = int.from_bytes(chosen, "little") << 8 * at
        planes: list[int] = []
        while left:
            if depth == len(blocks):
                rest = octets(left >> 8 * at)
                if rest.count(0x80) <= MAX_LONE:
                    strays += self._enter_lone(words, rest)
                    break
                mark = OF_BLOCKS[len(self.of_file) % len(OF_BLOCKS)]
                blocks.append(Block(self.of_file.setdefault(key[0], mark)))
            planes = planes or planes_of(words, at)
            block = blocks[depth]
            depth += 1
            same = block.same(planes, left)
            fresh = left & ~(same | block.known)
            if fresh:
                new = self._enter(block.mark, words, fresh >> 8 * at, strays) << 8 * at
                block.enter(planes, new)
                self.entered[block] |= new
                same |= new
            if same:
                found.append((block, same, how_many(same >> 8 * at)))
            left &= ~(same | fresh)
        return found, strays

    def _enter(self, mark: int, words: bytes, lanes: int, strays: list[int]) -> int:
        """Mark the numbers in these lanes that nobody had, and return their lanes."""
        chosen, marks = octets(lanes), self.marks
        numbers = numbers_of(words[: len(chosen) * WORD])
        if chosen.count(0x80) < len(numbers):
            numbers = list(compress(numbers, chosen))
        left = iter(numbers)
        with contextlib.suppress(IndexError):  # beyond what marks reach
            for number in left:  # the usual case, and the loop that costs most
                if marks[number]:
                    break
                marks[number] = mark
            else:
                return lanes
        rest = [number, *left]
        entered = bytearray(chosen)
        places = islice(compress(count(), chosen), len(numbers) - len(rest), None)
        for at, new in zip(places, self._mark_each(rest, mark, strays)):
            if not new:
                entered[at] = 0
        return int.from_bytes(entered, "little")

    def _enter_lone(self, words: bytes, chosen: bytes) -> list[int]:
        """Mark the chosen numbers that nobody had, outside of any Block: all are strays."""
        strays: list[int] = []
        numbers = list(compress(numbers_of(words), chosen))
        lone = list(compress(numbers, self._mark_each(numbers, LONE, strays)))
        self.lone += lone
        return strays + lone

    def _mark_each(self, numbers: list[int], mark: int, strays: list[int]) -> Iterator[bool]:
        """Mark the numbers that nobody had, and tell of each whether; others are strays."""
        self.reach(max(numbers))
        marks = self.marks
        for number in numbers:
            had = marks[number]
            if not had:
                marks[number] = mark
            elif had != UNREAL:
                strays.append(number)
            yield not had

    def claim(self, first: int) -> bool:
        """Whether nobody before has anything of the huge page from this PFN on."""
        self.reach(first + PMD_PAGES - 1)
        if any(self.marks[first : first + PMD_PAGES]):
            return False
        self.marks[first : first + PMD_PAGES] = bytes([CLAIMED]) * PMD_PAGES
        self.claims.append(first)
        return True

    def commit(self) -> tuple[int, int]:
        """End the process: how many different numbers it has, and how many nobody had before."""
        new = len(self.lone) + sum(map(how_many, self.entered.values()))
        astray = {n for n in self.strays if self.marks[n] != LONE}
        distinct = len(self.strays) - len(astray)
        for block, matches in self.matches.items():
            for lanes, number in matches if self.uss else ():
                block.add_inside(lanes)
                self.mapped[block.mark] += number
            lanes, number = matches[0]
            if len(matches) > 1:
                lanes = functools.reduce(int.__or__, [lanes for lanes, _ in matches])
                number = how_many(lanes)
            distinct += number
            if astray:
                astray.difference_update(block.numbers(lanes))
        if self.uss:
            self.stray_mappings.update(self.strays)
        self.claimed += self.claims
        self._begin()
        return distinct + len(astray), new

    def rollback(self) -> None:
        """Forget what came from the current process."""
        self.recent.clear()
        for block, lanes in self.entered.items():
            for number in block.numbers(lanes):
                self.marks[number] = 0
            block.known &= ~lanes
        for number in self.lone:
            self.marks[number] = 0
        for first in self.claims:
            self.marks[first : first + PMD_PAGES] = bytes(PMD_PAGES)
        self._begin()


class Census:
    """The count over all processes; without `kernel`, of those whose page tables are not read."""

    def __init__(self, kernel: Kernel | None, uss: bool) -> None:
        self.kernel: Any = kernel
        self.frames = Ledger(uss)
        self.slots: defaultdict[int, Ledger] = defaultdict(lambda: Ledger(False))  # by swap type
        self.private = self.pages = 0  # ANON_EXCLUSIVE frames; pagemap entries read
        for pfn in kernel.zero_pages if kernel else ():
            self.frames.reach(pfn)
            self.frames.marks[pfn] = UNREAL
        # By page and PFN of a process's first ANON_EXCLUSIVE frame, where its pagemap is, and
        # what any other counts that has the same: they share their memory (vfork, CLONE_VM).
        self.witnesses: dict[tuple[int, int], tuple[str, Row]] = {}

    def process(self, reading: Reading, tell: Callable[[int], None]) -> Row:
        """Count one process; tell of pages read, of all processes.

        Also `new_swap`, which nobody had before, and `twin`, if its memory is another's.
        If that raises an error, it is as if the process had never been met.
        """
        private, witness = 0, None
        try:
            for start, words in reading.chunks():
                self.pages += len(words) // WORD
                tell(self.pages)
                kinds = words[FLAGS::WORD].translate(KINDS)
                if not witness and ANON_EXCLUSIVE in kinds:  # true of a huge page's first page, too
                    at = kinds.index(ANON_EXCLUSIVE)
                    witness = start + at, numbers_of(words[at * WORD : (at + 1) * WORD])[0]
                    twin = self._twin(witness, reading)
                    if twin:
                        self.rollback()
                        return twin
                kinds = self._real_kinds(start, words, kinds)
                privates = kinds.count(ANON_EXCLUSIVE)
                private += privates
                if privates + kinds.count(NOTHING) < len(kinds):
                    self._shared(start, words, kinds, reading.files)
        except BaseException:
            self.rollback()
            raise
        frames, new_frames = self.frames.commit()
        slots = new_slots = 0
        for ledger in self.slots.values():
            more, new = ledger.commit()
            slots, new_slots = slots + more, new_slots + new
        self.private += private
        frames += private
        row: Row = {"frames": frames, "unique": private + new_frames, "size": frames * PAGE_SIZE}
        row |= {"swap": slots * PAGE_SIZE, "new_swap": new_slots * PAGE_SIZE, "twin": False}
        if witness:
            twin = {**row, "unique": 0, "new_swap": 0, "twin": True}
            self.witnesses[witness] = reading.path, twin
        return row

    def rollback(self) -> None:
        for ledger in self.frames, *self.slots.values():
            ledger.rollback()

    def _twin(self, witness: tuple[int, int], reading: Reading) -> Row | None:
        """The count, if a process has the same ANON_EXCLUSIVE frame at this moment."""
        path, counted = self.witnesses.get(witness, ("", None))
        if counted:
            with contextlib.suppress(OSError), open(path, "rb") as pagemap:
                there = read_words(pagemap.fileno(), witness[0], 1)
                if there and there == read_words(reading.pagemap, witness[0], 1):
                    return counted if KINDS[there[FLAGS]] == ANON_EXCLUSIVE else None
        return None

    def _real_kinds(self, start: int, words: bytes, kinds: bytes) -> bytes:
        """The kinds with ANON_EXCLUSIVE only where it is true, and the huge zero page as NOTHING.

        EXCLUSIVE is not to be trusted in a PMD-mapped huge page: all its entries have
        its first page's bit (before 6.11, and seen again in 6.18), while others may
        have its other pages, having copied or given up the first after a fork.  So such
        a page is claimed in the ledger, and shared if any of it is there already.  And
        the huge zero page, which always comes whole, passes for a file's.
        """
        for at in range(-start % PMD_PAGES, len(kinds) - PMD_PAGES + 1, PMD_PAGES):
            kind = kinds[at]
            if words[at * WORD] or kind not in (ANON_EXCLUSIVE, ANON_OR_DEVICE, FILE_PAGE):
                continue  # the usual case: PFNs of huge pages end in zeros
            entry = int.from_bytes(words[at * WORD : (at + 1) * WORD], "little")
            pfn = entry & NUMBER_MASK
            huge = (RAMP + entry * ONES).to_bytes(PMD_PAGES * WORD, "little")  # if it begins one
            if pfn % PMD_PAGES or words[at * WORD : (at + PMD_PAGES) * WORD] != huge:
                continue
            if kind == ANON_EXCLUSIVE and not self.frames.claim(pfn):
                kind = ANON_OR_DEVICE
            elif kind != ANON_EXCLUSIVE and self.kernel.has(pfn, KPF_ZERO_PAGE):
                kind = NOTHING
            kinds = kinds[:at] + bytes([kind]) * PMD_PAGES + kinds[at + PMD_PAGES :]
        return kinds

    def _shared(self, start: int, words: bytes, kinds: bytes, files: list[FileVma]) -> None:
        """Take in what others may have: what is a file's by its place there, else by address."""
        of_file = kinds.translate(EQUALS[FILE_PAGE])
        shared = bytearray(kinds.translate(EQUALS[ANON_OR_DEVICE]))
        size, maybe_devices = len(kinds), ANON_OR_DEVICE in kinds
        add, here, past = self.frames.add, (None, start), 0
        for i in range(max(0, bisect(files, (start,)) - 1), len(files)):
            first, end, shift, file = files[i]
            first, end = first - start, end - start  # of the entries, as far as they go
            if first >= size:
                break
            if first < 0:
                first, end = 0, max(0, end)
            add(words, of_file, past, first, here)
            add(words, of_file, first, end, (file, shift + start))
            past = end
            # The process's own copies, or a device's:
            if maybe_devices and kinds.find(ANON_OR_DEVICE, first, end) >= 0:
                numbers = numbers_of(words[first * WORD : end * WORD])
                for at, pfn in compress(enumerate(numbers, first), shared[first:end]):
                    if not (self.frames.mark_of(pfn) or self.kernel.has(pfn, KPF_ANON)):
                        shared[at] = 0
        add(words, of_file, past, size, here)
        add(words, bytes(shared), 0, size, here)
        if IN_SWAP in kinds:
            self._swapped(start, words, kinds.translate(EQUALS[IN_SWAP]))

    def _swapped(self, start: int, words: bytes, lanes: bytes) -> None:
        """Take in swap slots: by type, and in each their offsets, which lie as close as PFNs."""
        size, types = len(lanes), words[::WORD].translate(SWAP_TYPE_OF)
        offsets = (int.from_bytes(words, "little") >> SWAP_TYPE_BITS).to_bytes(len(words), "little")
        swapped = int.from_bytes(lanes, "little")
        for swap_type in {*compress(types, lanes)} & {*range(SWAP_TYPES)}:
            of_type = int.from_bytes(types.translate(EQUALS[swap_type]), "little")
            real = (of_type & swapped).to_bytes(size, "little")
            self.slots[swap_type].add(offsets, real, 0, size, (None, start))

    def uss_of_set(self, pids: list[int]) -> int:
        """How many frames have all their mappings in the set; 0 if that is not wanted.

        How many they have tells /proc/kpagecount (pagemap.rst), of which only what is needed
        is read.  Mappings of the processes with these PIDs, which are memuse, are taken off.
        """
        frames = self.frames
        if not (self.kernel and frames.uss):
            return 0
        own = self._own_mappings(pids)
        counts, many, of_mark = self._mapcounts()
        for _ in range(3):
            before, own = own, self._own_mappings(pids)
            if own == before:
                break
            for number in (own - before) + (before - own):  # code that ran for the first time
                (mapcount,) = unpack(read_words(self.kernel.kpagecount, number, 1))
                counts[number], many[number] = min(mapcount, MANY), mapcount
        alone = self.private
        # What is left when mappings that no Block knows of, and memuse's own, are taken off:
        for number, times in (frames.stray_mappings + own).items():
            left = max(0, many.get(number, counts[number]) - times)
            counts[number], many[number] = min(left, MANY), left
            alone += frames.marks[number] == LONE and not left
        for first in frames.claimed:
            alone -= sum(mapcount > 1 for mapcount in counts[first : first + PMD_PAGES])
        for block in chain.from_iterable(frames.blocks.values()):
            if of_mark[block.mark] == frames.mapped[block.mark]:
                alone += how_many(block.known)  # if so together, each is
                continue
            numbers = block.numbers(block.known)
            mapcounts = [counts[number] for number in numbers]
            if MANY in mapcounts:
                mapcounts = [many.get(number, counts[number]) for number in numbers]
            alone += sum(map(int.__le__, mapcounts, block.mappings()))
        return alone

    def _mapcounts(self) -> tuple[mmap.mmap, dict[int, int], list[int]]:
        """Of all frames that are marked: by PFN a byte with the mapcount, at most MANY; exact
        mapcounts of those with MANY or more, by PFN; and by mark, the sum of mapcounts.
        """
        frames, of_mark = self.frames, [0] * 256
        many: dict[int, int] = {}
        counts = lazy_bytes(len(frames.marks))
        for first, marks in frames.marked_runs():
            words = read_words(self.kernel.kpagecount, first, len(marks))
            low = words[::WORD]
            mapcounts: Sequence[int] = low
            if MANY in low or words.count(0) - low.count(0) < (WORD - 1) * len(low):
                mapcounts = unpack(words)
                low = bytes(min(mapcount, MANY) for mapcount in mapcounts)
                many.update((pfn, n) for pfn, n in enumerate(mapcounts, first) if n >= MANY)
            counts[first : first + len(low)] = low
            if marks.count(marks[0]) == len(low):
                of_mark[marks[0]] += sum(mapcounts)
                continue
            for mark in {*marks} - {0}:
                of_mark[mark] += sum(compress(mapcounts, marks.translate(EQUALS[mark])))
        return counts, many, of_mark

    def _own_mappings(self, pids: list[int]) -> Counter[int]:
        """How often memuse itself maps the set's frames: that is not outside of the set."""
        own: Counter[int] = Counter()
        frames, files = self.frames, {file for file, _ in self.frames.blocks}
        for pid in pids:
            with open(proc(f"{pid}/pagemap"), "rb", buffering=0) as pagemap:
                for start, end, _, file in parse_maps(read_file(proc(f"{pid}/maps")))[1]:
                    if file in files:
                        words = read_words(pagemap.fileno(), start, end - start)
                        kinds = words[FLAGS::WORD].translate(KINDS)
                        pfns = compress(numbers_of(words), kinds.translate(EQUALS[FILE_PAGE]))
                        own.update(pfn for pfn in pfns if frames.mark_of(pfn) > CLAIMED)
        return own


# ---- The set of processes -----------------------------------------------------


def process_tree(roots: list[int]) -> list[Node]:
    """The processes with these PIDs and their descendants, depth first, siblings by PID.

    From one pass over all processes: psutil's children(recursive=True) loses those
    whose parent exits between its two passes, and takes longer.  Error if a root is not there.
    """
    stats: dict[int, Stat] = {}
    children = defaultdict(list)
    for pid in sorted({*psutil.pids()} - {own_pid()}):
        stat = stat_of(pid)
        if stat:
            stats[pid] = stat
            children[stat.ppid].append(pid)
    for root in roots:
        if root not in stats:
            raise Error(f"there is no process {root}")

    def walk(stack: list[tuple[int, int]]) -> dict[int, Node]:
        nodes: dict[int, Node] = {}
        while stack:
            pid, depth = stack.pop()
            if pid not in nodes:
                nodes[pid] = Node(pid, stats[pid], depth)
                stack += [(child, depth + 1) for child in reversed(children[pid])]
        return nodes

    below = walk([(child, 1) for root in roots for child in children[root]])
    tops = [root for root in roots if root not in below] or roots
    return list(walk([(root, 0) for root in reversed(tops)]).values())


def count_each(job: Job, tell: Tell) -> tuple[Census, list[Outcome]]:
    """What becomes of each process; Unfit if one changes of which the job is only a part."""
    census = Census(job.kernel, "uss" in job.columns)
    outcomes: list[Outcome] = []
    opened: list[int] = []
    for node in job.nodes:
        told = functools.partial(tell, len(outcomes))
        told(census.pages)
        outcome: Outcome = "it changed whenever it was read"
        for _ in range(3):
            try:
                reading = Reading(node, job, opened)
                outcome = {**reading.row, **census.process(reading, told)}
                break
            except VANISHED:
                stat = stat_of(node.pid)
                if not stat or stat.started != node.stat.started or is_exiting(stat):
                    outcome = None
                    break
                if job.stripes is not None:  # for the other part, it may have been read before
                    raise Unfit from None
                node = node._replace(stat=stat)
            except (OSError, psutil.AccessDenied) as error:
                number = getattr(error, "errno", None) or errno.EACCES
                if number == errno.ENOMEM:
                    raise  # not because of this process
                outcome = os.strerror(number)
                break
            finally:
                while opened:
                    os.close(opened.pop())
        outcomes.append(outcome)
    return census, outcomes


def count_in_one(job: Job, tell: Tell) -> tuple[list[Outcome], int]:
    """What becomes of each process; and how many frames only the set maps, or 0."""
    census, outcomes = count_each(job, tell)
    return outcomes, census.uss_of_set([own_pid()])


# ---- Counting by two processes ------------------------------------------------

# A second process takes less time from so many pages on, beyond those in each process that take
# as long to read as its files to open, which both have to do.
FORK_FROM, OPENING = 1 << 17, 1 << 13


def shares_of(job: Job) -> list[Job]:
    """Two jobs that take about as long.

    For a page, smaps takes about what pagemap does, but cannot be read by stripes.
    """
    pids: tuple[set[int], set[int]] = set(), set()
    pages = [0, 0]
    for node in job.nodes if job.columns & FROM_SMAPS else ():
        which = pages[1] <= pages[0]
        pids[which].add(node.pid)
        pages[which] += node.stat.rss
    ahead = (pages[1] - pages[0]) / (sum(pages) or 1)
    middle = round(len(STRIPES) * (1 + ahead) / 2)
    ours = job._replace(stripes=STRIPES[:middle], smaps_of=pids[0])
    figures = job.columns - TEXTS  # which are no sums
    return [ours, job._replace(columns=figures, stripes=STRIPES[middle:], smaps_of=pids[1])]


def count_in_two(job: Job, tell: Tell) -> tuple[list[Outcome], int]:
    """As count_in_one(), by two processes that do not share an interpreter's lock.

    Each counts its stripes of every process, so that a frame, however many share it, is
    met by one of them only, and all figures are sums.  Unfit if a number is marked by both,
    as with KSM or after mremap; if a process changed meanwhile; or if the second fails.
    """
    ours, theirs = shares_of(job)
    first = own_pid()
    pages = memoryview(mmap.mmap(-1, PAGE_SIZE)).cast("Q")  # shared: how many the other read
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, there is nothing to wait for
    try:
        answer, end = os.pipe()
        other = os.fork()
    except OSError:
        raise Unfit from None
    if not other:
        os.close(answer)
        second_process(theirs, pages, first, end)
    os.close(end)

    def tell_both(done: int, here: int) -> None:
        tell(done, here + pages[0])
        if os.waitid(os.P_PID, other, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise Unfit

    try:
        with open(answer, "rb") as file:
            census, outcomes = count_each(ours, tell_both)
            second = marshal.load(file)
            alone = census.uss_of_set([first, second])
            others, others_alone = marshal.load(file)
            for swap_type, start, marks in iter(functools.partial(marshal.load, file), None):
                ledger = census.frames if swap_type is None else census.slots[swap_type]
                if ledger.meets(start, marks):
                    raise Unfit
    except (EOFError, TypeError, ValueError, *VANISHED):  # the other process ended
        raise Unfit from None
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    sums = FROM_PAGEMAP | FROM_SMAPS | {"new_swap"}
    for one, another in zip(outcomes, others):
        if isinstance(one, dict) and isinstance(another, dict) and one["twin"] == another["twin"]:
            one.update({name: one[name] + another[name] for name in sums})
        elif one != another:
            raise Unfit
    return outcomes, alone + others_alone


def second_process(job: Job, pages: memoryview, first: int, end: int) -> NoReturn:
    """What the second process does, until it is killed; it ends early if something goes wrong."""
    try:
        first_ended = select.poll()
        first_ended.register(end, 0)  # the other end of the pipe closes with it

        def tell(_: int, here: int) -> None:
            pages[0] = here
            if first_ended.poll(0):
                os._exit(1)

        with open(end, "wb") as file:
            second = own_pid()
            marshal.dump(second, file)
            file.flush()
            census, outcomes = count_each(job, tell)
            alone = census.uss_of_set([first, second])
            marshal.dump((outcomes, alone), file)
            for swap_type, ledger in (None, census.frames), *census.slots.items():
                for start, marks in ledger.marked_runs():
                    marshal.dump((swap_type, start, marks), file)
            marshal.dump(None, file)
            file.flush()
            first_ended.poll()  # until then, what is mapped here is to stay the same
    finally:
        os._exit(1)


# ---- The report ---------------------------------------------------------------

# The processes, then all together; PIDs left out, and why; how many exited.
Report = namedtuple("Report", "rows total skipped exited")


def measure(
    roots: list[int], wanted: set[str], kernel: Kernel | None, progress: Progress
) -> Report:
    """Count the processes with these PIDs and their descendants, as one set.

    Error if a root is not there, or ends before it is read.
    """
    nodes = process_tree(roots)
    job = Job(nodes, wanted, kernel, None, {node.pid for node in nodes})

    tell = functools.partial(progress, len(nodes))
    pages = sum(node.stat.rss - OPENING for node in nodes if node.stat.rss)
    result = None
    if (kernel or wanted & FROM_SMAPS) and pages > FORK_FROM and len(os.sched_getaffinity(0)) > 1:
        with contextlib.suppress(Unfit):
            result = count_in_two(job, tell)
    outcomes, alone = result or count_in_one(job, tell)
    for node, outcome in zip(nodes, outcomes):
        if outcome is None and node.pid in roots:
            raise Error(f"process {node.pid} exited while it was being read")
    rows = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    skipped = {node.pid: why for node, why in zip(nodes, outcomes) if isinstance(why, str)}
    sums = "rss", "pss", "unique", "new_swap"
    total: Row = {name: sum(row[name] for row in rows) for name in sums}
    total |= {"frames": total["unique"], "size": total["unique"] * PAGE_SIZE}
    total |= {"swap": total["new_swap"], "command": plural(len(rows))}
    if kernel and "uss" in wanted:
        total["uss"] = alone * PAGE_SIZE
    return Report(rows, total, skipped, outcomes.count(None))


# ---- Output -------------------------------------------------------------------


def human(size: int) -> str:
    """A size like 6.9M, in powers of 1024, as du and free write them."""
    value, power = float(size), 0
    while round(value) >= 1024:
        value, power = value / 1024, power + 1
    return f"{value:.{int(power > 0 and round(value, 1) < 10)}f}{' KMGTPE'[power].strip()}"


def plural(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def tree_lines(depths: list[int], ascii_only: bool) -> list[str]:
    """What stands before each row's command to draw the tree."""
    down, tee, corner = ("|  ", "|- ", "`- ") if ascii_only else ("│  ", "├─ ", "└─ ")
    lines = []
    later: list[bool] = []  # by depth: whether a row further down has the same parent
    for depth in reversed(depths):
        later = (later + [False] * (depth + 1))[: depth + 1]
        line = "".join(down if more else "   " for more in later[1:depth])
        lines.append(f" {line}{tee if later[depth] else corner}" if depth else "")
        later[depth] = True
    return lines[::-1]


def table(
    report: Report, columns: list[str], size: Callable[[int], str], ascii_only: bool
) -> list[str]:
    """The report's lines: header, processes, total.  No cell is empty."""

    def cell(row: Row, name: str, tree: str) -> str:
        if row.get(name) is None:
            return "TOTAL" if name == "pid" else "-"
        if name in SIZES:
            return size(row[name])
        return {"unique": "+", "command": tree}.get(name, "") + str(row[name])

    trees = tree_lines([row["depth"] for row in report.rows], ascii_only)
    lines = [[COLUMNS[name][0] for name in columns]]
    for row, tree in zip([*report.rows, report.total], [*trees, ""]):
        lines.append([cell(row, name, tree) for name in columns])
    for at, name in enumerate(columns[:-1] if columns[-1] in TEXTS else columns):
        width = max(7, *(len(cells[at]) for cells in lines))
        for cells in lines:
            cells[at] = cells[at].ljust(width) if name in TEXTS else cells[at].rjust(width)
    return ["  ".join(cells).rstrip() for cells in lines]


def cut(line: str, width: int) -> str:
    """As much of the line as a terminal shows in `width` columns."""
    import unicodedata  # not above: only a terminal needs it

    for end, character in enumerate(line):
        if not unicodedata.combining(character):
            width -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width < 0:
            return line[:end]
    return line


def as_json(report: Report, columns: list[str]) -> str:
    import json  # not above: it would be a part of every start

    figures = [name for name in columns if name in FROM_PAGEMAP | FROM_SMAPS and name != "unique"]
    return json.dumps(
        {
            "page_size": PAGE_SIZE,
            "processes": [{name: row[name] for name in columns} for row in report.rows],
            "total": {name: report.total.get(name) for name in figures},
            "skipped": [{"pid": pid, "reason": why} for pid, why in report.skipped.items()],
        }
    )


def output_encoding() -> str:
    """That of stdout; ASCII in the C locale, though there Python has come to write UTF-8."""
    environ = os.environ  # where LC_CTYPE may be Python's own doing (PEP 538)
    asked = {"PYTHONIOENCODING", "PYTHONUTF8"} & environ.keys()
    plain = (environ.get("LC_ALL") or environ.get("LANG")) in ("C", "POSIX")
    return "ascii" if plain and sys.flags.utf8_mode and not asked else sys.stdout.encoding


class Progress:
    """A line on stderr about what is going on, if that is a terminal and it takes long."""

    def __init__(self) -> None:
        self.shown = False
        self.next = time.monotonic() + 1

    def __call__(self, number: int, done: int, pages: int) -> None:
        """So many processes are read, of their number, and so many pages."""
        if time.monotonic() > self.next and sys.stderr and sys.stderr.isatty():
            text = f"{done} of {number} processes, {pages} pages"
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self.shown, self.next = True, time.monotonic() + 0.1

    def clear(self) -> None:
        if self.shown:
            os.write(2, b"\r\033[K")
            self.shown = False


# ---- The command line ---------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"memuse: {escaped(message)}; see memuse --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        write(message, sys.stderr if file is sys.stderr else sys.stdout)


def pid_argument(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a PID")
    return int(text)


def columns_argument(text: str) -> list[str]:
    for name in text.split(","):
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(f"there is no column {name!r}")
    return text.split(",")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    columns = "\n".join(f"  {name:8} {about}" for name, (_, about) in COLUMNS.items())
    parser = Parser(
        prog="memuse",
        add_help=False,
        allow_abbrev=False,
        # With a width given, argparse need not import what tells the terminal's.
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=80),
        description="Count the physical memory that a tree of processes really occupies.",
        epilog=f"columns:\n{columns}\n\ndefault: {IN_TABLE}; sizes in KiB",
    )
    add, unit = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    const: Any = {"dest": "size", "action": "store_const", "default": lambda n: str(n // 1024)}
    unit("-b", "--bytes", const=str, help="sizes in bytes", **const)
    unit("-h", "--human-readable", const=human, help="sizes like 6.9M, powers of 1024", **const)
    add("-J", "--json", action="store_true", help="JSON, sizes in bytes")
    add("-o", "--output", metavar="COLUMNS", type=columns_argument, help="see below")
    add("--help", action="help", help="show this and exit")
    add("--version", action="version", version=f"memuse {__version__}")
    add("pids", metavar="PID", type=pid_argument, nargs="+", help="a process, with all below it")
    return parser.parse_args(argv)


def write(text: str, stream: TextIO | None) -> None:
    """Error if stdout cannot take it, but for a reader that has had enough.

    Not by the stream: one without a buffer (python -u) takes a part for the whole, and others
    try again at Python's exit what has failed.
    """
    if stream is None:  # stderr is closed
        return
    left = text.encode(stream.encoding, stream.errors or "strict")
    try:
        while left:
            left = left[os.write(stream.fileno(), left) :]
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise Error(f"cannot write: {error.strerror}") from None


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[Report, str]:
    """The report and its text."""
    own_pid()  # before much is made of what this /proc lacks
    columns = arguments.output or (IN_JSON if arguments.json else IN_TABLE).split(",")
    pids = " ".join(map(str, arguments.pids))
    kernel = None if FROM_PAGEMAP.isdisjoint(columns) else Kernel(pids)
    report = measure(arguments.pids, set(columns), kernel, progress)
    if arguments.json:
        return report, as_json(report, columns) + "\n"
    encoding = output_encoding()
    lines = table(report, columns, arguments.size, not "└".encode(encoding, "ignore"))
    width = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0
    if width:  # a terminal that nobody told its size has none
        lines = [cut(line, width) for line in lines]
    text = "".join(f"{line}\n" for line in lines)
    return report, text.encode(encoding, "backslashreplace").decode(encoding)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all done, 1 not or not all, 2 wrong usage, 130 interrupted."""
    progress, status = Progress(), 1
    messages: list[str] = []

    def interrupt(*_: Any) -> None:
        # At once: an exception could be lost in a destructor, or tell its traceback at exit.
        progress.clear()
        os._exit(130)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as for a script's background jobs
        signal.signal(signal.SIGINT, interrupt)
    try:
        if sys.stdout is None:
            raise Error("standard output is closed")
        report, text = run(parse_args(argv), progress)
        progress.clear()
        write(text, sys.stdout)
        messages += [f"process {pid} left out: {why}" for pid, why in report.skipped.items()]
        if report.exited:
            messages.append(f"{plural(report.exited)} exited while being read")
        status = 1 if report.skipped else 0
    except Error as error:
        messages.append(str(error))
    except (MemoryError, ImportError, OSError) as error:
        if not isinstance(error, OSError) or error.errno == errno.ENOMEM:
            # At once: there is no memory for anything else, not even to map a module.
            with contextlib.suppress(OSError):
                os.write(2, b"\r\033[K" * os.isatty(2) + b"memuse: there is not enough memory\n")
            os._exit(1)
        where = os.fsdecode(error.filename) if error.filename else "reading"
        messages.append(f"{where}: {error.strerror}")
    progress.clear()
    write("".join(f"memuse: {message}\n" for message in messages), sys.stderr)
    return status


if __name__ == "__main__":
    # All is written.  To take the interpreter apart would be a tenth of a short run.
    os._exit(main())
