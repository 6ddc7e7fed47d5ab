"""The pure functions of memuse: what they make of the kernel's text and entries, or of noise."""

from __future__ import annotations

import contextlib
import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import memuse

PAGE = 4096

# ---- /proc/PID/maps -------------------------------------------------------------

MAPS = b"""\
55d0c0a00000-55d0c0a03000 r--p 00001000 fe:00 1234                       /usr/bin/a b\\012 (deleted)
55d0c0a03000-55d0c0a05000 r-xp 00004000 fe:00 1234                       /usr/bin/a b\\012 (deleted)
55d0c0a05000-55d0c0a06000 r--p 00005000 fe:00 1234                       /usr/bin/a b\\012 (deleted)
55d0c0a06000-55d0c0a07000 rw-p 00006000 fe:00 4321                       /usr/bin/b
7f0000000000-7f0000001000 rw-p 00000000 00:00 0
7f0000001000-7f0000002000 ---p 00000000 00:00 0
7f0000003000-7f0000004000 rw-p 00000000 00:00 0                          [heap]
7f0000004000-7f0000005000 rw-s 00000000 00:00 0                          [anon_shmem:a b]
7f0001000000-7f0001001000 rw-p 00000000 00:00 0
7f0001001000-7f0001002000 rw-p 00000000 00:00 0                          [anon:its name]
7f0001002000-7f0001003000 rw-p 00000000 00:00 0                          [stack:17]
7ffd00000000-7ffd00002000 r--p 00000000 00:00 0                          [vvar]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


def test_each_line_of_maps_is_a_vma_but_vsyscall() -> None:
    assert [tuple(vma[:4]) for vma in memuse.parse_maps(MAPS, PAGE)] == [
        (0x55D0C0A00, 0x55D0C0A03, 1 - 0x55D0C0A00, b"fe:00 1234"),
        (0x55D0C0A03, 0x55D0C0A05, 1 - 0x55D0C0A00, b"fe:00 1234"),
        (0x55D0C0A05, 0x55D0C0A06, -0x55D0C0A00, b"fe:00 1234"),
        (0x55D0C0A06, 0x55D0C0A07, -0x55D0C0A00, b"fe:00 4321"),
        (0x7F0000000, 0x7F0000001, 0, None),
        (0x7F0000001, 0x7F0000002, 0, None),
        (0x7F0000003, 0x7F0000004, 0, None),
        (0x7F0000004, 0x7F0000005, -0x7F0000004, b"[anon_shmem:a b]"),
        (0x7F0001000, 0x7F0001001, 0, None),
        (0x7F0001001, 0x7F0001002, 0, None),
        (0x7F0001002, 0x7F0001003, 0, None),
        (0x7FFD00000, 0x7FFD00002, -0x7FFD00000, b"[vvar]"),
    ]


def test_pages_of_another_size() -> None:
    line = b"10000-30000 r--p 00020000 fe:00 7 /a\n"
    assert memuse.parse_maps(line, 1 << 16) == [(1, 3, 1, b"fe:00 7", b"/a")]


def test_areas_end_where_a_long_hole_begins() -> None:
    assert memuse.areas_of(memuse.parse_maps(MAPS, PAGE)) == [
        (0x55D0C0A00, 0x55D0C0A07),
        (0x7F0000000, 0x7F0000005),
        (0x7F0001000, 0x7F0001003),
        (0x7FFD00000, 0x7FFD00002),
    ]


@pytest.mark.parametrize(("hole", "areas"), [(1, 1), (255, 1), (256, 2)])
def test_a_short_hole_is_read_over(hole: int, areas: int) -> None:
    vmas = [memuse.Vma(at, at + 9, 0, None) for at in (5000, 5009 + hole)]
    assert len(memuse.areas_of(vmas)) == areas


def test_files_go_on_where_addresses_and_places_in_the_file_do() -> None:
    """And anonymous memory wherever it is."""
    runs = memuse.joined(memuse.parse_maps(MAPS, PAGE))
    assert [tuple(vma[:4]) for vma in runs if vma.file] == [
        (0x55D0C0A00, 0x55D0C0A05, 1 - 0x55D0C0A00, b"fe:00 1234"),
        (0x55D0C0A05, 0x55D0C0A06, -0x55D0C0A00, b"fe:00 1234"),
        (0x55D0C0A06, 0x55D0C0A07, -0x55D0C0A00, b"fe:00 4321"),
        (0x7F0000004, 0x7F0000005, -0x7F0000004, b"[anon_shmem:a b]"),
        (0x7FFD00000, 0x7FFD00002, -0x7FFD00000, b"[vvar]"),
    ]


# Pages before a mapping, and in it; of what file, from which page on, and privately or not.
mappings = st.tuples(
    st.just(0) | st.integers(0, 900),
    st.integers(1, 100) | st.integers(1, 3000),
    st.sampled_from([b"00:00 0", b"fe:00 12 /file", b"00:01 7 /dev/zero"]),
    st.integers(0, 3000),
    st.sampled_from([b"rw-p", b"rw-s"]),
)


@given(st.lists(mappings, min_size=1, max_size=8))
def test_every_page_is_in_one_area_and_every_page_of_a_file_in_one_vma(made: list[Any]) -> None:
    lines, at, mapped, of_files = [], 1000, list[int](), {}
    for gap, pages, file, offset, rights in made:
        at += gap
        mapped += range(at, at + pages)
        if file != b"00:00 0":
            name = b" ".join(file.split()[:2])
            of_files.update({at + i: (name, offset + i) for i in range(pages)})
        span = b"%x-%x" % (at * PAGE, (at + pages) * PAGE)
        lines.append(b"%s %s %x %s\n" % (span, rights, offset * PAGE, file))
        at += pages
    vmas = memuse.parse_maps(b"".join(lines), PAGE)
    in_areas = [page for start, end in memuse.areas_of(vmas) for page in range(start, end)]
    assert len(in_areas) == len({*in_areas})
    assert {*mapped} <= {*in_areas}
    runs = memuse.joined(vmas)
    found = {page: vma for vma in runs for page in range(vma.start, vma.end)}
    assert len(found) == sum(vma.end - vma.start for vma in runs)
    for page in mapped:
        place = (found[page].file, page + found[page].shift)
        assert place == of_files.get(page, (None, page))


@pytest.mark.parametrize(
    "line", [b"Rss: 1 kB\n", b"\n", b"nonsense\n", b"1-x r--p 0 0:0 0\n", b"1-2 r--p 0\n"]
)
def test_other_lines_than_those_of_maps_are_an_error(line: bytes) -> None:
    for text in (line, MAPS + line, line + MAPS):
        with pytest.raises(memuse.Error, match="list of mappings"):
            memuse.parse_maps(text, PAGE)


@pytest.mark.parametrize(
    ("name", "unnamed"),
    [
        (b"/SYSV00000000 (deleted)", True),
        (b"/SYSV00000000", False),  # which any user can call a file in a root of his own
        (b"[anon_shmem:x]", True),
        (b"/dev/shm/x", False),
    ],
)
def test_what_has_no_name_is_told_by_the_end_of_it(name: bytes, unnamed: bool) -> None:
    assert memuse.is_unnamed(name) == unnamed


# ---- smaps, smaps_rollup, status, stat ------------------------------------------

ROLLUP = b"""\
55d0c0a00000-7ffd00002000 ---p 00000000 00:00 0                          [rollup]
Rss:                  11 kB
Pss:                  10 kB
Pss_Dirty:            99 kB
Pss_Anon:             98 kB
Private_Clean:         9 kB
Private_Dirty:         8 kB
LazyFree:              2 kB
Private_Hugetlb:       7 kB
Shared_Hugetlb:        6 kB
Swap:                  5 kB
SwapPss:               4 kB
"""
STATUS = b"Name:\tRss: 9 kB\nVmRSS:\t   3 kB\nVmPTE:\t      52 kB\nVmSwap:\t  1 kB\n"


def test_swap_is_that_of_shared_mappings() -> None:
    smaps = b"".join(
        b"%x-%x rw-%s 00000000 00:01 7 /memfd:x (deleted)\nSwap:  %d kB\nSwapPss: 9 kB\n"
        % (start * PAGE, (start + 2) * PAGE, kind, start)
        for start, kind in [(1, b"s"), (4, b"p"), (8, b"s")]
    )
    assert memuse.swap_of_shared(smaps, PAGE) == {(1, 3): 1024, (8, 10): 8192}


def test_sizes_are_those_of_a_field_or_of_several() -> None:
    sizes = memuse.sizes_of(memuse.ROLLUP, ROLLUP)
    kib = {"rss": 11, "pss": 10, "uss": 9 + 8 + 7, "lazyfree": 2}
    assert sizes == {name: size << 10 for name, size in kib.items()}
    assert memuse.sizes_of(memuse.STATUS, STATUS) == {"pte": 52 << 10}
    # Kernel threads and zombies have none.
    assert memuse.sizes_of(memuse.ROLLUP, b"") == dict.fromkeys(kib, 0)


def test_stat_of_a_process_with_an_evil_name() -> None:
    numbers = " ".join(str(number) for number in range(4, 53))
    stat = memuse.parse_stat(f"17 (a) Z 1 (\n) R {numbers}".encode())
    assert (stat.name, stat.state, stat.ppid) == (b"a) Z 1 (\n", b"R", 4)
    assert (stat.flags, stat.threads, stat.started) == (9, 20, b"22")
    assert stat.layout == (b"26", b"27", b"28", *(b"%d" % n for n in range(45, 52)))
    assert stat.same_image(stat._replace(state=b"Z", ppid=1))
    assert not stat.same_image(stat._replace(started=b"23"))
    assert not stat.same_image(stat._replace(layout=stat.layout[1:]))
    kernel_thread = memuse.parse_stat(b"2 (kthreadd) S 0 0 0 0 -1 2129984" + b" 0" * 50)
    assert kernel_thread.flags & memuse.PF_KTHREAD


# ---- Entries --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (0b0000_0000, memuse.NOTHING),
        (0b1000_0001, memuse.ANON_EXCLUSIVE),
        (0b1000_0011, memuse.ANON_EXCLUSIVE),  # write-protected by userfaultfd
        (0b1000_0000, memuse.ANON_OR_DEVICE),
        (0b1010_0000, memuse.FILE_PAGE),
        (0b1010_0001, memuse.FILE_PAGE),
        (0b0100_0000, memuse.IN_SWAP),
        (0b0110_0000, memuse.IN_SWAP),
        (0b0100_0100, memuse.NOTHING),  # a guard region
    ],
)
def test_kinds_of_entries(flags: int, kind: int) -> None:
    assert memuse.kind_of(flags) == memuse.KINDS[flags] == kind


def test_pfns_are_without_flags() -> None:
    pfns = [0x12_3456_789A, 3 + 77 * 32, 0]
    flags = [1 << 63 | 1 << 61 | 1 << 55, 1 << 62, 1 << 63]
    words = struct.pack("<3Q", *(pfn | bits for pfn, bits in zip(pfns, flags)))
    assert memuse.pfns_of(words) == pfns
    assert memuse.pfns_of(words[8:]) == pfns[1:]  # none of them above 4 G
    assert memuse.pfns_of(b"") == []


@given(st.sets(st.integers(0, 500), min_size=1), st.integers(1, 500))
@example({0}, 1).via("a single page")
@example({499}, 500).via("the last one of many")
def test_a_part_is_packed_and_unpacked(places: set[int], pages: int) -> None:
    """What is packed has the entries of a few pages; unpacked, it has the same PFNs again."""
    pages = max(pages, *places, 0) + 1
    chosen = bytes(memuse.YES * (at in places) for at in range(pages))
    entries = struct.pack(f"<{pages}Q", *((0x81 << 56) + 1000 + at for at in range(pages)))
    part = memuse.Part(b"file", 7, entries, chosen)
    packed = part.packed()
    few = len(places) <= pages // memuse.PACKED
    assert len(packed.entries) == (len(places) if few else pages) * memuse.WORD
    back = packed.unpacked()
    pfns = [1000 + at for at in sorted(places)]
    assert memuse.chosen_pfns(entries, chosen) == pfns
    assert memuse.chosen_pfns(back.entries, chosen) == pfns
    assert back.chosen == chosen
    assert [memuse.pfn_at(back.entries, at) for at in places] == [1000 + at for at in places]


def test_swap_types_of_slots() -> None:
    lowest = bytes([22 | 5 << 5, 23 | 7 << 5, 31, 0])
    assert lowest.translate(memuse.SWAP_TYPE_OF) == bytes([22, 23, 31, 0])


# ---- Command lines --------------------------------------------------------------


def test_a_command_line_is_its_arguments_or_else_its_name() -> None:
    assert memuse.command_line(b"/bin/sh\0-c\0\0sleep 1\0", b"sh") == "/bin/sh -c  sleep 1"
    assert memuse.command_line(b"postgres: idle\0\0\0\0", b"postgres") == "postgres: idle"
    assert memuse.command_line(b"", b"kthreadd") == "[kthreadd]"
    assert memuse.command_line(b" \0 \0", b"a\nb") == "[a\\nb]"


def test_only_a_command_line_that_is_cut_shows_that() -> None:
    limit = memuse.COMMAND_LIMIT
    assert memuse.command_line(b"x" * limit + b"\0", b"name") == "x" * limit
    assert memuse.command_line(b"x" * (limit + 1), b"name") == "x" * limit + "..."
    assert memuse.command_line(b"x" * limit + b" ", b"name") == "x" * limit + "..."


@given(st.text())
def test_escaped_text_is_printable_and_one_line(text: str) -> None:
    shown = memuse.escaped(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    if text.isprintable():
        assert shown == text
    json.dumps(shown).encode()


def test_escapes_show_what_was_there() -> None:
    hostile = "a\x1b[2J\n\x9b\u202e\u200b\u2028\udcff\U000e0001\u00e9"
    shown = "a\\x1b[2J\\n\\x9b\\u202e\\u200b\\u2028\\xff\\U000e0001\u00e9"
    assert memuse.escaped(hostile) == shown


# ---- Text -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"), (512, "512"), (1023, "1023"), (1024, "1.0K"), (4096, "4.0K"),
        (7104 << 10, "6.9M"), (69 << 20, "69M"), (10234 << 10, "10M"), (1023 << 10, "1023K"),
        ((1 << 20) - 1, "1.0M"), (int(9.96 * 2**30), "10G"), (3 << 40, "3.0T"),
        (5 << 60, "5.0E"),
    ],
)  # fmt: skip
def test_human_sizes(size: int, text: str) -> None:
    assert memuse.human(size) == text


@given(st.integers(0, 1 << 62))
def test_human_sizes_are_near_and_short(size: int) -> None:
    text = memuse.human(size)
    factor = 1024 ** " KMGTPE".index(text[-1]) if text[-1].isalpha() else 1
    assert abs(float(text.rstrip("KMGTPE")) * factor - size) <= max(0.051 * size, 0.5)
    assert len(text) <= 5


def test_lines_of_a_tree() -> None:
    depths = [0, 1, 2, 2, 1, 2, 0, 1]
    assert memuse.tree_lines(depths, memuse.LINES) == [
        "", " ├─ ", " │  ├─ ", " │  └─ ", " └─ ", "    └─ ", "", " └─ ",
    ]  # fmt: skip
    assert memuse.tree_lines(depths, memuse.ASCII)[2:5] == [" |  |- ", " |  `- ", " `- "]


visible = st.text(st.characters(exclude_categories=["C"]))


def wide(text: str) -> int:
    """How many columns of a terminal the text takes, in another way than memuse's."""
    return sum(
        (unicodedata.east_asian_width(c) in "WF") + 1 for c in text if not unicodedata.combining(c)
    )


