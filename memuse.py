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

import argparse
import array
import codecs
import contextlib
import functools
import json
import locale
import mmap
import os
import queue
import re
import shutil
import struct
import sys
import threading
import time
import unicodedata
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import chain, compress, count
from typing import Any, Callable, NamedTuple, NoReturn, Optional, TypeVar

try:
    import fcntl

    import psutil
except ModuleNotFoundError as missing:
    if missing.name == "fcntl":
        raise SystemExit("memuse: only Linux has /proc/PID/pagemap") from None
    raise SystemExit(
        "memuse: psutil is missing: apt install python3-psutil, or pip install psutil"
    ) from None

__version__ = "1.0.0"

T = TypeVar("T")


class Error(Exception):
    """What can be expected to go wrong, told in the one line that the user sees."""


# What reading a process raises once it has ended or called exec.
VANISHED = (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess)


# ---- The kernel's interface ---------------------------------------------------

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
PMD_PAGES = PAGE_SIZE // 8  # pages under one page table, and so in a PMD-mapped huge page

# A pagemap entry (pagemap.rst): 8 bytes a page, here least significant byte first.
# Bits 0-54 hold the PFN, or swap type (0-4) and offset.  Physical addresses have
# 52 bits at the most, so a PFN has 40, and so has the slot of any real swap area.
ENTRY_SIZE = 8
NUMBER_BYTES = 5
NUMBER_MASK = (1 << 8 * NUMBER_BYTES) - 1
# The last byte holds bits 56-63.
FLAGS_BYTE = 7
EXCLUSIVE, GUARD, FILE, SWAPPED, PRESENT = 1 << 0, 1 << 2, 1 << 5, 1 << 6, 1 << 7

# Bits 0-4 of a swapped entry.  Types from here up are not swap but migration,
# poison, device and marker entries (MAX_SWAPFILES, include/linux/swap.h).
SWAP_TYPE_MASK, SWAP_TYPES = 0x1F, 23

# /proc/kpageflags and kpagecount (pagemap.rst): a u64 per frame.
KPF_ANON, KPF_NOPAGE, KPF_ZERO_PAGE = 1 << 12, 1 << 20, 1 << 24

# ioctl PAGEMAP_SCAN on pagemap (pagemap.rst): struct pm_scan_arg is twelve u64.
PAGEMAP_SCAN = 0xC0606610
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4

PF_KTHREAD = 0x00200000  # /proc/PID/stat's flags (include/linux/sched.h)

# What an entry stands for, told from its flags.
NOTHING, PRIVATE, SHARED, OF_FILE, IN_SWAP = range(5)


