"""Scenes that take a setting or a feature of the kernel: huge pages, KSM, swap, drivers."""

from __future__ import annotations

import ctypes
import mmap
import os

from building import (
    ANON,
    HUGE,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MAP_FIXED,
    MAP_HUGETLB,
    MIB,
    PAGE,
    SHARED,
    Unable,
    advise,
    contents,
    failed,
    fork,
    libc,
    map_huge,
    map_memory,
    move,
    share,
    touch,
    unmap,
    wait_until,
    write,
)

HUGE_PAGES = HUGE // PAGE
SOME = HUGE_PAGES // 32  # pages: a part of a huge page, whatever its size

# ---- Huge pages -----------------------------------------------------------------


def huge() -> None:
    """Huge page's exclusive bit believed of pages that others have, too?

    Huge pages shared by fork, of which the child copied parts and the parent others.
    Of one, all but the second child copied the first page, and it passes for its own.
    """
    memory = map_huge(16 * MIB)
    write(memory, range(4096))
    fork(lambda: write(memory, [*range(512, 700), 2560], 3))
    fork(lambda: unmap(memory + HUGE, HUGE + 77 * PAGE))
    write(memory, [*range(2048, 2060), 2560], 2)


def huge_zero() -> None:
    """Huge zero page counted?

    It and real huge pages in one VMA; and in a private /dev/zero.
    """
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


def huge_misplaced() -> None:
    """Huge page known by its address and as a file's: counted twice?

    Those of a private /dev/zero begin elsewhere than at a huge page of the file.
    """
    fd = os.open("/dev/zero", os.O_RDWR)
    memory = map_huge(8 * MIB)
    map_memory(8 * MIB, mmap.MAP_PRIVATE | MAP_FIXED, fd, offset=100 * PAGE, at=memory)
    advise(memory, 8 * MIB, MADV_HUGEPAGE)
    write(memory, range(0, 2048, 512))
    fork(lambda: write(memory, [0, 512, 1024, 1536]))


def homeless() -> None:
    """Pages of a huge page in the place of other frames: lost, or counted twice?

    A child holds pages of its parent's huge page where another's pages are.
    """
    memory = map_huge(2 * HUGE)
    write(memory, range(1024))
    elsewhere = map_memory(HUGE)
    advise(elsewhere, HUGE, MADV_NOHUGEPAGE)
    write(elsewhere, range(512))

    def mover() -> None:
        write(memory, range(3), 7)
        move(memory + 10 * PAGE, 100 * PAGE, elsewhere)

    fork()
    fork(mover)


