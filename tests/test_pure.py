"""The parts that read no file: literal input, literal output, and properties."""

from __future__ import annotations

import json
import struct
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memuse

PAGE = memuse.PAGE_SIZE

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
7ffd00000000-7ffd00002000 r--p 00000000 00:00 0                          [vvar]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


def test_mappings_go_on_where_addresses_and_places_in_files_do() -> None:
    areas, files = memuse.parse_maps(MAPS)
    assert areas == [
        (0x55D0C0A00, 0x55D0C0A07, None),
        (0x7F0000000, 0x7F0000005, None),
        (0x7F0001000, 0x7F0001001, None),
        (0x7FFD00000, 0x7FFD00002, None),
    ]
    assert files == [
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


@given(st.lists(mappings, min_size=1, max_size=8), st.integers(0, 4))
def test_two_shares_have_every_page_once(made: list[Any], middle: int) -> None:
    lines, at, mapped = [], 1000, []
    for gap, pages, file, offset, rights in made:
        at += gap
        mapped += range(at, at + pages)
        span = b"%x-%x" % (at * memuse.PAGE_SIZE, (at + pages) * memuse.PAGE_SIZE)
        lines.append(b"%s %s %x %s\n" % (span, rights, offset * memuse.PAGE_SIZE, file))
        at += pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memuse, "STRIPE", memuse.PMD_PAGES)
        patch.setattr(memuse, "STRIPES", range(4))
        patch.setattr(memuse, "next_resident", lambda pagemap, start, end: start)
        read: Counter[int] = Counter()
        for stripes in (memuse.STRIPES[:middle], memuse.STRIPES[middle:]):
            areas, _ = memuse.parse_maps(b"".join(lines), stripes)
            for start, end in memuse.spans_of(areas, stripes, -1):
                read.update(range(start, end))
    assert {read[page] for page in mapped} == {1}


@pytest.mark.parametrize("rss", [[1], [0, 0], [5, 1000], [1000, 5], [1, 2, 900, 1], [7] * 9])
@pytest.mark.parametrize("columns", [{"frames"}, {"frames", "rss"}])
def test_shares_have_all_stripes_and_processes_once(rss: list[int], columns: set[str]) -> None:
    stat = memuse.parse_stat(Path("/proc/self/stat").read_bytes())
    nodes = [memuse.Node(pid, stat._replace(rss=pages), 0) for pid, pages in enumerate(rss)]
    pids = set(range(len(rss)))
    first, second = memuse.shares_of(memuse.Job(nodes, columns, None, None, pids))
    assert sorted([*first.stripes, *second.stripes]) == list(memuse.STRIPES)
    assert not first.smaps_of & second.smaps_of
    if "rss" in columns:
        assert first.smaps_of | second.smaps_of == pids
    elif len(rss) > 1:
        assert len(first.stripes) == len(second.stripes)


@pytest.mark.parametrize(
    "line", [b"Rss: 1 kB\n", b"\n", b"nonsense\n", b"1-x r--p 0 0:0 0\n", b"1-2 r--p 0\n"]
)
def test_other_lines_are_errors(line: bytes) -> None:
    with pytest.raises(memuse.Error, match="list of mappings"):
        memuse.parse_maps(line)


SMAPS = b"""\
55d0c0a00000-55d0c0a03000 r--p 00001000 fe:00 1234                       /usr/bin/Rss: 9 kB
Size:                 12 kB
Rss:                  11 kB
Pss:                  10 kB
Pss_Dirty:            99 kB
Private_Clean:         9 kB
Private_Dirty:         8 kB
Private_Hugetlb:       7 kB
Shared_Hugetlb:        6 kB
Swap:                  5 kB
THPeligible:           0
VmFlags: rd mr mw me
7f0000000000-7f0000001000 rw-p 00000000 00:00 0
Rss:                   4 kB
Private_Dirty:         1 kB
"""


def test_figures_are_sums_over_vmas() -> None:
    assert memuse.parse_figures(SMAPS) == {"rss": 15 << 10, "pss": 10 << 10, "uss": 25 << 10}


def test_stat_of_a_process_with_an_evil_name() -> None:
    numbers = " ".join(str(number) for number in range(4, 53))
    stat = memuse.parse_stat(f"17 (a) Z 1 (\n) R {numbers}".encode())
    assert stat[:6] == (b"R", 4, 9, 20, 22, 24)
    assert stat.name == b"a) Z 1 (\n"
    assert stat.image == [b"26", b"27", b"28", *(str(n).encode() for n in range(45, 52))]
    kernel_thread = memuse.parse_stat(b"2 (kthreadd) S 0 0 0 0 -1 2129984" + b" 0" * 50)
    assert kernel_thread.flags & memuse.PF_KTHREAD


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
    assert memuse.KINDS[flags] == kind


def test_numbers_of_entries_are_without_flags() -> None:
    entries = [(1 << 63 | 1 << 61 | 1 << 55 | 0x12345_6789A), (1 << 62 | 3 | 77 << 5)]
    words = b"".join(entry.to_bytes(8, "little") for entry in entries)
    assert memuse.numbers_of(words) == [0x12345_6789A & memuse.NUMBER_MASK, 3 + 77 * 32]
    assert memuse.numbers_of(words[8:]) == [3 + 77 * 32]


def test_swap_types_of_slots() -> None:
    lowest = bytes([22 | 5 << 5, 23 | 7 << 5, 31, 0])
    assert lowest.translate(memuse.SWAP_TYPE_OF) == bytes([22, 23, 31, 0])


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


