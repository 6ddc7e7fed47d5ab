"""Scenes of memory that is an inode's: memfds, shared anonymous memory, System V, tmpfs, files.

Of each there is more than any page table has: what filled it has ended, or nobody maps it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable

from building import (
    ANON,
    MADV_PAGEOUT,
    MIB,
    PAGE,
    SHARED,
    Unable,
    advise,
    contents,
    failed,
    fork,
    libc,
    map_memory,
    say_ready,
    share,
    stand_still,
    touch,
    unmap,
    wait_until,
    write,
)

CLONE_NEWNS, CLONE_NEWIPC = 0x20000, 0x8000000
MS_PRIVATE, MS_REC, MS_BIND, MNT_DETACH = 1 << 18, 1 << 14, 1 << 12, 2
MFD_HUGETLB = 4
IO_URING_SETUP, IO_URING_REGISTER = 425, 427
REGISTER_BUFFERS, REGISTER_FILES = 0, 2
IPC_PRIVATE, IPC_CREAT, IPC_RMID = 0, 0o1000, 0

libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
libc.mount.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p]


def by_one_that_ends(act: Callable[[], object]) -> None:
    """Act in a child that has ended afterwards."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("a child failed")


def afterwards(act: Callable[[], object]) -> None:
    """Act when all of the scene have ended, by a process that is not of it."""
    told, ends = os.pipe()  # whose other end all have who are forked from here on
    if os.fork():
        os.close(told)
        os.wait()
        return
    try:
        os.setsid()
        if os.fork() == 0:
            signal.alarm(0)
            os.close(ends)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            os.read(told, 1)
            act()
    finally:
        os._exit(0)


def memfd(pages: int, flags: int = 0) -> int:
    """A memfd that is filled, but no page table has any of it."""
    file = os.memfd_create("scene", flags)
    os.ftruncate(file, pages * PAGE)
    fill(file, pages)
    return file


