"""Processes with known memory, for tests to look at.

Each scene is a function below.  `python scenes.py NAME` builds it, forks its
children, prints "ready", and stands still until its standard input is closed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Callable

PAGE = mmap.PAGESIZE
MIB = 1 << 20
HUGE = 2 * MIB
MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 12, 14, 15
MADV_DONTNEED, MADV_PAGEOUT, MADV_GUARD_INSTALL = 4, 21, 102
MAP_HUGETLB, MAP_NORESERVE, MAP_FIXED = 0x40000, 0x4000, 0x10
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
RW = mmap.PROT_READ | mmap.PROT_WRITE

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = libc.madvise.argtypes
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

children: list[int] = []


def map_memory(
    size: int, flags: int = ANON, fd: int = -1, *, prot: int = RW, offset: int = 0
) -> int:
    address: int | None = libc.mmap(None, size, prot, flags, fd, offset)
    if address == ctypes.c_void_p(-1).value or address is None:
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def map_huge(size: int) -> int:
    """Anonymous memory aligned to huge pages, of which it will have as many as it can."""
    address = map_memory(size + HUGE)
    address += -address % HUGE
    advise(address, size, MADV_HUGEPAGE)
    return address


def advise(address: int, size: int, advice: int) -> None:
    if libc.madvise(address, size, advice):
        raise OSError(ctypes.get_errno(), f"madvise {advice}")


def write(address: int, pages: Iterable[int], value: int | None = None) -> None:
    for page in pages:
        ctypes.memset(address + page * PAGE, page % 250 + 1 if value is None else value, PAGE)


def unmap(address: int, size: int) -> None:
    libc.munmap(address, size)


def touch(address: int, pages: range) -> None:
    for page in pages:
        ctypes.c_char.from_address(address + page * PAGE).value  # noqa: B018


def fork(act: Callable[[], None] = lambda: None) -> None:
    """A child that acts, and then stands still like its parent."""
    done, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        children.clear()
        os.close(done)
        try:
            act()
            os.write(told, b"x")
            os.close(told)
            stand_still()
        finally:
            os._exit(1)
    os.close(told)
    if os.read(done, 1) != b"x":
        raise SystemExit("a child failed")
    os.close(done)
    children.append(pid)


def stand_still() -> None:
    while os.read(0, 1):
        pass
    for pid in children:
        os.waitpid(pid, 0)
    os._exit(0)


# ---- The scenes -----------------------------------------------------------------


def plain() -> None:
    write(map_memory(3 * MIB), range(701))


def forked() -> None:
    """Copy-on-write, three generations, each wrote a part."""
    memory = map_memory(8 * MIB)
    write(memory, range(1499))

    def child() -> None:
        write(memory, range(100, 199), 7)
        fork(lambda: write(memory, range(150, 233, 2), 9))

    fork(child)
    fork(lambda: write(memory, range(1400, 1600), 5))


def generations() -> None:
    """Five generations; each, and its second child, wrote anew to pages that others wrote to."""
    memory = map_memory(4 * MIB)

    def rewrite(generation: int) -> None:
        write(memory, range(generation * 31, 900, generation + 1), generation)
        if generation < 5:
            fork(lambda: rewrite(generation + 1))
            fork(lambda: write(memory, range(generation, 700, 3), 7))

    rewrite(0)


def crowd() -> None:
    """Pages that a child maps 300 times and its child 200 times, and the parent some of them."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(20 * PAGE))
        file.flush()

        def place() -> int:
            return map_memory(20 * PAGE, mmap.MAP_SHARED, file.fileno())

        def many() -> None:
            places = [place() for _ in range(300)]
            for address in places:
                touch(address, range(12))
            touch(places[0], range(17))
            fork(lambda: [unmap(address, 20 * PAGE) for address in places[200:]] and None)

        touch(place(), range(4))
        fork(many)


def zero() -> None:
    """The zero page next to real ones, in a parent and its child."""
    memory = map_memory(16 * MIB)
    advise(memory, 16 * MIB, MADV_NOHUGEPAGE)
    touch(memory, range(4096))
    write(memory, range(0, 4096, 37))
    fork(lambda: write(memory, range(1, 4096, 41)))


