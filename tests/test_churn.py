"""Processes that come, go, call exec, or get another's PID while memuse reads them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    MIB,
    TREE,
    Result,
    inside,
    kill,
    meanwhile,
    measured,
    needs_root,
    ready,
    reported,
    run_memuse,
    slow,
    wait_for,
)

pytestmark = needs_root
PAGE = os.sysconf("SC_PAGE_SIZE")


# ---- All the time ---------------------------------------------------------------

CHURN = {
    # Chains and fans that live for some 100 us.
    "fork": """
import os
print("ready", flush=True)
while True:
    for _ in range(8):
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
    for _ in range(8):
        os.wait()
""",
    # Memory comes and goes, at addresses that were used before, below thousands of mappings.
    "mmap": """
import mmap, os
kept = [mmap.mmap(-1, 4096 * (1 + n % 3), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                  mmap.PROT_READ | mmap.PROT_WRITE * (n % 2)) for n in range(2000)]
for _ in range(3):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
sizes = [4096, 1 << 20, 5 << 20, 64 << 20]
while True:
    for size in sizes:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, min(size, 1 << 20), 4096):
            memory[at] = 1
        memory.close()
""",
    # A build: shells that start pipes of small programs.
    "build": r"""
import os
for _ in range(3):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
script = 'while :; do echo "int x;" | sed s/x/y/ | wc -c & (ls /proc/self/fd; :) & wait; done'
os.execvp("sh", ["sh", "-c", f"exec >/dev/null 2>&1; {script}"])
""",
    # Shells that become another shell, thousands of times a second.
    "exec": """
import os
for _ in range(4):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
os.execvp("sh", ["sh", "-c", 'exec sh -c "$0" "$0"', 'exec sh -c "$0" "$0"'])
""",
}
EXITED = re.compile("memuse: ([0-9]+) process(?:es)? exited while being read")
UNREAD = re.compile("memuse: process(?:es)? ([0-9, ]+) not read: .+")


def check_accounts(result: Result, found: set[int]) -> dict[str, Any]:
    """Every process that was found is a row or counted, and the sums are sums."""
    assert "Traceback" not in result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    rows = report["processes"]
    pids = [row["pid"] for row in rows]
    assert len(pids) == len(set(pids))
    assert set(pids) <= found
    lines = result.stderr.splitlines()
    counted = [int(match[1]) for line in lines if (match := EXITED.fullmatch(line))]
    unread = [match[1].split(", ") for line in lines if (match := UNREAD.fullmatch(line))]
    assert len(found) == len(pids) + sum(counted)
    assert len(lines) == len(counted) + len(unread)
    named = [pid for each in unread for pid in each]
    assert named == [str(each["pid"]) for each in report["skipped"]]
    for each in report["skipped"]:
        assert each["reason"] == "it changed whenever it was read"
    assert result.returncode == (1 if unread else 0)
    read = [row for row in rows if row["pid"] not in {each["pid"] for each in report["skipped"]}]
    assert sum(row["unique"] for row in read) == report["total"]["frames"]
    for row in read:
        assert 0 <= row["unique"] <= row["frames"] == row["size"] // PAGE
        assert row["size"] == row["anon"] + row["shmem"] + row["file"]
        assert row["size"] <= row["tree"] <= report["total"]["tree"]
        assert 0 <= row["freed"] <= row["tree"]
    return report


def churn(name: str, runs: int, log: Path) -> None:
    with ready(CHURN[name]) as process:
        for _ in range(runs):
            result = inside(f"Logged {log}", "--json", process.pid)
            found = re.findall("^/proc/([0-9]+)$", log.read_text(), re.M)
            check_accounts(result, {int(pid) for pid in found})
        assert process.poll() is None


@pytest.mark.parametrize("name", CHURN)
def test_churn(name: str, tmp_path: Path) -> None:
    churn(name, 3, tmp_path / "log")


@slow
@pytest.mark.slow
@pytest.mark.parametrize("name", CHURN)
def test_churn_for_a_minute(name: str, tmp_path: Path) -> None:
    churn(name, 300, tmp_path / "log")


# ---- Exec while it is read ------------------------------------------------------

# A Python of 16 MiB that becomes a small shell when told; and then Python again.
BIG = """
import mmap, os, sys
memory = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 16 << 20, 4096):
    memory[at] = 1
print("ready", flush=True)
os.read(0, 1)
os.execv("/bin/sh", ["small", "-c", 'echo small; read line; exec "$0" "$@"', *sys.orig_argv[:4],
    sys.argv[1], sys.argv[1]])
"""
BIG = BIG.replace("*sys.orig_argv[:4]", 'sys.executable, "-S", "-E", "-c"')  # since 3.10


class Turning:
    """It is in turn big, as Python, and small, as a shell."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.pid = process, process.pid

    def turn(self, *_: int) -> None:
        """Have it call exec, until that is done."""
        assert answer(self.process) in {b"small\n", b"ready\n"}
        wait_for(lambda: psutil.Process(self.pid).status() == psutil.STATUS_SLEEPING)


