"""What is printed: columns, units, widths, the tree, TOTAL, and JSON."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    ENVIRONMENT,
    TREE,
    Result,
    fails,
    inside,
    measured,
    needs_root,
    on_terminal,
    ready,
    run_memuse,
    running,
    wait_for,
)

import memuse

pytestmark = needs_root
DEFAULT = ["PID", "FRAMES", "+UNIQUE", "SIZE", "TREE", "FREED", "PSS", "SWAP", "COMMAND"]
# Of all processes, what does not change while nobody does anything.
STEADY = "pid,ppid,user,frames,unique,size,tree,anon,shmem,file,rss,pte,swap,command"


def shown(*arguments: object, **environment: str) -> list[str]:
    """The lines of a run without a complaint."""
    result = inside(None, *arguments, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    return str(result.stdout).splitlines()


# ---- Literal in, literal out ----------------------------------------------------

FIGURES: list[dict[str, Any]] = [
    {
        "pid": 15897, "ppid": 1, "user": "root", "frames": 1776, "unique": 1776,
        "size": 7274496, "tree": 8945664, "freed": 4194304, "anon": 7000000,
        "shmem": 200000, "file": 74496,
        "rss": 7000064, "uss": 1671168, "pss": 3083264, "pte": 53248, "swap": 0,
        "command": "/usr/bin/zsh",
    },
    {
        "pid": 77, "ppid": 15897, "user": "joe", "command": "secret",
    },
    {
        "pid": 9783, "ppid": 77, "user": "joe", "frames": 608, "unique": 408,
        "size": 2490368, "tree": 2490368, "freed": 1024000, "anon": 2000000,
        "shmem": 0, "file": 490368,
        "rss": 2097152, "uss": 966656, "pss": 1333248, "pte": 40960, "swap": 4096,
        "command": "sudo make",
    },
]  # fmt: skip
TOTAL: dict[str, Any] = {
    "frames": 2184, "unique": 2184, "size": 8945664, "tree": 8945664, "freed": 5218304,
    "anon": 8181168, "shmem": 200000, "file": 564496, "rss": 9097216, "pss": 4416512, "pte": 94208,
    "swap": 4096,
}  # fmt: skip
REFUSED = "pagemap: Permission denied"
RESULTS = [
    memuse.Result(FIGURES[0], depth=0),
    memuse.Result(FIGURES[1], depth=1, unread=REFUSED),
    memuse.Result(FIGURES[2], depth=2),
    memuse.Result(TOTAL, depth=0),
]


def table(*columns: str, size: Any = memuse.kib, width: int = 0) -> list[str]:
    words = memuse.last_words(RESULTS, size, None)
    return memuse.table(RESULTS, [*columns] or memuse.IN_TABLE, size, width, words)


def test_table() -> None:
    assert table() == [
        "  PID FRAMES +UNIQUE SIZE TREE FREED  PSS SWAP COMMAND",
        "15897   1776    1776 7104 8736  4096 3011    0 /usr/bin/zsh",
        "   77      -       -    -    -     -    -    -  └─ secret",
        " 9783    608     408 2432 2432  1000 1302    4     └─ sudo make",
        "TOTAL   2184    2184 8736 8736  5096 4313    4 KiB, 3 processes, 1 unread",
    ]


def test_table_with_chosen_columns_and_sizes() -> None:
    assert table("user", "command", "rss", "pte", "uss", "pid", size=memuse.human) == [
        "USER COMMAND                      RSS PTE  USS   PID",
        "root /usr/bin/zsh                6.7M 52K 1.6M 15897",
        "joe   └─ secret                     -   -    -    77",
        "joe      └─ sudo make            2.0M 40K 944K  9783",
        "-    TOTAL 3 processes, 1 unread 8.7M 92K    -     -",
    ]


@pytest.mark.parametrize("columns", ["pid", "rss,pid", "rss", "user", "rss,command", "command,pid"])
def test_the_last_row_says_total_whatever_the_columns(columns: str) -> None:
    """At the command where no pid leads, and behind its figures where there is neither."""
    *others, last = table(*columns.split(","))
    assert last.split().count("TOTAL") == 1
    assert not [line for line in others if "TOTAL" in line]
    if "command" in columns:
        assert "TOTAL KiB, 3 processes, 1 unread" in last


def test_columns_widen_for_big_numbers() -> None:
    lines = table("pid", "size", "ppid", size=str)
    assert lines == [
        "  PID    SIZE  PPID",
        "15897 7274496     1",
        "   77       - 15897",
        " 9783 2490368    77",
        "TOTAL 8945664     -",
    ]


def test_json() -> None:
    report = json.loads(memuse.as_json(RESULTS, memuse.IN_JSON, 4096, {77: REFUSED}))
    assert list(report) == ["page_size", "processes", "total", "skipped"]
    assert report["page_size"] == 4096
    names = "pid ppid depth frames unique size tree freed anon shmem file rss pss uss swap command"
    for row, result in zip(report["processes"], RESULTS):
        assert list(row) == names.split()
        expected = {**result.cells, "depth": result.depth}
        assert row == {name: expected.get(name) for name in names.split()}
    figures = {name: TOTAL[name] for name in TOTAL if name != "pte"}
    assert report["total"] == {**figures, "uss": None}
    assert report["skipped"] == [{"pid": 77, "reason": REFUSED}]
    some = json.loads(memuse.as_json(RESULTS, ["pid", "user", "rss"], 4096, {}))
    assert some["processes"][2] == {"pid": 9783, "user": "joe", "rss": 2097152}
    assert some["total"] == {"rss": 9097216}


# ---- Columns and units ----------------------------------------------------------


def test_columns_are_as_wide_as_what_is_in_them_and_a_space_apart(forked: int) -> None:
    lines = shown(forked)
    assert lines[0].split() == DEFAULT
    cells = [line.split(None, len(DEFAULT) - 1) for line in lines]
    assert {len(row) for row in cells} == {len(DEFAULT)}
    widths = [max(len(row[at]) for row in cells) for at in range(len(DEFAULT) - 1)]
    for line, row in zip(lines, cells):
        padded = [cell.rjust(width) for cell, width in zip(row, widths)]
        assert line.startswith(" ".join(padded) + " ")
    assert cells[1][0] == str(forked)
    assert cells[1][-1] == " ".join(psutil.Process(forked).cmdline())
    assert cells[-1][0] == "TOTAL"


def test_cells_are_plain_numbers(forked: int) -> None:
    _, *rows, total = shown("-o", "frames,unique,size,tree,freed,pss,swap", forked)
    *figures, word = total.split()
    assert word == "TOTAL"
    cells = [*figures, *(cell for row in rows for cell in row.split())]
    assert all(re.fullmatch("[0-9]+", cell) for cell in cells)
    frames, unique, size, tree, *_ = map(int, figures)
    assert sum(int(row.split()[1]) for row in rows) == unique == frames
    assert size == tree == frames * os.sysconf("SC_PAGE_SIZE") // 1024


def test_no_line_ends_in_blanks(forked: int) -> None:
    for columns in ("user,pid", "command", "pid,user", "pid,command,user"):
        lines = shown("-o", columns, forked)
        assert lines == [line.rstrip() for line in lines]
        assert len(lines) == 6


@pytest.mark.parametrize(
    ("option", "unit"), [([], "KiB, "), (["-b"], "bytes, "), (["-h"], ""), (["--bytes"], "bytes, ")]
)
def test_the_unit_stands_beside_the_number_of_processes(
    option: list[str], unit: str, forked: int, scene: Any
) -> None:
    assert shown(*option, forked)[-1].split(None, 8)[-1] == f"{unit}4 processes"
    child = psutil.Process(forked).children()[-1]
    while child.children():
        (child,) = child.children()
    assert shown(*option, child.pid)[-1].split(None, 8)[-1] == f"{unit}1 process"


def test_units_agree(forked: int) -> None:
    in_bytes, kib, short = (
        shown(option, "-o", "size", forked)[-1].split()[0] for option in ("-b", "-osize", "-h")
    )
    assert int(in_bytes) // 1024 == int(kib)
    assert short == memuse.human(int(in_bytes))
    assert measured("-o", "size", forked)["total"]["size"] == int(in_bytes)


def test_a_column_named_twice_is_shown_once(forked: int) -> None:
    assert shown("-o", "pid,frames,pid,FRAMES", forked)[0].split() == ["PID", "FRAMES"]
    header = shown("-o", "+pid,user,user,command", forked)[0]
    assert header.split() == [*DEFAULT[:-1], "USER", "COMMAND"]


def test_names_of_columns_in_any_case(forked: int) -> None:
    assert shown("-o", "PID,Frames,uSer", forked)[0].split() == ["PID", "FRAMES", "USER"]


def test_columns_are_added_before_the_command(forked: int) -> None:
    header = shown("-o", "+uss,PTE", forked)[0]
    assert header.split() == [*DEFAULT[:-1], "USS", "PTE", "COMMAND"]
    plain, more = measured(forked), measured("-o", "+pte,user,size", forked)
    names = list(plain["processes"][0])
    assert list(more["processes"][0]) == [*names[:-1], "pte", "user", "command"]
    assert list(more["total"]) == [*plain["total"], "pte"]
    assert plain["total"]["unique"] == plain["total"]["frames"] > 0


def test_any_order_of_columns_shows_the_same(forked: int) -> None:
    names = STEADY.split(",")
    whole = measured("-o", STEADY, forked)
    back = measured("-o", ",".join(reversed(names)), forked)
    assert list(back["processes"][0]) == names[::-1]
    assert (back["processes"], back["total"]) == (whole["processes"], whole["total"])
    for name in names:
        alone = measured("-o", name, forked)
        assert alone["processes"] == [{name: row[name]} for row in whole["processes"]]
        assert alone["total"] == ({name: whole["total"][name]} if name in whole["total"] else {})


def test_page_tables_are_vmpte_and_their_sum(forked: int) -> None:
    report = measured("-o", "pid,pte", forked)
    for row in report["processes"]:
        status = Path(f"/proc/{row['pid']}/status").read_text()
        (kib,) = re.findall(r"^VmPTE:\s+(\d+) kB$", status, re.M)
        assert row["pte"] == int(kib) * 1024 > 0
    assert report["total"] == {"pte": sum(row["pte"] for row in report["processes"])}


def test_page_tables_and_command_of_a_process_whose_first_thread_has_ended(
    scene: Callable[..., int],
) -> None:
    """The files of that thread are empty."""
    (row,) = measured("-o", "pte,command", scene("lone_thread"))["processes"]
    assert row["pte"] > 0
    assert "lone_thread" in row["command"]


# Memory that its owner has given back for when the kernel needs it.
LAZY = """
import mmap, os
memory = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
memory.write(b"x" * (8 << 20))
memory.madvise(getattr(mmap, "MADV_FREE", 8), 0, 6 << 20)
print("ready", flush=True)
os.read(0, 1)
"""


def test_what_madv_free_gave_back_counts_and_is_told() -> None:
    with ready(LAZY) as process:
        report = measured("-o", "+lazyfree,pte", process.pid)
    (row,) = report["processes"]
    # The kernel marks pages in batches, so that the last few may not be marked yet.
    assert 5 << 20 < row["lazyfree"] == report["total"]["lazyfree"] <= 6 << 20
    assert row["anon"] >= row["freed"] >= 8 << 20


def test_a_set_has_no_uss_of_its_own(forked: int) -> None:
    assert measured("-o", "uss,rss", forked)["total"]["uss"] is None
    assert shown("-o", "uss,pid", forked)[-1].split() == ["-", "TOTAL"]


def test_owners_are_named(forked: int) -> None:
    rows = measured("-o", "user,ppid", forked)["processes"]
    assert rows[0] == {"user": psutil.Process().username(), "ppid": os.getpid()}


# ---- The tree -------------------------------------------------------------------


def test_the_tree_is_drawn_before_the_commands(forked: int) -> None:
    rows = measured("-o", "pid,ppid", forked)["processes"]
    parents = [row["ppid"] for row in rows]
    below = " │  └─ " if parents[2] == rows[1]["pid"] else " └─ "
    deepest = "    └─ " if parents[3] == rows[2]["pid"] else " └─ "
    drawn = [re.match("[ │├└─]*", line)[0] for line in shown("-o", "command", forked)[1:-1]]  # type: ignore[index]
    assert drawn == ["", " ├─ ", below, deepest]


@pytest.mark.parametrize(
    ("environment", "drawn"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "`- "),
        ({"LANG": "C", "PYTHONUTF8": "1"}, "└─ "),
        ({"LC_ALL": "C.UTF-8"}, "└─ "),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}, "`- "),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"}, "`- "),
    ],
)
def test_the_tree_is_drawn_in_the_outputs_encoding(
    environment: dict[str, str], drawn: str, forked: int
) -> None:
    result: Any = run_memuse(forked, env=ENVIRONMENT | environment, text=False)
    assert f"    {drawn}".encode() in result.stdout or f" {drawn}".encode() in result.stdout
    assert result.stdout.isascii() == drawn.isascii()


@pytest.mark.parametrize("depth", range(4))
def test_rows_below_a_depth_are_left_out_and_counted(depth: int, forked: int) -> None:
    columns = ("-o", "pid,frames,unique,tree,freed,command")
    whole, rows = measured(*columns, forked), measured(*columns, "-d", depth, forked)
    assert rows["total"] == whole["total"]
    depths = {row["pid"]: row["depth"] for row in measured(forked)["processes"]}
    assert rows["processes"] == [row for row in whole["processes"] if depths[row["pid"]] <= depth]
    columns = ("-o", "pid,frames,tree,command")
    lines = shown(*columns, "--max-depth", depth, forked)
    assert [line.split()[0] for line in lines[1:-1]] == [str(r["pid"]) for r in rows["processes"]]
    assert lines[-1] == shown(*columns, forked)[-1]
    assert lines[-1].endswith("KiB, 4 processes")
    assert len(lines) == 2 + {0: 1, 1: 3}.get(depth, 4)


def test_the_tree_is_drawn_without_what_is_left_out(forked: int) -> None:
    drawn = [re.match("[ │├└─]*", line) for line in shown("-d", 1, "-o", "command", forked)[1:-1]]
    assert [match and match[0] for match in drawn] == ["", " ├─ ", " └─ "]


# ---- Widths ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def long() -> Any:
    """A process with a long path, a long line, and a program's name between."""
    path = f"/usr/lib/{'chromium' * 8}/chromium"
    with waiting(path, "-c", "read line; :", "--type=renderer", "x" * 300) as pid:
        yield pid