def huge_zero() -> None:
    """The huge zero page and real huge pages in one VMA; and in a private /dev/zero."""
    memory = map_huge(12 * MIB)
    touch(memory, range(0, 3072, 512))
    write(memory, range(512, 1024))
    fd = os.open("/dev/zero", os.O_RDWR)
    address = map_memory(8 * MIB, mmap.MAP_PRIVATE, fd)
    address += -address % HUGE
    advise(address, 4 * MIB, MADV_HUGEPAGE)
    touch(address, range(1024))
    write(address, range(3))
    fork()


def huge() -> None:
    """Huge pages shared by fork, of which the child copied parts and the parent others.

    Of one, all but the second child copied the first page, and it passes for its own.
    """
    memory = map_huge(16 * MIB)
    write(memory, range(4096))
    fork(lambda: write(memory, [*range(512, 700), 2560], 3))
    fork(lambda: unmap(memory + HUGE, HUGE + 77 * PAGE))
    write(memory, [*range(2048, 2060), 2560], 2)


def lopsided() -> None:
    """A small process, and a child with nearly all of the memory."""
    memory = map_memory(64 * MIB)
    fork(lambda: write(memory, range(16000)))


def huge_misplaced() -> None:
    """Huge pages of a private /dev/zero that begin elsewhere than at a huge page of the file."""
    fd = os.open("/dev/zero", os.O_RDWR)
    memory = map_huge(8 * MIB)
    if libc.mmap(memory, 8 * MIB, RW, mmap.MAP_PRIVATE | MAP_FIXED, fd, 100 * PAGE) != memory:
        raise OSError(ctypes.get_errno(), "mmap")
    advise(memory, 8 * MIB, MADV_HUGEPAGE)
    write(memory, range(0, 2048, 512))
    fork(lambda: write(memory, [0, 512, 1024, 1536]))


