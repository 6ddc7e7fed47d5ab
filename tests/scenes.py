"""Processes with known memory, for tests to look at.

Each scene is a function here or in one of the modules scenes_of_*.py, and the first line of its
docstring says which mistake it would show.  `python scenes.py NAME` builds it, forks its children,
prints "ready", and stands still until its standard input is closed.

What only a few scenes need is imported in them: all that is imported is memory of each process.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from collections.abc import Callable

import scenes_of_kernels
import scenes_of_objects
import scenes_of_processes
from building import (
    ANON,
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MAP_FIXED,
    MAP_NORESERVE,
    MIB,
    PAGE,
    SHARED,
    Unable,
    advise,
    children,
    fork,
    libc,
    map_huge,
    map_memory,
    move,
    say_ready,
    sleeps,
    stand_still,
    touch,
    unmap,
    wait_until,
    write,
)

# ---- Copy-on-write --------------------------------------------------------------


def plain() -> None:
    """Memory that one process alone has: all of it counted, and once?"""
    write(map_memory(3 * MIB), range(701))


def forked() -> None:
    """Copy-on-write: the copies counted, and what is still shared only once?

    Three generations, each of which wrote to a part.
    """
    memory = map_memory(8 * MIB)
    write(memory, range(1499))

    def child() -> None:
        write(memory, range(100, 199), 7)
        fork(lambda: write(memory, range(150, 233, 2), 9))

    fork(child)
    fork(lambda: write(memory, range(1400, 1600), 5))


def generations() -> None:
    """Copies of copies: frames counted that only some of the rows at their place have?

    Five generations; each, and its second child, wrote anew to pages that others wrote to.
    """
    memory = map_memory(4 * MIB)

    def rewrite(generation: int) -> None:
        write(memory, range(generation * 31, 900, generation + 1), generation)
        if generation < 5:
            fork(lambda: rewrite(generation + 1))
            fork(lambda: write(memory, range(generation, 700, 3), 7))

    rewrite(0)


def lopsided() -> None:
    """TREE and FREED of a small process above one with nearly all of the memory?"""
    memory = map_memory(64 * MIB)
    fork(lambda: write(memory, range(16000)))


def moved() -> None:
    """Memory moved by mremap to where others have other frames: counted again?

    A child moved copy-on-write memory to where its sister has other, and wrote to some.
    """
    memory = map_memory(4 * MIB)
    elsewhere = map_memory(4 * MIB)
    write(memory, range(900))
    write(elsewhere, range(300))

    def mover() -> None:
        move(memory, 4 * MIB, elsewhere)
        write(elsewhere, range(0, 900, 5))
        fork()

    fork(mover)
    fork()


def scattered() -> None:
    """Pages far apart, of which few are neighbours: any lost, or counted twice?

    A child has copies of some, and others beside them.
    """
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


def zero() -> None:
    """Zero page counted?

    It is next to real ones, in a parent and its child.
    """
    memory = map_memory(16 * MIB)
    advise(memory, 16 * MIB, MADV_NOHUGEPAGE)
    touch(memory, range(4096))
    write(memory, range(0, 4096, 37))
    fork(lambda: write(memory, range(1, 4096, 41)))


def mappings() -> None:
    """Thousands of VMAs: any lost?

    Each is of one page, no two of one protection side by side.
    """
    memory = map_memory(5001 * PAGE)
    write(memory, range(5001))
    for page in range(0, 5001, 2):
        libc.mprotect(memory + page * PAGE, PAGE, mmap.PROT_READ)
    fork(lambda: write(memory, range(1, 1001, 2)))


def sparse() -> None:
    """Far-apart pages in much reserved address space: any passed over?"""
    memory = map_memory(1 << 34, ANON | MAP_NORESERVE)
    advise(memory, 1 << 34, MADV_NOHUGEPAGE)
    step = (1 << 34) // PAGE // 129
    write(memory, range(step, 128 * step, step))
    write(memory, range(7 * step, 7 * step + 3000))
    fork(lambda: write(memory, range(7 * step + 500, 7 * step + 800), 1))


# ---- Files and shared memory ----------------------------------------------------


def file_of(pages: int) -> int:
    """A file that has no name any more."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(pages * PAGE))
        file.flush()
        return os.dup(file.fileno())


def crowd() -> None:
    """File mapped hundreds of times: its frames counted once, its mappings all in FREED?

    Pages that a child maps 300 times and its child 200 times, and the parent some of them.
    """
    file = file_of(20)

    def place() -> int:
        return map_memory(20 * PAGE, mmap.MAP_SHARED, file)

    def many() -> None:
        places = [place() for _ in range(300)]
        for address in places:
            touch(address, range(12))
        touch(places[0], range(17))
        fork(lambda: [unmap(address, 20 * PAGE) for address in places[200:]])

    touch(place(), range(4))
    fork(many)