@given(visible, st.integers(1, 30))
def test_text_that_is_cut_fits_and_is_a_beginning(text: str, width: int) -> None:
    part = memuse.cut(text, width)
    assert text.startswith(part)
    assert wide(part) <= width
    assert part == text or wide(text) > width


@given(st.sampled_from(["", " ├─ ", " │  └─ "]), visible, st.integers(4, 60))
def test_a_command_that_is_shortened_fits_and_keeps_its_tree(
    tree: str, command: str, width: int
) -> None:
    shown = memuse.shortened(tree, command, width, "…")
    if wide(tree + command) <= width:
        assert shown == tree + command
    else:
        assert wide(shown) <= width
        assert shown.startswith(memuse.cut(tree, width))
    assert memuse.shortened(tree, command, 0, "…") == tree + command


def test_long_commands_are_cut_in_no_time() -> None:
    """Character by character, each measured whole, took minutes."""
    shown = memuse.shortened(" └─ ", f"/{'ä' * 60_000}/program {'b' * 60_000}", 80, "…")
    assert shown == f" └─ …/program {'b' * 66}"


# ---- Noise ----------------------------------------------------------------------

REAL_MAPS = Path("/proc/self/maps").read_bytes().splitlines(keepends=True)[:60]
REAL_SMAPS = Path("/proc/self/smaps").read_bytes().splitlines(keepends=True)[:120]
HEADER = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n"


