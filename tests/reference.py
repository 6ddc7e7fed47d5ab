"""A slow and obvious count to compare memuse with: entry by entry, VMA by VMA.

It shares no code and no shortcut with memuse: every entry of every VMA is decoded,
every frame is looked up in /proc/kpageflags, all numbers are kept in sets.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

PAGE = os.sysconf("SC_PAGE_SIZE")
ANON, NOPAGE, THP, ZERO_PAGE = 12, 20, 22, 24
KCMP = {"x86_64": 312, "s390x": 343, "ppc64le": 354}.get(os.uname().machine, 272)
VMA = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) .{4} .*?(\[.*\])?\n(?:(?!VmFlags).*\n)*VmFlags:(.*)", re.M
)
libc = ctypes.CDLL(None)


@dataclass
class Memory:
    """What one process has; mappings lists every frame as often as it is mapped."""

    parent: int = 0
    anon: set[int] = field(default_factory=set)
    file: set[int] = field(default_factory=set)
    slots: set[int] = field(default_factory=set)
    mappings: list[int] = field(default_factory=list)

    @property
    def frames(self) -> set[int]:
        return self.anon | self.file


# ---- Reading --------------------------------------------------------------------


def living(pid: int) -> str:
    """Where a thread of the process is that has not ended."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if "\nState:\tZ" not in (task / "status").read_text():
            return str(task)
    return f"/proc/{pid}"


def vmas_of(path: str) -> list[tuple[int, int]]:
    """Its VMAs in pages, but those of devices, whose memory is not the machine's."""
    vmas = []
    for low, high, name, flags in VMA.findall(Path(f"{path}/smaps").read_bytes()):
        # [vvar] is pf; since Linux 7 it is io and mm, of pages that the kernel counts as its own.
        some = set(flags.split())
        if name != b"[vsyscall]" and b"pf" not in some and (b"io" not in some or b"mm" in some):
            vmas.append((int(low, 16) // PAGE, int(high, 16) // PAGE))
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
        stat = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        memory = Memory(parent=int(stat[1]))
        path = living(pid)
        vmas = vmas_of(path)
        if not vmas:  # a zombie, which has no pagemap
            return memory
        with open(f"{path}/pagemap", "rb", buffering=0) as pagemap:
            for start, end in vmas:
                pagemap.seek(start * 8)
                while start < end:
                    entries = pagemap.read(min(end - start, 1 << 11) * 8)
                    if not entries:
                        break
                    start += len(entries) // 8
                    if entries.strip(b"\0"):
                        self.decode(entries, memory)
        return memory

    def decode(self, entries: bytes, memory: Memory) -> None:
        for (entry,) in struct.iter_unpack("=Q", entries):
            if entry >> 63:
                pfn = entry & (1 << 55) - 1
                if pfn not in self.kinds:
                    self.kinds[pfn] = word(self.kpageflags, pfn)
                kinds = self.kinds[pfn]
                if not (kinds >> ZERO_PAGE | kinds >> NOPAGE) & 1:
                    # Of huge pages that PMDs map, older kernels do not tell it in the entry.
                    of_file = entry >> 61 & 1 or (kinds >> THP & 1 and not kinds >> ANON & 1)
                    (memory.file if of_file else memory.anon).add(pfn)
                    memory.mappings.append(pfn)
            elif entry >> 62 and not entry >> 58 & 1 and entry & 31 < 23:
                memory.slots.add(entry & (1 << 55) - 1)


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


# ---- Counting -------------------------------------------------------------------


@dataclass
class Reading:
    """What processes had at one time; any of them can be counted, as one set."""

    memories: dict[int, Memory]  # by PID, parents before their children
    spaces: list[set[int]]  # PIDs that share an address space
    mapped: dict[int, int]  # by PFN, how often the whole machine maps it, but for memuse
    page: int = PAGE

    def below(self, pid: int) -> set[int]:
        """The process, and those of the reading that are below it."""
        found = {pid}
        for other, memory in self.memories.items():
            if memory.parent in found:
                found.add(other)
        return found

    def together(self, name: str, pids: set[int]) -> set[int]:
        return set().union(*(getattr(self.memories[pid], name) for pid in pids))

    def freed(self, pids: set[int], whole: set[int]) -> set[int]:
        """What only these map, and no address space that others in the whole set share."""
        inside: Counter[int] = Counter()
        for space in self.spaces:
            if space & whole and space & whole <= pids:  # the kernel counts its mappings once
                inside.update(self.memories[min(space)].mappings)
        return {pfn for pfn, times in inside.items() if self.mapped[pfn] == times}

    def count(self, pids: list[int]) -> dict[str, Any]:
        """What memuse should say of these processes, listed depth first: sizes in bytes."""
        whole = set(pids)

        def figures(alone: set[int], all_below: set[int], above: set[int]) -> dict[str, int]:
            frames = self.together("frames", alone)
            return {
                "frames": len(frames),
                "unique": len(frames - above),
                "size": len(frames) * self.page,
                "tree": len(self.together("frames", all_below)) * self.page,
                "freed": len(self.freed(all_below, whole)) * self.page,
                "anon": len(self.together("anon", alone)) * self.page,
                "file": len(self.together("file", alone)) * self.page,
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
    return Reading(memories, spaces, mapcounts(set().union(*frames)))


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
