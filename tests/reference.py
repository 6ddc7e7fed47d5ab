"""A slow and obvious count to compare memuse with: entry by entry, VMA by VMA.

It shares no code and no shortcut with memuse: every entry of every VMA is decoded,
every frame is looked up in /proc/kpageflags, every mapping and every descriptor of every
process of the machine is asked for its inode, all numbers are kept in sets.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import mmap
import os
import re
import stat
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Optional

PAGE = os.sysconf("SC_PAGE_SIZE")
ANON, SWAPBACKED, HEAD, TAIL, HUGETLB, NOPAGE, THP, ZERO_PAGE = 12, 14, 15, 16, 17, 20, 22, 24
KCMP = {"x86_64": 312, "s390x": 343, "ppc64le": 354}.get(os.uname().machine, 272)
# In maps and smaps: the range, the device, and the name of a mapping.
LINE = rb"^([0-9a-f]+-[0-9a-f]+) .{4} [0-9a-f]+ ([0-9a-f]+:[0-9a-f]+) \d+ *(.*)\n"
MAPPING = re.compile(LINE, re.M)
VMA = re.compile(LINE + rb"(?:(?!VmFlags).*\n)*VmFlags:(.*)", re.M)
TMPFS, HUGETLBFS = MEMORY = 0x01021994, 0x958458F6  # statfs(2); devtmpfs is a tmpfs
CACHESTAT = 451
MAP_SHARED_NORESERVE = mmap.MAP_SHARED | 0x4000
SHM_DEST = 0o1000  # in the mode of a System V segment that was removed while it was attached
KERNEL = 0  # the holder of what is kept though no process has it
libc = ctypes.CDLL(None, use_errno=True)


# The device and inode of a memory object, and the IPC namespace of a System V segment.
Key = tuple[int, int, str]


@dataclass
class Memory:
    """What one process has; mappings lists every frame as often as it is mapped."""

    parent: int = 0
    anon: set[int] = field(default_factory=set)
    file: set[int] = field(default_factory=set)  # all others
    shmem: set[int] = field(default_factory=set)  # those of them that are shared memory
    loose: set[int] = field(default_factory=set)  # of drivers, sockets and deleted files on disk
    objects: dict[Key, set[int]] = field(default_factory=dict)  # what it maps of each
    slots: set[int] = field(default_factory=set)
    mappings: list[int] = field(default_factory=list)

    @property
    def frames(self) -> set[int]:
        return self.anon | self.file


@dataclass
class Object:
    """Memory that is an inode's without a name, in page tables or not."""

    pages: int
    holders: set[int] = field(default_factory=set)


@dataclass
class HugePage:
    """An anonymous huge page that is mapped only in part."""

    mapped: list[int]  # PFNs
    mappings: int  # of all of them, by the whole machine
    unmapped: int  # pages


# ---- Reading --------------------------------------------------------------------


def living(pid: int) -> str:
    """Where a thread of the process is that has not ended: each has a directory in /proc."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if "\nState:\tZ" not in (task / "status").read_text():
            return f"/proc/{task.name}"
    return f"/proc/{pid}"


def vmas_of(path: str) -> list[tuple[bytes, bytes, bytes]]:
    """Ranges, devices and names of its VMAs, but those of drivers' memory that is no RAM."""
    vmas = []
    for bounds, device, name, flags in VMA.findall(Path(f"{path}/smaps").read_bytes()):
        # [vvar] is pf; since Linux 7 it is io and mm, of pages that the kernel counts as its own.
        some = set(flags.split())
        if name != b"[vsyscall]" and b"pf" not in some and (b"io" not in some or b"mm" in some):
            vmas.append((bounds, device, name))
    return vmas


def word(file: BinaryIO, index: int) -> int:
    found: int = struct.unpack("=Q", os.pread(file.fileno(), 8, index * 8))[0]
    return found