@pytest.fixture
def turning() -> Iterator[Turning]:
    with ready(BIG, BIG) as process:
        yield Turning(process)


# Where it is when it calls exec: before anything of it is read, and up to the last look.
MOMENTS = "after:PID before:PID/cmdline after:PID/cmdline after:PID/maps after:PID/pagemap"
MOMENTS += " words:PID/pagemap read:PID/pagemap after:PID/smaps_rollup"


def same(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both are of one process, of which nothing changed."""
    steady = ("pid", "ppid", "command", "frames", "size", "anon", "file", "rss")
    assert {name: row[name] for name in steady} == {name: expected[name] for name in steady}


@pytest.mark.parametrize("moment", MOMENTS.split())
def test_no_row_mixes_what_a_process_was_before_and_after_exec(
    moment: str, turning: Turning
) -> None:
    stops = f"1 {moment.replace('PID', f'/proc/{turning.pid}')}"
    big = measured(turning.pid)["processes"][0]
    result = meanwhile(turning.turn, stops, "--json", turning.pid)
    assert (result.returncode, result.stderr) == (0, "")
    (small,) = measured(turning.pid)["processes"]
    assert small["frames"] < 4 * MIB // PAGE < 16 * MIB // PAGE < big["frames"]
    (row,) = json.loads(result.stdout)["processes"]
    if row["rss"] is None:  # all else was already read
        same(row, {**big, "rss": None})
    else:
        same(row, small)


def test_exec_twice_is_read_a_third_time(turning: Turning) -> None:
    stops = f"2 after:/proc/{turning.pid}/pagemap"
    result = meanwhile(turning.turn, stops, "--json", turning.pid)
    assert (result.returncode, result.stderr) == (0, "")
    same(json.loads(result.stdout)["processes"][0], measured(turning.pid)["processes"][0])


def test_a_process_that_never_stops_calling_exec_is_named(turning: Turning) -> None:
    with ready(TREE, 0) as other:
        stops = f"3 after:/proc/{turning.pid}/pagemap"
        result = meanwhile(turning.turn, stops, "--json", other.pid, turning.pid)
    assert result.returncode == 1
    said = f"memuse: process {turning.pid} not read: it changed whenever it was read\n"
    assert result.stderr == said
    report = json.loads(result.stdout)
    first, second = report["processes"]
    assert first["frames"] == report["total"]["frames"]
    names = [name for name, value in second.items() if value is not None]
    assert {"pid", "depth", "command"} <= {*names} <= {"pid", "ppid", "depth", "command"}


def test_if_only_the_kernels_figures_cannot_be_had_its_row_stays(turning: Turning) -> None:
    """It calls exec whenever they are read, which does not change what was counted."""
    with ready(TREE, 0) as other:
        stops = f"2 after:/proc/{turning.pid}/smaps_rollup"
        columns = "pid,frames,rss,pss,uss,command"
        order = (other.pid, turning.pid)
        result = meanwhile(turning.turn, stops, "-o", columns, *order)
        alone = run_memuse("-o", "frames,rss", other.pid).stdout.splitlines()[-1].split()
    assert (result.returncode, result.stderr) == (0, "")
    _, first, second, total = (line.split(None, 5) for line in result.stdout.splitlines())
    assert (first[0], second[0]) == (str(other.pid), str(turning.pid))
    assert second[2:5] == ["-", "-", "-"]
    assert int(second[1]) > 0
    assert [first[1], first[2], "TOTAL"] == alone
    assert (total[2], total[5]) == (first[2], "KiB, 2 processes")


def test_figures_that_have_gone_for_a_moment_are_read_again() -> None:
    """As after an exec to the same addresses, which stat does not show."""
    with ready(TREE, 0) as process:
        result = inside("Emptied 1 smaps_rollup", "-o", "pid,rss", process.pid)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == run_memuse("-o", "pid,rss", process.pid).stdout


def test_a_sum_of_nothing_that_was_read_is_none(forked: int) -> None:
    report = reported(inside("Refusing ENOENT smaps_rollup", "--json", forked))
    assert {row["rss"] for row in report["processes"]} == {None}
    assert (report["total"]["rss"], report["total"]["pss"]) == (None, None)
    assert report["total"]["frames"] > 0


# ---- Ends while it is read ------------------------------------------------------


def accounts(found: list[int], act: Any, stops: str, *arguments: object) -> dict[str, Any]:
    return check_accounts(meanwhile(act, stops, "--json", *arguments), {*found})


def rows_of(report: dict[str, Any]) -> list[tuple[int, int]]:
    return [(row["pid"], row["depth"]) for row in report["processes"]]


@pytest.mark.parametrize("moment", MOMENTS.split())
def test_a_process_that_ends_while_it_is_read_is_a_zombie(moment: str) -> None:
    """While nobody has waited for it, it is a row of zeros, or as it was shortly before."""
    with ready(TREE, 0) as process:
        result = meanwhile(
            lambda _: kill(process.pid),
            f"1 {moment.replace('PID', f'/proc/{process.pid}')}",
            "--json",
            process.pid,
        )
        assert (result.returncode, result.stderr) == (0, "")
        (row,) = json.loads(result.stdout)["processes"]
        if row["rss"] is not None:  # else all but that was already read
            figures = {name: row[name] for name in ("frames", "unique", "size", "freed", "rss")}
            assert figures == dict.fromkeys(figures, 0)


# A chain of three, of which the first waits for the second.
CHAIN = """
import os
if os.fork() == 0:
    if os.fork() == 0:
        print("ready", flush=True)
    os.read(0, 1)
    os._exit(0)
os.wait()
os.read(0, 1)
"""


@pytest.mark.parametrize("moment", ["before:/proc/self/pagemap", "words:PID/pagemap"])
def test_children_of_one_that_exited_are_drawn_below_its_nearest_ancestor(moment: str) -> None:
    """psutil's own children() would lose them."""
    with ready(CHAIN) as process:
        (middle,) = psutil.Process(process.pid).children()
        (last,) = middle.children()
        stops = f"1 {moment.replace('PID', f'/proc/{middle.pid}')}"

        def end(_: int) -> None:
            middle.kill()
            wait_for(lambda: not middle.is_running())

        found = [process.pid, middle.pid, last.pid]
        report = accounts(found, end, stops, process.pid)
        assert rows_of(report) == [(process.pid, 0), (last.pid, 1)]
        first, second = report["processes"]
        assert first["tree"] == report["total"]["tree"] > second["tree"]
        assert second["ppid"] == middle.pid


def test_a_root_that_ends_after_all_were_listed_leaves_its_children() -> None:
    with ready(TREE, 3) as process:
        children = sorted(child.pid for child in psutil.Process(process.pid).children())

        def end(_: int) -> None:
            process.kill()
            process.wait()

        result = meanwhile(end, "1 before:/proc/self/pagemap", "--json", process.pid)
    assert result.returncode == 1
    assert result.stderr == f"memuse: process {process.pid} exited while it was being read\n"
    report = json.loads(result.stdout)
    assert rows_of(report) == [(child, 0) for child in children]
    assert report["total"]["frames"] == sum(row["unique"] for row in report["processes"])


def test_a_process_that_is_gone_without_an_error() -> None:
    """A look for what is resident finds nothing more in it."""
    code = "import mmap\nm = mmap.mmap(-1, 64 << 20)\nm[0] = 1\n" + TREE
    with ready(code, 1) as process:
        (child,) = psutil.Process(process.pid).children()
        stops = f"1 scan:/proc/{child.pid}/pagemap"
        found = [process.pid, child.pid]
        report = accounts(found, lambda _: kill(child.pid), stops, process.pid)
    assert rows_of(report) == [(process.pid, 0), (child.pid, 1)]
    assert report["processes"][1]["frames"] == 0  # a zombie


# Kills its child when told, and starts another program with the same PID.
REUSE = """
import os, signal, sys
def start(*argv):
    if (child := os.fork()) == 0:
        os.execvp(argv[0], argv)
    return child
first = start("sleep", "1000")
print("ready", flush=True)
os.read(0, 1)
os.kill(first, signal.SIGKILL)
os.wait()
for _ in range(100):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(first - 1))
    second = start("tail", "-f", "/dev/null")
    if second == first:
        break
    os.kill(second, signal.SIGKILL)
    os.wait()
print("reused" if second == first else "failed", flush=True)
os.read(0, 1)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/sys/kernel/ns_last_pid"), reason="PIDs cannot be chosen here"
)
@pytest.mark.parametrize("moment", ["before:/proc/self/pagemap", "after:PID", "after:PID/pagemap"])
def test_a_pid_that_was_used_anew_is_not_the_process_that_was_found(moment: str) -> None:
    for _ in range(20):  # others may take the PID
        result, found, told = reused(moment)
        if told == b"reused\n":
            break
    assert told == b"reused\n"
    assert rows_of(check_accounts(result, {*found})) == [(found[0], 0)]


def reused(moment: str) -> tuple[Result, list[int], bytes]:
    """A run in which a child's PID is used anew; which PIDs were found; whether it was."""
    told: list[bytes] = []
    with ready(REUSE) as process:
        wait_for(lambda: psutil.Process(process.pid).children()[0].name() == "sleep")
        pid = psutil.Process(process.pid).children()[0].pid
        stops = f"1 {moment.replace('PID', f'/proc/{pid}')}"
        result = meanwhile(lambda _: told.append(answer(process)), stops, "--json", process.pid)
    return result, [process.pid, pid], told[0]


def answer(process: subprocess.Popen[bytes]) -> bytes:
    """What it says when it is told to go on."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"\n")
    process.stdin.flush()
    return process.stdout.readline()