def with_columns(width: object, *arguments: object) -> list[str]:
    return shown(*arguments, COLUMNS=str(width))


def test_nothing_is_cut_in_a_pipe(long: int) -> None:
    assert shown(long)[1].endswith("x" * 300)
    for width in (0, -5, "", "wide", "1e3", "\u0663", 10**12):
        assert with_columns(width, long)[1].endswith("x" * 300)


def test_columns_of_the_environment_are_the_width_in_a_pipe(long: int) -> None:
    for width in (80, 100, 200):
        assert [len(line) for line in with_columns(width, long)][1] == width


@pytest.mark.parametrize(
    ("width", "environment", "longest"),
    [(80, "", 80), (0, "", 300), (80, "120", 120), (200, "70", 70), (80, "0", 80), (0, "90", 90)],
)
def test_the_width_of_a_terminal(width: int, environment: str, longest: int, long: int) -> None:
    """A terminal that nobody told its size has a width of 0; COLUMNS goes before."""
    env = ENVIRONMENT | ({"COLUMNS": environment} if environment else {})
    run = functools.partial(run_memuse, long, env=env, capture_output=False)
    result, text = on_terminal("stdout", width, run)
    assert result.returncode == 0
    found = max(len(line) for line in text.splitlines())
    assert found == longest if longest < 300 else found > 300


