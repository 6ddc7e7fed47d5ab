"""The command as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Callable

import psutil
import pytest
from conftest import MEMUSE, READ_ALL, ROOT, Scene, memuse, needs_root

import memuse as memuse_module

Build = Callable[..., Scene]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *READ_ALL]
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON", "LANG"))}


def fails(result: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line that tells of an error."""
    assert result.returncode == status
    assert result.stdout == ""
    assert re.fullmatch(r"memuse: [^\n]+\n", result.stderr)
    return result.stderr


# ---- Usage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["", "abc", "-5", "0", "1.5", "1_000", "\u0661", "1 -x", "-b -h 1", "-o nothing 1", "-o '' 1"],
)
def test_wrong_usage(arguments: str) -> None:
    assert "--help" in fails(memuse(*shlex.split(arguments)), 2)


def test_no_such_process(ended_child: int) -> None:
    for pid in (ended_child, 10**17):
        assert str(pid) in fails(memuse(pid))
    assert str(ended_child) in fails(memuse(os.getpid(), ended_child))


def test_help_and_version_need_no_rights() -> None:
    shown = memuse("--help", prefix=NOBODY if os.geteuid() == 0 else []).stdout
    for word in ("--bytes", "-h, --human-readable", "--json", "-o COLUMNS", "PID"):
        assert word in shown
    for column in memuse_module.COLUMNS:
        assert re.search(rf"^  {column} ", shown, re.MULTILINE)
    assert re.fullmatch(r"memuse \d+\.\d+\.\d+\n", memuse("--version").stdout)


