"""Scenes of processes that are not like others: shared address spaces, threads, zombies."""

from __future__ import annotations

import os
import signal

from building import (
    ANON,
    CLONE_PARENT,
    HUGE,
    MACHINE,
    MADV_HUGEPAGE,
    MAP_FIXED,
    MIB,
    PAGE,
    SHARED,
    advise,
    children,
    children_of,
    contents,
    fork,
    libc,
    map_huge,
    map_memory,
    say_ready,
    share,
    sleeps,
    stand_still,
    stat_of,
    touch,
    wait_until,
    write,
)


def shells() -> None:
    """No trap at all: +UNIQUE, TREE and FREED of three generations?

    They are shells, for every interpreter of Python has the zero page, for example.
    """
    root = os.getpid()

    def still() -> bool:
        """All are there, and wait."""
        pids = [root, *children_of(root)]
        pids += children_of(pids[-1])
        named = contents(f"/proc/{root}/cmdline").startswith("sh\0")
        return len(pids) == 3 and named and all(map(sleeps, pids))

    if os.fork() == 0:
        if os.fork() == 0:  # an orphan, which is not in the tree
            wait_until(still)
            say_ready()
        os._exit(0)
    os.wait()
    signal.alarm(0)
    line = "exec 3<&0; { { read -r x <&3; exit; } & read -r x <&3; exit; } & read -r x"
    os.execvp("sh", ["sh", "-c", line])


def opener() -> str:
    """A FIFO, and a child that says "ready" once it has a sibling, which waits for the FIFO."""
    import shutil
    import tempfile

    directory = tempfile.mkdtemp()
    fifo, parent = f"{directory}/fifo", os.getpid()
    os.mkfifo(fifo)
    if os.fork() == 0:
        own = os.getpid()
        wait_until(lambda: [sleeps(pid) for pid in children_of(parent) if pid != own] == [True])
        shutil.rmtree(directory)
        say_ready()
        stand_still()
    return fifo


def spawn(fifo: str) -> None:
    """Start a program whose input is a FIFO that nobody opens: it waits in our memory."""
    signal.alarm(0)
    actions = [(os.POSIX_SPAWN_OPEN, 3, fifo, os.O_RDONLY, 0)]
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=actions)
    os._exit(1)


def vforked() -> None:
    """Address space shared for a while, by a spawn under way: private memory counted twice?"""
    write(map_memory(4 * MIB), range(811))
    spawn(opener())


def vforked_huge() -> None:
    """Shared address space that begins with a huge page: private memory counted twice?

    It is the parent's alone: it forks before.
    """
    fifo = opener()
    with open("/proc/self/maps") as maps:
        lowest = int(maps.readline().partition("-")[0], 16) // HUGE * HUGE
    size = min(4 * HUGE, lowest - HUGE)  # the interpreter may be at 4 MiB
    map_memory(size, ANON | MAP_FIXED, at=lowest - size)
    advise(lowest - size, size, MADV_HUGEPAGE)
    write(lowest - size, range(size // PAGE))
    spawn(fifo)


def twins() -> None:
    """Three that share an address space, each below the other: private memory once, and freed?

    The last is the only one that goes on; beside them is a child that shares nothing.
    """
    memory = map_memory(3 * MIB)
    write(memory, range(600))
    fork(lambda: write(memory, range(100)))
    share()
    write(memory, range(200, 250))
    share()
    write(memory, range(550, 650))


def twin_siblings() -> None:
    """Siblings that share an address space, not their parent's: freed only with both?

    Three of them; a fourth child, a fork of one of them, has copies.
    """
    memory, all_have = map_memory(3 * MIB), map_memory(MIB, SHARED)
    write(memory, range(600))

    def sharer() -> None:
        write(memory, range(300))
        touch(all_have, range(100))
        fork(lambda: write(memory, range(50)))
        share(CLONE_PARENT)
        share(CLONE_PARENT)
        write(memory, range(400, 500))

    touch(all_have, range(50, 120))
    fork(sharer)


def twins_huge() -> None:
    """Siblings that share huge pages: counted twice, or freed with one of them?"""
    memory = map_huge(4 * HUGE)
    write(memory, range(2 * HUGE // PAGE))

    def sharer() -> None:
        write(memory, range(HUGE // PAGE))
        write(memory, range(2 * HUGE // PAGE, 4 * HUGE // PAGE))
        share(CLONE_PARENT)

    fork(sharer)


def lone_thread() -> None:
    """Main thread ended, as ps's <defunct>, while another uses the memory: taken for a zombie?"""
    import threading

    write(map_memory(3 * MIB), range(640))

    def tell_and_wait() -> None:
        wait_until(lambda: stat_of(f"self/task/{os.getpid()}")[0] == "Z")
        say_ready()
        stand_still()

    threading.Thread(target=tell_and_wait).start()
    exit_thread = {"x86_64": 60, "s390x": 1, "ppc64le": 1}.get(MACHINE, 93)
    libc.syscall(exit_thread, 0)


def zombie() -> None:
    """A child that has ended and was not waited for: a row of zeros?"""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    children.append(pid)