@pytest.mark.parametrize("width", [1, 20, 50, 57])
def test_numbers_are_never_cut(width: int, long: int) -> None:
    columns = "pid,frames,unique,size,tree,swap,command"
    whole, narrow = shown("-o", columns, long), with_columns(width, "-o", columns, long)
    for line, full in zip(narrow, whole):
        assert line.split()[:6] == full.split()[:6]
        assert len(line.split(None, 6)[-1]) <= max(width, len("COMMAND"))
    assert all(len(line) <= max(width, len(narrow[0])) for line in narrow)


def test_the_command_may_stand_before_other_columns(long: int) -> None:
    header, row, total = with_columns(40, "-o", "command,pid", long)
    assert (len(header), len(row), len(total)) == (40, 40, 40)
    assert row.split()[-1] == str(long)


@contextmanager
def waiting(*command: str) -> Iterator[int]:
    """A shell that waits under such a command line."""
    with running(command, executable="/bin/sh") as process:
        wait_for(lambda: psutil.Process(process.pid).cmdline() == [*command])
        yield process.pid


def command_in(width: int, pid: int) -> str:
    """The command with so many columns for it."""
    row = with_columns(columns_before_the_command(pid) + width, "-o", "pid,command", pid)[1]
    return row.split(None, 1)[1]