def parse(text: bytes) -> None:
    """Well-formed VMAs and sizes, or the one expected error."""
    for source in (memuse.ROLLUP, memuse.STATUS):
        assert all(int(size) >= 0 for size in memuse.sizes_of(source, text).values())
    assert all(size >= 0 for size in memuse.swap_of_shared(text, PAGE).values())
    with contextlib.suppress(memuse.Error):
        vmas = memuse.parse_maps(text, PAGE)
        assert all(isinstance(start + end, int) for start, end in memuse.areas_of(vmas))
        assert all(isinstance(sum(vma[:3]), int) for vma in memuse.joined(vmas))


@settings(max_examples=250)
@given(st.lists(st.binary(max_size=120)))
@example([b"Rss: " + b"9" * 5000 + b" kB\n"])  # int() refuses so many digits
@example(["Rss: ٣ kB\n".encode()])
@example([b"Rss: -4 kB\n"])
@example([b"Rss:\n", b":\n"])
@example([b"\n"])
@example([b"f" * 5000 + b"-0 rw-p 0 0:0 0\n"])
@example([b"1-2 rw-p " + b"f" * 5000 + b" 0:0 1\n"])
@example([b"1-2 rw-p 00000000 00:00\n"])
def test_parsers_take_any_bytes(lines: list[bytes]) -> None:
    parse(b"".join(lines))
    parse(HEADER + b"".join(lines))
    parse(HEADER + b"".join(lines) + b"\n")