def file_twice() -> None:
    """File mapped twice by one process: its frames counted twice?

    In part overlapping, privately with copies, and by a child.
    """
    file = file_of(768)
    first = map_memory(3 * MIB, mmap.MAP_SHARED, file)
    touch(first, range(768))
    second = map_memory(MIB, mmap.MAP_PRIVATE, file, offset=MIB)
    touch(second, range(256))
    write(second, range(0, 60))
    fork(lambda: write(second, range(50, 70)))
    third = map_memory(MIB, mmap.MAP_SHARED, file, offset=MIB // 2)
    touch(third, range(256))


def misnamed() -> None:
    """File with a name like anonymous memory's in maps: its copies lost, or its frames?"""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/x rw-p 00000000 00:00 0 "
        with open(path, "x+b") as file:
            file.write(os.urandom(MIB))
            file.flush()
            first = map_memory(MIB, mmap.MAP_SHARED, file.fileno())
            touch(first, range(256))
            second = map_memory(MIB // 2, mmap.MAP_SHARED, file.fileno(), offset=MIB // 4)
            touch(second, range(128))
            write(map_memory(MIB, mmap.MAP_PRIVATE, file.fileno()), range(50))
            fork(lambda: touch(second, range(128)))


def shared() -> None:
    """Shared memory at two addresses: counted twice?

    Each process touched a part of it; the last moved its mapping.
    """
    memory = map_memory(8 * MIB, SHARED)
    write(memory, range(1000))

    def mover() -> None:
        move(memory, 8 * MIB, elsewhere)
        touch(elsewhere, range(0, 2000, 3))

    elsewhere = map_memory(8 * MIB, prot=0)
    fork(lambda: touch(memory, range(500, 1300, 2)))
    fork(mover)


def windows() -> None:
    """File mapped by each process from another page on, and elsewhere: counted twice?"""
    file = file_of(2048)

    def window(offset: int) -> None:
        size = 8 * MIB - offset
        start = map_memory(size, mmap.MAP_SHARED, file, offset=offset)
        touch(start, range(size // PAGE))

    window(0)
    fork(lambda: window(2 * MIB))
    fork(lambda: window(3 * MIB))


def backends() -> None:
    """Shared memory touched at random by more rows than are kept by group: first and last rows?

    A branch of them is below another, and one maps it elsewhere too.
    """
    import random

    memory, copied = map_memory(4 * MIB, SHARED), map_memory(2 * MIB)
    write(copied, range(300))

    def act(number: int) -> None:
        chance = random.Random(number)
        touch(memory, chance.sample(range(1024), 60))
        write(copied, chance.sample(range(300), 30), number)
        if number == 4:
            for below in range(30, 34):
                fork(lambda below=below: act(below))  # type: ignore[misc]
        if number == 9:
            move(memory + MIB, MIB, map_memory(MIB))

    for number in range(22):
        fork(lambda number=number: act(number))  # type: ignore[misc]


def many() -> None:
    """Hundreds of processes with the same pages: mapcounts above 255 compared as a whole?

    Of a program that nobody else runs.
    """
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        program = shutil.copy(shutil.which("cat") or "/bin/cat", directory)
        for _ in range(270):
            quiet = (os.POSIX_SPAWN_DUP2, 2, 1)
            children.append(os.posix_spawn(program, ["cat"], {}, file_actions=[quiet]))
        wait_until(lambda: all(map(sleeps, children)))


def cousins() -> None:
    """Memory that only cousins share: in TREE and FREED of their ancestors alone, and once?

    Four generations.  A grandchild of one branch and one of the other have memory in common
    that nobody else has any more, and so have a great-grandchild and its uncle.
    """
    memory = map_memory(4 * MIB, SHARED)
    copied = map_memory(2 * MIB)
    write(copied, range(200))

    def last() -> None:
        touch(memory, range(150, 260))
        touch(memory, range(700, 900))
        unmap(copied, 2 * MIB)

    def left() -> None:
        write(copied, range(50, 90), 3)
        fork(lambda: touch(memory, range(100)))
        fork(lambda: [touch(memory, range(150, 190)), fork(last)])
        fork(lambda: touch(memory, range(700, 800)))

    def right() -> None:
        fork(lambda: touch(memory, range(50, 170)))
        unmap(copied + 100 * PAGE, 2 * MIB - 100 * PAGE)

    fork(left)
    fork(right)
    unmap(copied, 60 * PAGE)


# ---- By chance ------------------------------------------------------------------


def anything(seed: str) -> None:
    """Areas of all kinds, changed at random by nested processes: any figure wrong?

    By the seed, always the same.
    """
    import random

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
            if not move(start, size, elsewhere):
                return
            pieces = (address, part.start), (elsewhere, size // PAGE)
            rest = start + size, pages - part.stop
            areas[at : at + 1] = [area for area in (*pieces, rest) if area[1]]
        elif how == "replace" and size:
            flags = chance.choice([ANON, SHARED]) | MAP_FIXED
            map_memory(size, flags, at=start)

    def live(generation: int) -> None:
        for _ in range(chance.randint(1, 6)):
            add()
            for _ in range(chance.randint(1, 9)):
                change(chance.randrange(len(areas)))
        for number in range(chance.choice([0, 1, 1, 2, 3]) if generation < 4 else 0):
            name = f"{seed} {generation} {number}"
            fork(lambda name=name: grow_up(name, generation + 1))  # type: ignore[misc]
            change(chance.randrange(len(areas)))

    def grow_up(name: str, generation: int) -> None:
        chance.seed(name + str(chance.random()))
        live(generation)

    live(0)


def build(name: str) -> Callable[..., None]:
    """The function that builds a scene."""
    modules = scenes_of_processes, scenes_of_kernels, scenes_of_objects
    places = globals(), *map(vars, modules)
    found: Callable[..., None] = next(place[name] for place in places if name in place)
    return found


def about(name: str) -> str:
    """What a scene is there to catch."""
    return (build(name.split()[0]).__doc__ or "").split("\n", 1)[0]


def main(name: str, *arguments: str) -> None:
    signal.alarm(60)  # a scene that hangs is none
    try:
        build(name)(*arguments)
    except Unable as why:
        print(f"skip {why}", flush=True)
    else:
        say_ready()
        stand_still()


if __name__ == "__main__":
    main(*sys.argv[1:])