def columns_before_the_command(pid: int) -> int:
    return max(len(str(pid)), len("TOTAL")) + 1


def test_a_path_loses_its_middle_before_its_programs_name() -> None:
    rest = "-c read line; : --type=renderer"
    with waiting("/usr/lib/chromium/chromium", "-c", "read line; :", "--type=renderer") as pid:
        whole = f"/usr/lib/chromium/chromium {rest}"
        for width, expected in (
            (len(whole), whole),
            (len(whole) - 1, f"/usr/lib/chromi…/chromium {rest}"),
            (len(whole) - 4, f"/usr/lib/chr…/chromium {rest}"),
            (len(whole) - 16, f"…/chromium {rest}"),
            (len(whole) - 17, f"…/chromium {rest}"[:-1]),
            (20, "…/chromium -c read l"),
            (7, "…/chrom"),
        ):
            assert command_in(width, pid) == expected
        width = columns_before_the_command(pid) + len(whole) - 4
        env = {**ENVIRONMENT, "COLUMNS": str(width), "PYTHONIOENCODING": "ascii"}
        in_ascii = run_memuse("-o", "pid,command", pid, env=env).stdout.splitlines()[1]
        assert in_ascii.split(None, 1)[1] == f"/usr/lib/chr~/chromium {rest}"