def kind_of(flags: int) -> int:
    """What an entry with these flags (its bits 56-63) stands for.

    PRIVATE is anonymous memory that one process alone maps, and maps once: nobody
    else can have the frame.  SHARED is other memory without a file: copy-on-write,
    KSM, but also the zero page and device memory.
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


class Vma(NamedTuple):
    start: int  # page numbers: addresses in pages
    end: int
    offset: int  # of `start` in the file, in pages
    file: Optional[bytes]  # device and inode, or the name of a special mapping; None: anonymous
    kib: dict[bytes, int]  # smaps' fields, in KiB; empty if read from maps


VMA_LINE = re.compile(
    rb"([0-9a-f]{1,16})-([0-9a-f]{1,16}) [-\w]{4} ([0-9a-f]{1,16}) ([0-9a-f]+:[0-9a-f]+ (\d+)) *(.*)"
)
ANONYMOUS = (b"[heap]", b"[stack", b"[anon:")  # names of mappings that are anonymous all the same
OCCUPIED = (b"Rss", b"Swap", b"Shared_Hugetlb", b"Private_Hugetlb")
VSYSCALL = (1 << 63) // PAGE_SIZE  # above what pagemap covers
HOLE = 64  # pages that cost less to read over than another call


def parse_vmas(lines: Iterable[bytes]) -> Iterator[Vma]:
    """The VMAs in the lines of /proc/PID/maps, smaps or smaps_rollup (proc.rst).

    Error at a line that is neither a VMA's nor a field's.
    """
    vma = None
    for line in lines:
        match = VMA_LINE.match(line)
        if match:
            if vma:
                yield vma
            start, end, offset = (int(match[i], 16) // PAGE_SIZE for i in (1, 2, 3))
            name = match[6] if match[6] and not match[6].startswith(ANONYMOUS) else None
            vma = Vma(start, end, offset, name if match[5] == b"0" else match[4], {})
            continue
        field, colon, value = line.partition(b":")
        number, _, unit = value.strip().partition(b" ")
        if not vma or not colon:
            raise Error(f"cannot make out the kernel's list of mappings: {line[:60]!r}")
        if unit == b"kB" and number.isdigit():
            vma.kib[field] = int(number)
    if vma:
        yield vma


def pieces_of(vmas: Iterable[Vma], kib: Counter[bytes]) -> list[Vma]:
    """What is to be looked at: VMAs that may hold something, anonymous neighbours as one.

    The fields of all VMAs are added to `kib`.
    """
    pieces: list[Vma] = []
    for vma in vmas:
        kib.update(vma.kib)
        if vma.start >= VSYSCALL or (vma.kib and not any(map(vma.kib.get, OCCUPIED))):
            continue
        last = pieces[-1] if pieces else vma
        if last.file is None and vma.file is None and 0 <= vma.start - last.end < HOLE:
            pieces[-1] = last._replace(end=vma.end)
        else:
            pieces.append(vma)
    return pieces


class Stat(NamedTuple):
    """Of /proc/PID/stat (proc.rst, table 1-4)."""

    state: bytes
    kernel_thread: bool
    threads: int
    started: int  # clock ticks since boot
    image: list[bytes]  # where exec put code, data, stack and arguments


def parse_stat(text: bytes) -> Stat:
    fields = text[text.rindex(b")") + 2 :].split()  # from the third on: names hold anything
    kernel_thread = bool(int(fields[6]) & PF_KTHREAD)
    image = fields[23:26] + fields[42:49]
    return Stat(fields[0], kernel_thread, int(fields[17]), int(fields[19]), image)


# ---- Reading ------------------------------------------------------------------


def proc(name: str) -> str:
    """The path of a file in /proc, or in what psutil takes for it."""
    return f"{psutil.PROCFS_PATH}/{name}"


def read_words(fd: int, first: int, number: int) -> bytes:
    """Words (u64) from pagemap or a /proc/kpage* file, least significant byte first.

    Less than asked for, if the file ends or the process is gone.
    """
    try:
        words = os.pread(fd, number * ENTRY_SIZE, first * ENTRY_SIZE)
    except ProcessLookupError:
        return b""
    if sys.byteorder == "big":
        swapped = array.array("Q", words)
        swapped.byteswap()
        words = swapped.tobytes()
    return words


def unpack(words: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(words) // ENTRY_SIZE}Q", words)


def number_of(words: bytes, at: int = 0) -> int:
    """The PFN, or swap type and offset, in one of some entries."""
    (entry,) = struct.unpack_from("<Q", words, at * ENTRY_SIZE)
    return int(entry) & NUMBER_MASK


def next_resident(pagemap: int, start: int, end: int) -> int:
    """The first page from `start` on that is present or swapped; else `end`.  By PAGEMAP_SCAN."""
    region = array.array("Q", [0, 0, 0])
    wanted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    argument = array.array("Q", [
        96, 0, start * PAGE_SIZE, end * PAGE_SIZE, 0,  # size, flags, start, end, walk_end
        region.buffer_info()[0], 1, 1,  # vec, vec_len, max_pages
        0, 0, wanted, wanted,  # category_inverted, _mask, _anyof_mask, return_mask
    ])  # fmt: skip
    found = fcntl.ioctl(pagemap, PAGEMAP_SCAN, argument, True)
    return region[0] // PAGE_SIZE if found else end


FROM_PAGEMAP, FROM_SMAPS = ("frames", "unique", "size", "swap"), ("rss", "uss", "pss")


class Wanted(NamedTuple):
    """What is to be read of processes."""

    columns: list[str]

    @property
    def frames(self) -> bool:
        """Whether pagemap has to be read."""
        return not {*FROM_PAGEMAP}.isdisjoint(self.columns)

    @property
    def usage(self) -> bool:
        """Whether smaps has to be read."""
        return not {*FROM_SMAPS}.isdisjoint(self.columns)


class Kernel(NamedTuple):
    """What this kernel has; open files."""

    scan: bool  # whether it has PAGEMAP_SCAN, from 6.7 on; others answer ENOTTY or EINVAL
    kpageflags: int = -1
    kpagecount: int = -1


def ask_kernel(arguments: str) -> Kernel:
    """Open what counting needs.  Error if we may not see PFNs, with what to run instead."""
    where = " (in a container: run it on the host)" if os.geteuid() == 0 else ""
    need = (
        f"seeing page frames takes CAP_SYS_ADMIN{where}: sudo {sys.argv[0]} {arguments}"
        f"; without frames: {sys.argv[0]} -o pid,rss,pss,command {arguments}"
    )
    here = array.array("B", b"here")
    try:
        own = os.open(proc("self/pagemap"), os.O_RDONLY)
        if not number_of(read_words(own, here.buffer_info()[0] // PAGE_SIZE, 1)):
            raise Error(need)
        kpageflags, kpagecount = (
            os.open(proc(f"kpage{x}"), os.O_RDONLY) for x in ("flags", "count")
        )
    except PermissionError:
        raise Error(need) from None
    except OSError as error:
        raise Error(f"the kernel lacks CONFIG_PROC_PAGE_MONITOR: {error}") from None
    try:
        next_resident(own, 0, 1)
        scan = True
    except OSError:
        scan = False
    os.close(own)
    return Kernel(scan, kpageflags, kpagecount)


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
        outcome: queue.SimpleQueue[tuple[Any, Optional[BaseException]]] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((call(), None))
            except BaseException as error:  # raised again where the result is asked for
                outcome.put((None, error))

        def result() -> T:
            value: T
            value, error = outcome.get()
            if error:
                raise error
            return value

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


class Node(NamedTuple):
    """A process in the tree."""

    process: psutil.Process
    ppid: int
    depth: int
    found: float  # seconds since boot (CLOCK_BOOTTIME) when all were listed


class Chunk(NamedTuple):
    """Neighbouring pagemap entries of one piece."""

    piece: Vma
    start: int  # page number
    words: bytes


Span = tuple[Vma, int, int]  # a piece, and which of its pages to read: first, end


class Reading:
    """A process while it is read: raises one of VANISHED if it ends or calls exec.

    All its files are opened by way of one descriptor of its directory and between
    two looks at its stat.  So they belong to one process and one memory, even if it
    calls exec or its PID is used anew: then there is nothing more in them.
    """

    # How many entries to ask for at a time: few where memory is sparse.
    LONG, SHORT = 1 << 15, PMD_PAGES

    def __init__(self, node: Node, kernel: Kernel, wanted: Wanted, readers: Readers) -> None:
        self.scan, self.wanted = kernel.scan, wanted
        self.pieces: list[Vma] = []
        self._kib: Counter[bytes] = Counter()
        self._rollup: Optional[int] = None
        self._files: list[int] = []
        weakref.finalize(self, close_all, self._files)  # once no thread reads any more
        directory = self._file(proc(str(node.process.pid)))
        stat = self._stat(directory)
        if stat.started > node.found * os.sysconf("SC_CLK_TCK"):
            raise ProcessLookupError  # its PID was used anew
        self.command = command_line(node.process)
        self.user = node.process.username() if "user" in wanted.columns else ""
        if stat.state in b"ZX" and stat.threads > 1:
            self._open(self._live_thread(directory))  # the first has ended, others run on
        elif stat.state not in b"ZX" and not stat.kernel_thread:
            self._open(directory)
        if self._stat(directory)[3:] != stat[3:]:
            raise ProcessLookupError
        self.usage = readers.submit(self._usage)
        self.batches = self._batches()
        self.first = self.read(next(self.batches, []))

    def _open(self, directory: int) -> None:
        if self.wanted.frames:
            self._pagemap = self._file("pagemap", directory)
        if self.wanted.usage and self.scan:
            self._rollup = self._file("smaps_rollup", directory)
        if self.wanted.frames or not self._rollup:
            # Without PAGEMAP_SCAN, smaps is needed to know which VMAs hold anything.
            maps = "smaps" if self.wanted.usage and not self.scan else "maps"
            self.pieces = pieces_of(self._vmas(self._file(maps, directory)), self._kib)
            if not self.pieces:
                raise ProcessLookupError

    def _file(self, name: str, directory: Optional[int] = None) -> int:
        self._files.append(os.open(name, os.O_RDONLY, dir_fd=directory))
        return self._files[-1]

    def _stat(self, directory: int) -> Stat:
        with open(os.open("stat", os.O_RDONLY, dir_fd=directory), "rb") as file:
            return parse_stat(file.read())

    def _live_thread(self, directory: int) -> int:
        tasks = self._file("task", directory)
        for tid in os.listdir(tasks):
            task = self._file(tid, tasks)
            if self._stat(task).state not in b"ZX":
                return task
            os.close(self._files.pop())
        raise ProcessLookupError

    def _vmas(self, fd: int) -> Iterator[Vma]:
        with open(fd, "rb", closefd=False) as file:
            yield from parse_vmas(file)

    def _usage(self) -> Counter[bytes]:
        """The kernel's figures in KiB, by the names they have in smaps."""
        if self._rollup is not None:
            pieces_of(self._vmas(self._rollup), self._kib)
        return self._kib

    def _batches(self) -> Iterator[list[Span]]:
        """Spans that hold whatever is resident and little else, in portions of like cost.

        They end at multiples of PMD_PAGES, so that no huge page is cut.
        """
        batch: list[Span] = []
        cost = 0
        for piece in self.pieces if self.wanted.frames else ():
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

    def read(self, batch: list[Span]) -> list[Chunk]:
        chunks = []
        for piece, start, end in batch:
            words = read_words(self._pagemap, start, end - start)
            if len(words) != (end - start) * ENTRY_SIZE:
                raise ProcessLookupError
            chunks.append(Chunk(piece, start, words))
        return chunks

    def private_frame(self, page: int) -> int:
        """The PFN of a page that this process alone maps; else 0, which no such page has."""
        words = read_words(self._pagemap, page, 1)
        return number_of(words) if words and kind_of(words[FLAGS_BYTE]) == PRIVATE else 0


