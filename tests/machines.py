"""Machines that are not here, as what memuse.Machine reads of them.

python machines.py "CLASS [ARGUMENT ...]" MEMUSE'S ARGUMENTS runs memuse on one.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import importlib
import itertools
import os
import re
import resource
import signal
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import memuse


class Here(memuse.Machine):
    """This one; others differ from it in one thing."""

    def before_opening(self, path: str) -> None:
        """Called with the whole path of what is about to be opened; may raise an OSError."""

    def after_opening(self, path: str) -> None:
        """Called once it is open."""

    def opened(self, path: str, directory: memuse.Descriptor | None = None) -> memuse.Descriptor:
        whole = path if directory is None else f"{directory.path}/{path}"
        self.before_opening(whole)
        fd = super().opened(path, directory)
        try:
            self.after_opening(whole)
        except BaseException:
            os.close(fd)
            raise
        return fd


class NoScan(Here):
    """A kernel before 6.7, where this ioctl gives an error."""

    def __init__(self, error: str) -> None:
        number = getattr(errno, error)

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        fcntl.ioctl = refuse  # type: ignore[assignment]  # this interpreter runs memuse alone


class Refusing(Here):
    """One that answers with an error where files of these names are opened."""

    def __init__(self, error: str, *names: str) -> None:
        self.error, self.names = getattr(errno, error), names

    def before_opening(self, path: str) -> None:
        if os.path.basename(path) in self.names:
            raise OSError(self.error, os.strerror(self.error), path)


class BigEndian(Here):
    byteorder = "big" if sys.byteorder == "little" else "little"

    def pread(self, fd: memuse.Descriptor, size: int, offset: int) -> bytes:
        words = array.array("Q", super().pread(fd, size, offset))
        words.byteswap()
        return words.tobytes()


# ---- What happens while memuse reads


class Eventful(Here):
    """One in which something happens when memuse comes to a file.

    Events: "before:PATH" and "after:PATH" it is opened, "words:PATH" and "read:PATH" before and
    after entries of it are read, "scan:PATH" before a look for what is resident.
    """

    def __init__(self, times: str, event: str) -> None:
        """For so many of the events that match a regular expression."""
        self.left, self.event = int(times), re.compile(event)

    def happen(self) -> None:
        raise NotImplementedError

    def come_to(self, kind: str, path: str) -> None:
        if self.left and self.event.fullmatch(f"{kind}:{path}"):
            self.left -= 1
            self.happen()

    def before_opening(self, path: str) -> None:
        self.come_to("before", path)

    def after_opening(self, path: str) -> None:
        self.come_to("after", path)

    def words(self, fd: memuse.Descriptor, first: int, number: int) -> bytes:
        self.come_to("words", fd.path)
        words = super().words(fd, first, number)
        self.come_to("read", fd.path)
        return words

    def next_resident(self, pagemap: memuse.Descriptor, start: int, end: int) -> int:
        self.come_to("scan", pagemap.path)
        return super().next_resident(pagemap, start, end)


class Stopping(Eventful):
    """Stops, so that a test can act: see conftest's meanwhile()."""

    def happen(self) -> None:
        signal.raise_signal(signal.SIGSTOP)


class Interrupted(Eventful):
    """Interrupted by SIGINT at the last of these events."""

    def happen(self) -> None:
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


class OutOfMemory(Eventful):
    """MemoryError, or ENOMEM."""

    def __init__(self, how: str, times: str, event: str) -> None:
        super().__init__(times, event)
        self.how = how

    def happen(self) -> None:
        if self.how == "MemoryError":
            raise MemoryError
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class Denied(Eventful):
    """Without the right to read."""

    def happen(self) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


class Narrow(Here):
    """One with so many KiB of address space more than memuse has so far."""

    def __init__(self, kib: str) -> None:
        status = self.read("/proc/self/status").decode()
        (size,) = re.findall(r"^VmSize:\s+([0-9]+) kB", status, re.M)
        limit = (int(size) + int(kib)) << 10
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Logged(Here):
    """Writes to a file the paths that are opened, also of what is not there any more."""

    def __init__(self, log: str) -> None:
        self.log = open(log, "w", buffering=1)  # noqa: SIM115

    def before_opening(self, path: str) -> None:
        self.log.write(f"{path}\n")


