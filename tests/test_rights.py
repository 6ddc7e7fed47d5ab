"""Rights that are missing: which one is told, what helps, and what can be seen without it."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
from collections.abc import Iterator, Sequence

import psutil
import pytest
from conftest import (
    AS_NOBODY,
    MEMUSE,
    fails,
    inside,
    measured,
    needs_root,
    ready,
    run,
    run_memuse,
    running,
    simulated,
    wait_for,
)

pytestmark = needs_root
PROGRAM = MEMUSE[-1]

WITHOUT = {
    "root": ["capsh", "--drop=cap_sys_admin", "--", "-c", 'exec "$0" "$@"'],
    "nobody": AS_NOBODY,
    "docker": [
        "setpriv",
        "--bounding-set=-all,+chown,+dac_override,+fowner,+setuid,+setgid,+kill",
        "--inh-caps=-all",
    ],
}
IN_SHELL = ["-c", '"$0" "$@"; exit $?']  # which does not become memuse
PID_NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]
NAMESPACES = {
    "user": ["unshare", "--user", "--map-root-user"],
    "user and PID": [*PID_NAMESPACE, "--user", "--map-root-user", "sh", *IN_SHELL],
    "PID": [*PID_NAMESPACE, "capsh", "--drop=cap_sys_admin", "--", *IN_SHELL],
}


@pytest.fixture(scope="module")
def of_nobody() -> Iterator[int]:
    """A process of another user than root."""
    with running([*AS_NOBODY, "sleep", "1000"]) as process:
        wait_for(lambda: psutil.Process(process.pid).name() == "sleep")
        yield process.pid


# ---- Page frames ----------------------------------------------------------------


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("who", WITHOUT)
def test_without_cap_sys_admin_there_are_no_page_frames(
    who: str, form: list[str], forked: int
) -> None:
    line = fails(
        run_memuse(*form, forked, prefix=WITHOUT[who]), "/proc/self/pagemap", "CAP_SYS_ADMIN"
    )
    assert f"run sudo {PROGRAM} {shlex.join([*form, str(forked)])}" in line
    assert "CAP_DAC_READ_SEARCH" not in line
    assert "-o pid,rss" not in line  # it is root's process: that would not work, or take no less


def test_pagemap_that_is_opened_but_not_read_is_told_as_a_missing_right(forked: int) -> None:
    fails(inside("Denied 1 words:/proc/self/pagemap", forked), "self/pagemap", "CAP_SYS_ADMIN")


@pytest.mark.parametrize("mine", [True, False])
def test_files_that_are_roots_are_named_with_the_right_that_they_take(
    mine: bool, of_nobody: int, forked: int
) -> None:
    pid = of_nobody if mine else forked
    line = fails(simulated("OnlySysAdmin", pid), "/proc/kpageflags", "CAP_DAC_READ_SEARCH")
    assert ("-o pid,rss,pss,command" in line) == mine
    for name in ("kpageflags", "kpagecount"):
        line = fails(simulated(f"Refusing EACCES {name}", pid), name, "CAP_DAC_READ_SEARCH")
        assert "sudo memuse.py" in line


def test_the_suggested_command_has_the_arguments_of_the_one_that_failed(of_nobody: int) -> None:
    line = fails(run_memuse("-o", "pid,frames", "-J", of_nobody, prefix=AS_NOBODY))
    assert f": run sudo {PROGRAM} -o pid,frames -J {of_nobody};" in line


def test_what_is_said_to_work_without_the_right_does(of_nobody: int) -> None:
    """The command that the message names, for processes of one's own."""
    line = fails(run_memuse(of_nobody, prefix=AS_NOBODY), "CAP_SYS_ADMIN")
    match = re.search(rf"{re.escape(PROGRAM)} (-o pid,rss,pss,command {of_nobody})\n", line)
    assert match
    result = run_memuse(*match[1].split(), prefix=AS_NOBODY)
    assert (result.returncode, result.stderr) == (0, "")
    header, row, total = (line.split(None, 3) for line in result.stdout.splitlines())
    assert header == ["PID", "RSS", "PSS", "COMMAND"]
    assert (row[0], row[3]) == (str(of_nobody), "sleep 1000")
    assert int(row[1]) >= int(row[2]) > 0
    assert total == ["TOTAL", row[1], row[2], "KiB, 1 process"]


