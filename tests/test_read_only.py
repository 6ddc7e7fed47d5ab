"""memuse only reads: it writes nothing, and stops, traces and signals nobody."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Callable

import pytest
from conftest import ENVIRONMENT, MEMUSE, needs_root, run, run_memuse, state_of, wait_for

pytestmark = needs_root

# Ends memuse at what is no reading.  Of ioctls: PAGEMAP_SCAN, TCGETS, TIOCGWINSZ.
AUDIT = """
import os, runpy, sys
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        bad = writes and str(path) != os.devnull and not isinstance(path, int)
    elif event == "fcntl.ioctl":
        bad = arguments[1] not in (0xC0606610, 0x5401, 0x5413)
    elif event == "ctypes.dlopen":
        bad = arguments[0] is not None  # importing ctypes opens the interpreter itself
    else:
        bad = event.startswith(("os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.kill",
            "os.rename", "os.mkdir", "os.truncate", "os.chmod", "os.setxattr", "os.unlink",
            "subprocess", "signal.pthread_kill", "socket", "pty"))
    if bad:
        os.write(2, f"HARM {event} {arguments}\\n".encode())
        os._exit(99)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ARGUMENTS = [[], ["--json"], ["-o", "+user,pte,anon,file,rss,uss"], ["-g", "/"]]


def what_a_tracer_a_signal_or_a_write_would_change(pid: int) -> list[str]:
    wanted = ("State", "TracerPid", "SigQ", "SigPnd", "ShdPnd", "VmSize", "VmRSS", "VmSwap")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if line.startswith(wanted)]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=" ".join)
def test_it_only_reads(arguments: list[str], forked: int) -> None:
    wait_for(lambda: state_of(forked) == "S")
    before = what_a_tracer_a_signal_or_a_write_would_change(forked)
    # Without -B, Python itself would write a .pyc.
    result = run([sys.executable, "-B", "-c", AUDIT, *MEMUSE[1:], *arguments, forked])
    assert "HARM" not in result.stderr
    assert result.stdout.count(str(forked)) >= 1
    assert arguments == ["-g", "/"] or (result.returncode, result.stderr) == (0, "")
    assert what_a_tracer_a_signal_or_a_write_would_change(forked) == before


def test_the_look_for_what_is_resident_is_a_reading(scene: Callable[[str], int]) -> None:
    """In large areas PAGEMAP_SCAN is called, which could also write-protect."""
    result = run([sys.executable, "-B", "-c", AUDIT, *MEMUSE[1:], scene("sparse")])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("strace"), reason="the audit above is the test without it")
def test_system_calls_only_read(forked: int, tmp_path: Path) -> None:
    """What C code does too, psutil's included."""
    log = tmp_path / "log"
    calls = "kill,tkill,tgkill,ptrace,process_vm_writev,pidfd_send_signal,process_madvise"
    calls += ",pidfd_open,rt_sigqueueinfo,open,openat,creat,prlimit64,sched_setaffinity,setpriority"
    calls += ",fork,vfork,execve,unlink,rename,mkdir"
    prefix = ["strace", "-f", "-o", str(log), "-e", f"trace={calls}"]
    env = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
    result = run_memuse("-o", "+user,pte,uss", forked, prefix=prefix, env=env)
    assert result.returncode == 0
    _, *lines = log.read_text().splitlines()  # the first is execve, of memuse
    assert any("/pagemap" in line or '"pagemap"' in line for line in lines)
    for line in lines:
        if " open" in line or "<..." in line or "prlimit64(0, " in line:
            assert not any(flag in line for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")), line
        else:
            assert line.split(maxsplit=1)[1].startswith(("+++", "---")), line


def test_nobody_is_stopped_while_it_is_read(forked: int) -> None:
    """Nor is anything left behind in its directory, or in that of the program."""
    beside = sorted(os.listdir(Path(MEMUSE[1]).parent))
    files = sorted(os.listdir(f"/proc/{forked}/fd"))
    assert run_memuse(forked).returncode == 0
    assert sorted(os.listdir(Path(MEMUSE[1]).parent)) == beside
    assert sorted(os.listdir(f"/proc/{forked}/fd")) == files
    assert state_of(forked) == "S"