def test_psutil_missing() -> None:
    command = [sys.executable, "-S", str(ROOT / "memuse.py"), "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "apt install python3-psutil" in fails(result)


# ---- Rights ---------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("how", ["nobody", "root without the capability"])
def test_no_right_to_see_frames(how: str) -> None:
    if how == "nobody":
        result = memuse(os.getpid(), prefix=NOBODY)
    else:
        line = shlex.join([*MEMUSE, str(os.getpid())])
        command = ["capsh", "--drop=cap_sys_admin", "--", "-c", line]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    line = fails(result)
    assert "CAP_SYS_ADMIN" in line
    assert f"sudo {MEMUSE[-1]} {os.getpid()}" in line
    assert f"{MEMUSE[-1]} -o pid,rss,pss,command {os.getpid()}" in line


@needs_root
def test_kernels_figures_need_no_rights() -> None:
    with subprocess.Popen([*NOBODY, "sleep", "60"]) as process:
        try:
            result = memuse("-o", "pid,rss,pss,uss,frames,command", process.pid, prefix=NOBODY)
            assert "CAP_SYS_ADMIN" in fails(result)
            result = memuse("-o", "pid,rss,pss,uss,command", process.pid, prefix=NOBODY)
        finally:
            process.kill()
    assert (result.returncode, result.stderr) == (0, "")
    _, row, total = (line.split(None, 4) for line in result.stdout.splitlines())
    assert (row[0], row[4]) == (str(process.pid), "sleep 60")
    assert int(row[1]) >= int(row[2]) > 0
    assert total == ["TOTAL", row[1], row[2], "-", "1 process"]  # USS of the set takes frames


@needs_root
def test_processes_of_others_are_named_and_the_status_tells() -> None:
    result = memuse("-o", "pid,rss", "-J", os.getpid(), prefix=NOBODY)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert {"pid": os.getpid(), "reason": "Permission denied"} in report["skipped"]
    assert f"memuse: process {os.getpid()} left out: Permission denied\n" in result.stderr


# ---- Output ---------------------------------------------------------------------


@needs_root
def test_table_can_be_cut_into_fields(scene: Build) -> None:
    pid = scene("forked").pid
    result = memuse("-b", pid)
    header, *rows, total = (line.split(None, 7) for line in result.stdout.splitlines())
    assert header[0] == "PID"
    assert header[-1] == "COMMAND"
    assert total[0] == "TOTAL"
    assert total[-1] == "4 processes"
    assert all(len(row) == 8 for row in rows)
    assert sum(int(row[2]) for row in rows) == int(total[1]) == int(total[2])
    assert int(total[3]) == 4096 * int(total[1])
    assert int(rows[0][0]) == pid
    assert rows[0][-1] == " ".join(psutil.Process(pid).cmdline())


@needs_root
def test_units_agree(scene: Build) -> None:
    pid = scene("plain").pid
    of_bytes, kib, short = (memuse(*o, pid).stdout.split()[-6] for o in (["-b"], [], ["-h"]))
    assert int(of_bytes) // 1024 == int(kib)
    assert short == memuse_module.human(int(of_bytes))


@needs_root
@pytest.mark.parametrize(
    ("environment", "drawn"),
    [
        ({"LC_ALL": "C"}, "`- "),
        ({"LANG": "C"}, "`- "),
        ({"LANG": "C", "PYTHONUTF8": "1"}, "└─ "),
        ({"LC_ALL": "C.UTF-8"}, "└─ "),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}, "`- "),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"}, "`- "),
    ],
)
def test_tree_in_the_outputs_encoding(
    environment: dict[str, str], drawn: str, scene: Build
) -> None:
    environment = ENVIRONMENT | environment
    command = [*MEMUSE, str(scene("forked").pid)]
    output = subprocess.run(command, capture_output=True, env=environment, check=True).stdout
    assert f"   {drawn}".encode() in output
    assert output.isascii() == drawn.isascii()


@needs_root
@pytest.mark.parametrize("width", [80, 0])
def test_lines_are_cut_on_a_terminal_only(width: int, scene: Build) -> None:
    """And on one that has a width: a terminal that nobody told its size has none."""
    long = ["sh", "-c", "sleep 60; : " + "x" * 500]
    with subprocess.Popen(long, start_new_session=True) as process:
        try:
            assert "x" * 500 in memuse(process.pid).stdout
            controller, terminal = pty.openpty()
            size = struct.pack("HHHH", 24, width, 0, 0)
            import fcntl
            import termios

            fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
            with subprocess.Popen([*MEMUSE, str(process.pid)], stdout=terminal) as shown:
                os.close(terminal)
                text = b""
                while True:
                    try:
                        text += os.read(controller, 4096)
                    except OSError:
                        break
            assert shown.returncode == 0
            longest = max(len(line) for line in text.decode().splitlines())
            assert longest == width if width else longest > 500
        finally:
            os.killpg(process.pid, 9)


# Every look at the clock is a second after the last.
SLOW = "import memuse, time, itertools; time.monotonic = itertools.count().__next__"


@needs_root
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_a_long_run_on_a_terminal_only(terminal: bool, scene: Build) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {SLOW}; sys.exit(memuse.main())"
    command = [sys.executable, "-c", code, str(scene("forked").pid)]
    controller, end = pty.openpty() if terminal else os.pipe()
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, check=True)
        os.close(end)
        with contextlib.suppress(OSError):  # nothing written, and nobody left to write
            shown = os.read(controller, 100_000) if terminal else os.read(controller, 1)
    finally:
        os.close(controller)
    assert result.stdout.splitlines()[-1].endswith(b"processes")
    if terminal:
        assert re.fullmatch(rb"(\r\d of 4 processes, \d+ pages\x1b\[K)+\r\x1b\[K", shown)
        assert int(shown.split()[-3]) > 1000
    else:
        assert shown == b""


@needs_root
def test_a_reader_that_leaves_early(scene: Build) -> None:
    pid = scene("forked").pid
    line = f"{shlex.join(MEMUSE)} {pid} | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "0"


def test_version_is_written_once() -> None:
    version = memuse("--version").stdout.split()[1]
    texts = [(ROOT / name).read_text() for name in ("memuse.py", "pyproject.toml")]
    assert sum(text.count(version) for text in texts) == 1
    assert Path(ROOT, "memuse.py").stat().st_mode & 0o111 == 0o111
