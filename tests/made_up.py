"""A machine whose processes have whatever page tables a test tells, and what is to be counted."""

from __future__ import annotations

import os
import shutil
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import reference

import memuse

PRESENT, SWAPPED, OF_FILE, GUARD, WRITE_PROTECTED, EXCLUSIVE, SOFT_DIRTY = (
    1 << bit for bit in (63, 62, 61, 58, 57, 56, 55)
)
# In kpageflags.
ANON, HEAD, TAIL, NOPAGE, THP, ZERO_PAGE = (1 << bit for bit in (12, 15, 16, 20, 22, 24))
# PFNs: the zero page, the huge one, device memory, and what anyone may map.
ZERO, HUGE_ZERO, DEVICE, SHARED, FILES, HUGE_FRAMES, HUGE_FILES, FOLIOS, OWN = (
    0x3001, 0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x60000, 0x70000, 0x80000,
)  # fmt: skip
HIGH_DEVICE = 1 << 34  # at 64 TiB
POOL, HUGE_POOL = 0x1000, 8  # so many of them; so many huge pages
FOLIO = 16  # pages of a multi-size huge page
FIRST_PID = 5_000_001  # beyond PID_MAX_LIMIT: certainly nobody
KINDS = "nothing private shared file file_alone zero huge_zero device swap marker guard huge part"
KINDS += " huge_file huge_untold folio"

Run = tuple[str, int, int]  # a kind, a number of pages, and where in the pool they begin
Words = tuple[int, list[int]]  # the number of the first, and they and those after it
Area = tuple[bool, int, list[Run]]  # whether of a file, pages before it, what is in it
OUTSIDERS = (0, 1, 200, 0, 300)  # how often others map the frames that anyone may map


