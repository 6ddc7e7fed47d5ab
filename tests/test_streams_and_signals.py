"""Where the output goes, what happens if it cannot go there, and how memuse is interrupted."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import (
    Result,
    fails,
    meanwhile,
    needs_root,
    on_terminal,
    run_memuse,
    running,
    shell,
    simulated,
    wait_for,
)

import memuse

pytestmark = needs_root


# ---- Streams that are closed, full, or left -------------------------------------


@pytest.mark.parametrize("form", ["", "--json"])
def test_a_full_disk(form: str, forked: int) -> None:
    said = fails(shell(f'"$@" {form} {forked} >/dev/full'))
    assert said == "memuse: cannot write: No space left on device\n"


@pytest.mark.parametrize("form", ["--help", "--version"])
def test_a_full_disk_for_help(form: str) -> None:
    fails(shell(f'"$@" {form} >/dev/full'), "No space left on device")


@pytest.mark.parametrize("form", ["", "--json"])
def test_closed_stdout(form: str, forked: int) -> None:
    fails(shell(f'"$@" {form} {forked} >&-'), "standard output is closed")


def test_closed_stderr(forked: int) -> None:
    good = shell(f'"$@" {forked} 2>&-')
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1].strip().startswith("TOTAL")
    for arguments, status in (("999999999", 1), ("none", 2), ("--none", 2), ("", 2)):
        bad = shell(f'"$@" {arguments} 2>&-')
        assert (bad.returncode, bad.stdout) == (status, "")
    partly = shell(f'"$@" {forked} 999999999 2>&-')
    assert partly.returncode == 1
    assert partly.stdout.count("\n") == 6


def test_full_stderr(forked: int, ended_child: int) -> None:
    assert shell(f'"$@" {forked} 2>/dev/full').returncode == 0
    assert shell(f'"$@" {ended_child} 2>/dev/full').returncode == 1


@pytest.mark.parametrize("closing", [">&- 2>&-", "<&- >&- 2>&-"])
def test_everything_closed(closing: str, forked: int) -> None:
    result = shell(f'"$@" {forked} {closing}; echo $?')
    assert (result.stdout, result.stderr) == ("1\n", "")


@pytest.fixture(scope="module")
def wordy() -> Iterator[int]:
    """A process whose command line is longer than what a pipe holds."""
    command = ["sh", "-c", "read line; :", *["z" * 60_000] * 3]
    with running(command) as process:
        wait_for(lambda: psutil.Process(process.pid).cmdline() == command)
        yield process.pid


@pytest.mark.parametrize("form", ["", "--json"])
@pytest.mark.parametrize("unbuffered", ["", "PYTHONUNBUFFERED=1"])
def test_a_file_that_takes_a_part(form: str, unbuffered: str, wordy: int, tmp_path: Path) -> None:
    result = shell(f'ulimit -f 1; {unbuffered} "$@" {form} {wordy} > {tmp_path}/out')
    assert fails(result) == "memuse: cannot write: File too large\n"
    assert (tmp_path / "out").stat().st_size == 1024


@pytest.mark.parametrize("form", ["", "--json", "--help"])
@pytest.mark.parametrize("reader", ["head -1", "true", "(exec <&-; read line <>/dev/null)"])
def test_a_reader_that_quits(form: str, reader: str, wordy: int) -> None:
    """No word about it, and status 0, or that of SIGPIPE."""
    result = shell(
        f'"$@" {form} {" ".join([str(wordy)] * 2)} | {reader} >/dev/null;'
        ' echo "${PIPESTATUS[0]}" >&2'
    )
    assert result.stderr in {"0\n", "141\n"}


def test_the_rest_of_a_pipe_is_written_when_the_reader_comes_to_it(wordy: int) -> None:
    whole = run_memuse("-o", "pid,frames,command", wordy).stdout
    result = shell(f'"$@" -o pid,frames,command {wordy} | (sleep 0.1; cat)')
    assert (result.stdout, result.returncode) == (whole, 0)
    assert len(whole) > 65536


@pytest.mark.parametrize("arguments", [["1"], ["none"], ["--help"]])
def test_no_streams(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python has for stdout and stderr that are closed."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert memuse.main(arguments) == 1
    finally:
        signal.signal(signal.SIGINT, before)


# ---- Progress -------------------------------------------------------------------


def with_slow_clock(forked: int, machine: str = "SlowClock", **streams: int) -> Result:
    return simulated(machine, forked, capture_output=False, stdout=subprocess.PIPE, **streams)


def test_progress_of_a_long_run_on_a_terminal(forked: int) -> None:
    run = functools.partial(with_slow_clock, forked)
    result, shown = on_terminal("stderr", 80, run)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1].endswith("4 processes")
    assert re.fullmatch(r"(\r\d of 4 processes, \d+ pages\x1b\[K)+\r\x1b\[K", shown)
    told = [tuple(map(int, each)) for each in re.findall(r"(\d) of 4 processes, (\d+)", shown)]
    assert told == sorted(told)
    assert told[-1][0] >= 3
    assert told[-1][1] > 1000


def test_an_error_takes_the_progress_away(forked: int) -> None:
    run = functools.partial(with_slow_clock, forked, machine="SlowAndFull 2 words:/proc/kpagecount")
    result, shown = on_terminal("stderr", 80, run)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"(\r\d of 4 [^\r]+\x1b\[K)+\r\x1b\[Kmemuse: there is not enough memory\n", shown
    )


def test_no_progress_elsewhere(forked: int) -> None:
    result = with_slow_clock(forked, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_progress_of_a_short_run(forked: int) -> None:
    run = functools.partial(run_memuse, forked, capture_output=False, stdout=subprocess.DEVNULL)
    result, shown = on_terminal("stderr", 80, run)
    assert result.returncode == 0
    assert shown == "" or "pages" in shown  # a machine so busy that it took a second


# ---- Interrupts -----------------------------------------------------------------

MOMENTS = ["after:/proc/PID/stat", "before:/proc/self/pagemap", "words:/proc/PID/pagemap"]
MOMENTS += ["after:/proc/PID/smaps_rollup", "words:/proc/kpagecount"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_interrupted_in_every_phase(moment: str, form: list[str], forked: int) -> None:
    event = moment.replace("PID", str(forked))
    result = simulated(f"Interrupted 1 {event}", *form, forked)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [1, 2, 3, 5, 9, 17, 33])
def test_interrupted_by_the_nth_file(number: int, forked: int) -> None:
    result = simulated(f"Interrupted {number} before:.*", forked)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_interrupted_from_outside(forked: int) -> None:
    stops = f"1 words:/proc/{forked}/pagemap"
    result = meanwhile(lambda pid: os.kill(pid, signal.SIGINT), stops, forked)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_interrupted_while_progress_is_shown(forked: int) -> None:
    def run(**streams: int) -> Result:
        machine = "SlowAndInterrupted 1 words:/proc/kpagecount"
        return simulated(machine, forked, capture_output=False, stdout=subprocess.PIPE, **streams)

    result, shown = on_terminal("stderr", 80, run)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "")
    assert re.fullmatch(r"(\r\d of 4 processes, \d+ pages\x1b\[K)+(\r\x1b\[K)?", shown)


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupts_that_are_ignored(moment: str, forked: int) -> None:
    """As a shell has them ignored by what it runs in the background for a script."""
    event = moment.replace("PID", str(forked))
    result = simulated(f"Interrupted 1 {event}", forked, preexec_fn=ignore_interrupts)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 6


def test_other_signals_end_it_as_they_do_others(forked: int) -> None:
    stops = f"1 words:/proc/{forked}/pagemap"
    for number in (signal.SIGTERM, signal.SIGHUP):
        result = meanwhile(lambda pid, number=number: os.kill(pid, number), stops, forked)  # type: ignore[misc]
        assert (result.returncode, result.stdout) == (-number, "")