class Hiding(Here):
    """One that refuses to show the memory of some processes, as some systems' first."""

    def __init__(self, *pids: str) -> None:
        self.directories = {f"/proc/{pid}" for pid in pids}

    def before_opening(self, path: str) -> None:
        process, _, name = path.rpartition("/")
        if process in self.directories and name in {"maps", "pagemap", "smaps_rollup"}:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


class Locked(Here):
    """One that refuses to open, list or follow one path, as a security module does."""

    def __init__(self, path: str) -> None:
        self.path = path

    def before_opening(self, path: str) -> None:
        if path == self.path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def listed(self, path: str) -> list[str]:
        self.before_opening(path)
        return super().listed(path)

    def link(self, path: str) -> bytes:
        if path == self.path:  # os.readlink() is given bytes, and tells them
            name = os.fsencode(path)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return super().link(path)


class NoMapFiles(Here):
    """One that refuses to follow links in map_files, or no longer has them."""

    def __init__(self, error: str) -> None:
        self.error = getattr(errno, error)

    def stat_memory(self, path: str) -> os.stat_result:
        if "/map_files/" in path:
            raise OSError(self.error, os.strerror(self.error), path)
        return super().stat_memory(path)


class LooksLogged(Here):
    """Writes to a file the links that are followed to a file's status."""

    def __init__(self, log: str) -> None:
        self.log = open(log, "w", buffering=1)  # noqa: SIM115

    def stat_memory(self, path: str) -> os.stat_result:
        self.log.write(f"{path}\n")
        return super().stat_memory(path)


class Emptied(Here):
    """Files of such a name are empty, the first times that they are read."""

    def __init__(self, times: str, name: str) -> None:
        self.left, self.name = int(times), name

    def read(
        self, path: str, directory: memuse.Descriptor | None = None, at_most: int = -1
    ) -> bytes:
        if self.left and os.path.basename(path) == self.name:
            self.left -= 1
            return b""
        return super().read(path, directory, at_most)


class WithoutWords(Here):
    """One whose file of such a name has no words."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pread(self, fd: memuse.Descriptor, size: int, offset: int) -> bytes:
        empty = os.path.basename(fd.path) == self.name
        return b"" if empty else super().pread(fd, size, offset)


class SlowClock(Here):
    """Every look at the clock is a second after the last."""

    def __init__(self) -> None:
        time.monotonic = itertools.count().__next__


class SlowAndInterrupted(Interrupted):
    """Both."""

    def __init__(self, times: str, event: str) -> None:
        super().__init__(times, event)
        SlowClock()


class SlowAndFull(OutOfMemory):
    """Both."""

    def __init__(self, times: str, event: str) -> None:
        super().__init__("ENOMEM", times, event)
        SlowClock()


class OnlySysAdmin(Here):
    """Another user's memuse, with CAP_SYS_ADMIN and no other capability."""

    def __init__(self) -> None:
        # They may be in a home that is not theirs.
        for name in ("json", "locale", "shlex", "unicodedata"):
            importlib.import_module(name)
        libc, admin = ctypes.CDLL(None, use_errno=True), 1 << 21
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setresuid(65534, 65534, 65534)
        header = struct.pack("Ii", 0x20080522, 0)
        if libc.capset(header, struct.pack("6I", admin, admin, 0, 0, 0, 0)):
            raise OSError(ctypes.get_errno(), "capset")
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its own files in /proc are its own


def named(machine: str) -> memuse.Machine:
    """By a class and its arguments, such as "Refusing ENOENT kpageflags"."""
    name, *parameters = machine.split()
    made: memuse.Machine = globals()[name](*parameters)
    return made


def main(machine: str, *arguments: str) -> int:
    sys.argv[0] = "memuse.py"
    return memuse.main(list(arguments), named(machine))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
