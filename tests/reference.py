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
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
ZERO_PAGE, NOPAGE = 24, 20
KCMP = {"x86_64": 312}.get(os.uname().machine, 272)


@dataclass
class Memory:
    """What one process has; mappings lists every frame as often as it is mapped."""

    frames: set[int] = field(default_factory=set)
    slots: set[int] = field(default_factory=set)
    mappings: list[int] = field(default_factory=list)


def words(path: str, first: int, number: int) -> tuple[int, ...]:
    with open(path, "rb", buffering=0) as file:
        file.seek(first * 8)
        data = file.read(number * 8)
    if not data.strip(b"\0"):
        return ()
    return struct.unpack(f"={len(data) // 8}Q", data)


def living(pid: int) -> str:
    """Where a thread of the process is that has not ended."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if "\nState:\tZ" not in (task / "status").read_text():
            return str(task)
    return f"/proc/{pid}"


def read(pid: int) -> Memory:
    memory = Memory()
    device = False
    vmas = []
    path = living(pid)
    for line in Path(f"{path}/smaps").read_bytes().split(b"\n"):
        header = re.match(rb"([0-9a-f]+)-([0-9a-f]+) .{4} .*?(\[.*\])?$", line)
        if header:
            start, end = int(header[1], 16) // PAGE, int(header[2], 16) // PAGE
            device = header[3] in (b"[vvar]", b"[vvar_vclock]", b"[vsyscall]")
        elif line.startswith(b"VmFlags:"):
            flags = line.split()
            if not device and b"pf" not in flags and b"io" not in flags:
                vmas.append((start, end))
    with open("/proc/kpageflags", "rb", buffering=0) as kpageflags:
        for start, end in vmas:
            for first in range(start, end, 1 << 16):
                for entry in words(f"{path}/pagemap", first, min(end - first, 1 << 16)):
                    if entry >> 63:
                        pfn = entry & (1 << 55) - 1
                        kpageflags.seek(pfn * 8)
                        (kinds,) = struct.unpack("=Q", kpageflags.read(8))
                        if not (kinds >> ZERO_PAGE | kinds >> NOPAGE) & 1:
                            memory.frames.add(pfn)
                            memory.mappings.append(pfn)
                    elif entry >> 62 and not entry >> 58 & 1 and entry & 31 < 23:
                        memory.slots.add(entry & (1 << 55) - 1)
    return memory


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
    return ctypes.CDLL(None).syscall(KCMP, one, other, 1, 0, 0) == 0


def count(pids: list[int]) -> dict[str, Any]:
    """What memuse should say of these processes: sizes in bytes."""
    seen: set[int] = set()
    slots: set[int] = set()
    rows = []
    inside: Counter[int] = Counter()
    memories: dict[int, Memory] = {}
    for pid in pids:
        memory = memories[pid] = read(pid)
        rows.append((pid, len(memory.frames), len(memory.frames - seen), len(memory.slots) * PAGE))
        seen |= memory.frames
        slots |= memory.slots
        if not any(same_memory(pid, other) for other in memories if other != pid):
            inside.update(memory.mappings)
    with open("/proc/kpagecount", "rb", buffering=0) as kpagecount:
        uss = 0
        for pfn, times in inside.items():
            kpagecount.seek(pfn * 8)
            uss += struct.unpack("=Q", kpagecount.read(8))[0] == times
    return {"rows": rows, "frames": len(seen), "swap": len(slots) * PAGE, "uss": uss * PAGE}