class Memories:
    """Reads what processes have."""

    def __init__(self, kpageflags: BinaryIO) -> None:
        self.kpageflags = kpageflags
        self.kinds: dict[int, int] = {}  # flags of /proc/kpageflags by PFN

    def read(self, pid: int) -> Memory:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        memory = Memory(parent=int(fields[1]))
        path = living(pid)
        vmas = vmas_of(path)
        if not vmas:  # a zombie, which has no pagemap
            return memory
        with open(f"{path}/pagemap", "rb", buffering=0) as pagemap:
            for bounds, device, name in vmas:
                file = file_at(link_to(path, bounds), device)
                key = key_of(path, file, name) if file else None
                of_mapping = Memory()
                start, end = (int(bound, 16) // PAGE for bound in bounds.split(b"-"))
                pagemap.seek(start * 8)
                while start < end:
                    entries = pagemap.read(min(end - start, 1 << 11) * 8)
                    if not entries:
                        break
                    start += len(entries) // 8
                    if entries.strip(b"\0"):
                        self.decode(entries, of_mapping)
                memory.anon |= of_mapping.anon
                memory.file |= of_mapping.file
                memory.shmem |= of_mapping.shmem
                memory.slots |= of_mapping.slots
                memory.mappings += of_mapping.mappings
                if key:
                    memory.objects.setdefault(key, set()).update(of_mapping.file)
                elif file and is_loose(file, name):
                    memory.loose |= of_mapping.file - of_mapping.shmem
        return memory

    def decode(self, entries: bytes, memory: Memory) -> None:
        for (entry,) in struct.iter_unpack("=Q", entries):
            if entry >> 63:
                pfn = entry & (1 << 55) - 1
                kinds = self.kinds_of(pfn)
                if not (kinds >> ZERO_PAGE | kinds >> NOPAGE) & 1:
                    # Of huge pages that PMDs map, older kernels do not tell it in the entry.
                    of_file = entry >> 61 & 1 or (kinds >> THP & 1 and not kinds >> ANON & 1)
                    (memory.file if of_file else memory.anon).add(pfn)
                    if of_file and self.is_shmem(pfn):
                        memory.shmem.add(pfn)
                    memory.mappings.append(pfn)
            elif entry >> 62 and not entry >> 58 & 1 and entry & 31 < 23:
                memory.slots.add(entry & (1 << 55) - 1)

    def kinds_of(self, pfn: int) -> int:
        if pfn not in self.kinds:
            self.kinds[pfn] = word(self.kpageflags, pfn)
        return self.kinds[pfn]

    def is_shmem(self, pfn: int) -> bool:
        """Of a huge page, older kernels tell it of the head alone."""
        kinds = self.kinds_of(pfn)
        if (kinds >> SWAPBACKED | kinds >> HUGETLB) & 1:
            return True
        while kinds >> TAIL & 1:
            pfn -= 1
            kinds = self.kinds_of(pfn)
        return bool(kinds >> SWAPBACKED & 1)


def tree(pid: int) -> list[int]:
    """PIDs of a tree, depth first, as ps has them."""
    children: dict[int, list[int]] = {}
    listing = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, check=True, text=True
    )
    for line in sorted(listing.stdout.splitlines(), key=lambda line: int(line.split()[0])):
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)

    def below(pid: int) -> list[int]:
        return [pid, *(found for child in children.get(pid, []) for found in below(child))]

    return below(pid)


def same_memory(one: int, other: int) -> bool:
    """Whether two processes share their memory, as after vfork (kcmp(2), KCMP_VM)."""
    return bool(libc.syscall(KCMP, one, other, 1, 0, 0) == 0)


def mapcounts(pfns: set[int]) -> dict[int, int]:
    with open("/proc/kpagecount", "rb", buffering=0) as kpagecount:
        return {pfn: word(kpagecount, pfn) for pfn in pfns}


# ---- Huge pages -----------------------------------------------------------------