def hugetlb() -> None:
    private = map_memory(3 * HUGE, ANON | MAP_HUGETLB)
    shared = map_memory(2 * HUGE, SHARED | MAP_HUGETLB)
    write(private, range(2 * HUGE // PAGE))
    write(shared, range(HUGE // PAGE))
    fork(lambda: write(private, range(1), 9))


def ksm() -> None:
    """Merged pages: several in one process, in a child, and in an unrelated place."""
    memory = map_memory(4 * MIB)
    advise(memory, 4 * MIB, MADV_MERGEABLE)
    for page in range(1024):
        ctypes.memset(memory + page * PAGE, page % 5 + 1, PAGE)
    scans = Path("/sys/kernel/mm/ksm/full_scans")
    start = int(scans.read_text())
    while int(scans.read_text()) < start + 3:
        time.sleep(0.02)
    fork(lambda: write(memory, range(200), 77))


def file_twice() -> None:
    """One file mapped twice, in part overlapping, privately with copies, and by a child."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(3 * MIB))
        file.flush()
        first = map_memory(3 * MIB, mmap.MAP_SHARED, file.fileno())
        touch(first, range(768))
        second = map_memory(MIB, mmap.MAP_PRIVATE, file.fileno(), offset=MIB)
        touch(second, range(256))
        write(second, range(0, 60))
        fork(lambda: write(second, range(50, 70)))
        third = map_memory(MIB, mmap.MAP_SHARED, file.fileno(), offset=MIB // 2)
        touch(third, range(256))


def misnamed() -> None:
    """Copies of a file whose name looks like what maps says of anonymous memory."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/x rw-p 00000000 00:00 0 "
        Path(path).write_bytes(os.urandom(MIB))
        with open(path, "r+b") as file:
            first = map_memory(MIB, mmap.MAP_SHARED, file.fileno())
            touch(first, range(256))
            second = map_memory(MIB // 2, mmap.MAP_SHARED, file.fileno(), offset=MIB // 4)
            touch(second, range(128))
            write(map_memory(MIB, mmap.MAP_PRIVATE, file.fileno()), range(50))
            fork(lambda: touch(second, range(128)))


def homeless() -> None:
    """A child holds pages of its parent's huge page, in the place of another's pages."""
    memory = map_huge(2 * HUGE)
    write(memory, range(1024))
    elsewhere = map_memory(HUGE)
    advise(elsewhere, HUGE, MADV_NOHUGEPAGE)
    write(elsewhere, range(512))

    def mover() -> None:
        write(memory, range(3), 7)
        size = 100 * PAGE
        libc.mremap(memory + 10 * PAGE, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere)

    fork()
    fork(mover)


def shared() -> None:
    """Shared memory that each process touched in part; the last moved its mapping."""
    memory = map_memory(8 * MIB, SHARED)
    write(memory, range(1000))

    def mover() -> None:
        elsewhere = libc.mremap(memory, 8 * MIB, 8 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, at)
        touch(elsewhere, range(0, 2000, 3))

    at = map_memory(8 * MIB, prot=0)
    fork(lambda: touch(memory, range(500, 1300, 2)))
    fork(mover)


def windows() -> None:
    """A file of which each process maps another part, and elsewhere."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(8 * MIB))
        file.flush()

        def window(offset: int) -> None:
            size = 8 * MIB - offset
            touch(
                map_memory(size, mmap.MAP_SHARED, file.fileno(), offset=offset), range(size // PAGE)
            )

        window(0)
        fork(lambda: window(2 * MIB))
        fork(lambda: window(3 * MIB))


def scattered() -> None:
    """Pages far apart, of which a child has copies, and others beside them."""
    shared, copied = map_memory(40 * 8 * MIB, SHARED), map_memory(40 * 8 * MIB)
    advise(copied, 40 * 8 * MIB, MADV_NOHUGEPAGE)
    write(shared, range(5, 40 * 2048, 2048))
    write(copied, range(7, 40 * 2048, 500))

    def child() -> None:
        write(shared, range(0, 3 * 2048, 3))
        write(copied, range(7, 40 * 2048, 1500))
        fork(lambda: touch(shared, range(5, 40 * 2048, 4096)))

    fork(child)
    fork(lambda: touch(shared, range(5, 40 * 2048, 4096)))


def moved() -> None:
    """A child moved copy-on-write memory to where its sister has other, and wrote to some."""
    memory = map_memory(4 * MIB)
    elsewhere = map_memory(4 * MIB)
    write(memory, range(900))
    write(elsewhere, range(300))

    def mover() -> None:
        libc.mremap(memory, 4 * MIB, 4 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere)
        write(elsewhere, range(0, 900, 5))
        fork()

    fork(mover)
    fork()


def guarded() -> None:
    memory = map_memory(2 * MIB)
    write(memory, range(300))
    advise(memory + 100 * PAGE, 100 * PAGE, MADV_GUARD_INSTALL)
    fork()


def swapped() -> None:
    """Slots shared by fork: paged out before the fork, and read back by one child."""
    memory = map_memory(8 * MIB)
    advise(memory, 8 * MIB, MADV_NOHUGEPAGE)
    write(memory, range(1200))
    advise(memory, 8 * MIB, MADV_PAGEOUT)
    fork(lambda: write(memory, range(0, 300, 3)))
    fork(lambda: touch(memory, range(900, 1100)))
    other = map_memory(2 * MIB)
    write(other, range(400))
    advise(other, 2 * MIB, MADV_PAGEOUT)


def mappings() -> None:
    """Thousands of VMAs of one page, no two of one protection side by side."""
    memory = map_memory(5001 * PAGE)
    write(memory, range(5001))
    for page in range(0, 5001, 2):
        libc.mprotect(memory + page * PAGE, PAGE, mmap.PROT_READ)
    fork(lambda: write(memory, range(1, 1001, 2)))


def sparse() -> None:
    """Far-apart pages in much reserved address space."""
    memory = map_memory(1 << 37, ANON | MAP_NORESERVE)
    advise(memory, 1 << 37, MADV_NOHUGEPAGE)
    step = (1 << 37) // PAGE // 129
    write(memory, range(step, 128 * step, step))
    write(memory, range(7 * step, 7 * step + 3000))
    fork(lambda: write(memory, range(7 * step + 500, 7 * step + 800), 1))


def vforked(at: int | None = None) -> None:
    """A process that shares its parent's memory: a spawn that waits for a FIFO's writer.

    Huge pages at an address below all else are the parent's alone: it forks before.
    """

    def fill() -> None:
        write(map_memory(4 * MIB), range(811))
        if at:
            low = libc.mmap(ctypes.c_void_p(at), 8 * MIB, RW, ANON | MAP_FIXED, -1, 0)
            advise(low, 8 * MIB, MADV_HUGEPAGE)
            write(low, range(2048))

    with tempfile.TemporaryDirectory() as directory:
        fifo = f"{directory}/fifo"
        os.mkfifo(fifo)

        def open_later() -> None:
            if os.fork() == 0:
                stand_still_then_write(fifo)

        open_later()
        fill()
        print("ready", flush=True)
        actions = [(os.POSIX_SPAWN_OPEN, 3, fifo, os.O_RDONLY, 0)]
        os.posix_spawn("/bin/true", ["true"], {}, file_actions=actions)
    os._exit(0)


def vforked_huge() -> None:
    vforked(0x200000)


def stand_still_then_write(fifo: str) -> None:
    while os.read(0, 1):
        pass
    os.close(os.open(fifo, os.O_WRONLY))
    os._exit(0)


def lone_thread() -> None:
    """The main thread ends, as ps's <defunct>, while another still uses the memory."""
    import threading

    write(map_memory(3 * MIB), range(640))

    def tell_and_wait() -> None:
        time.sleep(0.2)
        print("ready", flush=True)
        stand_still()

    threading.Thread(target=tell_and_wait).start()
    libc.syscall(60)  # exit of this thread alone, on x86-64


def zombie() -> None:
    """A child that has ended and was not waited for."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    children.append(pid)


def anything(seed: str) -> None:
    """Areas of all kinds, changed at random by nested processes; by the seed, always the same."""
    chance = random.Random(seed)
    file = os.memfd_create("anything")
    os.write(file, os.urandom(800 * PAGE))
    areas: list[tuple[int, int]] = []  # address and pages

    def add() -> None:
        pages = chance.choice([1, 40, 700, 2100])
        kind = chance.choice(["anonymous", "huge", "shared", "of file", "copied file"])
        if kind == "huge":
            address = map_huge(pages * PAGE)
        elif kind.endswith("file"):
            first = chance.randrange(700)
            pages = min(pages, 800 - first)
            flags = mmap.MAP_SHARED if kind == "of file" else mmap.MAP_PRIVATE
            address = map_memory(pages * PAGE, flags, file, offset=first * PAGE)
        else:
            address = map_memory(pages * PAGE, SHARED if kind == "shared" else ANON)
        areas.append((address, pages))

    def some(pages: int) -> range:
        first, last = sorted(chance.choices(range(pages + 1), k=2))
        return range(first, last, chance.choice([1, 1, 2, 7]))

    def change(at: int) -> None:
        address, pages = areas[at]
        how = chance.choice(["write", "write", "touch", "drop", "move", "replace"])
        part = some(pages)
        start, size = address + part.start * PAGE, (part.stop - part.start) * PAGE
        if how == "write":
            write(address, part, chance.choice([0, 1, None]))
        elif how == "touch":
            touch(address, part)
        elif how == "drop" and size:
            advise(start, size, MADV_DONTNEED)
        elif how == "move" and size:
            elsewhere = map_memory(size, prot=0)
            if (
                libc.mremap(start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere)
                != elsewhere
            ):
                return  # it is of several mappings
            pieces = (address, part.start), (elsewhere, size // PAGE)
            rest = start + size, pages - part.stop
            areas[at : at + 1] = [area for area in (*pieces, rest) if area[1]]
        elif how == "replace" and size:
            flags = chance.choice([ANON, SHARED]) | MAP_FIXED
            libc.mmap(start, size, RW, flags, -1, 0)

    def live(generation: int) -> None:
        for _ in range(chance.randint(1, 6)):
            add()
            for _ in range(chance.randint(1, 9)):
                change(chance.randrange(len(areas)))
        for number in range(chance.choice([0, 1, 1, 2, 3]) if generation < 4 else 0):
            fork(lambda number=number: grow_up(f"{seed} {generation} {number}", generation + 1))
            change(chance.randrange(len(areas)))

    def grow_up(name: str, generation: int) -> None:
        chance.seed(name + str(chance.random()))
        live(generation)

    live(0)


def main(name: str, *arguments: str) -> None:
    globals()[name](*arguments)
    print("ready", flush=True)
    stand_still()


if __name__ == "__main__":
    main(*sys.argv[1:])