def close_all(files: list[int]) -> None:
    while files:
        os.close(files.pop())


# ---- Counting -----------------------------------------------------------------

MANY = 255  # for a mapcount of so many or more, where there is but a byte for it
ONLY_2 = bytes(number == 2 for number in range(256))
LANES = 4 * PMD_PAGES
SEVENS = int.from_bytes(b"\x7f" * LANES, "little")


class Block:
    """What is known of LANES neighbouring pages: which number each was first met with.

    A lane is one page's byte in an integer of LANES bytes, so that one operation
    treats all pages.  `known` has 0x80 in the lanes that have a number; `planes` are
    the numbers: all lanes' lowest bytes, then the next.  `mapped` counts, for each,
    how often the set maps it; it is begun anew before a lane could overflow.
    """

    __slots__ = ("known", "mapped", "planes", "times")

    def __init__(self) -> None:
        self.known = self.times = 0
        self.planes = (0,) * NUMBER_BYTES
        self.mapped: tuple[int, ...] = (0,)

    def state(self) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
        return self.known, self.planes, self.mapped, self.times

    def count(self, lanes: int) -> None:
        """Note one more mapping of each of the lanes."""
        if self.times == 255:
            self.mapped, self.times = (0, *self.mapped), 0
        self.mapped = (self.mapped[0] + (lanes >> 7), *self.mapped[1:])
        self.times += 1

    def mappings(self) -> list[int]:
        """How often the set maps each of the known numbers."""
        lanes = self.known.to_bytes(LANES, "little")
        each = [compress(mapped.to_bytes(LANES, "little"), lanes) for mapped in self.mapped]
        return list(each[0]) if len(each) == 1 else [sum(n) for n in zip(*each)]

    def numbers(self, lanes: int) -> list[int]:
        """The numbers known in these lanes."""
        words = bytearray(LANES * ENTRY_SIZE)
        for i, plane in enumerate(self.planes):
            words[i::ENTRY_SIZE] = plane.to_bytes(LANES, "little")
        return list(compress(unpack(bytes(words)), lanes.to_bytes(LANES, "little")))