def partly_mapped() -> list[HugePage]:
    """All of the machine, by a walk over all of its frames."""
    found, at_once, first = [], 1 << 15, 0  # many frames, so that no huge page lies in two parts
    paths = "/proc/kpageflags", "/proc/kpagecount"
    with open(paths[0], "rb", buffering=0) as kpageflags, open(paths[1], "rb") as kpagecount:
        while words := os.pread(kpageflags.fileno(), at_once * 8, first * 8):
            flags = array.array("Q", words)
            if any(map(is_anonymous_head, set(flags))):
                counts = array.array("Q", os.pread(kpagecount.fileno(), at_once * 8, first * 8))
                for head in range(len(flags)):
                    if is_anonymous_head(flags[head]):
                        end = head + 1
                        while end < len(flags) and flags[end] >> TAIL & 1:
                            end += 1
                        mapped = [first + page for page in range(head, end) if counts[page]]
                        found.append(
                            HugePage(mapped, sum(counts[head:end]), end - head - len(mapped))
                        )
            first += at_once
    return [huge_page for huge_page in found if huge_page.mapped and huge_page.unmapped]


def is_anonymous_head(flags: int) -> bool:
    return bool(flags >> HEAD & flags >> THP & flags >> ANON & 1)


# ---- Memory objects -------------------------------------------------------------

# A path that leads to a file, and what it is: of a mapping or a descriptor.
File = tuple[str, os.stat_result]


def link_to(path: str, bounds: bytes) -> str:
    """Where the file of a mapping is; no number there begins with a zero."""
    low, high = (int(bound, 16) for bound in bounds.split(b"-"))
    return f"{path}/map_files/{low:x}-{high:x}"


def file_at(link: str, device: bytes) -> Optional[File]:
    """A file that is mapped or open; anonymous memory is of no device."""
    return None if device == b"00:00" else (link, os.stat(link))


def key_of(path: str, file: File, name: bytes) -> Optional[Key]:
    """Which memory object a file is, if it is one, that a process has."""
    link, status = file
    if status.st_nlink or not stat.S_ISREG(status.st_mode) or file_system(link) not in MEMORY:
        return None
    # The ids of System V segments are their inodes, and begin at 0 in each namespace.
    namespace = os.readlink(f"{path}/ns/ipc") if name.startswith(b"/SYSV") else ""
    return status.st_dev, status.st_ino, namespace


def file_system(path: str) -> int:
    """Which one a file is on (statfs(2))."""
    found = ctypes.create_string_buffer(256)
    if libc.statfs(path.encode(), found):
        raise FileNotFoundError(path)
    kind = ctypes.c_uint32 if os.uname().machine == "s390x" else ctypes.c_ulong
    return int(kind.from_buffer(found).value)


def is_loose(file: File, name: bytes) -> bool:
    """Whether a file that is no object loses its pages once nobody maps them."""
    if name.startswith((b"socket:[", b"anon_inode:")) or name.endswith(b" (deleted)"):
        return True
    return stat.S_ISCHR(file[1].st_mode) or stat.S_ISBLK(file[1].st_mode)


def pages_of(file: File) -> int:
    """What an object has in memory: its blocks, less those that are swapped out."""
    link, status = file
    pages = status.st_blocks * 512 // PAGE
    swaps = len(Path("/proc/swaps").read_text().splitlines()) - 1
    if swaps and file_system(link) == TMPFS:  # hugetlb pages are not swapped
        with open(link, "rb") as opened:
            whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
            if libc.syscall(CACHESTAT, opened.fileno(), whole, found, 0) == 0:
                return min(pages, found[0])
            if ctypes.get_errno() == errno.ENOSYS and status.st_size:  # before Linux 6.5
                return pages - swapped_pages(opened, status)
    return pages