def test_tree_lines() -> None:
    depths = [0, 1, 2, 2, 1, 2, 0, 1]
    assert memuse.tree_lines(depths, ascii_only=False) == [
        "", " ├─ ", " │  ├─ ", " │  └─ ", " └─ ", "    └─ ", "", " └─ ",
    ]  # fmt: skip
    assert memuse.tree_lines(depths, ascii_only=True)[2:5] == [" |  |- ", " |  `- ", " `- "]


@given(st.text())
def test_visible_text_is_printable_and_one_line(text: str) -> None:
    shown = memuse.escaped(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    if text.isprintable():
        assert shown == text
    json.dumps(shown).encode()


def test_visible_shows_what_was_there() -> None:
    hostile = "a\x1b[2J\n\x9b\u202e\u200b\u2028\udcff\U000e0001\u00e9"
    shown = "a\\x1b[2J\\n\\x9b\\u202e\\u200b\\u2028\\xff\\U000e0001\u00e9"
    assert memuse.escaped(hostile) == shown


def test_what_is_forgotten_leaves_nothing_in_a_block() -> None:
    """A process that is forgotten, and another that has other frames in the same place."""
    ledger, chosen = memuse.Ledger(uss=True), b"\x80" * 64
    first, second = range(0x7FC0, 0x8000), range(0x100, 0x140)
    ledger.add(struct.pack("<64Q", *first), chosen, 0, 64, (None, 0))
    ledger.rollback()
    ledger.add(struct.pack("<64Q", *second), chosen, 0, 64, (None, 0))
    assert ledger.commit() == (64, 64)
    (block,) = ledger.blocks[None, 0]
    assert block.numbers(block.known) == list(second)
    assert bytes(ledger.marks[first[0] : first[-1] + 1]) == bytes(64)


def test_only_a_command_line_that_is_cut_shows_that() -> None:
    limit = memuse.COMMAND_LIMIT
    assert memuse.command_line(b"x" * limit + b"\0", b"name") == "x" * limit
    assert memuse.command_line(b"x" * (limit + 1), b"name") == "x" * limit + "..."


def test_a_circle_of_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a PID is used anew while processes are listed."""
    stat = memuse.parse_stat(Path("/proc/self/stat").read_bytes())
    monkeypatch.setattr(memuse.psutil, "pids", lambda: [5, 6])
    monkeypatch.setattr(memuse, "stat_of", lambda pid: stat._replace(ppid=11 - pid))
    assert [node.pid for node in memuse.process_tree([5])] == [5, 6]


@given(st.text(st.characters(exclude_categories=["C"])), st.integers(1, 30))
def test_cut_lines_fit(text: str, width: int) -> None:
    part = memuse.cut(text, width)
    assert text.startswith(part)
    wide = sum(
        (unicodedata.east_asian_width(c) in "WF") + 1 for c in part if not unicodedata.combining(c)
    )
    assert wide <= width


REPORT = memuse.Report(
    rows=[
        {
            "pid": 15897, "ppid": 1, "depth": 0, "user": "root", "frames": 1776, "unique": 1776,
            "size": 7274496, "rss": 7000064, "uss": 1671168, "pss": 3083264, "swap": 0,
            "command": "/usr/bin/zsh",
        },
        {
            "pid": 9783, "ppid": 15897, "depth": 1, "user": "joe", "frames": 608, "unique": 408,
            "size": 2490368, "rss": 2097152, "uss": 966656, "pss": 1333248, "swap": 4096,
            "command": "sudo make",
        },
    ],
    total={
        "frames": 2184, "unique": 2184, "size": 8945664, "rss": 9097216, "uss": None,
        "pss": 4416512, "swap": 4096, "command": "2 processes",
    },
    skipped={77: "Permission denied"},
    exited=0,
)  # fmt: skip


def test_table() -> None:
    size = memuse.parse_args(["1"]).size
    table = memuse.table(REPORT, memuse.IN_TABLE.split(","), size, ascii_only=False)
    assert table == [
        "    PID   FRAMES  +UNIQUE     SIZE      USS      PSS     SWAP  COMMAND",
        "  15897     1776    +1776     7104     1632     3011        0  /usr/bin/zsh",
        "   9783      608     +408     2432      944     1302        4   └─ sudo make",
        "  TOTAL     2184    +2184     8736        -     4313        4  2 processes",
    ]


def test_table_with_chosen_columns_and_sizes() -> None:
    columns = ["user", "command", "rss", "pid"]
    assert memuse.table(REPORT, columns, memuse.human, ascii_only=True) == [
        "USER     COMMAND            RSS      PID",
        "root     /usr/bin/zsh      6.7M    15897",
        "joe       `- sudo make     2.0M     9783",
        "-        2 processes       8.7M    TOTAL",
    ]


def test_columns_widen_for_big_numbers() -> None:
    table = memuse.table(REPORT, ["pid", "size"], lambda size: str(size * 10**6), ascii_only=True)
    assert len({len(line) for line in table}) == 1
    assert "7274496000000" in table[1]


def test_json() -> None:
    report = json.loads(memuse.as_json(REPORT, memuse.IN_JSON.split(",")))
    assert list(report) == ["page_size", "processes", "total", "skipped"]
    assert report["page_size"] == PAGE
    assert list(report["processes"][0]) == memuse.IN_JSON.split(",")
    assert report["total"] == {
        "frames": 2184, "size": 8945664, "rss": 9097216, "uss": None, "pss": 4416512, "swap": 4096,
    }  # fmt: skip
    assert report["skipped"] == [{"pid": 77, "reason": "Permission denied"}]
    some = json.loads(memuse.as_json(REPORT, ["pid", "user", "rss"]))
    assert some["processes"][1] == {"pid": 9783, "user": "joe", "rss": 2097152}
    assert some["total"] == {"rss": 9097216}
