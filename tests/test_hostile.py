"""Nothing breaks it: hostile names, churn, limits, signals, odd kernels, noise, containers.

Processes, signals, limits and namespaces are real.  Only kernels that are not here are
simulated: by calls that fail as theirs do, or by a made-up /proc.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest
import reference
from conftest import IN_TWO, MEMUSE, READ_ALL, ROOT, Scene, measured, memuse, needs_root, simulated
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import memuse as tool

pytestmark = needs_root
Build = Callable[..., Scene]
Result = subprocess.CompletedProcess[str]
KIB, MIB = 1 << 10, 1 << 20

CLEAN_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON"))}
slow = pytest.mark.skipif(not os.environ.get("MEMUSE_SLOW"), reason="MEMUSE_SLOW=1 runs it")


# ---- Help -----------------------------------------------------------------------


@contextmanager
def running(command: Sequence[str | bytes], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, of which nothing is left afterwards."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-E", "-c", code, *map(str, arguments)]


@contextmanager
def ready(code: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that has said that it is ready."""
    with running(python(code, *arguments)) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process


def one_line(result: Result, *words: str) -> None:
    """It failed, and said so in one line and nowhere else."""
    assert result.stdout == ""
    assert result.stderr.startswith("memuse: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert result.returncode == 1


def shell(command: str, *arguments: object) -> Result:
    """Run a line of bash in which "$@" is memuse with its arguments."""
    return subprocess.run(
        ["bash", "-c", command, "bash", *MEMUSE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=CLEAN_ENVIRONMENT,  # PYTHONUNBUFFERED would hide what Python does at its end
    )


# Forks as often as told; nobody does anything more until standard input is closed.
TREE = """
import os, sys
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        break
else:
    print("ready", flush=True)
os.read(0, 1)
"""

# The same, with memory that all share by copy-on-write.
FORK_SCENE = (
    """
import mmap
memory = mmap.mmap(-1, 512 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, 512 << 20, 4096):
    memory[page] = 1
"""
    + TREE
)


# ---- Hostile command lines ------------------------------------------------------

HOSTILE = {
    "csi": b"\x1b[2J\x1b[31mred",
    "osc52": b"\x1b]52;c;cm0gLXJmIC8=\x07",
    "title": b"\x1b]0;owned\x1b\\",
    "c1": "\x9b31m\x9d52;c;AAAA\x9c".encode(),
    "raw c1": b"\x9b31m\x90q\x9c",
    "newline": b"one\n  123  99999  +99999  root\nthree\n",
    "cr": b"innocent\rroot",
    "tab, backspace, delete": b"a\tb\x08\x08c\x7f\x0b\x0c",
    "bidi": "a\u202eexe.txt\u2066\u2069\u200f\u061c".encode(),
    "zero width": "ro\u200bo\u200dt\ufeff\u2060\u00ad".encode(),
    "separators": "a\u2028b\u2029c\x85d".encode(),
    "tags": "x\U000e0001\U000e0041y".encode(),
    "private use and noncharacters": "\ue000\uffff\U0010ffff".encode(),
    "invalid": b"\xff\xfe\xc3(\xf8\x88\x80\x80\x80",
    "surrogate": b"\xed\xa0\x80\xed\xb0\x80",
    "blank": b"   ",
    "wide and combining": "日本語 e\u0301\u0327 🙂".encode(),
    "long": b"x\x1b\n" * 40_000,
}

ENVIRONMENTS = {
    "utf-8": {"LC_ALL": "C.UTF-8"},
    "locale C": {"LC_ALL": "C"},
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "ascii, strict": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
}


@contextmanager
def shells(*argvs: list[bytes]) -> Iterator[list[int]]:
    """Shells that wait, each with such arguments; the first is its name."""
    with contextlib.ExitStack() as stack:
        processes = []
        for name, *rest in argvs:
            argv = [name, b"-c", b"read x; :", *rest]
            processes.append(stack.enter_context(running(argv, executable="/bin/sh")))
        for process in processes:  # until exec is done, it is a copy of pytest
            while not os.readlink(f"/proc/{process.pid}/exe").endswith("sh"):
                time.sleep(0.001)
        yield [process.pid for process in processes]


def check_harmless(output: bytes, encoding: str, rows: int) -> None:
    """Nothing that a terminal obeys or does not show, and as many lines as there should be."""
    text = output.decode(encoding)
    for character in set(text) - {"\n"}:
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert text.endswith("\n")
    assert text.count("\n") == len(text.splitlines()) == rows


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_trick_of_a_command_line_reaches_the_terminal(name: str) -> None:
    encoding = {"utf-8": "utf-8", "latin-1": "latin-1"}.get(name, "ascii")
    env = {**CLEAN_ENVIRONMENT, **ENVIRONMENTS[name]}
    argvs = [[text, text] for text in HOSTILE.values()]
    with shells(*argvs) as pids:
        for form, lines in ((["--json"], 1), ([], len(pids) + 2)):
            command = [*MEMUSE, *form, *map(str, pids)]
            result = subprocess.run(command, capture_output=True, timeout=120, env=env, check=False)
            assert (result.stderr, result.returncode) == (b"", 0)
            check_harmless(result.stdout, encoding, lines)
            if form:
                rows = json.loads(result.stdout)["processes"]
                assert [row["pid"] for row in rows] == pids
                for row in rows:  # not only in JSON's own escapes: jq -r prints these as they are
                    check_harmless(f"{row['command']}\n".encode(), "utf-8", 1)
            else:
                column = [int(line.split()[0]) for line in result.stdout.splitlines()[1:-1]]
                assert column == pids


def test_two_megabytes_of_arguments() -> None:
    text = b"A\x1b" * 65_000  # one argument is at most 128 KiB
    with shells([b"sh", *[text] * 14]) as (pid,):
        for form in ((), ("--json",)):
            result = memuse(*form, pid)
            assert (result.returncode, result.stderr) == (0, "")
            assert "\x1b" not in result.stdout
            assert result.stdout.count("\n") == (1 if form else 3)


# What is called the arguments may be moved by any process: prctl(PR_SET_MM, PR_SET_MM_MAP).
SET_ARGUMENTS = """
import ctypes, mmap, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.sbrk.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
def set_arguments(start, end):
    stat = open("/proc/self/stat", encoding="latin-1").read()
    fields = [0, 0, 0] + stat.rpartition(")")[2].split()
    code, stack, data, env = fields[26:28], fields[28], fields[45:47], fields[50:52]
    numbers = [*code, *data, fields[47], libc.sbrk(0), stack, start, end, *env, 0]
    given = struct.pack("12QIi", *map(int, numbers), 0, -1)
    buffer = ctypes.create_string_buffer(given, len(given))
    if libc.prctl(35, 14, ctypes.addressof(buffer), len(given), 0):
        raise OSError(ctypes.get_errno(), "prctl")
"""

# Claims far more memory as its command line than it was started with.
BOAST = (
    SET_ARGUMENTS
    + """
size = int(sys.argv[1]) << 20
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
start = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
ctypes.memset(start, 65, 4096)
set_arguments(start, start + size)
print("ready", flush=True)
os.read(0, 1)
"""
)


def test_a_command_line_without_end() -> None:
    """A process may call any of its memory its arguments: 256 MiB here, and mostly zeros."""
    with ready(BOAST, 256) as process:
        start = time.monotonic()
        result = memuse(process.pid, preexec_fn=lambda: limit_memory(256 * MIB))
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines()[1].split()[0] == str(process.pid)
        assert time.monotonic() - start < 5


def test_a_long_command_line_is_not_paid_for_in_every_row() -> None:
    text = b"y" * 130_000
    code = "import os, sys\nfor _ in range(300):\n if os.fork() == 0: break\n"
    code += "else: print('ready', flush=True)\nos.execvp('cat', ['cat'])"
    argv: list[str | bytes] = [
        *python(code),
        *[text] * 14,
    ]  # 1.8 MB, and then 300 that execute a short one
    with running(argv) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        with shells([b"sh", *[text] * 14]) as (pid,):
            wait_for(lambda: len(psutil.Process(process.pid).children()) == 300)
            result = memuse(process.pid, pid, preexec_fn=lambda: limit_memory(256 * MIB))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1 + 301 + 1 + 1


# Takes a name, and has no arguments.
NAMELESS = (
    SET_ARGUMENTS
    + """
name = ctypes.create_string_buffer(bytes.fromhex(sys.argv[1]))
assert libc.prctl(15, ctypes.addressof(name), 0, 0, 0) == 0  # PR_SET_NAME
start = int(open("/proc/self/stat", encoding="latin-1").read().rpartition(")")[2].split()[45])
set_arguments(start, start)
os.write(1, b"ready\\n")
os.read(0, 1)
"""
)

NAMES = [b"\x1b]0;x\x07\x1b[8m", b"a\nb\rc", b"x) R 1 1 (y", b"\xff\x9b\xc2\x9b"]
NAMES += ["\u202eab".encode(), b" "]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("environment", ["utf-8", "locale C"])
def test_names_of_processes_without_arguments(name: bytes, environment: str) -> None:
    env = {**CLEAN_ENVIRONMENT, **ENVIRONMENTS[environment]}
    with ready(NAMELESS, name.hex()) as process:
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == b""
        assert Path(f"/proc/{process.pid}/comm").read_bytes()[:-1] == name
        for form, lines in (((), 3), (("--json",), 1)):
            result = memuse(*form, process.pid, env=env)
            assert (result.returncode, result.stderr) == (0, "")
            check_harmless(result.stdout.encode(), "utf-8", lines)
            assert ("[" in json.loads(result.stdout)["processes"][0]["command"]) if form else True


def test_a_program_executed_without_any_argument(tmp_path: Path) -> None:
    """Its name is its file's, which holds what it likes."""
    path = tmp_path / "\x1b[7m\n\u202e"
    path.symlink_to("/bin/sh")
    code = "import ctypes, os, sys\n"
    code += "none = (ctypes.c_char_p * 1)(None)\nprint('ready', flush=True)\n"
    code += "ctypes.CDLL(None).execve(os.fsencode(sys.argv[1]), none, none)"
    with ready(code, path) as process:
        wait_for(lambda: "python" not in os.readlink(f"/proc/{process.pid}/exe"))
        result = memuse(process.pid)
    assert (result.returncode, result.stderr) == (0, "")
    check_harmless(result.stdout.encode(), "utf-8", 3)
    assert "[\\x1b[7m\\n\\u202e]" in result.stdout


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not come about")


# ---- Churn ----------------------------------------------------------------------

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

# Writes to a file which processes were found, and acts before any of them is read.
# In process: no other way to know what was found, or to come in between.
RECORD = """
import json, memuse
process_tree = memuse.process_tree
def record(*arguments):
    nodes = process_tree(*arguments)
    with open({path!r}, "w") as file:
        json.dump([node.pid for node in nodes], file)
    {then}
    return nodes
memuse.process_tree = record
"""


EXITED = "exited while being read\n"


def check_accounts(result: Result, found: set[int]) -> dict[str, Any]:
    """Every process that was found is a row, or named, or counted; and the sums are sums."""
    assert "Traceback" not in result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    rows, skipped = report["processes"], report["skipped"]
    pids = [row["pid"] for row in rows] + [left_out["pid"] for left_out in skipped]
    assert len(pids) == len(set(pids))
    assert set(pids) <= found
    lines = result.stderr.splitlines(keepends=True)
    counted = [int(line.split()[1]) for line in lines if line.endswith(EXITED)]
    assert len(found) == len(pids) + sum(counted)
    assert len(lines) == len(counted) + len(skipped)
    for left_out in skipped:
        assert any(f"process {left_out['pid']} left out: " in line for line in lines)
        assert left_out["reason"] not in {"Too many open files", "Success"}
    assert result.returncode == (1 if skipped else 0)
    assert sum(row["unique"] for row in rows) == report["total"]["frames"]
    for row in rows:
        assert 0 <= row["unique"] <= row["frames"] == row["size"] // reference.PAGE
    return report


def churn(name: str, seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "found"
    with ready(CHURN[name]) as process:
        end = time.monotonic() + seconds
        runs = 0
        while time.monotonic() < end or not runs:
            began = time.monotonic()
            change = RECORD.format(path=str(path), then="pass")
            result = simulated(change, "--json", process.pid)
            found = set(json.loads(path.read_text()))
            check_accounts(result, found)
            assert time.monotonic() - began < 20  # no endless retry
            runs += 1
        assert process.poll() is None


@pytest.mark.parametrize("name", CHURN)
def test_churn(name: str, tmp_path: Path) -> None:
    churn(name, 3, tmp_path)


@slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
@pytest.mark.parametrize("name", CHURN)
def test_churn_for_a_minute(name: str, tmp_path: Path) -> None:
    churn(name, 60, tmp_path)


# One process that by exec is in turn big, as Python, and small, as a shell.
TURNS = """
import mmap, os, sys
memory = mmap.mmap(-1, 32 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, 32 << 20, 4096):
    memory[at] = 1
os.execv("/bin/sh", ["small", "-c", 'n=0; while [ $n -lt 60000 ]; do n=$((n+1)); done; exec "$@"',
    "small", sys.executable, "-S", "-E", "-c", sys.argv[1], sys.argv[1]])
"""


def test_no_row_mixes_what_a_process_was_before_and_after_exec() -> None:
    end = time.monotonic() + 3
    with running(python(TURNS, TURNS)) as process:
        small = 0
        while time.monotonic() < end:
            result = memuse("--json", process.pid)
            assert "Traceback" not in result.stderr
            if result.stdout:
                for row in json.loads(result.stdout)["processes"]:
                    if row["command"].startswith("small "):
                        small += 1
                        assert row["frames"] < 4 * MIB // reference.PAGE
                        assert row["rss"] < 4 * MIB
            else:
                one_line(result, str(process.pid))
    assert small


def test_a_root_that_dies_midway() -> None:
    """Its children live on, under another parent."""
    outcomes = set()
    for step in range(13):
        with ready(TREE, 60) as process:
            command = [*MEMUSE, "--json", str(process.pid)]
            pipe = subprocess.PIPE
            with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as run:
                time.sleep(0.02 * (step + 1))
                process.kill()
                process.wait()
                stdout, stderr = run.communicate(timeout=60)
            result = subprocess.CompletedProcess(command, run.returncode, stdout, stderr)
            outcomes.add(run.returncode)
            if run.returncode:
                one_line(result, f"process {process.pid}")
            else:
                rows = json.loads(stdout)["processes"]
                assert rows[0]["pid"] == process.pid
                check_accounts(result, {row["pid"] for row in rows} | gone(stderr))
    assert outcomes == {0, 1}


def gone(stderr: str) -> set[int]:
    """As many numbers, none of them a PID, as processes are said to have exited."""
    counts = [int(x.split()[1]) for x in stderr.splitlines(keepends=True) if x.endswith(EXITED)]
    return set(range(-sum(counts), 0))


# After some pages of its, a process is gone, and PAGEMAP_SCAN finds nothing more.
GONE = """
import memuse, time
memuse.READ_WHOLE, looks = 0, []
def look(pagemap, start, end):
    if os.readlink(f"/proc/self/fd/{{pagemap}}") == "/proc/{pid}/pagemap":
        looks.append(start)
        if len(looks) > 1:
            os.kill({pid}, 9)
            time.sleep(0.2)
            return end
    return start
memuse.next_resident = look
"""


def test_a_process_that_is_gone_without_an_error() -> None:
    with ready(TREE, 1) as process:
        (child,) = psutil.Process(process.pid).children()
        columns = "pid,frames,command"
        result = simulated(GONE.format(pid=child.pid), "--json", "-o", columns, process.pid)
        rows = json.loads(result.stdout)["processes"]
    assert [row["pid"] for row in rows] == [process.pid, child.pid]
    assert rows[1]["frames"] == 0  # a zombie


CHAIN = """
import os, sys
if os.fork() == 0:
    if os.fork() == 0:
        print("ready", flush=True)
    os.read(0, 1)
    os._exit(0)
os.wait()
os.read(0, 1)
"""


def test_a_parent_that_dies_after_all_were_listed(tmp_path: Path) -> None:
    """Of a chain of three, the middle one: psutil's own children() would lose the third."""
    path = tmp_path / "found"
    with ready(CHAIN) as process:
        wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 2)
        (middle,) = psutil.Process(process.pid).children()
        (last,) = middle.children()
        kill = f"import time; os.kill({middle.pid}, 9); time.sleep(0.3)"
        result = simulated(RECORD.format(path=str(path), then=kill), "--json", process.pid)
        report = check_accounts(result, {process.pid, middle.pid, last.pid})
    assert [row["pid"] for row in report["processes"]] == [process.pid, last.pid]
    assert result.stderr == "memuse: 1 process exited while being read\n"


# Kills its child when told, and starts another program with the same PID.
REUSE = """
import os, signal, sys, time
def start(*argv):
    if (child := os.fork()) == 0:
        os.execvp(argv[0], argv)
    return child
first = start("sleep", "1000")
print("ready", flush=True)
os.read(0, 1)
os.kill(first, signal.SIGKILL)
os.wait()
time.sleep(0.05)
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
def test_a_pid_that_was_used_anew_is_not_the_process_that_was_found(tmp_path: Path) -> None:
    path = tmp_path / "found"
    fifos = [tmp_path / "go", tmp_path / "done"]
    for fifo in fifos:
        os.mkfifo(fifo)
    with ready(REUSE) as process:
        assert process.stdin
        assert process.stdout
        wait_for(lambda: psutil.Process(process.pid).children()[0].name() == "sleep")
        pid = psutil.Process(process.pid).children()[0].pid
        then = f"open({str(fifos[0])!r}, 'w').close(); open({str(fifos[1])!r}).close()"
        change = RECORD.format(path=str(path), then=then)
        # The end of a thread that waits is the listing's; the PID is reused in between.
        with running(
            [sys.executable, "-c", RUN_SIMULATED, change, str(ROOT), str(process.pid)],
            stderr=subprocess.PIPE,
        ) as run:
            wait_for(path.exists)
            fifos[0].open().close()
            process.stdin.write(b"x")
            process.stdin.flush()
            assert process.stdout.readline() == b"reused\n"
            fifos[1].open("w").close()
            stdout, stderr = run.communicate(timeout=30)
    result = subprocess.CompletedProcess("", run.returncode, stdout.decode(), stderr.decode())
    report = check_accounts(result, {process.pid, pid})
    assert [row["pid"] for row in report["processes"]] == [process.pid]


RUN_SIMULATED = """
import os, sys
change, root, pid = sys.argv[1:]
sys.path.insert(0, root)
exec(change)
import memuse
raise SystemExit(memuse.main(["--json", pid]))
"""


def test_processes_left_out_are_named_and_the_exit_status_says_so(tmp_path: Path) -> None:
    """One whose memory may not be read, as some systems' first, is left out by name."""
    change = (
        "import memuse\nopen_any = os.open\n"
        "def refuse(path, *a, dir_fd=None, **k):\n"
        "    if dir_fd is not None and path in ('maps', 'smaps', 'pagemap'):\n"
        "        if os.readlink(f'/proc/self/fd/{dir_fd}').endswith('/%d'):\n"
        "            raise PermissionError(13, 'Permission denied')\n"
        "    return open_any(path, *a, dir_fd=dir_fd, **k)\n"
        "os.open = refuse"
    )
    with ready(TREE, 3) as process:
        victim = psutil.Process(process.pid).children()[1].pid
        found = {p.pid for p in psutil.Process(process.pid).children()} | {process.pid}
        report = check_accounts(simulated(change % victim, "--json", process.pid), found)
        assert report["skipped"] == [{"pid": victim, "reason": "Permission denied"}]
        table = simulated(change % victim, process.pid)
        assert table.returncode == 1
        assert table.stderr == f"memuse: process {victim} left out: Permission denied\n"
        assert table.stdout.count("\n") == 5


# ---- Does no harm ---------------------------------------------------------------

AUDIT = """
import os, runpy, sys
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        bad = writes and str(path) != os.devnull and not isinstance(path, int)
    elif event == "fcntl.ioctl":
        bad = arguments[1] not in (0xC0606610, 0x5401, 0x5413)  # PAGEMAP_SCAN, TCGETS, TIOCGWINSZ
    elif event == "os.kill":  # none but memuse's second process
        stat = open(f"/proc/{arguments[0]}/stat").read()
        bad = int(stat.rpartition(")")[2].split()[1]) != os.getpid()
    else:
        bad = event.startswith(("os.exec", "os.posix_spawn", "os.remove",
            "os.rename", "os.mkdir", "os.truncate", "os.chmod", "os.setxattr", "os.unlink",
            "subprocess", "signal.pthread_kill", "socket", "pty", "ctypes.dlopen"))
        if event == "ctypes.dlopen":
            bad = arguments[0] is not None  # importing ctypes opens the interpreter itself
    if bad:
        os.write(2, f"HARM {event} {arguments}\\n".encode())
        os._exit(99)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["zero", "forked"])
def test_it_only_reads(name: str, scene: Build) -> None:
    check_only_reads(scene(name).pid)


def test_two_processes_only_read() -> None:
    with ready(FORK_SCENE, 2) as process:
        check_only_reads(process.pid)


def check_only_reads(pid: int) -> None:
    wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_SLEEPING)
    before = process_state(pid)
    # Without -B, Python itself would write a .pyc.
    command = [sys.executable, "-B", "-c", AUDIT, *MEMUSE[1:], str(pid)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") > 2
    assert process_state(pid) == before


def process_state(pid: int) -> list[str]:
    """What a tracer, a signal or a write would change."""
    wanted = ("State", "TracerPid", "SigQ", "SigPnd", "ShdPnd", "VmSize", "VmRSS", "VmSwap")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [line for line in lines if line.startswith(wanted)]


@pytest.mark.skipif(not shutil.which("strace"), reason="the audit above is the test without it")
def test_system_calls_only_read(scene: Build, tmp_path: Path) -> None:
    """What C code does too, psutil's included."""
    pid, log = scene("zero").pid, tmp_path / "log"
    calls = "kill,tkill,tgkill,ptrace,process_vm_writev,pidfd_send_signal,process_madvise"
    calls += ",pidfd_open,rt_sigqueueinfo,open,openat,creat,prlimit64,sched_setaffinity,setpriority"
    prefix = ["strace", "-f", "-o", str(log), "-e", f"trace={calls}"]
    result = memuse(pid, prefix=prefix, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 0
    lines = log.read_text().splitlines()
    assert any("/pagemap" in line or '"pagemap"' in line for line in lines)
    for line in lines:
        if " open" in line or "<..." in line or "prlimit64(0, " in line:
            assert not any(flag in line for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")), line
        else:
            assert line.split(maxsplit=1)[1].startswith(("+++", "---")), line


# ---- Resources ------------------------------------------------------------------


def limit_memory(more: int) -> None:
    limit = interpreter_size() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def interpreter_size() -> int:
    """What address space it takes to import memuse; asked for once."""
    if not SIZES:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import memuse\n"
        code += "print(open('/proc/self/status').read())"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        (peak,) = [x for x in output.stdout.splitlines() if x.startswith(b"VmPeak:")]
        SIZES.append(int(peak.split()[1]) * KIB)
    return SIZES[0]


SIZES: list[int] = []


def limit_files(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def test_hundreds_of_processes_with_few_open_files() -> None:
    with ready(TREE, 400) as process:
        pids = {process.pid, *(p.pid for p in psutil.Process(process.pid).children())}
        result = memuse("--json", process.pid, preexec_fn=lambda: limit_files(64))
        assert result.stderr == ""
        assert len(check_accounts(result, pids)["processes"]) == 401


def test_churn_with_few_open_files() -> None:
    """Readings that fail give their files back at once, not when garbage is collected."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(ready(CHURN["fork"])) for _ in range(4)]
        end = time.monotonic() + 2
        while time.monotonic() < end:
            roots = [process.pid for process in processes]
            result = memuse("--json", *roots, preexec_fn=lambda: limit_files(64))
            assert "Traceback" not in result.stderr
            assert "Too many open files" not in result.stderr
            assert result.returncode == 0


def test_those_that_are_gone_hold_no_files(tmp_path: Path) -> None:
    """A hundred processes exit, or change, after they were listed."""
    path = tmp_path / "found"
    with ready(TREE, 100) as process:
        pids = [p.pid for p in psutil.Process(process.pid).children()]
        kill = f"import time; [os.kill(pid, 9) for pid in {pids[::2]}]; time.sleep(0.2)"
        kill += "; import resource"
        kill += "; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
        result = simulated(RECORD.format(path=str(path), then=kill), "--json", process.pid)
        report = check_accounts(result, {process.pid, *pids})
    # They are zombies: nobody has waited for them.
    assert len(report["processes"]) == 101


def test_memory_limit_of_64_mib() -> None:
    interpreter_size()
    with ready(FORK_SCENE, 6) as process:
        free = memuse(process.pid, "-o", "pid,frames,unique,swap")
        limited = memuse(
            process.pid,
            "-o",
            "pid,frames,unique,swap",
            preexec_fn=lambda: limit_memory(64 * MIB),
        )
    assert (limited.returncode, limited.stderr) == (0, "")
    assert limited.stdout == free.stdout
    assert int(free.stdout.splitlines()[-1].split()[1]) > 131072


@pytest.mark.parametrize("mib", [4, 6, 8, 10, 16])
def test_too_little_memory_is_told_in_one_line(mib: int, scene: Build) -> None:
    interpreter_size()
    with ready(FORK_SCENE, 2) as process:
        result = memuse(process.pid, preexec_fn=lambda: limit_memory(mib * MIB))
    if result.returncode:
        one_line(result)
    else:
        assert result.stderr == ""
        assert result.stdout.count("\n") == 5


def test_memory_that_cannot_be_mapped_is_no_fault_of_a_process(scene: Build) -> None:
    change = "import memuse\ndef fail(*_): raise OSError(12, 'Cannot allocate memory')\n"
    for mode in ("", IN_TWO):
        result = simulated(mode + change + "memuse.Ledger.reach = fail", scene("forked").pid)
        one_line(result, "not enough memory")


# What may befall one of two processes of memuse: the second, or the first.
BEFALLEN = """
second_process, count_each = memuse.second_process, memuse.count_each
def fail(*_):
    {how}
def second(*arguments):
    memuse.count_each = count_each
    fail.once = {when}
    {when} = fail
    second_process(*arguments)
memuse.second_process = second
"""
FIRST_BEFALLEN = """
count_each = memuse.count_each
def fail(job, tell):
    if job.stripes and 0 in job.stripes:
        raise ProcessLookupError
    return count_each(job, tell)
memuse.count_each = fail
"""


ANEW = """
count_in_one = memuse.count_in_one
def anew(*arguments):
    print("anew", file=sys.stderr)
    return count_in_one(*arguments)
memuse.count_in_one = anew
"""


def check_befallen(change: str) -> None:
    """All is counted anew by one process."""
    with ready(FORK_SCENE, 2) as process:
        for columns in ("pid,frames,unique,rss,swap", "pid,rss,swap"):
            expected = memuse("-o", columns, process.pid)
            result = simulated(IN_TWO + ANEW + change, "-o", columns, process.pid)
            assert (result.returncode, result.stderr) == (0, "anew\n")
            assert result.stdout.splitlines()[2:4] == expected.stdout.splitlines()[2:4]
            assert result.stdout.splitlines()[-1] == expected.stdout.splitlines()[-1]


@pytest.mark.parametrize("when", ["memuse.own_pid", "memuse.Reading", "memuse.marshal.dump"])
@pytest.mark.parametrize(
    "how",
    [
        "raise MemoryError",
        "{when} = fail.once; raise ProcessLookupError",
        "os.kill(os.getpid(), 9)",
        "os._exit(0)",
    ],
)
def test_a_second_process_that_fails_is_done_without(when: str, how: str) -> None:
    check_befallen(BEFALLEN.format(when=when, how=how.format(when=when)))


@pytest.mark.parametrize("change", [FIRST_BEFALLEN, "def fail(): raise OSError\nos.fork = fail"])
def test_a_second_process_that_is_of_no_use(change: str) -> None:
    check_befallen(change)


def test_where_nothing_is_read_there_is_no_second_process(scene: Build) -> None:
    pid = scene("forked").pid
    result = simulated(IN_TWO + "os.fork = None", "-o", "pid,command", pid)
    assert (result.returncode, result.stderr) == (0, "")


def test_figures_that_have_gone_are_read_anew(scene: Build) -> None:
    """As after an exec to the same addresses, which stat does not show."""
    pid = scene("forked").pid
    change = """import memuse
read_file, gone = memuse.read_file, [b""]
def read(name, *arguments):
    return gone.pop() if name == "smaps_rollup" and gone else read_file(name, *arguments)
memuse.read_file = read"""
    result = simulated(change, "-o", "pid,rss", pid)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == memuse("-o", "pid,rss", pid).stdout


# The first process dies: when it has only begun, or waits for what the second has to tell.
DIE_EARLY = """
def die(kind, pid, *_):
    print(pid, flush=True)
    os.kill(os.getpid(), 9)
os.waitid = die
"""
DIE_LATE = """
import time
load = memuse.marshal.load
def die(file):
    print(load(file), flush=True)
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
memuse.marshal.load = die
"""


# In a namespace of PIDs of its own, the second process is the first there, and has no parent.
@pytest.mark.parametrize("prefix", [[], ["unshare", "--pid"]])
@pytest.mark.parametrize("die", [DIE_EARLY, DIE_LATE])
def test_a_second_process_ends_with_the_first(die: str, prefix: list[str], scene: Build) -> None:
    began = time.monotonic()
    result = simulated(IN_TWO + die, scene("plain").pid, prefix=prefix)
    assert result.returncode == -9
    wait_for(lambda: not psutil.pid_exists(int(result.stdout)))
    assert time.monotonic() - began < 20  # the second has the first's stdout


def interrupted_early(stderr: str) -> bool:
    """Whether Python was interrupted before it came to memuse's first statement.

    The signal may come while Python starts, or while it compiles memuse.py: then it
    is told at the docstring.
    """
    frames = [line for line in stderr.splitlines() if line.startswith("  File ")]
    ours = [line for line in frames if "memuse.py" in line]
    before = ("from __future__ import annotations\n", "import signal\n")
    if any(line in stderr for line in before) and len(ours) == 1:  # what has to come first
        return True
    return not ours or (
        len(frames) == 1 and re.search(", line [01], in <module>", ours[0]) is not None
    )


def test_interrupted_at_any_moment() -> None:
    """Exit status 130, nothing on stderr, and stdout whole or empty."""
    with ready(FORK_SCENE, 6) as process:
        began = time.monotonic()
        whole = memuse(process.pid).stdout
        duration = time.monotonic() - began
        statuses = []
        for step in range(40):
            run = subprocess.Popen(
                [*MEMUSE, str(process.pid)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            time.sleep(duration * 1.1 * step / 40)
            run.send_signal(signal.SIGINT)
            stdout, stderr = run.communicate(timeout=20)
            statuses.append(run.returncode)
            assert stdout == "" or stdout.count("\n") == whole.count("\n")
            if not (stderr and interrupted_early(stderr)):  # else Python may even go on
                assert stderr == "", stderr
                assert run.returncode in {0, 130, -signal.SIGINT}
    assert 130 in statuses or -signal.SIGINT in statuses


def test_interrupts_that_are_ignored() -> None:
    """As a shell has them ignored by what it runs in the background for a script."""
    with ready(FORK_SCENE, 6) as process:
        with subprocess.Popen(
            [*MEMUSE, str(process.pid)],
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        ) as run:
            while run.poll() is None:
                run.send_signal(signal.SIGINT)
                time.sleep(0.001)
        assert run.returncode == 0


def test_interrupted_in_every_phase() -> None:
    """Not by the clock: SIGINT comes with the n-th file that is opened."""
    change = (
        "import signal\nopened = 0\n"
        "def watch(event, arguments):\n"
        "    global opened\n"
        "    if event == 'open':\n"
        "        opened += 1\n"
        "        if opened == %d:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "import memuse\n"
        "sys.addaudithook(watch)"
    )
    with ready(TREE, 3) as process:
        statuses = []
        for number in [*range(1, 9), *range(10, 130, 12)]:
            result = simulated(change % number, process.pid)
            statuses.append(result.returncode)
            assert "Traceback" not in result.stderr, (number, result.stderr)
            assert result.stderr == ""
            assert result.returncode in {0, 130, -signal.SIGINT}
    assert statuses[0] in {130, -signal.SIGINT}


@pytest.mark.parametrize("form", ["", "--json"])
def test_full_disk(form: str) -> None:
    result = shell(f'"$@" {form} {os.getpid()} >/dev/full')
    one_line(result, "No space left on device")


@pytest.mark.parametrize("form", ["--help", "--version"])
def test_full_disk_for_help(form: str) -> None:
    result = shell(f'"$@" {form} >/dev/full')
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert result.stderr.count("\n") <= 1
    assert result.returncode != 0


@pytest.mark.parametrize("form", ["", "--json"])
def test_closed_stdout(form: str) -> None:
    one_line(shell(f'"$@" {form} {os.getpid()} >&-'))


def test_closed_stderr() -> None:
    good = shell(f'"$@" {os.getpid()} 2>&-')
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1].strip().startswith("TOTAL")
    for arguments, status in (("999999999", 1), ("none", 2), ("--none", 2)):
        bad = shell(f'"$@" {arguments} 2>&-')
        assert (bad.returncode, bad.stdout) == (status, "")


def test_full_stderr(ended_child: int) -> None:
    assert shell(f'"$@" {os.getpid()} 2>/dev/full').returncode == 0
    assert shell(f'"$@" {ended_child} 2>/dev/full').returncode == 1


@pytest.mark.parametrize("closing", [">&- 2>&-", "<&- >&- 2>&-"])
def test_everything_closed(closing: str) -> None:
    result = shell(f'"$@" {os.getpid()} {closing}; echo $?')
    assert (result.stdout, result.stderr) == ("1\n", "")


@pytest.mark.parametrize("form", ["", "--json"])
@pytest.mark.parametrize("unbuffered", ["", "PYTHONUNBUFFERED=1"])
def test_a_file_that_takes_a_part(form: str, unbuffered: str, tmp_path: Path) -> None:
    with shells([b"sh", *[b"z" * 60_000] * 3]) as (pid,):
        code = f'ulimit -f 1; {unbuffered} "$@" {form} {pid} > {tmp_path}/out'
        result = shell(code)
    one_line(result, "cannot write: File too large")
    assert (tmp_path / "out").stat().st_size == 1024


@pytest.mark.parametrize("arguments", [["1"], ["none"], ["--help"]])
def test_no_streams(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python has for stdout and stderr that are closed."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert tool.main(arguments) == 1
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("form", ["", "--json", "--help"])
@pytest.mark.parametrize("reader", ["head -1", "true", "(exec <&-; sleep 1)"])
def test_a_reader_that_quits(form: str, reader: str) -> None:
    """More than a pipe holds is written, by a tree with long command lines."""
    with shells([b"sh", *[b"z" * 100_000] * 5]) as (pid,):
        result = shell(f'"$@" {form} {pid} | {reader}; echo "${{PIPESTATUS[0]}}" >&2')
    assert result.stderr in {"0\n", "141\n"}


# ---- Kernels that are not here --------------------------------------------------

NO_SCAN = """
import errno, memuse
def refuse(*arguments):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
memuse.fcntl.ioctl = refuse  # in process: no kernel here is without PAGEMAP_SCAN
"""
FIGURES = "pid,frames,unique,size,swap,rss,uss"


def check_simulated(change: str, pid: int) -> dict[str, Any]:
    """What is counted with the change is what the reference counts."""
    expected = reference.count(reference.tree(pid))
    result = simulated(change, "--json", pid)
    assert (result.returncode, result.stderr) == (0, "")
    report: dict[str, Any] = json.loads(result.stdout)
    rows = [(row["pid"], row["frames"], row["unique"], row["swap"]) for row in report["processes"]]
    assert rows == expected["rows"]
    return report


@pytest.mark.parametrize("name", ["zero", "guarded", "forked", "file_twice", "lone_thread"])
@pytest.mark.parametrize("error", ["ENOTTY", "EINVAL"])
def test_without_pagemap_scan(name: str, error: str, scene: Build) -> None:
    pid = scene(name).pid
    report = check_simulated(NO_SCAN.format(name=error), pid)
    with_scan = measured("-o", "pid,rss", pid)["processes"]
    assert [row["rss"] for row in report["processes"]] == [row["rss"] for row in with_scan]


def test_without_pagemap_scan_hugetlb(scene: Build, hugetlb: None) -> None:
    """Its pages are not in Rss, by which VMAs are then chosen."""
    check_simulated(NO_SCAN.format(name="ENOTTY"), scene("hugetlb").pid)


def test_an_interpreter_with_short_hashes(scene: Build) -> None:
    """One of 32 bits, on a kernel of 64; in process: there is none here."""
    change = "sys.hash_info = type('', (), {'width': 32})\nimport memuse\n"
    check_simulated(change + "assert memuse.DIGEST is tuple", scene("forked").pid)


# smaps of Linux 2.6.29 (proc.rst of then): no AnonHugePages, KSM, Pss_Dirty, hugetlb, VmFlags.
OLD_FIELDS = (
    "Size",
    "Rss",
    "Pss",
    "Shared_Clean",
    "Shared_Dirty",
    "Private_Clean",
    "Private_Dirty",
    "Referenced",
    "Swap",
    "KernelPageSize",
    "MMUPageSize",
)


def test_smaps_without_newer_fields(scene: Build, tmp_path: Path) -> None:
    pid = scene("forked").pid
    rss = {}
    for each in reference.tree(pid):
        lines = Path(f"/proc/{each}/smaps").read_text().splitlines(keepends=True)
        old = [x for x in lines if x.split()[0][-1] != ":" or x.split(":")[0] in OLD_FIELDS]
        assert 0 < len(old) < len(lines) * 2 / 3
        rss[each] = sum(int(x.split()[1]) for x in old if x.startswith("Rss:")) * KIB
        directory = tmp_path / str(each)
        directory.mkdir()
        (directory / "smaps").write_text("".join(old))
        for name in ("stat", "status", "cmdline", "maps", "pagemap", "task", "exe"):
            (directory / name).symlink_to(f"/proc/{each}/{name}")
    for name in ("stat", "kpageflags", "kpagecount", "self"):
        (tmp_path / name).symlink_to(f"/proc/{name}" if name != "self" else "own")
    change = NO_SCAN.format(name="ENOTTY") + (
        f"import psutil\nfake = {str(tmp_path)!r}\npsutil.PROCFS_PATH = fake\n"
        "os.remove(f'{fake}/self')\nos.symlink(str(os.getpid()), f'{fake}/self')\n"
        "os.symlink(f'/proc/{os.getpid()}', f'{fake}/{os.getpid()}')"
    )
    report = check_simulated(change, pid)
    assert {row["pid"]: row["rss"] for row in report["processes"]} == rss


REFUSE = """
import errno
open_any = os.open
def refuse(path, *arguments, **options):
    if os.path.basename(str(path)) in {names!r}:
        raise OSError({error}, os.strerror({error}), path)
    return open_any(path, *arguments, **options)
os.open = refuse
"""


def refused(error: int, *names: str) -> str:
    return REFUSE.format(names=names, error=error)


def test_pagemap_refused() -> None:
    """Linux 4.0 and 4.1 do not even open it without the capability."""
    result = simulated(refused(errno.EPERM, "pagemap"), os.getpid())
    one_line(result, "CAP_SYS_ADMIN", "sudo")


@pytest.mark.parametrize("names", [("pagemap", "smaps", "smaps_rollup"), ("kpageflags",)])
def test_no_page_monitor(names: tuple[str, ...]) -> None:
    result = simulated(refused(errno.ENOENT, *names), os.getpid())
    one_line(result, "CONFIG_PROC_PAGE_MONITOR")
    free = simulated(refused(errno.ENOENT, *names), "-o", "pid,command", os.getpid())
    assert (free.returncode, free.stderr) == (0, "")


def test_no_smaps_rollup(scene: Build) -> None:
    """Before 4.14; and psutil has it no other way."""
    pid = scene("forked").pid
    change = NO_SCAN.format(name="ENOTTY") + refused(errno.ENOENT, "smaps_rollup")
    result = simulated(change, "--json", "-o", FIGURES, pid)
    assert (result.returncode, result.stderr) == (0, "")
    with_it = measured("-o", FIGURES, pid)
    assert [r["frames"] for r in json.loads(result.stdout)["processes"]] == [
        r["frames"] for r in with_it["processes"]
    ]


def test_proc_of_an_inner_pid_namespace() -> None:
    """We are not in it, and its numbers are not ours."""
    inner = ["unshare", "--pid", "--fork", "--mount-proc", "sleep", "60"]
    with running(inner) as process:
        wait_for(lambda: bool(psutil.Process(process.pid).children()))
        (child,) = psutil.Process(process.pid).children()
        wait_for(lambda: child.name() == "sleep")
        prefix = ["nsenter", "--mount", "--target", str(child.pid)]
        for columns in ((), ("-o", "pid,rss,command")):
            result = memuse(*columns, 1, prefix=prefix)
            one_line(result, "PID namespace")
            assert "CONFIG" not in result.stderr


def test_proc_of_an_outer_pid_namespace(scene: Build) -> None:
    """It shows us too, under another number than getpid() gives."""
    pid = scene("plain").pid
    result = memuse("--json", pid, prefix=["unshare", "--pid", "--fork"])
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = json.loads(result.stdout)["processes"]
    assert row["frames"] == measured(pid)["processes"][0]["frames"]


# While it reads how often frames are mapped, memuse comes to map what the set maps.
MAPS_MORE = """
import memuse, mmap
read, mapped = memuse.Census._mapcounts, []
def map_more(self):
    counted = {late} and read(self)
    if not mapped:
        mapped.append(mmap.mmap(os.open({path!r}, os.O_RDONLY), 0, prot=mmap.PROT_READ))
        mapped[0][::4096]
    return counted or read(self)
memuse.Census._mapcounts = map_more
"""
MAPS_FILE = """
import mmap, os, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)
memory[::4096]
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("late", "outsiders"), [(False, 0), (True, 1)])
def test_what_memuse_comes_to_map_is_not_outside(
    late: bool, outsiders: int, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100 * 4096)
    with contextlib.ExitStack() as stack:
        maps = [stack.enter_context(ready(MAPS_FILE, path)) for _ in range(1 + outsiders)]
        process = maps[0]
        result = simulated(MAPS_MORE.format(path=str(path), late=late), "--json", process.pid)
        expected = reference.count([process.pid])
    total = json.loads(result.stdout)["total"]
    assert (total["frames"], total["uss"]) == (expected["frames"], expected["uss"])


@pytest.mark.parametrize("hidepid", [1, 2])
def test_hidepid(hidepid: int, scene: Build) -> None:
    """What one may not see is not there, in whatever columns."""
    pid = scene("plain").pid
    with readable() as (python_, script):
        for columns in ("", "-o pid,rss,command"):
            user = "--reuid=65534 --regid=65534 --clear-groups"
            run = f"setpriv {user} {' '.join(READ_ALL)} {python_} {script}"
            line = f"mount -t proc -o hidepid={hidepid} proc /proc && exec {run} {columns} {pid}"
            result = subprocess.run(
                ["unshare", "--mount", "--pid", "--fork", "sh", "-c", line.replace("--pid", "")],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            one_line(result)
            if columns:
                assert "no process" in result.stderr


@contextmanager
def readable() -> Iterator[tuple[str, str]]:
    """The interpreter and a copy of memuse.py that nobody else's rights keep from reading."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        copy = shutil.copy(ROOT / "memuse.py", directory)
        os.chmod(copy, 0o755)
        yield shlex.quote(sys.executable), shlex.quote(copy)


BIG_ENDIAN = """
import array
import memuse, psutil
read_native = os.pread
def read_swapped(fd, size, at):
    words = array.array("Q", read_native(fd, size, at))
    words.byteswap()
    return words.tobytes()
os.pread = read_swapped
sys.byteorder = "big"
"""


@pytest.mark.parametrize("name", ["forked", "zero", "guarded", "huge"])
def test_big_endian(name: str, scene: Build, thp: None) -> None:
    check_simulated(BIG_ENDIAN, scene(name).pid)


# ---- Made-up memory -------------------------------------------------------------

PRESENT, SWAPPED, OF_FILE, GUARD, WRITE_PROTECTED, EXCLUSIVE, SOFT_DIRTY = (
    1 << bit for bit in (63, 62, 61, 58, 57, 56, 55)
)
ANON, NOPAGE, ZERO_PAGE = 1 << 12, 1 << 20, 1 << 24
# PFNs: the zero page, the huge one, device memory, and what anyone may map.
ZERO, HUGE_ZERO, DEVICE, SHARED, FILES, HUGE, OWN = (
    0x3001, 0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000,
)  # fmt: skip
POOL = 0x1000
FIRST_PID = 5_000_001  # beyond PID_MAX_LIMIT: certainly nobody
KINDS = "nothing private shared file file_alone zero huge_zero device swap marker guard huge part"

Run = tuple[str, int, int]  # a kind, a number of pages, and where in the pool they begin
Area = tuple[bool, int, list[Run]]  # whether of a file, pages before it, what is in it
runs = st.tuples(st.sampled_from(KINDS.split()), st.integers(1, 700), st.integers(0, 600))
areas = st.tuples(st.booleans(), st.integers(0, 200), st.lists(runs, min_size=1, max_size=6))
processes = st.lists(st.lists(areas, min_size=1, max_size=4), min_size=1, max_size=4)


class MadeUp:
    """A /proc with processes whose page tables are whatever it is told."""

    def __init__(self, root: Path, page: int, order: str = "<") -> None:
        self.root, self.page, self.order = root, page, order
        self.pmd = page // 8
        self.own = OWN
        self.owners: set[int] = set()  # huge pages that a process has as such
        self.mine: set[int] = set()  # those of the current process
        self.parts: set[int] = set()  # those of which it has some pages, as others may
        self.expected: list[tuple[set[int], set[int]]] = []
        (root / "stat").symlink_to("/proc/stat")
        flags = (
            (ZERO, ZERO_PAGE, 1),
            (HUGE_ZERO, ZERO_PAGE, self.pmd),
            (DEVICE, NOPAGE, POOL),
            (SHARED, ANON, POOL),
            (HUGE, ANON, 8 * self.pmd),
        )
        with (root / "kpageflags").open("wb") as file:
            file.truncate(8 << 20)
            for first, word, number in flags:
                file.seek(first * 8)
                file.write(struct.pack(f"{order}Q", word) * number)
        (root / "kpagecount").write_bytes(b"")

    def entries(self, kind: str, at: int, length: int, base: int, file: bool) -> list[int]:
        """Of a run that begins at a page, perhaps with nothing up to a huge page's bounds."""
        pages = range(base, base + length)
        if kind == "private":
            return [PRESENT | EXCLUSIVE | pfn for pfn in self.new_frames(length)]
        if kind == "file_alone":
            return [PRESENT | EXCLUSIVE | OF_FILE | pfn for pfn in self.new_frames(length)]
        if kind == "shared":
            return [PRESENT | SOFT_DIRTY * (p % 3 == 0) | SHARED + p for p in pages]
        if kind == "file":
            return [PRESENT | OF_FILE | FILES + p for p in pages]
        if kind == "zero":
            return [PRESENT | ZERO] * length
        if kind == "device" and file:  # only drivers' files map any
            return [PRESENT | DEVICE + p for p in pages]
        if kind == "swap":
            return [SWAPPED | WRITE_PROTECTED * (p % 2) | p % 23 | p // 3 << 5 for p in pages]
        if kind == "marker":
            return [SWAPPED | 23 + p % 9 | p << 5 for p in pages]
        if kind == "guard":
            return [SWAPPED | GUARD | 31] * length
        if kind in {"huge", "huge_zero"}:
            empty = [0] * (-at % self.pmd)
            number = base % 8
            if kind == "huge_zero":
                return empty + [PRESENT | OF_FILE | HUGE_ZERO + i for i in range(self.pmd)]
            if number in self.owners | self.parts:
                return empty
            self.owners.add(number)
            self.mine.add(number)
            first = HUGE + number * self.pmd
            # The first page's bit on all, though others may map the others.
            return empty + [PRESENT | EXCLUSIVE | first + i for i in range(self.pmd)]
        if kind == "part":
            if base % 8 in self.mine:  # no anonymous page is mapped twice by one process
                return [0] * length
            self.parts.add(base % 8)
            first = HUGE + base % 8 * self.pmd
            return [PRESENT | first + 1 + (base + i) % (self.pmd - 1) for i in range(length)]
        return [0] * length

    def new_frames(self, length: int) -> range:
        self.own += length
        return range(self.own - length, self.own)

    def add(self, made: list[Area], torn: bool = False) -> int:
        """A process, whose page tables may be torn: they end before its last mapping does."""
        pid = FIRST_PID + len(self.expected)
        directory = self.root / str(pid)
        directory.mkdir()
        ppid = pid - 1 if self.expected else 1
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        (directory / "stat").write_text(" ".join([f"{pid} (made up) S {ppid}", *stat[2:]]))
        (directory / "cmdline").write_bytes(b"made\0up\0")
        self.mine, self.parts = set(), set()
        at = 1 << 20
        lines, frames, slots = [], set(), set()
        with (directory / "pagemap").open("wb") as file:
            for of_file, gap, content in made:
                start = at = at + gap
                entries: list[int] = []
                for kind, length, base in content:
                    entries += self.entries(kind, start + len(entries), length, base, of_file)
                if not entries:
                    continue
                at += len(entries)
                name = "fe:01 1234 /a file" if of_file else "00:00 0"
                end = at * self.page
                lines.append(f"{start * self.page:x}-{end:x} rw-p 00003000 {name}\n")
                file.seek(start * 8)
                file.write(struct.pack(f"{self.order}{len(entries)}Q", *entries))
                for entry in entries:
                    frames |= real_frame(entry)
                    slots |= real_slot(entry)
            if not lines:
                file.truncate(16)
            if torn:
                file.truncate((at - 1) * 8)
        (directory / "maps").write_text("".join(lines) or "1000-2000 ---p 00000000 00:00 0\n")
        self.expected.append((frames, slots))
        return pid


def real_frame(entry: int) -> set[int]:
    pfn = entry & (1 << 55) - 1
    unreal = pfn == ZERO or HUGE_ZERO <= pfn < SHARED
    return {pfn} if entry & PRESENT and not unreal else set()


def real_slot(entry: int) -> set[int]:
    real = entry & SWAPPED and not entry & (PRESENT | GUARD) and entry & 31 < 23
    return {entry & (1 << 55) - 1} if real else set()


@contextmanager
def entered(made_up: MadeUp) -> Iterator[None]:
    """Have this interpreter take it for /proc; our own entries all tell of the zero page."""
    own = made_up.root / str(os.getpid())
    own.mkdir()
    (own / "pagemap").write_bytes(b"")
    (own / "maps").symlink_to(f"/proc/{os.getpid()}/maps")
    (made_up.root / "self").symlink_to(own.name)
    inode = (own / "pagemap").stat().st_ino
    pread, path, interrupt = os.pread, psutil.PROCFS_PATH, signal.getsignal(signal.SIGINT)
    entry = struct.pack(f"{made_up.order}Q", PRESENT | ZERO)

    def read(fd: int, size: int, at: int) -> bytes:
        return entry if os.fstat(fd).st_ino == inode else pread(fd, size, at)

    os.pread, psutil.PROCFS_PATH = read, str(made_up.root)
    try:
        yield
    finally:
        os.pread, psutil.PROCFS_PATH = pread, path
        signal.signal(signal.SIGINT, interrupt)


COUNTED = ["--json", "-o", "pid,frames,unique,swap"]


def check_made_up(made_up: MadeUp, torn: set[int]) -> None:
    """memuse's report, compared with sets."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = tool.main([*COUNTED, str(FIRST_PID)])
        output.seek(0)
        errors.seek(0)
        report, told = json.load(output), errors.read()
    assert "Traceback" not in told
    if not torn:
        assert (status, told) == (0, "")
    seen: set[int] = set()
    swapped: set[int] = set()
    rows = []
    for i, (frames, slots) in enumerate(made_up.expected):
        if i not in torn:
            swap = len(slots) * made_up.page
            rows.append((FIRST_PID + i, len(frames), len(frames - seen), swap))
            seen |= frames
            swapped |= slots
    got = [(row["pid"], row["frames"], row["unique"], row["swap"]) for row in report["processes"]]
    assert got == rows
    assert report["total"] == {"frames": len(seen), "swap": len(swapped) * made_up.page}
    assert {left_out["pid"] - FIRST_PID for left_out in report["skipped"]} == torn


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    made=processes,
    tear=st.sets(st.integers(1, 3), max_size=1),
    portion=st.sampled_from([512, 1536, 1 << 15]),
    few=st.sampled_from([0, 3, 16]),
    in_two=st.booleans(),
)
@example(
    made=[
        [(False, 0, [("huge", 1, 0), ("private", 5, 0), ("swap", 30, 2)])],
        [(False, 0, [("part", 400, 8), ("part", 400, 16)]), (True, 3, [("device", 9, 1)])],
    ],
    tear=set(),
    portion=1 << 15,
    few=16,
    in_two=False,
)
@example(  # one that vanishes when some of it has been counted, and had much and part of it new
    made=[
        [(False, 0, [("shared", 100, 0), ("private", 1, 0)])],
        [(False, 0, [("shared", 33000, 0)])],
        [(False, 0, [("shared", 33000, 0)]), (True, 0, [("file", 40, 0)])],
        [(False, 9, [("shared", 33000, 0)])],
    ],
    tear={1},
    portion=1 << 15,
    few=16,
    in_two=False,
)
@example(
    made=[
        [(False, 0, [("shared", 100, 0)])],
        [(False, 0, [("shared", 50, 200), ("huge", 1, 0), ("private", 33000, 0)])],
        [(False, 0, [("shared", 50, 200), ("part", 300, 0)])],
        [(False, 0, [("part", 300, 0), ("shared", 50, 200)])],
    ],
    tear={1},
    portion=1 << 15,
    few=16,
    in_two=False,
)
@example(  # the same with numbers that are too few for a Block
    made=[
        [(False, 0, [("shared", 5, 0), ("private", 1, 0)])],
        [(False, 0, [("shared", 9, 0), ("swap", 30, 0)])],
        [(False, 0, [("shared", 300, 3), ("swap", 30, 0)])],
        [(False, 0, [("shared", 9, 0), ("nothing", 9, 0), ("shared", 9, 5), ("swap", 20, 9)])],
    ],
    tear={1},
    portion=1 << 15,
    few=16,
    in_two=False,
)
def test_any_entries_are_counted_as_sets_would(
    made: list[list[Area]], tear: set[int], portion: int, few: int, in_two: bool
) -> None:
    """Whatever is in page tables, and wherever the portions end in which they are read."""
    torn = {i for i in tear if i < len(made)}
    with tempfile.TemporaryDirectory() as directory:
        made_up = MadeUp(Path(directory), reference.PAGE)
        for i, content in enumerate(made):
            # A mapping of some pages at its end, of which the last is missing.
            more: list[Area] = [(False, 0, [("private", 9, 0)])] if i in torn else []
            made_up.add([*content, *more], torn=i in torn)
        with entered(made_up), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tool, "MAX_READ", portion)
            patch.setattr(tool, "MAX_LONE", few)
            if in_two:
                patch.setattr(tool, "FORK_FROM", -1 << 60)
                patch.setattr(tool, "STRIPE", tool.PMD_PAGES)
                patch.setattr(tool, "STRIPES", range(2))
                patch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
            check_made_up(made_up, torn)


OTHER_PAGES: list[list[Area]] = [
    [
        (False, 7, [("private", 701, 0), ("shared", 997, 3), ("zero", 300, 0), ("swap", 211, 5)]),
        (True, 100, [("file", 500, 11), ("shared", 40, 900), ("device", 30, 0)]),
        (False, 0, [("huge", 1, 0), ("huge_zero", 1, 0), ("guard", 20, 0)]),
    ],
    [
        (False, 7, [("nothing", 701, 0), ("shared", 997, 3), ("part", 300, 8), ("swap", 99, 80)]),
        (True, 100, [("file", 600, 100), ("file_alone", 70, 0), ("marker", 100, 0)]),
    ],
]


@pytest.mark.parametrize("kib", [4, 16, 64])
@pytest.mark.parametrize("order", ["little", "big"])
def test_page_sizes_and_byte_orders(kib: int, order: str, tmp_path: Path) -> None:
    made_up = MadeUp(tmp_path, kib * KIB, "<" if order == "little" else ">")
    for content in OTHER_PAGES:
        made_up.add(content)
    # memuse asks for the page size when it is imported: so everything in another interpreter.
    change = (
        "sysconf = os.sysconf\n"
        f"os.sysconf = lambda name: {kib * KIB} if name == 'SC_PAGE_SIZE' else sysconf(name)\n"
        "import test_hostile, memuse\nfrom pathlib import Path\n"
        f"sys.byteorder = {order!r}\n"
        f"made = object.__new__(test_hostile.MadeUp)\n"
        f"made.root, made.order = Path({str(tmp_path)!r}), {made_up.order!r}\n"
        "import atexit, contextlib\nstack = contextlib.ExitStack()\natexit.register(stack.close)\n"
        "stack.enter_context(test_hostile.entered(made))"
    )
    result = simulated(change, *COUNTED, FIRST_PID)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    (frames, slots), (more, more_slots) = made_up.expected
    got = [(row["frames"], row["unique"], row["swap"]) for row in report["processes"]]
    assert got == [
        (len(frames), len(frames), len(slots) * kib * KIB),
        (len(more), len(more - frames), len(more_slots) * kib * KIB),
    ]
    assert report["page_size"] == kib * KIB
    assert report["total"]["swap"] == len(slots | more_slots) * kib * KIB


# ---- Noise ----------------------------------------------------------------------

MAPS = Path("/proc/self/maps").read_bytes().splitlines(keepends=True)[:60]
SMAPS = Path("/proc/self/smaps").read_bytes().splitlines(keepends=True)[:120]
HEADER = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n"


def parse(text: bytes) -> None:
    """Well-formed areas and figures, or the one expected error."""
    assert all(size >= 0 for size in tool.parse_figures(text).values())
    with contextlib.suppress(tool.Error):
        areas, files = tool.parse_maps(text)
        assert all(isinstance(start + end, int) for start, end, _ in areas)
        assert all(isinstance(start + end + shift, int) for start, end, shift, _ in files)


@settings(max_examples=400, deadline=None)
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


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_parsers_take_mutated_text(data: st.DataObject) -> None:
    lines = list(data.draw(st.sampled_from([MAPS, SMAPS])))
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
    areas, files = tool.parse_maps(b"".join(MAPS))
    for line in MAPS:
        start, end = (int(text, 16) // tool.PAGE_SIZE for text in line.split()[0].split(b"-"))
        inode = line.split()[4]
        assert any(low <= start < end <= high for low, high, _ in areas) or b"[vsyscall]" in line
        assert inode == b"0" or any(
            low <= start < end <= high and file.endswith(inode) for low, high, _, file in files
        )
    assert tool.parse_figures(b"".join(SMAPS))["rss"] == 1024 * sum(
        int(line.split()[1]) for line in SMAPS if line.startswith(b"Rss:")
    )


# ---- Containers -----------------------------------------------------------------

CONTAINERS = {
    "user and PID namespace": "unshare -Ur --pid --fork --mount-proc {}",
    "root without the capability": "capsh --drop=cap_sys_admin -- -c {!r}",
    "nobody": (
        "setpriv --reuid=65534 --regid=65534 --clear-groups"
        " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search {}"
    ),
    "only what Docker gives": (
        "setpriv --bounding-set -all,+chown,+dac_override,+fowner,+setuid,+setgid,+kill"
        " --inh-caps -all {}"
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("form", ["", "--json"])
def test_without_the_capability(name: str, form: str) -> None:
    with readable() as (python_, script):
        command = CONTAINERS[name].format(f"{python_} {script} {form} 1")
        result = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=60, check=False
        )
    one_line(result, "CAP_SYS_ADMIN", "sudo")


def test_what_is_said_to_work_without_the_capability_does() -> None:
    """The command that the message names, for a process of one's own."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *READ_ALL]
    with running([*nobody, "sleep", "60"]) as process:
        wait_for(lambda: psutil.Process(process.pid).name() == "sleep")
        message = memuse(process.pid, prefix=nobody).stderr
        assert "-o pid,rss,pss,command" in message
        result = memuse("-o", "user,rss,pss,command", process.pid, prefix=nobody)
    assert (result.returncode, result.stderr) == (0, "")
    user, rss, *_ = result.stdout.splitlines()[1].split()
    assert user == pwd.getpwuid(65534).pw_name
    assert int(rss) > 0