def test_a_command_without_the_right_is_suggested_for_ones_own_processes_only(
    of_nobody: int, forked: int
) -> None:
    for pids in ([forked], [of_nobody, forked], [forked, of_nobody]):
        line = fails(run_memuse(*pids, prefix=AS_NOBODY), f"run sudo {PROGRAM}")
        assert "-o" not in line


def test_kernels_figures_need_no_rights(of_nobody: int) -> None:
    result = run_memuse("-o", "user,rss,uss,pte,ppid,command", of_nobody, prefix=AS_NOBODY)
    assert (result.returncode, result.stderr) == (0, "")
    user, rss, uss, pte, ppid, command = result.stdout.splitlines()[1].split(None, 5)
    assert user == pwd.getpwuid(65534).pw_name
    assert int(rss) >= int(uss) > 0
    assert int(pte) > 0
    assert (ppid, command) == (str(os.getpid()), "sleep 1000")
    fails(run_memuse("-o", "pid,rss,frames", of_nobody, prefix=AS_NOBODY), "CAP_SYS_ADMIN")


# ---- Other users' processes -----------------------------------------------------

FAMILY = """
import os, sys, subprocess
child = subprocess.Popen(sys.argv[1:])
print("ready", flush=True)
os.read(0, 1)
"""


@pytest.fixture(scope="module")
def family() -> Iterator[tuple[int, int]]:
    """A process of root's, and below it one of another user's."""
    with ready(FAMILY, *AS_NOBODY, "sleep", "1000") as process:
        wait_for(lambda: psutil.Process(process.pid).children())
        (child,) = psutil.Process(process.pid).children()
        wait_for(lambda: child.name() == "sleep")
        yield process.pid, child.pid


def test_processes_of_others_keep_their_rows_and_are_named(family: tuple[int, int]) -> None:
    parent, child = family
    result = run_memuse("-o", "pid,rss,pss,uss,command", parent, prefix=AS_NOBODY)
    assert result.returncode == 1
    assert result.stderr == (
        f"memuse: process {parent} not read: smaps_rollup: Permission denied"
        " (needs CAP_SYS_PTRACE)\n"
    )
    _, first, second, total = (line.split(None, 4) for line in result.stdout.splitlines())
    assert first[:4] == [str(parent), "-", "-", "-"]
    assert "python" in first[4]
    assert (second[0], second[4]) == (str(child), "└─ sleep 1000")
    assert total == ["TOTAL", second[1], second[2], "-", "KiB, 2 processes, 1 unread"]

    result = run_memuse("--json", "-o", "pid,rss,user", parent, prefix=AS_NOBODY)
    report = json.loads(result.stdout)
    assert report["processes"][0] == {"pid": parent, "rss": None, "user": "root"}
    assert report["total"] == {"rss": report["processes"][1]["rss"]}
    (skipped,) = report["skipped"]
    assert skipped["pid"] == parent
    assert skipped["reason"].startswith("smaps_rollup: Permission denied")
    assert result.returncode == 1


@pytest.mark.parametrize("name", ["cmdline", "status", "maps"])
def test_a_process_that_may_not_be_read_any_more_keeps_its_row(name: str, forked: int) -> None:
    """As once it has called exec of sudo, or has become another user's."""
    child, *_ = psutil.Process(forked).children()
    result = inside(f"Denied 1 before:/proc/{child.pid}/{name}", "--json", "-o", "+pte", forked)
    assert result.returncode == 1
    assert result.stderr.startswith(f"memuse: process {child.pid} not read: ")
    report = json.loads(result.stdout)
    rows = {row["pid"]: row for row in report["processes"]}
    assert rows[child.pid]["frames"] is rows[child.pid]["rss"] is None
    assert rows[forked]["frames"] > 0
    assert [skipped["pid"] for skipped in report["skipped"]] == [child.pid]