class MadeUp(memuse.Machine):
    """A machine with processes whose page tables are whatever it is told.

    What is in them is kept as sets, too: finish() gives what memuse should see.
    """

    def __init__(
        self, root: Path, page_size: int = 4096, byteorder: str = "little", pmd_pages: int = 512
    ) -> None:
        self.proc, self.sysfs = str(root), f"{root}/sys"
        self.root, self.page_size, self.pmd_pages = root, page_size, pmd_pages
        self.byteorder = "little" if byteorder == "little" else "big"
        self.memories: dict[int, reference.Memory] = {}
        self.spaces: list[set[int]] = []
        self.torn: set[int] = set()  # their page tables end before their last mapping does
        self.vanishing: dict[int, int] = {}  # by their pagemap's inode: gone when that is read
        self.own = OWN
        self.owners: set[int] = set()  # huge pages that a process has as such
        if pmd_pages:
            directory = Path(self.sysfs, "kernel/mm/transparent_hugepage")
            directory.mkdir(parents=True)
            (directory / "hpage_pmd_size").write_text(f"{pmd_pages * page_size}\n")
            self.partly_mapped = self.say_partly_mapped(FOLIO, "1")
        self._add_memuse()
        self._write_flags()

    def pids(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(self.root) if name.isdigit())

    def pread(self, fd: memuse.Descriptor, size: int, offset: int) -> bytes:
        pid = self.vanishing.get(os.fstat(fd).st_ino)
        if pid:
            shutil.rmtree(self.root / str(pid), ignore_errors=True)
        return super().pread(fd, size, offset)

    def next_resident(self, pagemap: memuse.Descriptor, start: int, end: int) -> int:
        """As PAGEMAP_SCAN tells it, or, of pages that are missing, nothing."""
        entries = super().pread(pagemap, (end - start) * 8, start * 8)
        if len(entries) < (end - start) * 8:
            return start
        return start + (len(entries) - len(entries.lstrip(b"\0"))) // 8

    def packed(self, words: Sequence[int]) -> bytes:
        return struct.pack(f"{'<' if self.byteorder == 'little' else '>'}{len(words)}Q", *words)

    def _write_words(self, path: Path, runs: list[Words], end: int) -> None:
        """Runs of words, by the number of their first; what is between them is 0."""
        with path.open("wb") as file:
            file.truncate(8 * end)
            for first, words in runs:
                file.seek(first * 8)
                file.write(self.packed(words))

    def _write_flags(self) -> None:
        pools = [(ZERO, ZERO_PAGE, 1), (HUGE_ZERO, ZERO_PAGE, self.pmd_pages)]
        pools += [(DEVICE, NOPAGE, POOL), (SHARED, ANON, POOL)]
        pools += [(HUGE_FILES, THP, 2 * self.pmd_pages)]
        runs = [(first, [flag] * number) for first, flag, number in pools]
        for pages in self._huge_pages():
            tails = [ANON | THP | TAIL] * (len(pages) - 1)
            runs.append((pages[0], [ANON | THP | HEAD, *tails]))
        self._write_words(self.root / "kpageflags", runs, (1 << 20) + 512)

    def say_partly_mapped(self, pages: int, number: str) -> Path:
        """Say how many huge pages of so many pages are partly mapped; in this file."""
        name = f"hugepages-{pages * self.page_size // 1024}kB"
        directory = Path(self.sysfs, "kernel/mm/transparent_hugepage", name, "stats")
        directory.mkdir(parents=True)
        file = directory / "nr_anon_partially_mapped"
        file.write_text(f"{number}\n")
        return file

    def _huge_pages(self) -> list[range]:
        """The PFNs of each anonymous one."""
        if not self.pmd_pages:
            return []
        ends = HUGE_FRAMES + HUGE_POOL * self.pmd_pages, FOLIOS + POOL
        found = [
            range(at, at + self.pmd_pages) for at in range(HUGE_FRAMES, ends[0], self.pmd_pages)
        ]
        return found + [range(at, at + FOLIO) for at in range(FOLIOS, ends[1], FOLIO)]

    def _add_memuse(self) -> None:
        """The process that memuse itself is there, which maps some of a file, too."""
        directory = self.root / str(FIRST_PID - 1)
        directory.mkdir()
        (self.root / "self").symlink_to(directory.name)
        self._write_stat(FIRST_PID - 1, 1)
        self.mapped_by_memuse = range(FILES + 30, FILES + 60)
        size, entries = self.page_size, [PRESENT | ZERO, 0]
        entries += [PRESENT | OF_FILE | pfn for pfn in self.mapped_by_memuse]
        lines = f"{64 * size:x}-{65 * size:x} r--p 00000000 00:05 8 /dev/zero\n"
        lines += f"{66 * size:x}-{(64 + len(entries)) * size:x} r--p 00000000 fe:01 1234 /a file\n"
        (directory / "maps").write_text(lines)
        (directory / "pagemap").write_bytes(bytes(64 * 8) + self.packed(entries))

    def _write_stat(self, pid: int, ppid: int) -> None:
        fields = ["0"] * 50  # from the third on
        fields[0], fields[1], fields[17], fields[19] = "S", str(ppid), "1", str(pid)
        (self.root / str(pid) / "stat").write_text(f"{pid} (made up) {' '.join(fields)}\n")

    def add(self, areas: list[Area], parent: int | None = None, fate: str = "") -> int:
        """A process below another, by its PID; its fate may be to be "torn", or to "vanish"."""
        pid = FIRST_PID + len(self.memories)
        directory = self.root / str(pid)
        (directory / "fd").mkdir(parents=True)
        self._write_stat(pid, parent or 1)
        self.mine: set[int] = set()  # huge pages that it has as such
        self.parts: set[int] = set()  # those of which it has some pages, as others may
        self.of_folios: set[int] = set()  # pages that it has of them
        memory = self.memories[pid] = reference.Memory(parent or 1)
        lines, tables, at = [], [], 1 << 20
        for of_file, gap, content in [*areas, (False, 300, [("private", 9, 0)])]:  # its stack
            start = at = at + gap
            for kind, length, base in content:
                entries = self._entries(kind, at, length, base, of_file)
                tables.append((at, entries))
                at += len(entries)
                for entry in filter(None, entries):
                    add_entry(memory, entry)
            name = "fe:01 1234 /a file" if of_file else "00:00 0"
            if at > start:
                bounds = f"{start * self.page_size:x}-{at * self.page_size:x}"
                lines.append(f"{bounds} rw-p 00003000 {name}\n")
        (directory / "maps").write_text("".join(lines))
        self._write_words(directory / "pagemap", tables, at + 511)
        if fate == "torn":
            os.truncate(directory / "pagemap", (at - 1) * 8)
            self.torn.add(pid)
        if fate == "vanish":
            self.vanishing[os.stat(directory / "pagemap").st_ino] = pid
        self.spaces.append({pid})
        return pid

    def add_twin(self, pid: int, parent: int) -> int:
        """A process that shares another's address space."""
        twin = FIRST_PID + len(self.memories)
        (self.root / str(twin) / "fd").mkdir(parents=True)
        self._write_stat(twin, parent)
        for name in ("maps", "pagemap"):
            (self.root / str(twin) / name).symlink_to(f"../{pid}/{name}")
        self.memories[twin] = replace(self.memories[pid], parent=parent)
        next(space for space in self.spaces if pid in space).add(twin)
        return twin

    def _entries(self, kind: str, at: int, length: int, base: int, file: bool) -> list[int]:
        """Of a run that begins at a page, perhaps with nothing up to a huge page's bounds."""
        pages = range(base, base + length)
        if kind in {"private", "file_alone"}:
            self.own += length
            flags = PRESENT | EXCLUSIVE | OF_FILE * (kind == "file_alone")
            return [flags | pfn for pfn in range(self.own - length, self.own)]
        if kind == "shared":
            return [PRESENT | SOFT_DIRTY * (p % 3 == 0) | SHARED + p for p in pages]
        if kind == "file":
            return [PRESENT | OF_FILE | FILES + p for p in pages]
        if kind == "anew":  # a file's no more
            return [PRESENT | FILES + p for p in pages]
        if kind == "folio" and self.pmd_pages:  # no page of it is mapped twice by one process
            of_folios = [FOLIOS + p % POOL for p in pages]
            entries = [0 if pfn in self.of_folios else PRESENT | pfn for pfn in of_folios]
            self.of_folios.update(of_folios)
            return entries
        if kind == "high_device":
            return [PRESENT | HIGH_DEVICE + p for p in pages]
        if kind == "zero":
            return [PRESENT | ZERO] * length
        if kind == "device" and file:  # only drivers' files map any
            return [PRESENT | DEVICE + p for p in pages]
        if kind == "swap":
            return [SWAPPED | WRITE_PROTECTED * (p % 2) | p % 23 | p // 3 << 5 for p in pages]
        if kind == "swap_down":
            return [SWAPPED | p << 5 for p in reversed(pages)]
        if kind == "marker":
            return [SWAPPED | 23 + p % 9 | p << 5 for p in pages]
        if kind == "guard":
            return [SWAPPED | GUARD | p % 32 for p in pages]
        if kind in {"part", "huge", "huge_zero", "huge_file", "huge_untold"} and self.pmd_pages:
            return self._huge_entries(kind, at, length, base)
        return [0] * length

    def _huge_entries(self, kind: str, at: int, length: int, base: int) -> list[int]:
        pages, number = range(self.pmd_pages), base % HUGE_POOL
        first = HUGE_FRAMES + number * self.pmd_pages
        empty = [0] * (-at % self.pmd_pages)
        if kind in {"huge_file", "huge_untold"}:  # before Linux 6.11 a file's are like the others
            flags = PRESENT | (OF_FILE if kind == "huge_file" else EXCLUSIVE * (number % 2))
            return empty + [flags | HUGE_FILES + base % 2 * self.pmd_pages + i for i in pages]
        if kind == "huge_zero":
            return empty + [PRESENT | OF_FILE | HUGE_ZERO + i for i in pages]
        if kind == "huge":
            if number in self.owners | self.parts:
                return empty
            self.owners.add(number)
            self.mine.add(number)
            # The first page's bit on all, though others may map the others.
            return empty + [PRESENT | EXCLUSIVE | first + i for i in pages]
        if number in self.mine:  # no anonymous page is mapped twice by one process
            return [0] * length
        self.parts.add(number)
        others = len(pages) - 1
        return [PRESENT | first + 1 + (base + i) % others for i in range(min(length, others))]

    def finish(self, with_outsiders: bool = False) -> reference.Reading:
        """What is to be counted, once all processes are there."""
        gone = set(self.vanishing.values())
        mapped: Counter[int] = Counter()
        for space in self.spaces:
            if not space <= gone:
                mapped.update(self.memories[min(space)].mappings)
        if with_outsiders:
            for pfn in mapped:
                anyone = SHARED <= pfn < HUGE_FRAMES or (
                    pfn < OWN and (pfn - HUGE_FRAMES) % self.pmd_pages
                )
                mapped[pfn] += OUTSIDERS[pfn % len(OUTSIDERS)] if anyone else 0
        counts = mapped + Counter(self.mapped_by_memuse)
        end = max(counts) + max(512, self.pmd_pages)
        self._write_words(self.root / "kpagecount", runs_of(counts), end)
        huge_pages = []
        for pages in self._huge_pages():
            of_it = [pfn for pfn in pages if mapped[pfn]]
            mappings = sum(mapped[pfn] for pfn in of_it)
            if 0 < len(of_it) < len(pages):
                huge_pages.append(reference.HugePage(of_it, mappings, len(pages) - len(of_it)))
        for pid in gone | self.torn:  # others see what they map, memuse does not
            self.memories[pid] = reference.Memory(self.memories[pid].parent)
        reading = reference.Reading(self.memories, self.spaces, mapped, self.page_size)
        reading.huge_pages = huge_pages
        return reading


def runs_of(words: dict[int, int]) -> list[Words]:
    """Words by their numbers, as runs of those that follow each other."""
    runs: list[Words] = []
    end = -1
    for at in sorted(words):
        if at != end:
            run: list[int] = []
            runs.append((at, run))
        run.append(words[at])
        end = at + 1
    return runs


def add_entry(memory: reference.Memory, entry: int) -> None:
    """Take in what an entry stands for."""
    pfn = entry & (1 << 55) - 1
    if entry & PRESENT:
        if SHARED <= pfn < HIGH_DEVICE:  # neither of the zero pages, nor a device's
            of_file = entry & OF_FILE or HUGE_FILES <= pfn < FOLIOS
            (memory.file if of_file else memory.anon).add(pfn)
            memory.mappings.append(pfn)
    elif entry & SWAPPED and not entry & GUARD and entry & 31 < 23:
        memory.slots.add(pfn)
