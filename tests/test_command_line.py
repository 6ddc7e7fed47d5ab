"""What a user may type: usage, help, versions of Python, and PIDs of all sorts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import (
    AS_NOBODY,
    MEMUSE,
    ROOT,
    TREE,
    Result,
    fails,
    inside,
    kill,
    meanwhile,
    measured,
    needs_root,
    ready,
    run,
    run_memuse,
    running,
    wait_for,
)

import memuse

COLUMNS = [name for name, column in memuse.COLUMNS.items() if column.header]

# ---- Usage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "abc", "-5", "0", "1.5", "1_000", "1,x", "\u0661", "1 -x", "-b -h 1", "--js 1",
        "-d 1", "-d x 1", "-d -1 1", "-d '' 1",
        "-o nothing 1", "-o '' 1", "-o + 1", "-o pid, 1", "-o", "-g", "1 2 x",
    ],
)  # fmt: skip
def test_wrong_usage(arguments: str) -> None:
    fails(inside(None, *shlex.split(arguments)), "memuse --help", status=2)


@pytest.mark.parametrize("arguments", ["", "-h", "-b", "-J", "-o pid", "--json ''", "''", ","])
def test_a_missing_pid_is_what_is_said_to_be_missing(arguments: str) -> None:
    """As from a pgrep that finds nothing, in quotation marks or without."""
    line = fails(inside(None, *shlex.split(arguments)), status=2)
    assert line == "memuse: no PID given; see memuse --help\n"
    said = "memuse: no PID given: 1234 was taken as N of -d; see memuse --help\n"
    assert run_memuse("-d", 1234).stderr == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("nginx", "'nginx' is not a PID: try sudo memuse $(pgrep -o nginx), or -g nginx for a"),
        ("server.py", "'server.py' is not a PID: try sudo memuse $(pgrep -o -f server.py), or"),
        ("16071,nginx", "'nginx' is not a PID: try "),
        ("-o 16071", "'16071' was taken as COLUMNS"),
        ("-o 16071 16117", "'16071' was taken as COLUMNS"),
        ("-p 16071", "no option '-p': type the PID alone;"),
        ("-p16071", "no option '-p16071': type the PID alone;"),
        ("-a", "no option '-a': type -g / for the whole machine;"),
        ("--sort rss 1", "no option '--sort': append | sort "),
        ("--sort=-rss 1", "no option '--sort=-rss': append | sort "),
        ("-x 1", "no option '-x';"),
        ("1.5", "'1.5' is not a PID;"),
    ],
)
def test_what_others_take_is_answered_with_what_to_type(arguments: str, said: str) -> None:
    fails(inside(None, *arguments.split()), said, status=2)


def test_an_unknown_column_is_answered_with_those_that_there_are() -> None:
    for columns in ("sice", "pid,sice", "+sice", "PID,Sice"):
        line = fails(inside(None, "-o", columns, 1), "'sice'", status=2)
        assert f"there are {', '.join(COLUMNS)};" in line


def test_help_needs_no_rights_and_names_everything() -> None:
    result = run_memuse("--help", prefix=AS_NOBODY if os.geteuid() == 0 else [])
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    for word in ("-b, --bytes", "-h, --human-readable", "-J, --json", "--help", "-V, --version"):
        assert word in text
    for short, long in (("-o", "--output COLUMNS"), ("-g", "--cgroup GROUP")):
        assert re.search(rf"^  {short}( [A-Z]+)?, {long}\b", text, re.M)  # as Python has it
    for column in COLUMNS:
        assert re.search(rf"^  {column} +[^ ]", text, re.M), column
    assert ",".join(memuse.IN_TABLE) in text
    usage, columns, examples = (text.index(w) for w in ("usage:", "\ncolumns", "\nexamples"))
    assert usage < columns < examples
    assert text[examples:].count("sudo memuse ") == 3
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "as root" in text
    assert text.count("may be repeated") == 2  # PIDs and groups
    assert "sudo memuse -g / " in text
    statuses = text[text.index("\nexit status") :]
    assert re.findall(r"\b[0-9]+\b", statuses) == ["0", "1", "2", "130"]


def test_the_version_is_written_once() -> None:
    texts = [run_memuse(option).stdout for option in ("--version", "-V")]
    assert texts[0] == texts[1]
    assert re.fullmatch(r"memuse \d+\.\d+\.\d+\n", texts[0])
    version = texts[0].split()[1]
    files = [(ROOT / name).read_text() for name in ("memuse.py", "pyproject.toml")]
    assert sum(text.count(version) for text in files) == 1
    assert Path(ROOT, "memuse.py").stat().st_mode & 0o111 == 0o111


# ---- The interpreter ------------------------------------------------------------


def test_a_missing_psutil_names_the_interpreter_that_lacks_it() -> None:
    line = fails(run([sys.executable, "-S", ROOT / "memuse.py", "1"]), sys.executable, "psutil")
    assert f"{sys.executable} -m pip install psutil" in line
    assert "apt install python3-psutil" in line
    assert f"sudo /usr/bin/python3 {ROOT / 'memuse.py'} PID" in line


@pytest.mark.parametrize("version", ["3.7", "3.8"])
def test_older_pythons_get_one_line(version: str) -> None:
    installed = Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python")
    for interpreter in (*map(str, installed), f"/usr/bin/python{version}"):
        if os.path.exists(interpreter):
            result = run([interpreter, ROOT / "memuse.py", "1"])
            fails(result, "needs Python 3.9 or newer", f"{interpreter} is older")
            break
    else:
        pytest.skip(f"no Python {version} here")


# ---- PIDs -----------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("between", [",", "\n", " ", ", "])
def test_pids_in_one_argument_are_as_pgrep_writes_them(between: str, forked: int) -> None:
    pids = sorted(child.pid for child in psutil.Process(forked).children())
    assert tree_of(between.join(map(str, pids))) == tree_of(*pids)


def tree_of(*roots: object) -> list[tuple[int, int]]:
    return [(row["pid"], row["depth"]) for row in measured(*roots)["processes"]]


@needs_root
def test_the_tree_is_depth_first_with_siblings_by_pid(forked: int) -> None:
    first, second = sorted(psutil.Process(forked).children(), key=lambda child: child.pid)
    (grandchild,) = (*first.children(), *second.children())
    rows = [(forked, 0), (first.pid, 1), (second.pid, 1)]
    rows.insert(2 if grandchild.ppid() == first.pid else 3, (grandchild.pid, 2))
    assert tree_of(forked) == rows
    child = grandchild.ppid()
    assert tree_of(child) == [(child, 0), (grandchild.pid, 1)]
    # Roots within another's tree, or named twice, are where they belong, once.
    assert tree_of(grandchild.pid, forked, forked, child) == rows


@needs_root
def test_several_roots_are_one_set_in_the_order_given(forked: int) -> None:
    with ready(TREE, 0) as process:
        first = process.pid
        together = measured(forked, first)["total"]["frames"]
        alone = [measured(pid)["total"]["frames"] for pid in (first, forked)]
        assert max(alone) < together < sum(alone)  # they share Python
        assert tree_of(first, forked)[0] == (first, 0)
        assert tree_of(forked, first)[-1] == (first, 0)


def test_a_circle_of_parents_has_an_end() -> None:
    """As when a PID is used anew while processes are listed."""

    class Circle(memuse.Machine):
        def pids(self) -> list[int]:
            return [5, 6]

        def read(self, path: str, directory: int | None = None, at_most: int = -1) -> bytes:
            pid = int(path.split("/")[2])
            return b"%d (x) S %d" % (pid, 11 - pid) + b" 0" * 50

    assert [node.pid for node in memuse.find_processes(Circle(), [5], set())] == [5, 6]
    assert [node.pid for node in memuse.find_processes(Circle(), [], {5, 6})] == [5, 6]


def test_no_such_process(ended_child: int) -> None:
    for pid in (ended_child, 10**17):
        assert fails(inside(None, pid)) == f"memuse: there is no process {pid}\n"


def incomplete(result: Result, *rows: int) -> str:
    """What a run said that shows these rows nevertheless."""
    assert result.returncode == 1
    assert [row["pid"] for row in json.loads(result.stdout)["processes"]] == [*rows]
    return result.stderr


def skipped(result: Result) -> dict[int, str]:
    return {each["pid"]: each["reason"] for each in json.loads(result.stdout)["skipped"]}


@needs_root
def test_others_are_shown_beside_a_process_that_is_gone(ended_child: int) -> None:
    with ready(TREE, 1) as process:
        (child,) = psutil.Process(process.pid).children()
        result = inside(None, "--json", ended_child, process.pid, 10**17)
        reasons = {pid: f"there is no process {pid}" for pid in (ended_child, 10**17)}
        said = "".join(f"memuse: {reason}\n" for reason in reasons.values())
        assert incomplete(result, process.pid, child.pid) == said
        assert skipped(result) == reasons
    line = fails(inside(None, ended_child, 10**17))
    assert line == f"memuse: there is no process {ended_child}; there is no process {10**17}\n"


@needs_root
def test_others_are_shown_beside_a_process_that_exits_while_it_is_read() -> None:
    with ready(TREE, 0) as process, ready(TREE, 0) as other:
        result = meanwhile(
            lambda _: kill_and_reap(other),
            f"1 after:/proc/{process.pid}",
            "--json",
            process.pid,
            other.pid,
        )
        reason = f"process {other.pid} exited while it was being read"
        assert incomplete(result, process.pid) == f"memuse: {reason}\n"
        assert skipped(result) == {other.pid: reason}


def kill_and_reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@needs_root
def test_a_process_that_exits_while_it_is_read_leaves_no_table_if_it_was_alone() -> None:
    with ready(TREE, 0) as process:
        stops = f"1 words:/proc/{process.pid}/pagemap"
        result = meanwhile(lambda _: kill_and_reap(process), stops, process.pid)
        said = f"memuse: process {process.pid} exited while it was being read\n"
        assert fails(result) == said


THREAD = """
import os, threading
print("ready", flush=True)
threading.Thread(target=os.read, args=(0, 1)).start()
"""


@needs_root
def test_a_threads_id_is_told_with_its_process() -> None:
    with ready(THREAD) as process, ready(TREE, 0) as other:
        wait_for(lambda: len(psutil.Process(process.pid).threads()) == 2)
        tids = {thread.id for thread in psutil.Process(process.pid).threads()}
        (tid,) = tids - {process.pid}
        said = f"memuse: {tid} is a thread of process {process.pid}: measure {process.pid}\n"
        assert fails(inside(None, tid)) == said
        assert incomplete(inside(None, "--json", tid, other.pid), other.pid) == said
        assert tree_of(process.pid) == [(process.pid, 0)]  # threads are no rows


@needs_root
def test_kernel_threads_are_rows_only_if_they_are_named() -> None:
    (thread, *_) = psutil.Process(2).children()
    assert tree_of(2) == [(2, 0)]
    assert tree_of(2, thread.pid) == [(2, 0), (thread.pid, 1)]
    result = inside(None, "--json", "-o", "pid", "-g", "/")
    assert not {2, thread.pid} & {row["pid"] for row in json.loads(result.stdout)["processes"]}


@needs_root
def test_zombies_and_kernel_threads_are_rows_of_zeros() -> None:
    with ready(TREE, 1) as process:
        (child,) = psutil.Process(process.pid).children()
        kill(child.pid)
        rows = [row for row in measured(process.pid, 2)["processes"] if row["command"][0] == "["]
    assert any((row["pid"], row["command"]) == (2, "[kthreadd]") for row in rows)
    assert child.pid in {row["pid"] for row in rows}
    assert {row["ppid"] for row in rows} == {0, process.pid}
    for row in rows:
        names = set(row) - {"pid", "ppid", "depth", "command"}
        assert {row[name] for name in names} == {0}


# ---- memuse itself --------------------------------------------------------------


@pytest.fixture
def sudo(tmp_path: Path) -> Path:
    """Programs that start another, and wait for it, under names that do so; like sudo."""
    for name in ("sudo", "doas", "su", "pkexec", "sudoku"):
        (tmp_path / name).write_text('#!/bin/sh\n"$@"\nexit $?\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path


def rows_of(result: Result) -> list[tuple[int, str]]:
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(result.stdout)["processes"]
    return [(row["pid"], row["command"]) for row in rows]


@needs_root
def test_memuse_leaves_itself_out() -> None:
    rows = rows_of(run_memuse("--json", os.getpid()))
    assert rows[0][0] == os.getpid()
    assert len(rows) == 1 + len(psutil.Process().children(recursive=True))


@needs_root
@pytest.mark.parametrize("waiters", ["sudo", "sudo sudo", "doas", "su", "pkexec", "sudo su"])
def test_those_that_only_wait_for_memuse_are_left_out(waiters: str, sudo: Path) -> None:
    prefix = [str(sudo / name) for name in waiters.split()]
    rows = rows_of(run_memuse("--json", os.getpid(), prefix=prefix))
    assert rows[0][0] == os.getpid()
    assert not [command for _, command in rows if str(sudo) in command]


@needs_root
def test_others_above_memuse_are_shown(sudo: Path) -> None:
    """A shell that sudo started, and what has another name."""
    for prefix in (
        [str(sudo / "sudo"), "sh", "-c", '"$@"; exit $?', "sh"],
        [str(sudo / "sudoku")],
    ):
        rows = rows_of(run_memuse("--json", os.getpid(), prefix=prefix))
        assert [command for _, command in rows if f"{sudo}/sudo" in command]


@needs_root
def test_a_waiter_with_another_child_is_shown(sudo: Path) -> None:
    (sudo / "sudo").write_text('#!/bin/sh\nsleep 60 &\n"$@"\nkill $!\n')
    rows = rows_of(run_memuse("--json", os.getpid(), prefix=[str(sudo / "sudo")]))
    assert [command for _, command in rows if f"{sudo}/sudo" in command]


@needs_root
def test_a_waiter_that_is_named_is_shown(sudo: Path) -> None:
    line = 'exec "$@" --json $PPID'
    rows = rows_of(run([sudo / "sudo", "sh", "-c", line, "sh", *MEMUSE]))
    ((_, command),) = rows
    assert f"{sudo}/sudo" in command


@needs_root
def test_memuse_may_not_be_named(sudo: Path) -> None:
    with running(["sh", "-c", 'read _; exec "$@" $$ 2>&1', "sh", *MEMUSE]) as process:
        output, _ = process.communicate(b"\n", timeout=60)
    assert output == b"memuse: %d is memuse itself\n" % process.pid


@needs_root
@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ("pid,ppid,user,command", set()),
        ("pid,pte", {"status"}),
        ("rss", {"smaps_rollup"}),
        ("pid,frames,unique,size", {"pagemap", "maps", "kpageflags", "kpagecount"}),
    ],
)
def test_columns_decide_what_is_read(
    columns: str, read: set[str], forked: int, tmp_path: Path
) -> None:
    """Where no figure is asked for, no file that would cost the process is opened."""
    log = tmp_path / "log"
    result = inside(f"Logged {log}", "-o", columns, forked)
    assert (result.returncode, result.stderr) == (0, "")
    opened = {os.path.basename(path) for path in log.read_text().splitlines()}
    costly = {"maps", "pagemap", "smaps", "smaps_rollup", "status", "kpageflags", "kpagecount"}
    assert opened & costly == read