@pytest.mark.parametrize("refused", ["", "/maps", "/fd", "/smaps_rollup"])
def test_what_was_refused_is_told_by_its_path_below_the_process(refused: str) -> None:
    """As by a security module, for root too."""
    code = "import os\nos.memfd_create('x')\nprint('ready', flush=True)\nos.read(0, 1)"
    with ready(code) as process:
        line = fails(inside(f"Locked /proc/{process.pid}{refused}", process.pid))
    name = refused[1:] or f"/proc/{process.pid}"
    why = f"{name}: Permission denied (needs CAP_SYS_PTRACE)"
    assert line == f"memuse: process {process.pid} not read: {why}\n"


def test_if_all_are_others_there_is_no_table(forked: int) -> None:
    line = fails(run_memuse("-o", "pid,rss", forked, prefix=AS_NOBODY), "CAP_SYS_PTRACE")
    assert re.fullmatch(rf"memuse: processes {forked}(, \d+){{3}} not read: .+\n", line)


@pytest.mark.parametrize("columns", ["", "-o pid,rss,command"])
@pytest.mark.parametrize("hidepid", [1, 2])
def test_what_a_user_may_not_see_is_not_there(hidepid: int, columns: str, forked: int) -> None:
    command = shlex.join([*AS_NOBODY, *MEMUSE, *columns.split(), str(forked)])
    line = f"mount -t proc -o hidepid={hidepid} proc /proc && {command}"
    result = run(["unshare", "--mount", "--fork", "sh", "-c", line])
    assert fails(result) == f"memuse: there is no process {forked}\n"


# ---- Namespaces -----------------------------------------------------------------


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_in_a_namespace_the_advice_is_the_host_with_its_pid_there(
    namespace: str, form: list[str], forked: int
) -> None:
    """A PID may be another's there, and whoever is root here is not."""
    pid = forked if namespace == "user" else 1
    line = fails(run_memuse(*form, pid, prefix=NAMESPACES[namespace]), "CAP_SYS_ADMIN")
    assert line.endswith(f": run it on the host, with its PID there: sudo {PROGRAM} PID\n")


def in_namespace(*arguments: object, prefix: Sequence[str]) -> str:
    result = run_memuse(*arguments, prefix=prefix)
    assert (result.returncode, result.stderr) == (0, "")
    return str(result.stdout)


def test_with_the_right_a_pid_namespace_is_no_hindrance() -> None:
    prefix = [*PID_NAMESPACE, "sh", *IN_SHELL]
    (row,) = json.loads(in_namespace("--json", 1, prefix=prefix))["processes"]
    assert (row["pid"], row["ppid"]) == (1, 0)
    assert row["frames"] > 100


def test_a_proc_of_an_outer_pid_namespace(forked: int) -> None:
    """It shows us too, under another number than getpid() gives."""
    text = in_namespace("--json", forked, prefix=["unshare", "--pid", "--fork"])
    rows = json.loads(text)["processes"]
    expected = measured(forked)["processes"]
    assert [row["frames"] for row in rows] == [row["frames"] for row in expected]


def test_a_proc_of_an_inner_pid_namespace() -> None:
    """We are not in it, and its numbers are not ours."""
    with running([*PID_NAMESPACE, "sleep", "60"]) as process:
        wait_for(lambda: psutil.Process(process.pid).children())
        (child,) = psutil.Process(process.pid).children()
        wait_for(lambda: child.name() == "sleep")
        prefix = ["nsenter", "--mount", "--target", str(child.pid)]
        for columns in ((), ("-o", "pid,rss,command")):
            line = fails(run_memuse(*columns, 1, prefix=prefix), "PID namespace")
            assert "CONFIG" not in line


def test_no_proc_at_all(forked: int) -> None:
    line = f"mount -t tmpfs none /proc && {shlex.join([*MEMUSE, str(forked)])}"
    result = run(["unshare", "--mount", "sh", "-c", line])
    fails(result, "/proc")