def popcount(lanes: int) -> int:
    return bin(lanes).count("1")  # int.bit_count came with Python 3.10


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
        self.blocks: defaultdict[tuple[Optional[bytes], int], Block] = defaultdict(Block)
        # A byte for each number, 1 once it was met; in segments, for PFNs have holes.
        self.marks: defaultdict[int, bytearray] = defaultdict(lambda: bytearray(1 << 16))
        self.claimed: set[int] = set()  # huge pages (PFN // PMD_PAGES) counted whole, unmarked
        self.astray: Counter[int] = Counter()  # strays, as often as the set maps them
        self._begin()

    def _begin(self) -> None:
        # Of the current process: what Blocks were before it, lanes in which it equals
        # them, strays, those of them that were new, and huge pages it claimed.
        self.before: dict[Block, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {}
        self.own: Counter[Block] = Counter()
        self.strays: Counter[int] = Counter()
        self.homeless: list[int] = []
        self.claims: list[int] = []
        self.matched = self.new = 0

    def add(
        self, chunk: Chunk, lanes: bytes, place: tuple[Optional[bytes], int], unreal: Unreal
    ) -> None:
        """Take in those entries of the process that `lanes` marks with 0x80.

        They begin at `place`: a file, or None for the address space, and a page in it.
        `unreal` tells which of some numbers that nobody had before are not memory.
        """
        file, index = place
        for start in range(-(index % LANES), len(lanes), LANES):
            first, end = max(start, 0), start + LANES
            if 0x80 in lanes[first:end]:
                block = self.blocks[file, (index + first) // LANES]
                words = chunk.words[first * ENTRY_SIZE : end * ENTRY_SIZE]
                self._match(block, first - start, words, lanes[first:end], unreal)

    def _match(self, block: Block, lane: int, words: bytes, lanes: bytes, unreal: Unreal) -> None:
        """Compare with a Block, from its lane `lane` on."""
        self.before.setdefault(block, block.state())
        shift = 8 * lane
        wanted = int.from_bytes(lanes, "little") << shift
        planes = [
            int.from_bytes(words[i::ENTRY_SIZE], "little") << shift for i in range(NUMBER_BYTES)
        ]
        same = wanted & block.known
        if same:
            differ = 0
            for plane, known in zip(planes, block.planes):
                differ |= plane ^ known
            differ |= (differ & SEVENS) + SEVENS  # the top bit tells that the lane is not 0
            same ^= same & differ
        if same != wanted:
            new = self._enter(block, wanted ^ same, shift, words, unreal)
            fill = (new << 1) - (new >> 7)  # all bits of the lanes that have their top bit
            block.known |= new
            block.planes = tuple(old | (p & fill) for old, p in zip(block.planes, planes))
            same |= new
        block.count(same)
        self.matched += popcount(same & ~self.own[block])
        self.own[block] |= same

    def _enter(self, block: Block, lanes: int, shift: int, words: bytes, unreal: Unreal) -> int:
        """Mark the numbers of these lanes, which differ from the Block; lanes to take them."""
        chosen, taken = (
            (some >> shift).to_bytes(len(words) // ENTRY_SIZE, "little")
            for some in (lanes, lanes & block.known)
        )
        numbers = [entry & NUMBER_MASK for entry in compress(unpack(words), chosen)]
        not_memory = unreal(numbers)
        entered = bytearray(len(chosen))
        for i, number in zip(compress(count(), chosen), numbers):
            segment = self.marks[number >> 16]
            if segment[number & 0xFFFF]:
                self.strays[number] += 1
            elif number not in not_memory:
                segment[number & 0xFFFF] = 1
                self.new += number // PMD_PAGES not in self.claimed
                if taken[i]:
                    self.strays[number] += 1
                    self.homeless.append(number)
                else:
                    entered[i] = 0x80
        return int.from_bytes(entered, "little") << shift

    def claim(self, first: int) -> bool:
        """Whether nobody before has anything of the huge page from this PFN on."""
        low = first & 0xFFFF
        if any(self.marks[first >> 16][low : low + PMD_PAGES]):
            return False
        self.claims.append(first // PMD_PAGES)
        self.claimed.add(first // PMD_PAGES)
        return True

    def commit(self) -> tuple[int, int]:
        """End a process: how many different numbers it has, and how many nobody had before."""
        distinct = self.matched + len(self.strays)
        if self.strays:
            for block, lanes in self.own.items():
                distinct -= len(self.strays.keys() & block.numbers(lanes))
        self.astray.update(self.strays)
        result = distinct, self.new
        self._begin()
        return result

    def rollback(self) -> None:
        """Forget what came from the current process."""
        for block, (known, planes, mapped, times) in self.before.items():
            self.homeless += block.numbers(block.known ^ known)
            block.known, block.planes, block.mapped, block.times = known, planes, mapped, times
        for number in self.homeless:
            self.marks[number >> 16][number & 0xFFFF] = 0
        self.claimed.difference_update(self.claims)
        self._begin()


class Count(NamedTuple):
    """Frames and swap slots of one process, and those of them that nobody had before."""

    frames: int = 0
    new_frames: int = 0
    slots: int = 0
    new_slots: int = 0


Unreal = Callable[[list[int]], set[int]]


class Census:
    """The count over all processes."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.frames, self.slots = Ledger(), Ledger()
        self.private = 0  # frames that were counted without being entered or claimed
        self.huge_zero: set[int] = set()  # PFNs
        # To know processes that share their memory (vfork, CLONE_VM) by: for each first
        # mapping and page of a PRIVATE frame, by PFN, what its process counted.
        self.witnesses: defaultdict[Any, dict[int, dict[int, Count]]] = defaultdict(dict)

    def process(self, reading: Reading, chunks: Iterable[Chunk]) -> tuple[Count, Counter[bytes]]:
        """Count one process, and wait for its usage; chunks come in order of address.

        If either raises an error, it is as if the process had never been met.
        """
        if not (reading.wanted.frames and reading.pieces):
            return Count(), reading.usage()
        family = self.witnesses[reading.pieces[0][:4]]
        for page, counts in family.items():
            twin = counts.get(reading.private_frame(page))
            if twin:
                return twin._replace(new_frames=0, new_slots=0), reading.usage()
        private = huge = 0
        witness: Optional[tuple[int, int]] = None
        try:
            for chunk in chunks:
                kinds = chunk.words[FLAGS_BYTE::ENTRY_SIZE].translate(KINDS)
                if PRIVATE in kinds:
                    kinds, claimed = self._claim_huge(chunk, kinds)
                    huge += claimed
                alone = kinds.count(PRIVATE)
                private += alone
                if alone and not witness:
                    at = kinds.index(PRIVATE)
                    witness = chunk.start + at, number_of(chunk.words, at)
                if alone + kinds.count(NOTHING) < len(kinds):
                    self._shared(chunk, kinds)
            kib = reading.usage()
        except BaseException:
            self.frames.rollback()
            self.slots.rollback()
            raise
        frames, new_frames = self.frames.commit()
        slots, new_slots = self.slots.commit()
        self.private += private - huge
        result = Count(private + frames, private + new_frames, slots, new_slots)
        if witness:
            family.setdefault(witness[0], {})[witness[1]] = result
        return result, kib

    def _claim_huge(self, chunk: Chunk, kinds: bytes) -> tuple[bytes, int]:
        """The kinds, none PRIVATE without being so, and how many pages are in huge ones.

        EXCLUSIVE is not to be trusted in a PMD-mapped huge page: all its entries have
        its first page's bit (before 6.11, and seen again in 6.18), while others may
        have its other pages, having copied or given up the first after a fork.
        """
        claimed = 0
        for at in range(-chunk.start % PMD_PAGES, len(kinds) - PMD_PAGES + 1, PMD_PAGES):
            if kinds[at] == PRIVATE and number_of(chunk.words, at) % PMD_PAGES == 0:
                page = chunk.words[at * ENTRY_SIZE : (at + PMD_PAGES) * ENTRY_SIZE]
                first = unpack(page[:ENTRY_SIZE])[0]
                if page != struct.pack(f"<{PMD_PAGES}Q", *range(first, first + PMD_PAGES)):
                    continue  # mapped page by page, each with its own bit
                if self.frames.claim(first & NUMBER_MASK):
                    claimed += PMD_PAGES
                else:
                    kinds = kinds[:at] + bytes([SHARED]) * PMD_PAGES + kinds[at + PMD_PAGES :]
        return kinds, claimed

    def _shared(self, chunk: Chunk, kinds: bytes) -> None:
        piece = chunk.piece
        self._frames(chunk, kinds, self._zero_huge, self._device if piece.file else self._zero)
        if IN_SWAP in kinds:
            lanes = kinds.translate(LANES_OF[IN_SWAP])
            self.slots.add(chunk, lanes, (None, chunk.start), no_swap)

    def _frames(self, chunk: Chunk, kinds: bytes, of_file: Unreal, shared: Unreal) -> None:
        piece, start = chunk.piece, chunk.start
        if OF_FILE in kinds:
            place = piece.file, piece.offset + start - piece.start
            self.frames.add(chunk, kinds.translate(LANES_OF[OF_FILE]), place, of_file)
        if SHARED in kinds:
            self.frames.add(chunk, kinds.translate(LANES_OF[SHARED]), (None, start), shared)

    def visit(self, chunks: Iterable[Chunk]) -> None:
        """Note a process's mappings of frames of the set, and nothing else of it."""
        for chunk in chunks:
            kinds = chunk.words[FLAGS_BYTE::ENTRY_SIZE].translate(KINDS)
            self._frames(chunk, kinds, set, set)  # what is not known yet is no memory
        self.frames.commit()

    def _zero_huge(self, numbers: list[int]) -> set[int]:
        # The huge zero page passes for a file's.  It comes whole, its first page first.
        for number in numbers:
            if number % PMD_PAGES == 0 and self._flags(number) & (KPF_ZERO_PAGE | KPF_NOPAGE):
                self.huge_zero.update(range(number, number + PMD_PAGES))
        return self.huge_zero

    def _zero(self, numbers: list[int]) -> set[int]:
        return self.zero_pages

    def _device(self, numbers: list[int]) -> set[int]:
        # What the VMA of a file has without being the file's is a process's own copy,
        # or device memory.  Flags change, so nothing is remembered.
        return {number for number in numbers if not self._flags(number) & KPF_ANON}

    def _flags(self, pfn: int) -> int:
        words = read_words(self.kernel.kpageflags, pfn, 1)
        return unpack(words)[0] if words else KPF_NOPAGE  # past the end

    @functools.cached_property
    def zero_pages(self) -> set[int]:
        """The PFNs of the zero page; some architectures have several in a row."""
        import ctypes  # not above: it takes 5 ms, and few processes alone need it

        page = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            page.madvise(mmap.MADV_NOHUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        assert page[0] == 0  # reading untouched memory maps the zero page
        own = os.open(proc("self/pagemap"), os.O_RDONLY)
        pfn = number_of(read_words(own, address // PAGE_SIZE, 1))
        os.close(own)
        first = max(0, pfn - 256)
        flags = unpack(read_words(self.kernel.kpageflags, first, 512))
        return {first + i for i, word in enumerate(flags) if word & KPF_ZERO_PAGE}

    def unshared(self, readers: Readers) -> int:
        """How many frames have in the set all the mappings that the kernel knows of.

        Those are in /proc/kpagecount (pagemap.rst), of which only what is needed is read.
        """
        frames = self.frames
        for huge in frames.claimed:
            segment, low = divmod(huge * PMD_PAGES, 1 << 16)
            page = frames.marks[segment][low : low + PMD_PAGES]
            frames.marks[segment][low : low + PMD_PAGES] = page.replace(b"\0", b"\2")
        calls = [functools.partial(self._mapcounts, *item) for item in frames.marks.items()]
        counts = dict(zip(frames.marks, (result() for result in readers.ahead(calls, 4))))
        claimed = (compress(counts[s], m.translate(ONLY_2)) for s, m in frames.marks.items())
        alone = self.private + sum(n == 1 for n in chain.from_iterable(claimed))
        strays = frames.astray.copy()
        for block in frames.blocks.values():
            numbers, inside = block.numbers(block.known), block.mappings()
            if strays or frames.claimed:
                for i, number in enumerate(numbers):
                    inside[i] += strays.pop(number, 0) + (number // PMD_PAGES in frames.claimed)
            alone += self._all_inside(numbers, inside, counts)
        inside = [n + (number // PMD_PAGES in frames.claimed) for number, n in strays.items()]
        return alone + self._all_inside(list(strays), inside, counts)

    def _all_inside(
        self, numbers: list[int], inside: list[int], counts: dict[int, bytearray]
    ) -> int:
        known = [counts[number >> 16][number & 0xFFFF] for number in numbers]
        if MANY in known:
            known = [
                unpack(read_words(self.kernel.kpagecount, number, 1))[0] if n == MANY else n
                for number, n in zip(numbers, known)
            ]
        return sum(map(int.__le__, known, inside))

    def _mapcounts(self, segment: int, marks: bytearray) -> bytearray:
        """The mapcounts of the marked numbers of a segment, or MANY."""
        counts = bytearray(len(marks))
        met = marks.replace(b"\2", b"\1")
        at = met.find(1)
        while at >= 0:
            # Where few are marked, one by one: the kernel takes 0.1 us for each.
            length = 512 if met.count(1, at, at + 512) > 50 else 1
            words = read_words(self.kernel.kpagecount, (segment << 16) + at, length)
            low = words[::ENTRY_SIZE]
            if any(words[1::ENTRY_SIZE]) or any(words[2::ENTRY_SIZE]) or MANY in low:
                low = bytes(min(n, MANY) for n in unpack(words))
            counts[at : at + len(low)] = low
            at = met.find(1, at + length)
        return counts


def no_swap(numbers: list[int]) -> set[int]:
    return {number for number in numbers if number & SWAP_TYPE_MASK >= SWAP_TYPES}


# ---- The set of processes -----------------------------------------------------


def own_pid() -> int:
    """In the PID namespace of this /proc, which need not be ours."""
    try:
        return int(os.readlink(proc("self")))
    except OSError:
        raise Error(f"no {proc('self')}: it belongs to another PID namespace") from None


def process_tree(roots: list[int]) -> list[Node]:
    """The processes with these PIDs and their descendants, depth first, siblings by PID.

    From one pass over all processes: psutil's children(recursive=True) loses those
    whose parent exits between its two.  Error if a root is not there.
    """
    processes = {p.pid: p for p in psutil.process_iter(["ppid"]) if p.pid != own_pid()}
    found = time.clock_gettime(time.CLOCK_BOOTTIME)
    children = defaultdict(list)
    for pid in sorted(processes):
        children[processes[pid].info["ppid"]].append(pid)
    for root in roots:
        if root not in processes:
            raise Error(f"there is no process {root}")
    nodes: dict[int, Node] = {}

    def walk(stack: list[tuple[int, int]]) -> None:
        while stack:
            pid, depth = stack.pop()
            if pid not in nodes:
                nodes[pid] = Node(processes[pid], processes[pid].info["ppid"], depth, found)
                stack += [(child, depth + 1) for child in reversed(children[pid])]

    below = [(child, 1) for root in roots for child in children[root]]
    walk(below)
    tops = [root for root in roots if root not in nodes] or roots
    nodes.clear()
    walk([(root, 0) for root in reversed(tops)])
    return list(nodes.values())


def command_line(process: psutil.Process) -> str:
    """The arguments joined by spaces or, without any, the name in brackets as ps has it."""
    try:
        line = " ".join(process.cmdline())
    except (psutil.AccessDenied, psutil.ZombieProcess):
        line = ""
    return visible(line if line.strip() else f"[{process.name()}]")


def visible(text: str) -> str:
    """The text with what a terminal might obey, or not show, written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else escape(c) for c in text)


def escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (PEP 383)
        return f"\\x{code & 0xFF:02x}"
    return character.encode("unicode_escape").decode()


Row = dict[str, Any]  # by names of columns, and depth; sizes in bytes, None if not read


class Report(NamedTuple):
    rows: list[Row]
    total: Row
    skipped: dict[int, str]  # PIDs and reasons
    exited: int  # processes that ended before they were read


def measure(
    roots: list[int], wanted: Wanted, kernel: Kernel, progress: Callable[[str], None]
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
        reads = readers.ahead((functools.partial(reading.read, b) for b in reading.batches), 4)
        for batch in chain([reading.first], (result() for result in reads)):
            yield from batch
            pages += sum(len(chunk.words) for chunk in batch) // ENTRY_SIZE
            progress(f"{len(rows)} of {len(nodes)} processes, {pages} pages")

    starts = [functools.partial(Reading, node, kernel, wanted, readers) for node in nodes]
    for node, again, start in zip(nodes, starts, readers.ahead(starts, 2)):
        pid = node.process.pid
        for attempt in (start, again, again):
            try:
                reading = attempt()
                count, kib = census.process(reading, chunks(reading))
            except VANISHED:
                continue
            except OSError as error:
                skipped[pid] = os.strerror(error.errno or 0)
            else:
                slots += count.new_slots
                rows.append(row_of(node, reading, count, kib))
            break
        else:
            if node.process.is_running():
                skipped[pid] = "it changed whenever it was read"
            elif pid in roots:
                raise Error(f"process {pid} exited while it was being read")
            else:
                exited += 1
    alone = None
    if "uss" in wanted.columns and wanted.frames:
        itself = Node(psutil.Process(own_pid()), 0, 0, float("inf"))
        census.visit(chunks(Reading(itself, kernel, wanted, readers)))  # is not outside the set
        alone = census.unshared(readers)
    return Report(rows, total_of(rows, wanted, slots, alone), skipped, exited)


def row_of(node: Node, reading: Reading, count: Count, kib: Counter[bytes]) -> Row:
    row: Row = {"pid": node.process.pid, "ppid": node.ppid, "depth": node.depth}
    row["user"], row["command"] = reading.user, reading.command
    if reading.wanted.frames:
        row["frames"], row["unique"] = count.frames, count.new_frames
        row["size"], row["swap"] = count.frames * PAGE_SIZE, count.slots * PAGE_SIZE
    if reading.wanted.usage:
        uss = kib[b"Private_Clean"] + kib[b"Private_Dirty"] + kib[b"Private_Hugetlb"]
        row["rss"], row["uss"], row["pss"] = kib[b"Rss"] * 1024, uss * 1024, kib[b"Pss"] * 1024
    return row


def total_of(rows: list[Row], wanted: Wanted, slots: int, alone: Optional[int]) -> Row:
    """Frames and slots once each, sums of RSS and PSS; as USS, the `alone` frames."""
    total: Row = {"command": f"{len(rows)} process{'' if len(rows) == 1 else 'es'}"}
    if wanted.frames:
        frames = sum(row["unique"] for row in rows)
        total.update(frames=frames, unique=frames, size=frames * PAGE_SIZE, swap=slots * PAGE_SIZE)
    if wanted.usage:
        total.update(rss=sum(row["rss"] for row in rows), pss=sum(row["pss"] for row in rows))
    if alone is not None:
        total["uss"] = alone * PAGE_SIZE
    return total


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
DEFAULT_JSON = ["pid", "ppid", "depth", *list(COLUMNS)[3:]]
DEFAULT = ["pid", "frames", "unique", "size", "uss", "pss", "swap", "command"]


def human(size: int) -> str:
    """A size like 6.9M, in powers of 1024, as du and free write them."""
    value, unit = float(size), ""
    for unit in ("", *"KMGTPE"):
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
        value = row.get(name)
        if value is None:
            return "TOTAL" if name == "pid" else "-"
        if name in SIZES:
            return size(value)
        return {"unique": "+", "command": tree}.get(name, "") + str(value)

    trees = tree_lines([row["depth"] for row in report.rows], ascii_only)
    lines = [[COLUMNS[name][0] for name in columns]]
    for row, tree in zip([*report.rows, report.total], [*trees, ""]):
        lines.append([cell(row, name, tree) for name in columns])
    for at, name in enumerate(columns):
        width = max(7, *(len(cells[at]) for cells in lines))
        for cells in lines:
            cells[at] = cells[at].ljust(width) if name in TEXTS else cells[at].rjust(width)
    return ["  ".join(cells).rstrip() for cells in lines]


def cut(line: str, width: int) -> str:
    """As much of the line as a terminal shows in `width` columns."""
    for end, character in enumerate(line):
        if not unicodedata.combining(character):
            width -= 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width < 0:
            return line[:end]
    return line


def as_json(report: Report, columns: list[str]) -> str:
    figures = [name for name in columns if name in (*FROM_PAGEMAP, *FROM_SMAPS)]
    return json.dumps(
        {
            "page_size": PAGE_SIZE,
            "processes": [{name: row[name] for name in columns} for row in report.rows],
            "total": {name: report.total.get(name) for name in figures if name != "unique"},
            "skipped": [{"pid": pid, "reason": why} for pid, why in report.skipped.items()],
        }
    )


def output_encoding() -> str:
    """That of stdout; ASCII where the user's locale says so, though Python writes UTF-8."""
    if not {"PYTHONIOENCODING", "PYTHONUTF8"} & os.environ.keys():
        with contextlib.suppress(LookupError):
            if codecs.lookup(locale.nl_langinfo(locale.CODESET)).name == "ascii":
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


def pid_argument(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a PID")
    return int(text)


def columns_argument(text: str) -> list[str]:
    columns = text.split(",")
    for name in columns:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(f"{name!r} is no column")
    return columns


def parse_args(argv: Optional[list[str]]) -> argparse.Namespace:
    listed = "\n".join(f"  {name:8} {text}" for name, (_, text) in COLUMNS.items())
    parser = Parser(
        prog="memuse",
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Count the physical memory that a tree of processes really occupies.",
        epilog=f"columns:\n{listed}\n\ndefault: {','.join(DEFAULT)}; sizes in KiB",
    )
    units = parser.add_mutually_exclusive_group()
    store: Any = {"dest": "size", "action": "store_const"}
    units.add_argument("-b", "--bytes", const=str, help="sizes in bytes", **store)
    units.add_argument(
        "-h", "--human-readable", const=human, help="sizes like 6.9M, powers of 1024", **store
    )
    parser.add_argument("-J", "--json", action="store_true", help="JSON, sizes in bytes")
    parser.add_argument(
        "-o", "--output", metavar="COLUMNS", type=columns_argument, help="columns, with commas"
    )
    parser.add_argument("--help", action="help", help="show this and exit")
    parser.add_argument("--version", action="version", version=f"memuse {__version__}")
    parser.add_argument(
        "pids", metavar="PID", type=pid_argument, nargs="+", help="a process, with all below it"
    )
    parser.set_defaults(size=kibibytes)
    return parser.parse_args(argv)


def complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed
        sys.stderr.write(f"memuse: {text}\n")
        sys.stderr.flush()


def main(argv: Optional[list[str]] = None) -> int:
    arguments = parse_args(argv)
    progress = Progress()
    try:
        report, text = run(arguments, progress)
        progress.clear()
        write(text)
    except Error as error:
        progress.clear()
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        progress.clear()
        return 130
    for pid, reason in report.skipped.items():
        complain(f"process {pid} left out: {reason}")
    if report.exited:
        some = "1 process" if report.exited == 1 else f"{report.exited} processes"
        complain(f"{some} exited while being read")
    return 1 if report.skipped else 0


def run(arguments: argparse.Namespace, progress: Progress) -> tuple[Report, str]:
    """The report and its text."""
    columns = arguments.output or (DEFAULT_JSON if arguments.json else DEFAULT)
    wanted = Wanted(columns)
    pids = " ".join(map(str, arguments.pids))
    kernel = (
        ask_kernel(pids)
        if wanted.frames
        else Kernel(scan=os.path.exists(proc("self/smaps_rollup")))
    )
    report = measure(arguments.pids, wanted, kernel, progress)
    encoding = output_encoding()
    if arguments.json:
        lines = [as_json(report, columns)]
    else:
        lines = table(report, columns, arguments.size, not "└".encode(encoding, "ignore"))
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns
            lines = [cut(line, width) for line in lines]
    text = "".join(f"{line}\n" for line in lines)
    return report, text.encode(encoding, "backslashreplace").decode(encoding)


def write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has had enough; nor is Python to try again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Error(f"cannot write: {error.strerror}") from None


if __name__ == "__main__":
    raise SystemExit(main())