def swapped_pages(opened: BinaryIO, status: os.stat_result) -> int:
    """What smaps has as swapped out of a mapping of all of a file, none of which is touched."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with mmap.mmap(opened.fileno(), 0, MAP_SHARED_NORESERVE, mmap.PROT_READ):
        smaps = Path("/proc/self/smaps").read_text()
    line = rf" {device} {status.st_ino} .*\n(?:.*kB\n)*?Swap: +(\d+)"
    found = re.search(line, smaps)
    return int(found[1]) * 1024 // PAGE if found else 0


def files_of(path: str) -> list[tuple[str, bytes, bytes]]:
    """Where the files are that a process maps or has open; devices and names of mapped ones."""
    found = []
    for bounds, device, name in MAPPING.findall(Path(f"{path}/maps").read_bytes()):
        found.append((link_to(path, bounds), device, name))
    return [*found, *((f"{path}/fd/{number}", b"", b"") for number in os.listdir(f"{path}/fd"))]


def all_objects() -> dict[Key, Object]:
    """The machine's memory objects, and who maps or has open each."""
    objects: dict[Key, Object] = {}
    namespaces: dict[int, str] = {}
    gone = FileNotFoundError, ProcessLookupError, PermissionError  # or not to be read
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(*gone):
            path = living(pid)
            namespaces[pid] = os.readlink(f"{path}/ns/ipc")
            for link, device, name in files_of(path):
                with contextlib.suppress(*gone):  # a mapping or descriptor
                    file = file_at(link, device)
                    key = key_of(path, file, name) if file else None
                    if file and key:
                        objects.setdefault(key, Object(pages_of(file))).holders.add(pid)
    ours = os.readlink("/proc/self/ns/ipc")
    for (_, number, namespace), found in objects.items():
        if namespace == ours and is_kept(number):
            found.holders.add(KERNEL)
        elif namespace and namespace != ours:  # its inhabitants can still attach it, for all we see
            found.holders |= {pid for pid, where in namespaces.items() if where == namespace}
    return objects


def is_kept(shmid: int) -> bool:
    """Whether a System V segment of our namespace outlives all who have it attached."""
    if Path("/proc/sys/kernel/shm_rmid_forced").read_text() == "1\n":
        return False
    lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return any(int(line[1]) == shmid and not int(line[2], 8) & SHM_DEST for line in lines)


# ---- Counting -------------------------------------------------------------------


@dataclass
class Reading:
    """What processes had at one time; any of them can be counted, as one set."""

    memories: dict[int, Memory]  # by PID, parents before their children
    spaces: list[set[int]]  # PIDs that share an address space
    mapped: dict[int, int]  # by PFN, how often the whole machine maps it, but for memuse
    page: int = PAGE
    objects: dict[Key, Object] = field(default_factory=dict)  # of the whole machine
    huge_pages: list[HugePage] = field(default_factory=list)  # partly mapped ones, of all of it

    def below(self, pid: int) -> set[int]:
        """The process, and those of the reading that are below it."""
        found = {pid}
        for other, memory in self.memories.items():
            if memory.parent in found:
                found.add(other)
        return found

    def together(self, name: str, pids: set[int]) -> set[int]:
        return set().union(*(getattr(self.memories[pid], name) for pid in pids))

    def mappings(self, pids: set[int], whole: set[int]) -> Counter[int]:
        """By frame, how often these map it, without what others in the whole set share with them.

        That is an address space, whose mappings the kernel counts once.
        """
        inside: Counter[int] = Counter()
        for space in self.spaces:
            if space & whole and space & whole <= pids:
                inside.update(self.memories[min(space)].mappings)
        return inside

    def unmapped(self, pids: set[int], whole: set[int]) -> int:
        """The pages that nobody maps, of huge pages of which only these map the rest."""
        inside = self.mappings(pids, whole)
        return sum(
            huge_page.unmapped
            for huge_page in self.huge_pages
            if sum(inside[pfn] for pfn in huge_page.mapped) == huge_page.mappings
        )

    def mapped_alone(self, pids: set[int], whole: set[int]) -> set[int]:
        """What only these map."""
        inside = self.mappings(pids, whole)
        return {pfn for pfn, times in inside.items() if self.mapped[pfn] == times}

    def held_alone(self, pids: set[int]) -> list[Key]:
        """The memory objects that only these hold."""
        return [key for key, found in self.objects.items() if found.holders <= pids]

    def freed(self, pids: set[int], whole: set[int]) -> int:
        """The pages that come free when all of these end."""
        loose = self.together("anon", pids) | self.together("loose", pids)
        alone = loose & self.mapped_alone(pids, whole)
        held = self.held_alone(pids)
        return (
            len(alone) + self.unmapped(pids, whole) + sum(self.objects[key].pages for key in held)
        )

    def tree(self, pids: set[int], whole: set[int]) -> int:
        """The pages that these have in their page tables, or that only they keep from being free.

        Those are in a memory object, or in a huge page.
        """
        pages = len(self.together("frames", pids)) + self.unmapped(pids, whole)
        for key in self.held_alone(pids):
            mapped = (self.memories[pid].objects.get(key, set()) for pid in whole)
            pages += self.objects[key].pages - len(set().union(*mapped))
        return pages

    def count(self, pids: list[int]) -> dict[str, Any]:
        """What memuse should say of these processes, listed depth first: sizes in bytes."""
        whole = set(pids)

        def figures(alone: set[int], all_below: set[int], above: set[int]) -> dict[str, int]:
            frames, shmem = self.together("frames", alone), self.together("shmem", alone)
            return {
                "frames": len(frames),
                "unique": len(frames - above),
                "size": len(frames) * self.page,
                "tree": self.tree(all_below, whole) * self.page,
                "freed": self.freed(all_below, whole) * self.page,
                "anon": len(self.together("anon", alone)) * self.page,
                "shmem": len(shmem) * self.page,
                "file": len(self.together("file", alone) - shmem) * self.page,
                "swap": len(self.together("slots", alone)) * self.page,
            }

        rows = []
        above: set[int] = set()
        for pid in pids:
            rows.append({"pid": pid, **figures({pid}, self.below(pid) & whole, above)})
            above |= self.memories[pid].frames
        return {"rows": rows, "total": figures(whole, whole, set())}


