"""Hostile command lines and names: nothing of them is obeyed by a terminal, or costs much."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    ENVIRONMENT,
    MIB,
    inside,
    needs_root,
    python,
    ready,
    run_memuse,
    running,
    wait_for,
)

pytestmark = needs_root

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
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "ascii, strict": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
    "locale C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
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
            wait_for(lambda pid=process.pid: runs_a_shell(pid))  # type: ignore[misc]
        yield [process.pid for process in processes]


def runs_a_shell(pid: int) -> bool:
    return "python" not in os.path.basename(os.readlink(f"/proc/{pid}/exe"))


def check_harmless(output: bytes, encoding: str, rows: int) -> None:
    """Nothing that a terminal obeys or does not show, and as many lines as there should be."""
    text = output.decode(encoding)
    categories = {unicodedata.category(character) for character in set(text) - {"\n"}}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert text.endswith("\n")
    assert text.count("\n") == len(text.splitlines()) == rows


@pytest.fixture(scope="module")
def hostile() -> Iterator[list[int]]:
    with shells(*([text, text] for text in HOSTILE.values())) as pids:
        yield pids


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_trick_of_a_command_line_reaches_the_terminal(name: str, hostile: list[int]) -> None:
    encoding = name if name in {"utf-8", "latin-1"} else "ascii"
    env = {**ENVIRONMENT, **ENVIRONMENTS[name]}
    result: Any = run_memuse("--json", *hostile, text=False, env=env)
    assert (result.stderr, result.returncode) == (b"", 0)
    check_harmless(result.stdout, encoding, 1)
    rows = json.loads(result.stdout)["processes"]
    assert [row["pid"] for row in rows] == hostile
    for row in rows:  # not only in JSON's own escapes: jq -r prints these as they are
        check_harmless(f"{row['command']}\n".encode(), "utf-8", 1)

    for more in ({}, {"COLUMNS": "100"}):
        result = run_memuse(*hostile, text=False, env={**env, **more})
        assert (result.stderr, result.returncode) == (b"", 0)
        check_harmless(result.stdout, encoding, len(hostile) + 2)
        pids = [int(line.split()[0]) for line in result.stdout.splitlines()[1:-1]]
        assert pids == hostile


@pytest.mark.parametrize("line", [" └─ ", "│  ├─ ", " ├─nginx: worker"])
def test_no_command_looks_like_a_line_of_the_tree(line: str) -> None:
    """In a name of one's own choice; else a row seems to be below the one above it."""
    with shells([line.encode()]) as (pid,):
        (row,) = shown_rows(pid)
        assert not {*"│├└─"} & {*row}
        assert line.encode("unicode_escape").decode().strip() in row


@pytest.mark.parametrize(("name", "shown"), [("|- x", r"\|- x"), (" `- x", r" \`- x")])
def test_no_command_looks_like_a_line_of_a_tree_in_ascii(name: str, shown: str) -> None:
    with shells([name.encode(), b"a | b"]) as (pid,):
        (row,) = shown_rows(pid)
    assert f" {shown} -c read x; : a | b" in row


def shown_rows(*pids: int) -> list[str]:
    result = inside(None, *pids)
    assert (result.returncode, result.stderr) == (0, "")
    return str(result.stdout).splitlines()[1:-1]


# ---- Long ones ------------------------------------------------------------------


def test_two_megabytes_of_arguments() -> None:
    text = b"A\x1b" * 65_000  # one argument is at most 128 KiB
    with shells([b"sh", *[text] * 14]) as (pid,):
        for form, lines in (((), 3), (("--json",), 1)):
            result = inside(None, *form, pid)
            assert (result.returncode, result.stderr) == (0, "")
            assert "\x1b" not in result.stdout
            assert result.stdout.count("\n") == lines


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


def in_128_mib() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (128 * MIB, 128 * MIB))


