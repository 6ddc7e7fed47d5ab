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

if __name__ == "__main__":  # until main() can do better: Ctrl-C during the imports
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import array
import contextlib
import errno
import functools
import json
import mmap
import operator
import os
import queue
import re
import struct
import sys
import threading
import time
from collections import Counter, defaultdict, deque, namedtuple
from itertools import chain, compress, count

try:
    import fcntl

    import psutil
except ModuleNotFoundError as missing:
    if missing.name == "fcntl":
        raise SystemExit("memuse: only Linux has /proc/PID/pagemap") from None
    raise SystemExit(
        "memuse: psutil is missing: apt install python3-psutil, or pip install psutil"
    ) from None

TYPE_CHECKING = False  # the module typing alone would take a tenth of a short run
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from typing import Any, NoReturn, TextIO, TypeVar

    T = TypeVar("T")
    Row = dict[str, Any]  # by names of columns; sizes in bytes
    Unreal = Callable[[list[int]], set[int]]  # of some PFNs, those that are not memory

__version__ = "1.0.0"


class Error(Exception):
    """What can be expected to go wrong, told in the one line that the user sees."""


# What reading a process raises once it has ended or called exec.
VANISHED = (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess)


# ---- The kernel's interface ---------------------------------------------------

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
PMD_PAGES = PAGE_SIZE // 8  # pages under one page table, and so in a PMD-mapped huge page

# A pagemap entry (pagemap.rst): a u64 a page, here least significant byte first.
# Bits 0-54 hold the PFN, or swap type (0-4) and offset.  Physical addresses have
# 52 bits at the most, so a PFN has 40, and so has the slot of any real swap area.
WORD = 8
NUMBER_BYTES = 5
NUMBER_MASK = (1 << 8 * NUMBER_BYTES) - 1
# The last byte holds bits 56-63.
FLAGS = 7
EXCLUSIVE, GUARD, FILE, SWAPPED, PRESENT = 1 << 0, 1 << 2, 1 << 5, 1 << 6, 1 << 7

# Bits 0-4 of a swapped entry.  Types from here up are not swap but migration,
# poison, device and marker entries (MAX_SWAPFILES, include/linux/swap.h).
SWAP_TYPE_MASK, SWAP_TYPES = 0x1F, 23

# /proc/kpageflags (pagemap.rst), a u64 per frame
KPF_ANON, KPF_NOPAGE, KPF_ZERO_PAGE = 1 << 12, 1 << 20, 1 << 24
KPF_NO_MEMORY = KPF_NOPAGE | KPF_ZERO_PAGE

# ioctl PAGEMAP_SCAN (pagemap.rst): struct pm_scan_arg is twelve u64
PAGEMAP_SCAN = 0xC0606610
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4

MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h; Python has no name for it
PF_KTHREAD = 0x00200000  # in /proc/PID/stat's flags (include/linux/sched.h)

# What an entry stands for, told from its flags.
NOTHING, PRIVATE, SHARED, OF_FILE, IN_SWAP = range(5)


def kind_of(flags: int) -> int:
    """What an entry with these flags (its bits 56-63) stands for.

    PRIVATE is anonymous memory mapped by one process alone, and once: nobody else
    has the frame.  SHARED is other memory that is no file's: copy-on-write, KSM, but
    also the zero page and device memory.
    """
    if flags & PRESENT:
        if flags & FILE:
            return OF_FILE
        return PRIVATE if flags & EXCLUSIVE else SHARED
    return IN_SWAP if flags & SWAPPED and not flags & GUARD else NOTHING


# For bytes.translate: flags to kinds, and kinds to lanes (see Ledger).
KINDS = bytes(kind_of(flags) for flags in range(256))
LANES_OF = [bytes(0x80 * (k == kind) for k in range(256)) for kind in range(5)]


# ---- Parsing ------------------------------------------------------------------

# Page numbers (addresses in pages); what page of the file is at start, itself if anonymous;
# device and inode, or a special mapping's name, None if anonymous; smaps' fields in KiB.
Vma = namedtuple("Vma", "start end offset file kib")

ANONYMOUS = (b"[heap]", b"[stack", b"[anon:")  # anonymous mappings that have a name
OCCUPIED = (b"Rss", b"Swap", b"Shared_Hugetlb", b"Private_Hugetlb")
VSYSCALL = (1 << 63) // PAGE_SIZE  # above what pagemap covers
HOLE = 64  # pages that cost less to read over than another call