def read(pids: list[int]) -> Reading:
    """Processes that are listed depth first."""
    with open("/proc/kpageflags", "rb", buffering=0) as kpageflags:
        reader = Memories(kpageflags)
        memories = {pid: reader.read(pid) for pid in pids}
    spaces: list[set[int]] = []
    for pid in pids:
        for space in spaces:
            if same_memory(pid, min(space)):
                space.add(pid)
                break
        else:
            spaces.append({pid})
    frames = (memory.frames for memory in memories.values())
    mapped = mapcounts(set().union(*frames))
    return Reading(memories, spaces, mapped, objects=all_objects(), huge_pages=partly_mapped())


def count(pids: list[int]) -> dict[str, Any]:
    return read(pids).count(pids)


def differences(
    report: dict[str, Any], expected: dict[str, Any], later: dict[str, Any] | None = None
) -> list[str]:
    """A table of the figures in memuse's JSON that are not as expected; none if all are.

    Only of the columns that it has.  With a second count, made later, a figure may be anywhere
    between the two: other processes on this machine come to map the same files, or end.
    """
    got_pids = [row["pid"] for row in report["processes"]]
    pids = [row["pid"] for row in expected["rows"]]
    if got_pids != pids:
        return [f"rows: expected {pids}, got {got_pids}"]
    wanted = [*expected["rows"], expected["total"]]
    changed = [*later["rows"], later["total"]] if later else wanted
    found = []
    for want, other, got in zip(wanted, changed, [*report["processes"], report["total"]]):
        for column in [name for name in want if name in got]:
            figures = want[column], other[column], got[column]
            if got[column] != want[column] and (
                None in figures or got[column] != sorted(figures)[1]
            ):
                line = f"{want.get('pid', 'TOTAL'):>9} {column:<7} {want[column]!s:>13}"
                more = "" if None in figures else f"{got[column] - want[column]:>+11}"
                found.append(f"{line} {got[column]!s:>13} {more}")
    header = f"{'ROW':>9} {'COLUMN':<7} {'EXPECTED':>13} {'GOT':>13}  DIFFERENCE"
    return [header, *found[:40]] if found else []