def folios(kib: str) -> None:
    """Multi-size THP: pages of a large folio lost, or believed to be exclusive?

    Folios of this size, of which a child copied parts, another unmapped parts, and the
    parent both; and one child moved some away.
    """
    step = int(kib) * 1024 // PAGE
    size = HUGE - PAGE * step  # no room for a PMD-mapped one
    areas = [map_huge(HUGE) for _ in range(3)]
    for memory in areas:
        unmap(memory + size, HUGE - size)
        write(memory, range(size // PAGE))

    def copier() -> None:
        for memory in areas:
            write(memory, range(3, size // PAGE, step), 5)
        fork(lambda: write(areas[1], range(0, size // PAGE, 2 * step), 6))

    def leaver() -> None:
        advise(areas[0] + 7 * PAGE, 40 * PAGE, MADV_DONTNEED)
        unmap(areas[1] + 5 * PAGE, 100 * PAGE)
        move(areas[2] + 9 * PAGE, 50 * PAGE, map_memory(50 * PAGE))

    fork(copier)
    fork(leaver)
    write(areas[0], range(0, size // PAGE, 3), 8)
    advise(areas[2], 11 * PAGE, MADV_DONTNEED)


def drop(memory: int, pages: range) -> None:
    """Give neighbouring pages back, as malloc and others do."""
    advise(memory + pages.start * PAGE, len(pages) * PAGE, MADV_DONTNEED)


def emptied(times: str = "1") -> None:
    """Pages of huge pages that nobody maps any more: missing in TREE and FREED?

    Of the first the head stays, of others a page further on, the last one, half of it; one is
    unmapped in the middle, and one is whole; and so as often as told.  A child has its own.
    """

    def all_of_them() -> None:
        for _ in range(int(times)):
            partly()

    def partly() -> None:
        memory = map_huge(6 * HUGE)
        write(memory, range(6 * HUGE_PAGES))
        drop(memory, range(1, HUGE_PAGES))
        drop(memory + HUGE, range(5 * SOME))
        drop(memory + HUGE, range(5 * SOME + 1, HUGE_PAGES))
        drop(memory + 2 * HUGE, range(HUGE_PAGES - 1))
        drop(memory + 3 * HUGE, range(HUGE_PAGES // 2, HUGE_PAGES))
        unmap(memory + 4 * HUGE + SOME * PAGE, 20 * SOME * PAGE)

    all_of_them()
    fork(all_of_them)


def emptied_moved() -> None:
    """Huge pages that are partly mapped at other places than their own: missing?

    What is left of each is moved, that of the last in two parts; a child drops one of them.
    """
    memory, elsewhere = map_huge(3 * HUGE), map_memory(3 * HUGE)
    write(memory, range(3 * HUGE_PAGES))
    last = 2 * HUGE_PAGES
    moves = [(1, 6, 0), (HUGE_PAGES, 1, 7), (last + SOME, 2, 9), (last + 9 * SOME, 3, 12)]
    for first, number, to in moves:
        move(memory + first * PAGE, number * SOME * PAGE, elsewhere + (to * SOME + 1) * PAGE)
    unmap(memory, 3 * HUGE)
    fork(lambda: unmap(elsewhere + (9 * SOME + 1) * PAGE, 2 * SOME * PAGE))


def emptied_branches() -> None:
    """What nobody maps of a huge page: credited to the lowest row above all that map the rest?

    Of several that were shared by fork, all have dropped some pages, and each has others left:
    both children; a child and its child; one alone; that child, of one that it wrote to.
    """
    memory = map_huge(5 * HUGE)
    write(memory, range(5 * HUGE_PAGES))

    def first() -> None:
        for which in range(4):
            drop(memory + which * HUGE, range(3 * SOME))
        write(memory + 4 * HUGE, [2], 3)
        fork(lambda: drop(memory + HUGE, range(12 * SOME, HUGE_PAGES)))
        drop(memory + HUGE, range(9 * SOME))
        drop(memory + 3 * HUGE, range(HUGE_PAGES))

    def second() -> None:
        drop(memory, range(18 * SOME))
        drop(memory + HUGE, range(HUGE_PAGES))
        drop(memory + 2 * HUGE, range(HUGE_PAGES))
        drop(memory + 3 * HUGE, range(6 * SOME, HUGE_PAGES))
        drop(memory + 4 * HUGE, range(4))

    fork(first)
    fork(second)
    unmap(memory, 4 * HUGE)
    drop(memory + 4 * HUGE, range(1, 2 * SOME))


def emptied_twins() -> None:
    """Huge pages that are partly mapped, of processes that share an address space: counted twice?

    The mappings are the kernel's once; both rows have them.
    """
    memory = map_huge(3 * HUGE)
    write(memory, range(3 * HUGE_PAGES))
    drop(memory, range(1, HUGE_PAGES))
    drop(memory + HUGE, range(6 * SOME))
    fork()
    share()


def emptied_swapped() -> None:
    """Huge pages that are partly mapped, of which parts were swapped out: counted still?"""
    memory = map_huge(4 * HUGE)
    write(memory, range(4 * HUGE_PAGES))
    for which in range(3):
        drop(memory + which * HUGE, range(6 * SOME, HUGE_PAGES))
    advise(memory + HUGE, 3 * SOME * PAGE, MADV_PAGEOUT)
    advise(memory + 3 * HUGE, HUGE, MADV_PAGEOUT)
    touch(memory + HUGE, range(SOME))
    touch(memory + 3 * HUGE, range(SOME))
    fork(lambda: drop(memory + 2 * HUGE, range(SOME)))


def folios_emptied(kib: str) -> None:
    """Multi-size THP: what nobody maps of a large folio missing in TREE and FREED?

    Of each folio a page is left, another one of each; of some a child has another.
    """
    step = int(kib) * 1024 // PAGE
    size = HUGE_PAGES - step  # no room for a PMD-mapped one
    memory = map_huge(HUGE)
    unmap(memory + size * PAGE, step * PAGE)
    write(memory, range(size))

    def leave(which: int) -> None:
        for at in range(0, size, step):
            kept = at + (at // step + which) % step
            drop(memory, range(at, kept))
            if kept + 1 < at + step:
                drop(memory, range(kept + 1, at + step))

    fork(lambda: leave(1))
    leave(0)
    drop(memory, range(step))


def tmpfs_huge() -> None:
    """Huge pages of a tmpfs, mapped whole and in part: their frames once, at any address?

    By several processes, one of which has private copies.
    """
    import tempfile

    mount = [ctypes.c_char_p(text) for text in (b"tmpfs", b"tmpfs", b"huge=always,size=64m")]
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):  # private, all
        raise failed("a mount namespace")
    with tempfile.TemporaryDirectory() as directory:
        if libc.mount(mount[0], directory.encode(), mount[1], 0, mount[2]):
            raise Unable("a tmpfs with huge=always")
        file = os.open(f"{directory}/file", os.O_RDWR | os.O_CREAT)
        libc.umount2(directory.encode(), 2)  # once nobody has the file
    os.ftruncate(file, 4 * HUGE)

    def view(first: int, pages: int, flags: int = mmap.MAP_SHARED) -> int:
        """Of the file from a page on, where PMDs can map it."""
        place = map_memory(5 * HUGE, prot=0)
        at = place + -place % HUGE + first % HUGE_PAGES * PAGE
        map_memory(pages * PAGE, flags | MAP_FIXED, file, offset=first * PAGE, at=at)
        return at

    whole = view(0, 4 * HUGE_PAGES)
    write(whole, range(3 * HUGE_PAGES + 10))

    def copier() -> None:
        copies = view(HUGE_PAGES, 2 * HUGE_PAGES, mmap.MAP_PRIVATE)
        touch(copies, range(2 * HUGE_PAGES))
        write(copies, range(100, 200))
        unmap(whole, 4 * HUGE)
        fork(lambda: touch(view(77, 1000), range(0, 1000, 7)))

    fork(copier)
    fork(lambda: unmap(whole + HUGE + 5 * PAGE, HUGE))
    file_elsewhere = map_memory(2 * HUGE, mmap.MAP_SHARED, file, offset=9 * PAGE)
    touch(file_elsewhere, range(2 * HUGE_PAGES))


def hugetlb() -> None:
    """Hugetlb pages left out, which the kernel has in no RSS?"""
    import re

    (size,) = re.findall(r"Hugepagesize: +(\d+) kB", contents("/proc/meminfo"))
    pages = int(size) * 1024 // PAGE
    private = map_memory(3 * pages * PAGE, ANON | MAP_HUGETLB)
    shared = map_memory(2 * pages * PAGE, SHARED | MAP_HUGETLB)
    write(private, range(2 * pages))
    write(shared, range(pages))
    fork(lambda: write(private, range(1), 9))


# ---- KSM, swap, guard pages, drivers --------------------------------------------


def mergeable(pages: int, kinds: int) -> int:
    """Memory whose pages have but few contents."""
    memory = map_memory(pages * PAGE)
    advise(memory, pages * PAGE, MADV_MERGEABLE)
    for page in range(pages):
        write(memory, [page], page % kinds + 1)
    return memory


def wait_for_scans() -> None:
    scans = "/sys/kernel/mm/ksm/full_scans"
    start = int(contents(scans))
    wait_until(lambda: int(contents(scans)) >= start + 3, seconds=50)


def ksm() -> None:
    """KSM page counted as often as it is mapped?

    Merged pages: several in one process, in a child, and in an unrelated place.
    """
    memory = mergeable(700, 5)
    wait_for_scans()
    fork(lambda: write(memory, range(200), 77))


def ksm_branches() -> None:
    """KSM page of two branches that never shared it: counted twice, or freed with one?"""

    def branch() -> None:
        fork(lambda: mergeable(300, 40))
        mergeable(100, 40)

    fork(branch)
    fork(branch)
    fork(lambda: mergeable(200, 60))
    wait_for_scans()


def swapped() -> None:
    """Swap slots shared by fork: counted twice, or markers counted as swap?

    Paged out before the fork, and read back by one child.
    """
    memory = map_memory(8 * MIB)
    advise(memory, 8 * MIB, MADV_NOHUGEPAGE)
    write(memory, range(1200))
    advise(memory, 8 * MIB, MADV_PAGEOUT)
    fork(lambda: write(memory, range(0, 300, 3)))
    fork(lambda: touch(memory, range(900, 1100)))
    other = map_memory(2 * MIB)
    write(other, range(400))
    advise(other, 2 * MIB, MADV_PAGEOUT)


def swapped_branches() -> None:
    """Swap slots that only cousins have, at random and moved: counted twice?"""
    import random

    memory = map_memory(4 * MIB)
    advise(memory, 4 * MIB, MADV_NOHUGEPAGE)
    write(memory, range(1000))
    advise(memory, 4 * MIB, MADV_PAGEOUT)

    def keeper(seed: int) -> None:
        for page in random.Random(seed).sample(range(1000), 300):
            advise(memory + page * PAGE, PAGE, MADV_DONTNEED)
        if seed == 2:
            move(memory + 100 * PAGE, 500 * PAGE, map_memory(500 * PAGE))

    def branch(seed: int) -> None:
        fork(lambda: keeper(seed))
        fork(lambda: keeper(seed + 1))
        advise(memory, 4 * MIB, MADV_DONTNEED)

    fork(lambda: branch(1))
    fork(lambda: branch(3))
    advise(memory, 3 * MIB, MADV_DONTNEED)


def guarded() -> None:
    """Guard pages counted as swap?"""
    memory = map_memory(2 * MIB)
    write(memory, range(300))
    try:
        advise(memory + 100 * PAGE, 100 * PAGE, MADV_GUARD_INSTALL)
    except OSError as error:
        raise Unable("no MADV_GUARD_INSTALL, as before Linux 6.13") from error
    fork()


def packet_ring() -> None:
    """A driver's buffers, here a network ring, at several addresses: counted twice?

    Mapped twice by one process and, moved and in part, by its children.
    """
    import socket
    import struct

    try:
        ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        block, blocks = 16 * PAGE, 8
        request = struct.pack("4I", block, blocks, 2048, blocks * block // 2048)
        ring.setsockopt(263, 5, request)  # SOL_PACKET, PACKET_RX_RING
    except OSError as error:
        raise Unable(f"a packet ring: {error.strerror}") from error
    size, number = block * blocks, ring.detach()
    first = map_memory(size, mmap.MAP_SHARED, number)
    second = map_memory(size, mmap.MAP_SHARED, number)
    elsewhere = map_memory(size)
    write(elsewhere, range(100))
    fork(lambda: [unmap(first, size), unmap(second + 5 * PAGE, 30 * PAGE)])
    fork(lambda: [unmap(second, size), move(first + 10 * PAGE, 60 * PAGE, elsewhere)])