def parse_vmas(lines: Iterable[bytes]) -> Iterator[Vma]:
    """The VMAs in the lines of /proc/PID/maps, smaps or smaps_rollup (proc.rst).

    Error at a line that is neither a VMA's nor a field's.
    """
    vma: Any = None
    try:
        for line in lines:
            head, _, rest = line.partition(b" ")
            if head.endswith(b":"):
                if rest.endswith(b"kB\n"):
                    vma.kib[head[:-1]] = int(rest[:-3])
                continue
            if vma:
                yield vma
            start, end = (int(address, 16) // PAGE_SIZE for address in head.split(b"-"))
            if rest[4:] == b" 00000000 00:00 0 \n":  # the commonest in the thousands
                vma = Vma(start, end, start, None, {})
                continue
            words = rest.split(None, 4)
            name = words[4].rstrip(b"\n") if words[4:] else b""
            offset = int(words[1], 16) // PAGE_SIZE
            if words[3] != b"0":
                vma = Vma(start, end, offset, b" ".join(words[2:4]), {})
            elif name and not name.startswith(ANONYMOUS):
                vma = Vma(start, end, offset, name, {})
            else:
                vma = Vma(start, end, start, None, {})
    except (ValueError, IndexError, AttributeError):
        raise Error(f"cannot make out the kernel's list of mappings: {line[:60]!r}") from None
    if vma:
        yield vma


def pieces_of(vmas: Iterable[Vma], kib: Counter[bytes]) -> list[Vma]:
    """What is to be looked at: VMAs that may hold something, joined where they go on.

    The fields of all VMAs are added to `kib`.
    """
    pieces: list[Vma] = []
    run: tuple[Any, ...] = ()
    first = last = 0
    for start, end, offset, file, fields in vmas:
        if fields:
            kib.update(fields)
            if not any(map(fields.get, OCCUPIED)):
                continue
        if run == (file, start - offset) and start - last < HOLE:
            last = end
        elif start < VSYSCALL:
            if run:
                pieces.append(Vma(first, last, first - run[1], run[0], {}))
            run, first, last = (file, start - offset), start, end
    if run:
        pieces.append(Vma(first, last, first - run[1], run[0], {}))
    return pieces


# Of /proc/PID/stat (proc.rst, table 1-4): `started` in clock ticks since boot, `image` where
# exec put code, stack, data and arguments.
Stat = namedtuple("Stat", "state ppid kernel_thread threads started image name")


def parse_stat(text: bytes) -> Stat:
    name, _, rest = text.partition(b"(")[2].rpartition(b")")  # which may hold anything
    fields = rest.split()  # from the third on
    kernel_thread = bool(int(fields[6]) & PF_KTHREAD)
    numbers = int(fields[17]), int(fields[19])
    image = [*fields[23:26], *fields[42:49]]
    return Stat(fields[0], int(fields[1]), kernel_thread, *numbers, image, name)


# ---- Reading ------------------------------------------------------------------


def proc(name: str) -> str:
    """The path of a file in /proc, or in what psutil takes for it."""
    return f"{psutil.PROCFS_PATH}/{name}"


def own_pid() -> int:
    """In the PID namespace of this /proc, which need not be ours."""
    try:
        return int(os.readlink(proc("self")))
    except OSError:
        raise Error(f"no {proc('self')}: mount the /proc of this PID namespace") from None


def read_stat(name: str, directory: int | None = None) -> Stat:
    with open(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
        return parse_stat(file.read())


def read_words(fd: int, first: int, number: int) -> bytes:
    """Words from pagemap or /proc/kpage*, least significant byte first.

    Less than asked for, if the file ends or the process is gone.
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
    """The PFNs, or swap types and offsets, in entries."""
    if sys.byteorder == "little" and words[4::WORD].count(0) == len(words) // WORD:
        return memoryview(words).cast("I")[::2].tolist()  # in a quarter of the time
    return [word & NUMBER_MASK for word in unpack(words)]


def number_of(words: bytes, at: int = 0) -> int:
    """The PFN, or swap type and offset, in one of some entries."""
    return unpack(words[at * WORD : (at + 1) * WORD])[0] & NUMBER_MASK


def next_resident(pagemap: int, start: int, end: int) -> int:
    """The first page from `start` on that is present or swapped, else `end` (PAGEMAP_SCAN)."""
    region = array.array("Q", [0, 0, 0])
    which = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    head = (12 * WORD, 0, start * PAGE_SIZE, end * PAGE_SIZE, 0)  # size flags start end walk_end
    vector = (region.buffer_info()[0], 1, 1)  # vec vec_len max_pages
    masks = (0, 0, which, which)  # category_inverted _mask _anyof_mask, return_mask
    found = fcntl.ioctl(pagemap, PAGEMAP_SCAN, array.array("Q", head + vector + masks), True)
    return region[0] // PAGE_SIZE if found else end


class Kernel:
    """What is open of the kernel; `scan` if it has PAGEMAP_SCAN (6.7) and smaps_rollup."""

    def __init__(self, frames: bool, arguments: str) -> None:
        """Error if `frames` are to be seen and may not; it tells what to run instead."""
        self.scan = os.path.exists(proc("self/smaps_rollup"))
        if not frames:
            return
        name = sys.argv[0]
        where = "on the host, outside of any container, " if os.geteuid() == 0 else ""
        need = (
            f"seeing page frames takes CAP_SYS_ADMIN: {where}run sudo {name} {arguments}; or, for"
            f" the kernel's figures alone, {name} -o pid,rss,pss,command {arguments}"
        )
        here = array.array("B", b"here").buffer_info()[0] // PAGE_SIZE
        try:
            own = os.open(proc("self/pagemap"), os.O_RDONLY)
            if not number_of(read_words(own, here, 1)):
                raise Error(need)
            self.flags = os.open(proc("kpageflags"), os.O_RDONLY)
            self.count = os.open(proc("kpagecount"), os.O_RDONLY)
        except PermissionError:
            raise Error(need) from None
        except FileNotFoundError as error:
            raise Error(f"a kernel without CONFIG_PROC_PAGE_MONITOR: {error}") from None
        try:
            next_resident(own, 0, 1)
        except OSError:
            self.scan = False
        os.close(own)

    def flags_of(self, pfn: int) -> int:
        words = read_words(self.flags, pfn, 1)
        return unpack(words)[0] if words else KPF_NOPAGE  # past the end

    @functools.cached_property
    def zero_pages(self) -> set[int]:
        """The PFNs of the zero page; some architectures have several in a row."""
        import ctypes  # not above: it takes 5 ms, and few processes alone need it

        page = lazy_bytes(PAGE_SIZE)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            page.madvise(mmap.MADV_NOHUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        assert page[0] == 0  # reading untouched memory maps the zero page
        with open(proc("self/pagemap"), "rb") as own:
            pfn = number_of(read_words(own.fileno(), address // PAGE_SIZE, 1))
        first = max(0, pfn - 256)
        flags = unpack(read_words(self.flags, first, 512))
        return {first + i for i, word in enumerate(flags) if word & KPF_ZERO_PAGE}


class Readers:
    """Threads that read /proc, where the kernel works outside the interpreter's lock."""

    THREADS = 2  # as many as there are figures of a page to read: its share, its frame

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.stack_size(1 << 18)  # under ulimit -v, the usual 8 MiB are dear
        for _ in range(self.THREADS):
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._calls.get()()

    def submit(self, call: Callable[[], T]) -> Callable[[], T]:
        """Have a thread call; what is returned waits for the result, or raises its error."""
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((call(), None))
            except BaseException as error:  # raised again where the result is asked for
                outcome.put((None, error))

        def result() -> T:
            value, error = outcome.get()
            try:
                if error:
                    raise error
                return value  # type: ignore[no-any-return]
            finally:
                del error  # whose traceback holds this frame, and open files

        self._calls.put(run)
        return result

    def ahead(self, calls: Iterable[Callable[[], T]], depth: int) -> Iterator[Callable[[], T]]:
        """The results of the calls in their order, with `depth` more under way."""
        pending: deque[Callable[[], T]] = deque()
        for call in calls:
            pending.append(self.submit(call))
            if len(pending) > depth:
                yield pending.popleft()
        yield from pending


# A process in the tree; when it was found, `stat` was so.
Node = namedtuple("Node", "pid stat depth")
# Neighbouring pagemap entries of one piece, from page `start` on.
Chunk = namedtuple("Chunk", "piece start words")

FROM_PAGEMAP, FROM_SMAPS = {"frames", "unique", "size", "swap"}, {"rss", "uss", "pss"}


class Reading:
    """A process while it is read: raises one of VANISHED if it ends or calls exec.

    All its files are opened by way of one descriptor of its directory and between
    two looks at its stat.  So they belong to one process and one memory, even if it
    calls exec or its PID is used anew: then there is nothing more in them.
    """

    # How many entries to ask for at a time: few where memory is sparse.
    LONG, SHORT = 1 << 15, PMD_PAGES

    def __init__(self, node: Node, kernel: Kernel, wanted: set[str], readers: Readers) -> None:
        self.scan, self.frames = kernel.scan, bool(wanted & FROM_PAGEMAP)
        self._usage_wanted = bool(wanted & FROM_SMAPS)
        self.pieces: list[Vma] = []
        self._kib: Counter[bytes] = Counter()
        self._rollup: int | None = None
        self._files: list[int] = []
        directory = self._file(proc(str(node.pid)))
        stat = read_stat("stat", directory)
        if stat.started != node.stat.started:
            raise ProcessLookupError  # its PID was used anew
        # Not psutil's: it reads all that a process may claim, and not by way of the directory.
        with open(self._file("cmdline", directory), "rb", closefd=False) as file:
            self.command = command_line(file.read(COMMAND_LIMIT + 1), stat.name)
        self.user = psutil.Process(node.pid).username() if "user" in wanted else None
        if stat.state in b"ZX" and stat.threads > 1:
            self._open(self._live_thread(directory))  # the first has ended, others run on
        elif stat.state not in b"ZX" and not stat.kernel_thread:
            self._open(directory)
        if read_stat("stat", directory)[4:6] != stat[4:6]:
            raise ProcessLookupError
        self.usage = readers.submit(self._usage)
        self.batches = self._batches()
        self.first = self.read(next(self.batches, []))

    def close(self) -> None:
        self.batches.close()  # it and this would hold each other

    def __del__(self) -> None:  # once no thread reads any more
        for fd in self._files:
            os.close(fd)

    def _open(self, directory: int) -> None:
        if self.frames:
            self._pagemap = self._file("pagemap", directory)
        if self._usage_wanted and self.scan:
            self._rollup = self._file("smaps_rollup", directory)
        if self.frames or not self.scan:
            # Without PAGEMAP_SCAN, smaps is needed to know which VMAs hold anything.
            maps = "smaps" if self._usage_wanted and not self.scan else "maps"
            self.pieces = pieces_of(self._vmas(self._file(maps, directory)), self._kib)
            if not self.pieces:
                raise ProcessLookupError

    def _file(self, name: str, directory: int | None = None) -> int:
        self._files.append(os.open(name, os.O_RDONLY, dir_fd=directory))
        return self._files[-1]

    def _live_thread(self, directory: int) -> int:
        tasks = self._file("task", directory)
        for tid in os.listdir(tasks):
            task = self._file(tid, tasks)
            if read_stat("stat", task).state not in b"ZX":
                return task
            os.close(self._files.pop())
        raise ProcessLookupError

    def _vmas(self, fd: int) -> Iterator[Vma]:
        with open(fd, "rb", closefd=False) as file:
            yield from parse_vmas(file)

    def _usage(self) -> Counter[bytes]:
        """The kernel's figures in KiB, by the names they have in smaps."""
        if self._rollup is not None:
            for vma in self._vmas(self._rollup):
                self._kib.update(vma.kib)
        return self._kib

    def _batches(self) -> Generator[list[tuple[Vma, int, int]]]:
        """Spans of pages (piece, first, end) that hold whatever is resident and little else.

        In portions of like cost.  They end at multiples of PMD_PAGES: no huge page is cut.
        """
        batch, cost = [], 0
        for piece in self.pieces if self.frames else ():
            start, size = piece.start, self.SHORT
            while start < piece.end:
                found = start
                if self.scan and piece.end - start > self.SHORT:
                    found = next_resident(self._pagemap, start, piece.end)
                if found == piece.end:
                    break
                size = min(2 * size, self.LONG) if found == start else self.SHORT
                end = min((found + size) // PMD_PAGES * PMD_PAGES, piece.end)
                batch.append((piece, found, end))
                cost += end - found + HOLE
                start = end
                if cost >= self.LONG:
                    yield batch
                    batch, cost = [], 0
        yield batch

    def read(self, batch: list[tuple[Vma, int, int]]) -> list[Chunk]:
        chunks = []
        for piece, start, end in batch:
            words = read_words(self._pagemap, start, end - start)
            if len(words) != (end - start) * WORD:
                raise ProcessLookupError
            chunks.append(Chunk(piece, start, words))
        return chunks

    def private_frame(self, page: int) -> int:
        """The PFN of a page that this process alone maps; else 0, which no such page has."""
        words = read_words(self._pagemap, page, 1)
        return number_of(words) if words and kind_of(words[FLAGS]) == PRIVATE else 0


# ---- Counting -----------------------------------------------------------------

LANES = 4 * PMD_PAGES
SEVENS = int.from_bytes(b"\x7f" * LANES, "little")
# Marks: entered in a Block by address or by place in a file, or in none; no memory; and,
# only for Census.alone, counted with a huge page.
NEW, ANON, IN_FILE, HOMELESS, UNREAL, CLAIMED = range(6)
IS_ANON = bytes(mark == ANON for mark in range(256))
IS_MARKED = bytes(mark not in (NEW, UNREAL) for mark in range(256))
PART = 1 << 16  # so many PFNs are looked at in one go


class Block:
    """What is known of LANES neighbouring pages: which number each was first met with.

    A lane is one page's byte in an integer of LANES bytes, so that one operation
    treats all pages.  `known` has 0x80 in the lanes that have a number;
    `planes` are the numbers: all lanes' lowest bytes, then the next.  `mapped` counts
    how often the set maps each; its first is put by before a lane could overflow.
    """

    def __init__(self) -> None:
        self.known = 0
        self.planes = [0] * NUMBER_BYTES
        self.mapped: tuple[int, ...] = (0,)
        self.times = 0  # that mapped[0] was added to
        self.last: tuple[int | None, int] = None, 0  # hash of entries all known, their lanes

    def numbers(self, lanes: int) -> list[int]:
        """The numbers known in these lanes."""
        length = (lanes.bit_length() + 7) // 8
        words = bytearray(length * WORD)
        for i, plane in enumerate(self.planes):
            words[i::WORD] = plane.to_bytes(LANES, "little")[:length]
        return list(compress(numbers_of(bytes(words)), lanes.to_bytes(length, "little")))

    def inside(self) -> list[int]:
        """How often the set maps each of the known numbers."""
        length = (self.known.bit_length() + 7) // 8
        lanes = self.known.to_bytes(length, "little")
        each = [compress(one.to_bytes(length, "little"), lanes) for one in self.mapped]
        return list(map(sum, zip(*each))) if len(each) > 1 else list(each[0])


def lazy_bytes(size: int) -> mmap.mmap:
    """Zeros that take memory only once they are written to."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


class Ledger:
    """Numbers (PFNs or swap slots) that may be shared, each counted once.

    Forked processes have the same page at the same address, and processes that map
    a file have the same page at the same place in it.  So a number is entered in a
    Block, at the place where it is first met; what another process has there is
    compared for all lanes at once, and only what differs is looked at one by one.

    This is exact because a number is entered at one place only: `marks` tells which
    are.  The lanes in which a process equals the Blocks are that many different
    numbers, unless it maps a place twice, which `own` shows.  A number met elsewhere
    than where it was entered (KSM, mremap, buffers of drivers) is a stray, and
    strays are few enough for sets.
    """

    def __init__(self) -> None:
        self.blocks: defaultdict[tuple[bytes | None, int], Block] = defaultdict(Block)
        self.marks = lazy_bytes(PART)  # a byte for each number; see reach()
        self.parts: set[int] = set()  # PARTs of it that may have others than NEW
        self.claimed: set[int] = set()  # huge pages (PFN // PMD_PAGES) counted whole, unmarked
        self.astray: Counter[int] = Counter()  # strays, as often as the set maps them
        self.mappings = 0  # of ANON numbers, not as strays
        self._begin()

    def _begin(self) -> None:
        # Of the current process: what Blocks were before it, lanes in which it equals
        # them, strays, those of them that were new, and huge pages it claimed.
        self.before: dict[Block, Any] = {}
        self.own: Counter[Block] = Counter()
        self.strays: Counter[int] = Counter()
        self.homeless: list[int] = []
        self.claims: set[int] = set()
        self.matched = self.new = self.mapped = 0

    def add(self, words: bytes, lanes: bytes, place: Any, unreal: Unreal) -> None:
        """Take in those entries of the process that `lanes` marks with 0x80.

        They begin at `place`: a file, or None for the address space, and a page in it.
        `unreal` tells which of some numbers are not memory, or marks them as UNREAL.
        """
        file, index = place
        for start in range(-(index % LANES), len(lanes), LANES):
            first, end = max(start, 0), start + LANES
            here = lanes[first:end]
            if 0x80 in here:
                block = self.blocks[file, (index + first) // LANES]
                part = words[first * WORD : end * WORD]
                if block not in self.before:
                    self.before[block] = vars(block).copy()
                # Whatever equals what last was there, all entered, is so too.
                key = hash((part, here, first - start))
                if key != block.last[0]:
                    mark = ANON if file is None else IN_FILE
                    shift = 8 * (first - start)
                    wanted, same = self._match(block, shift, part, here, unreal, mark)
                    block.last = (key if wanted == same else None), same
                self._count(block, block.last[1], file is None)

    def _count(self, block: Block, lanes: int, anonymous: bool) -> None:
        """Note that the process maps these lanes, as they are known."""
        if block.times == 255:
            block.mapped, block.times = (0, *block.mapped), 0
        block.mapped = (block.mapped[0] + (lanes >> 7), *block.mapped[1:])
        block.times += 1
        number = lanes.to_bytes(LANES, "little").count(0x80)
        again = lanes & self.own[block]
        self.matched += number - (again.to_bytes(LANES, "little").count(0x80) if again else 0)
        self.mapped += number if anonymous else 0
        self.own[block] |= lanes

    def _match(
        self, block: Block, shift: int, words: bytes, lanes: bytes, unreal: Unreal, mark: int
    ) -> tuple[int, int]:
        """Compare entries with a Block, and enter in it what is new.

        Lanes that are marked, and those of them in which the process now equals the Block.
        """
        wanted = int.from_bytes(lanes, "little") << shift
        planes = [int.from_bytes(words[i::WORD], "little") << shift for i in range(NUMBER_BYTES)]
        same = wanted & block.known
        if same:
            differ = functools.reduce(int.__or__, map(int.__xor__, planes, block.planes))
            differ |= (differ & SEVENS) + SEVENS  # the top bit tells that a lane is not 0
            same ^= same & differ
        if same != wanted:
            entered = self._enter(wanted ^ same, block.known, shift, words, unreal, mark)
            fill = (entered << 1) - (entered >> 7)  # all ones in the lanes that have their top bit
            block.planes = [old | (new & fill) for old, new in zip(block.planes, planes)]
            block.known |= entered
            same |= entered
        return wanted, same

    def _enter(
        self, lanes: int, known: int, shift: int, words: bytes, unreal: Unreal, mark: int
    ) -> int:
        """Mark the numbers in these lanes, which differ from their Block; lanes to take them."""
        length = len(words) // WORD
        chosen = (lanes >> shift).to_bytes(length, "little")
        taken = ((lanes & known) >> shift).to_bytes(length, "little")
        numbers = numbers_of(words)
        if 0 in chosen:
            numbers = list(compress(numbers, chosen))
        marks, not_memory = self.marks, unreal(numbers)
        # The PART of a number is its upper bytes, of which mostly one only varies.
        first, second, third = (words[n::WORD] for n in range(2, NUMBER_BYTES))
        if not_memory:
            parts = {number // PART for number in numbers if number not in not_memory}
        elif second.count(second[0]) == third.count(third[0]) == length:
            parts = {part + (second[0] << 8) + (third[0] << 16) for part in set(first)}
        else:
            parts = {number // PART for number in numbers}
        self.reach(max(parts, default=0) * PART)
        self.parts |= parts
        if not (any(taken) or self.claimed or not_memory):
            following = iter(numbers)
            for number in following:  # the usual case, and the loop that costs most
                if marks[number]:
                    break
                marks[number] = mark
            else:
                self.new += len(numbers)
                return lanes
            for entry in numbers[: -1 - len(list(following))]:
                marks[entry] = NEW
        entered = bytearray(length)
        for i, number in zip(compress(count(), chosen), numbers):
            known_as = marks[number] if number < len(marks) else UNREAL
            if known_as == UNREAL:
                continue
            if known_as:
                self.strays[number] += 1
            elif number not in not_memory:
                self.new += number // PMD_PAGES not in self.claimed
                if taken[i]:
                    marks[number] = HOMELESS
                    self.strays[number] += 1
                    self.homeless.append(number)
                else:
                    marks[number] = mark
                    entered[i] = 0x80
        return int.from_bytes(entered, "little") << shift

    def reach(self, number: int) -> None:
        """Have marks up to the end of the number's PART."""
        end = (number // PART + 1) * PART
        if end > len(self.marks):
            self.marks.resize(end)

    def claim(self, first: int) -> bool:
        """Whether nobody before has anything of the huge page from this PFN on."""
        if any(self.marks[first : first + PMD_PAGES]):
            return False
        self.reach(first)
        self.parts.add(first // PART)
        self.claims.add(first // PMD_PAGES)
        self.claimed.add(first // PMD_PAGES)
        return True

    def commit(self) -> tuple[int, int]:
        """End a process: how many different numbers it has, and how many nobody had before."""
        distinct = self.matched + len(self.strays)
        at_home = {number for number in self.strays if self.marks[number] != HOMELESS}
        if at_home:
            for block, lanes in self.own.items():
                distinct -= len(at_home.intersection(block.numbers(lanes)))
        self.astray.update(self.strays)
        self.mappings += self.mapped
        result = distinct, self.new
        self._begin()
        return result

    def rollback(self) -> None:
        """Forget what came from the current process."""
        for block, state in self.before.items():
            self.homeless += block.numbers(block.known ^ state["known"])
            vars(block).update(state)
        for number in self.homeless:
            self.marks[number] = NEW
        self.claimed -= self.claims
        self._begin()


# Frames and swap slots of a process, and those of them that nobody had before.
Count = namedtuple("Count", "frames new_frames slots new_slots")


class Census:
    """The count over all processes."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.frames, self.slots = Ledger(), Ledger()
        self.private = 0  # PRIVATE frames
        self.huge_unreal: set[int] = set()  # huge pages (PFN // PMD_PAGES) that are no memory
        # To know processes that share their memory (vfork, CLONE_VM) by: for each first
        # mapping and page of a PRIVATE frame, by PFN, what its process counted.
        self.witnesses: defaultdict[Any, dict[int, dict[int, Count]]] = defaultdict(dict)

    def process(self, reading: Reading, chunks: Iterable[Chunk]) -> tuple[Count, Counter[bytes]]:
        """Count one process, and wait for its usage; chunks come in order of address.

        If either raises an error, it is as if the process had never been met.
        """
        if not (reading.frames and reading.pieces):
            return Count(0, 0, 0, 0), reading.usage()
        family = self.witnesses[reading.pieces[0][:4]]
        for page, counts in family.items():
            twin = counts.get(reading.private_frame(page))
            if twin:
                return twin._replace(new_frames=0, new_slots=0), reading.usage()
        private = 0
        witness = None
        try:
            for chunk in chunks:
                kinds = self._kinds(chunk)
                alone = kinds.count(PRIVATE)
                if alone and not witness:
                    at = kinds.index(PRIVATE)
                    witness = chunk.start + at, number_of(chunk.words, at)
                private += alone
                if alone + kinds.count(NOTHING) < len(kinds):
                    device = self._device if chunk.piece.file else self._zero
                    self._shared(chunk, kinds, self._huge_zero, device, no_swap)
            kib = reading.usage()
        except BaseException:
            self.frames.rollback()
            self.slots.rollback()
            raise
        frames, new_frames = self.frames.commit()
        result = Count(private + frames, private + new_frames, *self.slots.commit())
        self.private += private
        if witness:
            family.setdefault(witness[0], {})[witness[1]] = result
        return result, kib

    def visit_itself(self) -> None:
        """Note what memuse maps of the set's files: it is not to be outside the set."""
        files = {file for file, _ in self.frames.blocks}
        with open(proc("self/maps"), "rb") as maps, open(proc("self/pagemap"), "rb") as pagemap:
            for piece in pieces_of(parse_vmas(maps), Counter()):
                if piece.file and piece.file in files:
                    words = read_words(pagemap.fileno(), piece.start, piece.end - piece.start)
                    kinds = words[FLAGS::WORD].translate(KINDS)
                    # What is not known yet is as good as unreal.
                    self._shared(Chunk(piece, piece.start, words), kinds, set, set, set)
        self.frames.commit()
        self.slots.commit()

    def _kinds(self, chunk: Chunk) -> bytes:
        """What each entry stands for; PRIVATE only if it is.

        EXCLUSIVE is not to be trusted in a PMD-mapped huge page: all its entries have
        its first page's bit (before 6.11, and seen again in 6.18), while others may
        have its other pages, having copied or given up the first after a fork.
        """
        kinds: bytes = chunk.words[FLAGS::WORD].translate(KINDS)
        if PRIVATE not in kinds:
            return kinds
        for at in range(-chunk.start % PMD_PAGES, len(kinds) - PMD_PAGES + 1, PMD_PAGES):
            if (
                kinds[at] == PRIVATE
                and int.from_bytes(chunk.words[at * WORD : at * WORD + 2], "little") % PMD_PAGES
                == 0
            ):
                page = chunk.words[at * WORD : (at + PMD_PAGES) * WORD]
                first = unpack(page[:WORD])[0]
                if page != struct.pack(f"<{PMD_PAGES}Q", *range(first, first + PMD_PAGES)):
                    continue  # mapped page by page, each with its own bit
                if not self.frames.claim(first & NUMBER_MASK):
                    kinds = kinds[:at] + bytes([SHARED]) * PMD_PAGES + kinds[at + PMD_PAGES :]
        return kinds

    def _shared(
        self, chunk: Chunk, kinds: bytes, of_file: Unreal, shared: Unreal, in_swap: Unreal
    ) -> None:
        piece, start, words = chunk
        in_file = piece.file, piece.offset + start - piece.start
        for kind, ledger, place, unreal in (
            (OF_FILE, self.frames, in_file, of_file),
            (SHARED, self.frames, (None, start), shared),
            (IN_SWAP, self.slots, (None, start), in_swap),
        ):
            if kind in kinds:
                ledger.add(words, kinds.translate(LANES_OF[kind]), place, unreal)

    def _huge_zero(self, numbers: list[int]) -> set[int]:
        # The huge zero page passes for a file's.  It comes whole, its first page first.
        for number in numbers:
            if number % PMD_PAGES == 0 and self.kernel.flags_of(number) & KPF_NO_MEMORY:
                self.huge_unreal.add(number // PMD_PAGES)
        if not self.huge_unreal:
            return set()
        return {number for number in numbers if number // PMD_PAGES in self.huge_unreal}

    def _zero(self, numbers: list[int]) -> set[int]:
        for number in self.kernel.zero_pages:
            self.frames.reach(number)
            self.frames.marks[number] = UNREAL
        return set()

    def _device(self, numbers: list[int]) -> set[int]:
        # What the VMA of a file has without being the file's is a process's own copy,
        # or device memory.  Flags change, so nothing is remembered.
        return {number for number in numbers if not self.kernel.flags_of(number) & KPF_ANON}

    def alone(self, readers: Readers) -> int:
        """How many frames have in the set all the mappings that the kernel knows of.

        Those are in /proc/kpagecount (pagemap.rst), of which only what is needed is read.
        """
        frames, marks = self.frames, self.frames.marks
        for huge in frames.claimed:
            page = slice(huge * PMD_PAGES, (huge + 1) * PMD_PAGES)
            marks[page] = marks[page].replace(bytes([NEW]), bytes([CLAIMED]))
        mapcounts = memoryview(lazy_bytes(4 * len(marks))).cast("I")
        reads = readers.ahead((functools.partial(self._mapcounts, n) for n in frames.parts), 4)
        mapped = 0
        for first, run, of_anon in chain.from_iterable(result() for result in reads):
            mapcounts[first : first + len(run)] = run
            mapped += of_anon
        # What is left when mappings that no Block knows of are taken off:
        alone = others = 0
        for huge in frames.claimed:
            for number in range(huge * PMD_PAGES, (huge + 1) * PMD_PAGES):
                mapcounts[number] -= min(1, mapcounts[number])
                others += marks[number] == ANON
                alone += marks[number] == CLAIMED and not mapcounts[number]
        for number, times in frames.astray.items():
            mapcounts[number] -= min(times, mapcounts[number])
            others += times if marks[number] == ANON else 0
            alone += marks[number] == HOMELESS and not mapcounts[number]
        # No frame has more mappings in the set than in all: if the sums are equal, so is each.
        all_anon = mapped == frames.mappings + others
        for (file, _), block in frames.blocks.items():
            if file is None and all_anon:
                alone += block.known.to_bytes(LANES, "little").count(0x80)
                continue
            inside = block.inside()
            counts = [mapcounts[number] for number in block.numbers(block.known)]
            alone += len(inside) if counts == inside else sum(map(operator.le, counts, inside))
        return alone + self.private - PMD_PAGES * len(frames.claimed)

    def _mapcounts(self, part: int) -> list[tuple[int, array.array[int], int]]:
        """For what is marked in a PART: the first PFN of a run, its mapcounts, those of ANONs."""
        runs = []
        start = part * PART
        marks = self.frames.marks[start : start + PART]
        met = marks.translate(IS_MARKED)
        at = met.find(1)
        while at >= 0:
            # The kernel takes 0.1 us for each frame, and some 10 us go by for a call.
            length = next(n for n in (512, 64, 1) if met.count(1, at, at + n) >= n / 16)
            words = read_words(self.kernel.count, start + at, length)
            run = array.array("I", unpack(words))
            anon = marks[at : at + length].translate(IS_ANON)
            runs.append((start + at, run, sum(compress(run, anon))))
            at = met.find(1, at + length)
        return runs


def no_swap(numbers: list[int]) -> set[int]:
    return {number for number in numbers if number & SWAP_TYPE_MASK >= SWAP_TYPES}


# ---- The set of processes -----------------------------------------------------


def process_tree(roots: list[int]) -> list[Node]:
    """The processes with these PIDs and their descendants, depth first, siblings by PID.

    From one pass over all processes: psutil's children(recursive=True) loses those
    whose parent exits between its two, and takes longer.  Error if a root is not there.
    """
    stats: dict[int, Stat] = {}
    children = defaultdict(list)
    for pid in sorted({*psutil.pids()} - {own_pid()}):
        with contextlib.suppress(*VANISHED):
            stats[pid] = read_stat(proc(f"{pid}/stat"))
            children[stats[pid].ppid].append(pid)
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
    tops = [root for root in roots if root not in below]
    return list(walk([(root, 0) for root in reversed(tops)]).values())


COMMAND_LIMIT = 1 << 17  # bytes: a process can claim any of its memory to be arguments


def command_line(cmdline: bytes, name: bytes) -> str:
    """The arguments joined by spaces or, without any, the name in brackets as ps has it."""
    line = cmdline[:COMMAND_LIMIT].rstrip(b"\0").replace(b"\0", b" ")
    if not line.strip():
        line = b"[%s]" % name
    shown = visible(line.decode("utf-8", "surrogateescape"))
    return shown + "..." if len(cmdline) > COMMAND_LIMIT else shown


def visible(text: str) -> str:
    """The text with what a terminal might obey, or not show, written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else escape(c) for c in text)


def escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8 (PEP 383)
        return f"\\x{ord(character) & 0xFF:02x}"
    return character.encode("unicode_escape").decode()


# The processes, then all together; PIDs left out, and why; how many exited.
Report = namedtuple("Report", "rows total skipped exited")


def measure(
    roots: list[int], wanted: set[str], kernel: Kernel, progress: Callable[[str], None]
) -> Report:
    """Count the processes with these PIDs and their descendants, as one set.

    Error if a root is not there, or ends before it is read.
    """
    nodes = process_tree(roots)
    census, readers = Census(kernel), Readers()
    rows: list[Row] = []
    skipped: dict[int, str] = {}
    exited = slots = pages = 0

    def chunks(reading: Reading) -> Iterator[Chunk]:
        nonlocal pages
        reads = readers.ahead((functools.partial(reading.read, b) for b in reading.batches), 6)
        for batch in chain([reading.first], (result() for result in reads)):
            yield from batch
            pages += sum(len(chunk.words) for chunk in batch) // WORD
            progress(f"{len(rows)} of {len(nodes)} processes, {pages} pages")

    starts = [functools.partial(Reading, node, kernel, wanted, readers) for node in nodes]
    for node, again, start in zip(nodes, starts, readers.ahead(starts, 4)):
        pid = node.pid
        for attempt in (start, again, again):
            try:
                with contextlib.closing(attempt()) as reading:
                    counted, kib = census.process(reading, chunks(reading))
            except VANISHED:
                continue
            except OSError as error:
                skipped[pid] = os.strerror(error.errno or 0)
            else:
                slots += counted.new_slots
                rows.append(row_of(node, reading, counted, kib))
            break
        else:
            if os.path.exists(proc(str(pid))):
                skipped[pid] = "it changed whenever it was read"
            elif pid in roots:
                raise Error(f"process {pid} exited while it was being read")
            else:
                exited += 1

    total: Row = {"command": f"{len(rows)} process{'' if len(rows) == 1 else 'es'}"}
    total |= {name: sum(row[name] for row in rows) for name in ("rss", "pss", "unique")}
    total |= {"frames": total["unique"], "size": total["unique"] * PAGE_SIZE}
    total |= {"swap": slots * PAGE_SIZE}
    if "uss" in wanted and wanted & FROM_PAGEMAP:
        census.visit_itself()
        total["uss"] = census.alone(readers) * PAGE_SIZE
    return Report(rows, total, skipped, exited)


def row_of(node: Node, reading: Reading, counted: Count, kib: Counter[bytes]) -> Row:
    return {
        "pid": node.pid,
        "ppid": node.stat.ppid,
        "depth": node.depth,
        "user": reading.user,
        "frames": counted.frames,
        "unique": counted.new_frames,
        "size": counted.frames * PAGE_SIZE,
        "rss": kib[b"Rss"] * 1024,
        "pss": kib[b"Pss"] * 1024,
        "uss": (kib[b"Private_Clean"] + kib[b"Private_Dirty"] + kib[b"Private_Hugetlb"]) * 1024,
        "swap": counted.slots * PAGE_SIZE,
        "command": reading.command,
    }


# ---- Output -------------------------------------------------------------------

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
SIZES, TEXTS = {"size", "rss", "uss", "pss", "swap"}, {"user", "command"}
IN_TABLE = "pid,frames,unique,size,uss,pss,swap,command"
IN_JSON = "pid,ppid,depth,frames,unique,size,rss,pss,uss,swap,command"


def human(size: int) -> str:
    """A size like 6.9M, in powers of 1024, as du and free write them."""
    value, unit = float(size), ""
    for unit in ("", *"KMGTPE"):  # noqa: B007
        if round(value) < 1024:
            break
        value /= 1024
    return f"{value:.1f}{unit}" if unit and round(value, 1) < 10 else f"{value:.0f}{unit}"


def kibibytes(size: int) -> str:
    return str(size // 1024)


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
    if not {"PYTHONIOENCODING", "PYTHONUTF8"} & os.environ.keys():
        settings = map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))
        if next(filter(None, settings), "") in ("C", "POSIX"):
            return "ascii"
    return sys.stdout.encoding


class Progress:
    """A line on stderr about what is going on, if that is a terminal and it takes long."""

    def __init__(self) -> None:
        self.shown = False
        self.next = time.monotonic() + 1

    def __call__(self, text: str) -> None:
        if time.monotonic() > self.next and sys.stderr and sys.stderr.isatty():
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
            self.shown, self.next = True, time.monotonic() + 0.1

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- The command line ---------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"memuse: {visible(message)}; see memuse --help\n")

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
    const: Any = {"dest": "size", "action": "store_const"}
    unit("-b", "--bytes", const=str, help="sizes in bytes", **const)
    unit("-h", "--human-readable", const=human, help="sizes like 6.9M, powers of 1024", **const)
    add("-J", "--json", action="store_true", help="JSON, sizes in bytes")
    add("-o", "--output", metavar="COLUMNS", type=columns_argument, help="see below")
    add("--help", action="help", help="show this and exit")
    add("--version", action="version", version=f"memuse {__version__}")
    add("pids", metavar="PID", type=pid_argument, nargs="+", help="a process, with all below it")
    parser.set_defaults(size=kibibytes)
    return parser.parse_args(argv)


def write(text: str, stream: TextIO | None) -> None:
    """Error if stdout cannot take it, but for a reader that has had enough."""
    try:
        if stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        stream.write(text)
        stream.flush()
    except OSError as error:
        if stream:  # Python is not to try again at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise Error(f"cannot write: {error.strerror}") from None


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[Report, str]:
    """The report and its text."""
    own_pid()  # before much is made of what this /proc lacks
    if sys.stdout is None:
        raise Error("standard output is closed")
    columns = arguments.output or (IN_JSON if arguments.json else IN_TABLE).split(",")
    pids = " ".join(map(str, arguments.pids))
    kernel = Kernel(not FROM_PAGEMAP.isdisjoint(columns), pids)
    report = measure(arguments.pids, set(columns), kernel, progress)
    if arguments.json:
        return report, as_json(report, columns) + "\n"
    encoding = output_encoding()
    lines = table(report, columns, arguments.size, not "└".encode(encoding, "ignore"))
    if sys.stdout.isatty():
        lines = [cut(line, os.get_terminal_size(sys.stdout.fileno()).columns) for line in lines]
    text = "".join(f"{line}\n" for line in lines)
    return report, text.encode(encoding, "backslashreplace").decode(encoding)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all done, 1 not or not all, 2 wrong usage, 130 interrupted."""
    progress, status = Progress(), 1
    messages: list[str] = []

    def interrupt(*_: Any) -> None:
        # At once: an exception could be lost in a destructor, or tell its traceback at exit.
        if progress.shown:
            os.write(2, b"\r\033[K")
        os._exit(130)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        report, text = run(parse_args(argv), progress)
        progress.clear()
        write(text, sys.stdout)
        messages += [f"process {pid} left out: {why}" for pid, why in report.skipped.items()]
        if report.exited:
            some = "1 process" if report.exited == 1 else f"{report.exited} processes"
            messages.append(f"{some} exited while being read")
        status = 1 if report.skipped else 0
    except (Error, OSError) as error:
        messages.append(str(error))
    except (MemoryError, RuntimeError):  # a thread cannot be started
        messages.append("there is not enough memory")
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    progress.clear()
    write("".join(f"memuse: {message}\n" for message in messages), sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