def test_a_command_without_a_path_loses_its_end() -> None:
    with waiting("server:", "-c", "read line; :", "/var/lib/data/" + "y" * 90) as pid:
        assert command_in(30, pid) == "server: -c read line; : /var/l"


def test_wide_characters_take_two_columns_and_combining_ones_none() -> None:
    with waiting("日本語" * 10, "-c", "read line; :", "e\u0301" * 20) as pid:
        assert command_in(13, pid) == "日本語" * 2
        assert command_in(100, pid).endswith("e\u0301" * 20)
        header, row, total = shown("-o", "command,ppid", pid)
    # What stands right of it is aligned by columns of the terminal.
    width = 60 + len(" -c read line; : ") + 20
    assert header == "COMMAND".ljust(width) + " " + "PPID".rjust(len(str(os.getpid())))
    assert row.endswith(f"e\u0301 {os.getpid():>4}")
    assert len(total) == len(header)


# ---- Processes that cannot be read ----------------------------------------------


@pytest.fixture
def family() -> Any:
    """A parent with three children, which have done the same."""
    with ready(TREE, 3) as process:
        yield process.pid, sorted(child.pid for child in psutil.Process(process.pid).children())


def hiding(pids: list[int], *arguments: object) -> Result:
    return inside(f"Hiding {' '.join(map(str, pids))}", *arguments)


