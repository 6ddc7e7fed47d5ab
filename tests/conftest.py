"""Fixtures: scenes of real processes, and kernel settings that are put back afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).parent.parent
MEMUSE = [sys.executable, str(ROOT / "memuse.py")]
sys.path.insert(0, str(ROOT))

# For other users: an interpreter may be in a home that is not theirs.
READ_ALL = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="reading page frames takes root")


def memuse(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = options.pop("prefix", []) + MEMUSE + [str(argument) for argument in arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def simulated(
    change: str, *arguments: object, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run memuse in an interpreter in which something was changed before."""
    code = f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{change}\n"
    code += "sys.argv[0] = 'memuse.py'\nimport memuse\nraise SystemExit(memuse.main())"
    command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# Two processes of memuse, whatever the size, with the smallest stripes.
IN_TWO = """
import memuse
memuse.FORK_FROM, memuse.STRIPE, memuse.STRIPES = -1 << 60, memuse.PMD_PAGES, range(2)
os.sched_getaffinity = lambda pid: {0, 1}
"""
# An error, should these not make a whole.
NOT_IN_ONE = IN_TWO + "memuse.count_in_one = None\n"


def measured(*arguments: object) -> dict[str, Any]:
    result = memuse("--json", *arguments)
    assert result.stderr == ""
    assert result.returncode == 0
    report: dict[str, Any] = json.loads(result.stdout)
    return report


class Scene:
    """A process of scenes.py, once it is ready; it and its children end at the end."""

    def __init__(self, name: str, prefix: list[str]) -> None:
        command = [*prefix, sys.executable, str(ROOT / "tests/scenes.py"), *name.split()]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        assert self.process.stdout
        self.pid = self.process.pid
        if self.process.stdout.readline() != "ready\n":
            self.end()
            pytest.fail(f"the scene {name} could not be built")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its own session: nobody else is in it
        self.process.wait()


@pytest.fixture
def scene() -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def build(name: str, prefix: tuple[str, ...] = ()) -> Scene:
        scenes.append(Scene(name, list(prefix)))
        return scenes[-1]

    yield build
    for built in scenes:
        built.end()


@contextmanager
def setting(path: str, value: str) -> Iterator[None]:
    """A kernel setting, put back whatever happens."""
    file = Path(path)
    before = file.read_text()
    if "[" in before:  # one of several
        before = before[before.index("[") + 1 : before.index("]")]
    try:
        file.write_text(value)
        yield
    finally:
        file.write_text(before)


@pytest.fixture
def swap() -> Iterator[None]:
    """A swap area of 256 MB for the time of a test."""
    with tempfile.NamedTemporaryFile(dir=ROOT, prefix=".swap") as file:
        os.posix_fallocate(file.fileno(), 0, 256 << 20)
        subprocess.run(["mkswap", file.name], check=True, capture_output=True)
        subprocess.run(["swapon", file.name], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", file.name], check=True)


@pytest.fixture
def hugetlb() -> Iterator[None]:
    with setting("/proc/sys/vm/nr_hugepages", "8"):
        yield


@pytest.fixture
def ksm() -> Iterator[None]:
    directory = "/sys/kernel/mm/ksm"
    with setting(f"{directory}/sleep_millisecs", "0"), setting(f"{directory}/run", "1"):
        yield
    Path(directory, "run").write_text("2")  # part what was merged, then as it was
    Path(directory, "run").write_text("0")


@pytest.fixture
def thp() -> Iterator[None]:
    with setting("/sys/kernel/mm/transparent_hugepage/enabled", "madvise"):
        yield


@pytest.fixture
def ended_child() -> int:
    """The PID of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