def fill(file: int, pages: int) -> None:
    """In pieces: what large ones were in would stay as memory of the process."""
    for _ in range(pages // 64):
        os.write(file, os.urandom(64 * PAGE))


def view(file: int, first: int, pages: int, flags: int = mmap.MAP_SHARED) -> int:
    """A mapping of a part of a file."""
    return map_memory(pages * PAGE, flags, file, offset=first * PAGE)


# ---- Shared anonymous memory and memfds -----------------------------------------


def shared_filled() -> None:
    """Shared memory that a child filled which has ended: what no page table has lost?

    Of two pieces, one is a branch's alone.
    """
    memory = map_memory(16 * MIB, SHARED)
    by_one_that_ends(lambda: write(memory, range(3000)))

    def branch() -> None:
        own = map_memory(12 * MIB, SHARED)
        by_one_that_ends(lambda: write(own, range(100, 2600)))
        touch(own, range(90, 140))
        fork(lambda: touch(own, range(120, 300)))
        unmap(memory, 16 * MIB)

    fork(branch)
    touch(memory, range(10))
    fork(lambda: touch(memory, range(5, 50)))


def memfd_windows() -> None:
    """Memfd of which each process maps a part: what is in nobody's window lost?

    A child and its child alone have another; one maps a part twice, one lies beyond the end.
    """
    file = memfd(2048)
    touch(view(file, 0, 100), range(100))

    def branch() -> None:
        own = memfd(1536)
        touch(view(own, 64, 128), range(0, 128, 3))
        touch(view(own, 100, 128), range(128))
        fork(lambda: touch(view(own, 1000, 100), range(50)))
        os.close(file)

    fork(branch)
    fork(lambda: touch(view(file, 50, 300), range(200)))
    fork(lambda: view(file, 4096, 100))


def memfd_strewn() -> None:
    """Memfd with few pages, far apart: taken for another's, or for a file on disk?

    A child has a page before its parent's first one.  In another, a copy comes before any page.
    """

    def empty() -> int:
        file = os.memfd_create("scene")
        os.ftruncate(file, 8000 * PAGE)
        return file

    memory = view(empty(), 0, 8000)
    write(memory, range(500, 8000, 300))
    fork(lambda: write(memory, [100, *range(500, 8000, 300)]))

    def copier() -> None:
        own = view(empty(), 0, 8000, mmap.MAP_PRIVATE)
        write(own, [1000])
        touch(own, [1400, 2000])
        fork()

    fork(copier)


def memfd_open() -> None:
    """Memfd that is open and that nobody maps: lost?

    One that all have, one that a child has by a descriptor that cannot read, one that a child
    opened by the path of the first, and one of no pages.
    """
    memfd(1024)
    memfd(0)

    def by_path() -> None:
        own = memfd(2048)
        os.open(f"/proc/self/fd/{own}", os.O_PATH)
        os.close(own)

    fork(by_path)
    fork(lambda: [memfd(1536), fork()])


def memfd_open_above() -> None:
    """Memfd that a parent has open and a child maps: in FREED of the child?

    Another is open in a child that its own child maps.
    """
    file = memfd(2048)

    def mapper() -> None:
        memory = view(file, 0, 2048)
        os.close(file)
        touch(memory, range(100, 1100))

    def branch() -> None:
        os.close(file)
        own = memfd(1536)
        fork(lambda: [touch(view(own, 512, 1024), range(1000)), os.close(own)])

    fork(mapper)
    fork(branch)


def memfd_private() -> None:
    """Private mapping of a memfd: its copies lost, or not held by it?

    A child has no more than such a mapping, without a page of it, and its sister nothing.
    """
    file = memfd(2048)
    memory = view(file, 0, 2048, mmap.MAP_PRIVATE)
    os.close(file)
    touch(memory, range(1000))
    write(memory, range(500, 700))

    def branch() -> None:
        unmap(memory, 2048 * PAGE)
        own = memfd(1024)
        copied = view(own, 0, 1024, mmap.MAP_PRIVATE)
        os.close(own)
        fork(lambda: write(copied, range(300, 400)))

    fork(branch)
    fork(lambda: write(memory, range(600, 900), 9))
    fork(lambda: unmap(memory, 2048 * PAGE))


def memfd_of_sisters() -> None:
    """Held by a sister that maps it, or has it only open: in FREED of one of them?

    Three memfds: two children map the first, of the second one has a descriptor and no mapping,
    the third only the last child has.
    """
    first, second = memfd(1024), memfd(1536)

    def mapper() -> None:
        touch(view(first, 0, 1024), range(800))
        touch(view(second, 0, 1536), range(900))
        os.close(first)
        os.close(second)

    def other() -> None:
        view(first, 1000, 24)
        os.close(first)
        memfd(2048)

    fork(mapper)
    fork(other)
    os.close(first)
    os.close(second)


def memfd_of_twins() -> None:
    """Held by several in one address space: free when one of them ends?

    Siblings share memory, and each has its own descriptors.
    """
    memory = map_memory(8 * MIB, SHARED)
    by_one_that_ends(lambda: write(memory, range(1500)))

    def sharer() -> None:
        touch(memory, range(100))
        own = memfd(1536)
        mapped = view(memfd(1024), 0, 1024)
        share(0x8000)  # CLONE_PARENT: the child is a sibling
        os.close(own)
        touch(mapped, range(500))

    fork(sharer)
    unmap(memory, 8 * MIB)


def memfd_of_thread() -> None:
    """Mapped and open where the first thread has ended: no holder?"""
    import threading

    mapped = view(memfd(2048), 0, 1024)
    touch(mapped, range(600))
    fork(lambda: touch(mapped, range(500, 700)))

    def tell_and_wait() -> None:
        task = f"/proc/self/task/{os.getpid()}/status"
        wait_until(lambda: "\nState:\tZ" in contents(task))
        say_ready()
        stand_still()

    threading.Thread(target=tell_and_wait).start()
    exit_thread = {"x86_64": 60, "s390x": 1, "ppc64le": 1}.get(os.uname().machine, 93)
    libc.syscall(exit_thread, 0)


def memfd_huge() -> None:
    """Hugetlb memfd that a child filled which has ended: what the kernel has in no RSS lost?

    Of two, one is only open, and a child's.
    """

    def filled(pages: int) -> int:
        (size,) = [line.split()[1] for line in lines if line.startswith("Hugepagesize")]
        try:
            file = os.memfd_create("huge", MFD_HUGETLB)
        except OSError as error:
            raise Unable(f"a hugetlb memfd: {error.strerror}") from error
        huge = int(size) * 1024 // PAGE
        os.ftruncate(file, pages * huge * PAGE)
        by_one_that_ends(lambda: write(view(file, 0, pages * huge), range(0, pages * huge, huge)))
        return file

    lines = contents("/proc/meminfo").splitlines()
    file = filled(3)
    fork(lambda: [os.close(file), filled(2)])
    size = os.fstat(file).st_blksize
    fork(lambda: touch(view(file, 0, size // PAGE), range(1)))


def memfd_swapped() -> None:
    """Memory of an object that is swapped out: in TREE and FREED, where it is no memory?

    Half of a memfd, that is mapped whole, and some that only a child has; of another, all but
    private copies is in memory.  One is first met open, and privately mapped, then mapped whole.
    """
    file = os.memfd_create("swapped")
    os.ftruncate(file, 64 * MIB)
    memory = view(file, 0, 64 * MIB // PAGE)
    write(memory, range(64 * MIB // PAGE))
    advise(memory, 32 * MIB, MADV_PAGEOUT)

    def child() -> None:
        own = map_memory(16 * MIB, SHARED)
        write(own, range(16 * MIB // PAGE))
        advise(own, 4 * MIB, MADV_PAGEOUT)

    def opened(own: int) -> None:
        def mapper() -> None:
            whole = view(own, 0, 2048)
            os.close(own)
            touch(whole, range(2048))
            advise(whole, 4 * MIB, MADV_PAGEOUT)

        view(own, 100, 100)
        fork(mapper)

    def another() -> None:
        own = memfd(1024)
        copied = view(own, 0, 1024, mmap.MAP_PRIVATE)
        fork(lambda: touch(view(own, 0, 1024), range(1024)))
        os.close(own)
        write(copied, range(1024))
        advise(copied, 2 * MIB, MADV_PAGEOUT)

    fork(child)
    fork(another)
    fork(lambda: opened(memfd(2048)))


# ---- What only the kernel holds -------------------------------------------------


def unseen(how: str) -> None:
    """Memfd that a child maps, and the kernel has for the parent: in whose FREED?

    In flight: its descriptor is in a socket.  A ring: io_uring has the file, or its memory.
    """
    file = memfd(1536)
    fork(lambda: [touch(view(file, 0, 1536), range(100)), os.close(file)])
    if how == "in_flight":
        import socket

        pair = socket.socketpair()
        socket.send_fds(pair[0], [b"file"], [file])
        for end in pair:
            end.detach()
    else:
        import struct

        ring = libc.syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(120))
        if ring < 0:
            raise Unable(f"io_uring: {os.strerror(ctypes.get_errno())}")
        memory, size = view(file, 0, 1536), 1536 * PAGE
        what, words = REGISTER_FILES, struct.pack("i", file)
        if how == "ring_of_memory":
            what, words = REGISTER_BUFFERS, struct.pack("NN", memory, size)
        if libc.syscall(IO_URING_REGISTER, ring, what, words, 1):
            raise Unable(f"io_uring's registration: {os.strerror(ctypes.get_errno())}")
        unmap(memory, size)
    os.close(file)


# ---- System V -------------------------------------------------------------------


def segment(pages: int) -> int:
    found: int = libc.shmget(IPC_PRIVATE, pages * PAGE, IPC_CREAT | 0o600)
    if found < 0:
        raise failed("shmget")
    return found


def attach(shmid: int) -> int:
    address: int | None = libc.shmat(shmid, None, 0)
    if address == ctypes.c_void_p(-1).value or address is None:
        raise failed("shmat")
    return address


def removed_segment(pages: int) -> int:
    """Attached and removed, and filled by a child that has ended."""
    shmid = segment(pages)
    memory = attach(shmid)
    libc.shmctl(shmid, IPC_RMID, None)
    by_one_that_ends(lambda: write(memory, range(pages - 100)))
    return memory


def new_namespace(flags: int) -> None:
    if libc.unshare(flags):
        raise failed("unshare")


def sysv_removed() -> None:
    """System V segment that was removed while attached: what no page table has lost?"""
    memory = removed_segment(2048)
    touch(memory, range(0, 300, 2))

    def branch() -> None:
        libc.shmdt(ctypes.c_void_p(memory))
        own = removed_segment(3072)
        fork(lambda: touch(own, range(1000)))

    fork(branch)
    fork(lambda: touch(memory, range(700)))


def sysv_kept() -> None:
    """System V segment that outlives all who have it: in FREED of anybody?

    A branch has one that is kept, and one that was removed.
    """

    def branch() -> None:
        memory, own = attach(shmid), removed_segment(2048)
        write(memory, range(2000))
        fork(lambda: touch(own, range(1000)))
        fork(lambda: unmap(own, 2048 * PAGE))

    shmid = segment(3072)
    afterwards(lambda: libc.shmctl(shmid, IPC_RMID, None))
    fork(branch)
    fork(lambda: touch(attach(shmid), range(500)))


def sysv_forced() -> None:
    """System V segment that was not removed, but ends with the last who has it attached?

    So it is where shm_rmid_forced is set, which is of a namespace.  What filled it has ended.
    """
    new_namespace(CLONE_NEWIPC)
    with open("/proc/sys/kernel/shm_rmid_forced", "w") as forced:
        forced.write("1")
    memory = attach(segment(2048))
    by_one_that_ends(lambda: write(memory, range(2048)))
    fork(lambda: touch(memory, range(100)))


def sysv_elsewhere() -> None:
    """System V segments of two namespaces, both with the id 0: taken for one?

    Each is held by all who live there: the parent holds what only its child has attached.
    """
    new_namespace(CLONE_NEWIPC)
    shmid = segment(2048)
    if shmid:
        raise Unable(f"System V: the first id of a namespace is {shmid}")

    def of_both() -> None:
        touch(attach(shmid), range(1500))
        fork()

    def elsewhere() -> None:
        new_namespace(CLONE_NEWIPC)
        memory = removed_segment(1536)
        write(attach(segment(1024)), range(600))
        fork(lambda: touch(memory, range(300)))

    by_one_that_ends(lambda: write(attach(shmid), range(2000)))
    fork(of_both)
    fork(elsewhere)


# ---- Files ----------------------------------------------------------------------


def file_in(directory: str, pages: int, name: str = "") -> int:
    """A filled file, which has a name only if it is told."""
    import tempfile

    if name:
        file = os.open(f"{directory}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    else:
        file, path = tempfile.mkstemp(dir=directory)
        os.unlink(path)
    fill(file, pages)
    return file


def all_of(file: int, pages: int) -> int:
    """A mapping of a file, all of which is touched, that is not open any more."""
    memory = view(file, 0, pages)
    os.close(file)
    touch(memory, range(pages))
    return memory


def with_named_file(directory: str, pages: int) -> None:
    """A named and a deleted file, some of which children map, too."""
    name = f"memuse-scene-{os.getpid()}"
    afterwards(lambda: os.unlink(f"{directory}/{name}"))
    file = file_in(directory, pages, name)

    def branch() -> None:
        view(file, 0, pages)
        memory, own = all_of(file, pages), all_of(file_in(directory, 1536), 1536)
        fork(lambda: touch(own, range(1000)))
        unmap(memory, 100 * PAGE)

    fork(branch)
    os.close(file)
    unlinked = all_of(file_in(directory, 1024), 1024)
    fork(lambda: unmap(unlinked, 1024 * PAGE))
    fork(lambda: touch(unlinked, range(700)))


def tmpfs_files() -> None:
    """Files of a tmpfs: in FREED with a name, or not in it without one?"""
    if not os.path.ismount("/dev/shm"):
        raise Unable("no tmpfs at /dev/shm")
    with_named_file("/dev/shm", 2048)


def disk_files() -> None:
    """Files on disk: in FREED with a name, or not in it without one?"""
    with_named_file("/var/tmp", 2048)


def mounted() -> None:
    """Tmpfs of a mount namespace of its own: its files not known as memory?

    Unlinked: one that is mapped and was filled by a child that has ended, one only open.
    """
    if not os.path.isdir("/dev/shm"):
        raise Unable("no place to mount at")
    new_namespace(CLONE_NEWNS)
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=%d" % (64 * MIB)):
        raise Unable("a tmpfs of its own")
    memory = view(file_in("/dev/shm", 2048), 0, 2048)
    touch(memory, range(100))

    def branch() -> None:
        fork(lambda: file_in("/dev/shm", 1536))
        touch(view(file_in("/dev/shm", 1024), 0, 1024), range(200))

    fork(branch)
    fork(lambda: write(map_memory(MIB, ANON), range(100)))


def mounted_elsewhere() -> None:
    """Unlinked files on a mount that a holder of them does not see: held by nobody?

    They were opened before unshare or chroot: one is only open, one only mapped, and two are mapped
    in one process and open in another.
    """
    if not os.path.ismount("/dev/shm"):
        raise Unable("no tmpfs at /dev/shm")
    first, second, third = (file_in("/dev/shm", pages) for pages in (1024, 1536, 2048))

    def in_a_namespace_of_its_own() -> None:
        os.close(second)
        new_namespace(CLONE_NEWNS)

    def below_another_root() -> None:
        own = file_in("/dev/shm", 512)
        view(own, 0, 512)
        touch(view(second, 0, 1536), range(100))
        for file in (own, second, third):
            os.close(file)
        os.chroot("/var")

    def as_usual() -> None:
        touch(view(third, 0, 2048), range(200))
        for file in (second, third):
            os.close(file)

    fork(in_a_namespace_of_its_own)
    os.close(first)
    fork(below_another_root)
    fork(as_usual)
    os.close(third)


def unmounted_disk() -> None:
    """File on disk, of a mount that is gone, with the name of a memfd: taken for one?"""
    import tempfile

    new_namespace(CLONE_NEWNS)
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        path = directory.encode()
        if libc.mount(path, path, None, MS_BIND, None):
            raise Unable("a mount of a directory")
        file = os.open(f"{directory}/memfd:scene", os.O_RDWR | os.O_CREAT)
        os.unlink(f"{directory}/memfd:scene")
        libc.umount2(path, MNT_DETACH)
    if os.readlink(f"/proc/self/fd/{file}") != "/memfd:scene (deleted)":
        raise Unable("a path without its mount")