def test_a_process_that_cannot_be_read_keeps_its_row(family: tuple[int, list[int]]) -> None:
    pid, children = family
    result = hiding(children[1:2], "-o", "+uss,pte,user", pid)
    header, *rows, total = (line.split(None, 11) for line in result.stdout.splitlines())
    assert [row[0] for row in rows] == [str(each) for each in (pid, *children)]
    assert rows[2][1:10] == ["-"] * 9
    assert rows[2][10] == psutil.Process().username()
    assert rows[2][11].split()[1].endswith("python") or "python" in rows[2][11]
    assert total[-1] == "KiB, 4 processes, 1 unread"
    assert result.returncode == 1
    assert result.stderr == (
        f"memuse: process {children[1]} not read: pagemap: Permission denied"
        " (needs CAP_SYS_PTRACE)\n"
    )
    others = [row for row in rows if row[1] != "-"]
    assert sum(int(row[2]) for row in others) == int(total[1])
    assert header[:9] == [*DEFAULT[:8], "USS"]


def test_what_is_below_a_process_that_cannot_be_read_is_counted_and_drawn_below_it(
    forked: int,
) -> None:
    """For its own tree it has no figure; those above it count what was read."""
    whole = measured(forked)
    (upper,) = [
        row["pid"]
        for row in whole["processes"]
        if row["pid"] != forked and row["pid"] in {r["ppid"] for r in whole["processes"]}
    ]
    result = hiding([upper], "--json", forked)
    report = json.loads(result.stdout)
    for row, expected in zip(report["processes"], whole["processes"]):
        names = ("pid", "ppid", "depth", "command")
        assert [row[name] for name in names] == [expected[name] for name in names]
        hidden = [name for name, value in row.items() if value is None]
        assert hidden == ([n for n in row if n not in names] if row["pid"] == upper else [])
    top = report["processes"][0]
    assert top["tree"] == report["total"]["tree"] == report["total"]["size"]
    assert top["tree"] < whole["processes"][0]["tree"]
    assert report["skipped"][0]["pid"] == upper
    assert result.returncode == 1


def test_an_unread_row_that_is_left_out_is_told(family: tuple[int, list[int]]) -> None:
    pid, children = family
    result = hiding(children[:1], "-d", 0, pid)
    assert result.stdout.endswith(" KiB, 4 processes, 1 unread\n")
    assert result.stdout.count("\n") == 3
    report = json.loads(hiding(children[:1], "--json", "-d", 0, pid).stdout)
    assert [row["pid"] for row in report["processes"]] == [pid]
    assert [each["pid"] for each in report["skipped"]] == children[:1]


def test_one_line_for_each_reason(family: tuple[int, list[int]]) -> None:
    pid, children = family
    result = hiding(children, "--json", pid)
    assert re.fullmatch(
        f"memuse: processes {', '.join(map(str, children))} not read: [^\n]+\n", result.stderr
    )
    skipped = json.loads(result.stdout)["skipped"]
    assert [each["pid"] for each in skipped] == children
    assert len({each["reason"] for each in skipped}) == 1


@pytest.mark.parametrize("form", [[], ["--json"], ["-o", "pid,rss"]])
def test_if_nothing_can_be_read_there_is_no_table(
    form: list[str], family: tuple[int, list[int]]
) -> None:
    pid, children = family
    fails(hiding([pid, *children], *form, pid), "not read", str(pid))