@settings(max_examples=250)
@given(st.data())
def test_parsers_take_mutated_text(data: st.DataObject) -> None:
    lines = list(data.draw(st.sampled_from([REAL_MAPS, REAL_SMAPS])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(lines) - 1))
        line = lines[at]
        cut = data.draw(st.integers(0, len(line)))
        how = data.draw(st.sampled_from(["drop", "cut", "insert", "swap", "flip"]))
        if how == "drop" and len(lines) > 1:
            del lines[at]
        elif how == "cut":
            lines[at] = line[:cut]
        elif how == "insert":
            lines[at] = line[:cut] + data.draw(st.binary(max_size=20)) + line[cut:]
        elif how == "swap":
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif line:
            cut %= len(line)
            changed = line[cut] ^ 1 << data.draw(st.integers(0, 7))
            lines[at] = line[:cut] + bytes([changed]) + line[cut + 1 :]
    parse(b"".join(lines))


def test_parsers_take_the_real_thing() -> None:
    vmas = memuse.parse_maps(b"".join(REAL_MAPS), PAGE)
    areas, files = memuse.areas_of(vmas), memuse.joined(vmas)
    for line in REAL_MAPS:
        start, end = (int(text, 16) // PAGE for text in line.split()[0].split(b"-"))
        inode = line.split()[4]
        assert any(low <= start < end <= high for low, high in areas) or b"[vsyscall]" in line
        assert inode == b"0" or any(
            low <= start < end <= high and str(file).split()[-1] == f"{inode.decode()}'"
            for low, high, _, file, _ in files
        )
    rollup = Path("/proc/self/smaps_rollup").read_bytes()
    (rss,) = [line for line in rollup.splitlines() if line.startswith(b"Rss:")]
    assert memuse.sizes_of(memuse.ROLLUP, rollup)["rss"] == 1024 * int(rss.split()[1])
