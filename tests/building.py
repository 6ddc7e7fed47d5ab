"""What scenes are built with: memory at chosen places, and children that stand still."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterable

PAGE = mmap.PAGESIZE
MIB = 256 * PAGE  # with pages of 4 KiB; elsewhere, scenes are as many pages
PMD_SIZE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
HUGE = 2 * MIB
if os.path.exists(PMD_SIZE):
    with open(PMD_SIZE) as pmd_size:
        HUGE = int(pmd_size.read())
MADV_MERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 12, 14, 15
MADV_DONTNEED, MADV_PAGEOUT, MADV_GUARD_INSTALL = 4, 21, 102
MAP_HUGETLB, MAP_NORESERVE, MAP_FIXED = 0x40000, 0x4000, 0x10
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
ANON = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
RW = mmap.PROT_READ | mmap.PROT_WRITE
MACHINE = os.uname().machine
CLONE_VM, CLONE_VFORK, CLONE_PARENT = 0x100, 0x4000, 0x8000

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = libc.madvise.argtypes
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

children: list[int] = []


class Unable(Exception):
    """What this kernel cannot do, so that the scene cannot be built here."""


# ---- Memory ---------------------------------------------------------------------


def failed(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")


def map_memory(
    size: int, flags: int = ANON, fd: int = -1, *, prot: int = RW, offset: int = 0, at: int = 0
) -> int:
    address: int | None = libc.mmap(at or None, size, prot, flags, fd, offset)
    if address == ctypes.c_void_p(-1).value or address is None:
        raise failed("mmap")
    return address


def map_huge(size: int) -> int:
    """Anonymous memory aligned to huge pages, of which it will have as many as it can."""
    size += -size % HUGE
    address = map_memory(size + HUGE)
    address += -address % HUGE
    advise(address, size, MADV_HUGEPAGE)
    return address


def advise(address: int, size: int, advice: int) -> None:
    if libc.madvise(address, size, advice):
        raise failed(f"madvise {advice}")


def write(address: int, pages: Iterable[int], value: int | None = None) -> None:
    for page in pages:
        ctypes.memset(address + page * PAGE, page % 250 + 1 if value is None else value, PAGE)


def touch(address: int, pages: Iterable[int]) -> None:
    for page in pages:
        ctypes.c_char.from_address(address + page * PAGE).value  # noqa: B018


def unmap(address: int, size: int) -> None:
    libc.munmap(address, size)


def move(address: int, size: int, elsewhere: int) -> bool:
    """Move mapped memory to where something else was; False if it is of several mappings."""
    how = MREMAP_MAYMOVE | MREMAP_FIXED
    return bool(libc.mremap(address, size, size, how, elsewhere) == elsewhere)


# ---- Processes ------------------------------------------------------------------


def fork(act: Callable[[], object] = lambda: None) -> None:
    """A child that acts, and then stands still like its parent."""
    done, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        children.clear()
        os.close(done)
        os.dup2(2, 1)  # only the scene's first process says that it is ready
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


def share(flags: int = 0) -> None:
    """Go on as a child in the same memory, like a vfork that never comes to exec.

    The parent stands still in the kernel, for good: the stack is the child's now.
    """
    if MACHINE not in {"x86_64", "aarch64"}:  # others pass other arguments
        raise Unable(f"clone of {MACHINE}")
    number = 56 if MACHINE == "x86_64" else 220
    if libc.syscall(number, CLONE_VM | CLONE_VFORK | flags | signal.SIGCHLD, 0, 0, 0, 0) < 0:
        raise failed("clone")


def stand_still() -> None:
    while os.read(0, 1):
        pass
    for pid in children:
        os.waitpid(pid, 0)
    os._exit(0)


def say_ready() -> None:
    signal.alarm(0)
    os.write(1, b"ready\n")


def wait_until(condition: Callable[[], object], seconds: int = 10) -> None:
    for _ in range(200 * seconds):
        if condition():
            return
        time.sleep(0.005)
    raise SystemExit("it did not come about")


def contents(path: str) -> str:
    with open(path, encoding="latin-1") as file:
        return file.read()


def stat_of(process: str) -> list[str]:
    """The fields of a process or thread from its state on."""
    return contents(f"/proc/{process}/stat").rpartition(")")[2].split()


def sleeps(pid: int) -> bool:
    return stat_of(str(pid))[0] == "S"


def children_of(parent: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(stat_of(name)[1]) == parent:
                found.append(int(name))
    return found