def test_a_command_line_without_end() -> None:
    """A process may call any of its memory its arguments: 512 MiB here, and mostly zeros."""
    with ready(BOAST, 512) as process:
        result = run_memuse(process.pid, preexec_fn=in_128_mib)
        assert (result.returncode, result.stderr) == (0, "")
        row = result.stdout.splitlines()[1]
    assert row.split()[0] == str(process.pid)
    assert len(row) < 1 << 17


def test_long_command_lines_are_neither_kept_whole_nor_paid_for_in_other_rows() -> None:
    """80 processes with 1.8 MB each, which would be 144 MB, and 40 with short ones."""
    code = "import os\nfor n in range(120):\n if os.fork() == 0: break\n"
    code += "else:\n print('ready', flush=True)\n n = 0\n"
    code += "os.execvp('cat', ['cat']) if n >= 80 else os.read(0, 1)"
    with ready("", command=[*python(code), *["y" * 130_000] * 14]) as process:
        children = psutil.Process(process.pid).children()
        wait_for(lambda: sum(child.name() == "cat" for child in children) == 40)
        result = run_memuse("-o", "pid,command", process.pid, preexec_fn=in_128_mib)
    assert (result.returncode, result.stderr) == (0, "")
    lengths = [len(line) for line in result.stdout.splitlines()]
    assert len(lengths) == 1 + 121 + 1
    assert sum(length < 100 for length in lengths) == 42
    assert sum(length > 1 << 16 for length in lengths) == 81
    assert max(lengths) < (1 << 16) + 100


# ---- Names instead of command lines ---------------------------------------------

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

NAMES = {
    b"\x1b]0;x\x07\x1b[8m": "[\\x1b]0;x\\x07\\x1b[8m]",
    b"a\nb\rc": "[a\\nb\\rc]",
    b"x) R 1 1 (y": "[x) R 1 1 (y]",
    b"\xff\x9b\xc2\x9b": "[\\xff\\x9b\\x9b]",
    "\u202eab".encode(): "[\\u202eab]",
    b" ": "[ ]",
}


@pytest.fixture(scope="module")
def nameless() -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ready(NAMELESS, name.hex())).pid for name in NAMES]


@pytest.mark.parametrize("environment", ["utf-8", "ascii"])
def test_names_of_processes_without_arguments(environment: str, nameless: list[int]) -> None:
    env: Any = {**ENVIRONMENT, **ENVIRONMENTS[environment]}
    for pid, name in zip(nameless, NAMES):
        assert Path(f"/proc/{pid}/cmdline").read_bytes() == b""
        assert Path(f"/proc/{pid}/comm").read_bytes()[:-1] == name
    for form, lines in (((), 2 + len(NAMES)), (("--json",), 1)):
        result = run_memuse(*form, *nameless, env=env)
        assert (result.returncode, result.stderr) == (0, "")
        check_harmless(result.stdout.encode(), "utf-8", lines)
    rows = json.loads(result.stdout)["processes"]
    assert [row["command"] for row in rows] == [*NAMES.values()]
    assert [row["ppid"] for row in rows] == [os.getpid()] * len(NAMES)


def test_a_program_executed_without_any_argument(tmp_path: Path) -> None:
    """Its name is its file's, which holds what it likes."""
    path = tmp_path / "\x1b[7m\n\u202e"
    path.symlink_to("/bin/sh")
    code = "import ctypes, os, sys\n"
    code += "none = (ctypes.c_char_p * 1)(None)\nprint('ready', flush=True)\n"
    code += "ctypes.CDLL(None).execve(os.fsencode(sys.argv[1]), none, none)"
    with ready(code, path) as process:
        wait_for(lambda: runs_a_shell(process.pid))
        wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
        result = inside(None, process.pid)
    assert (result.returncode, result.stderr) == (0, "")
    check_harmless(result.stdout.encode(), "utf-8", 3)
    assert "[\\x1b[7m\\n\\u202e]" in result.stdout
