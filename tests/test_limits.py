"""Few open files and little memory: what memuse takes, and how it tells that it takes more."""

from __future__ import annotations

import functools
import json
import resource
import sys
from collections.abc import Iterator

import psutil
import pytest
from conftest import (
    KIB,
    MIB,
    ROOT,
    TREE,
    fails,
    inside,
    kill,
    meanwhile,
    needs_root,
    ready,
    run,
    run_memuse,
    simulated,
)

pytestmark = needs_root


# ---- Open files -----------------------------------------------------------------


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))


@pytest.fixture(scope="module")
def crowd() -> Iterator[list[int]]:
    """A process with 200 children."""
    with ready(TREE, 200) as process:
        children = sorted(child.pid for child in psutil.Process(process.pid).children())
        yield [process.pid, *children]


def test_hundreds_of_processes_with_few_open_files(crowd: list[int]) -> None:
    result = run_memuse("--json", crowd[0], preexec_fn=few_files)
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(result.stdout)["processes"]
    assert [row["pid"] for row in rows] == crowd
    assert all(row["frames"] and row["rss"] for row in rows)


def test_those_that_are_gone_hold_no_files() -> None:
    """Fifty processes end after they were listed, or while they are read."""
    with ready(TREE, 100) as process:
        children = sorted(child.pid for child in psutil.Process(process.pid).children())

        def end(pid: int) -> None:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (32, 32))
            for child in children[::2]:
                kill(child)

        stops = f"1 words:/proc/{children[0]}/pagemap"
        result = meanwhile(end, stops, "--json", process.pid)
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(result.stdout)["processes"]
    assert [row["pid"] for row in rows] == [process.pid, *children]  # nobody has waited for them
    assert [row["frames"] > 0 for row in rows] == [True, *[False, True] * 50]


def test_too_few_open_files_are_told_in_one_line(forked: int) -> None:
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (5, 5))
    fails(run_memuse(forked, preexec_fn=limit), "Too many open files")


# ---- Memory ---------------------------------------------------------------------

FORK_SCENE = (
    """
import mmap
memory = mmap.mmap(-1, 256 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, 256 << 20, 4096):
    memory[page] = 1
"""
    + TREE
)


@functools.lru_cache(1)
def size_of_interpreter() -> int:
    """What address space it takes to import memuse."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import memuse, json\n"
    code += "print(open('/proc/self/status').read())"
    lines = run([sys.executable, "-c", code]).stdout.splitlines()
    (peak,) = [line for line in lines if line.startswith("VmPeak:")]
    return int(peak.split()[1]) * KIB


# Of 32 GiB, 16 pages in every 32 MiB: their entries, with those around them, are 64 MiB.
SPARSE_SCENE = (
    """
import mmap
SIZE = 32 << 30
NORESERVE = 0x4000
memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, SIZE, 2 << 20):
    memory[page + page // 8 % (1 << 20) // 4096 * 4096] = 1
"""
    + TREE
)


@pytest.mark.parametrize(
    ("scene", "children", "pages"),
    [(FORK_SCENE, 6, 65536), (FORK_SCENE, 120, 65536), (SPARSE_SCENE, 1, 16384)],
    ids=["256 MiB that are shared", "by many", "sparse"],
)
def test_64_mib_are_enough(scene: str, children: int, pages: int) -> None:
    """The floor that any counting by page takes, and not one word for each page of each row."""
    limit = size_of_interpreter() + 64 * MIB
    columns = ("-o", "pid,frames,unique,size,tree,freed,swap")
    with ready(scene, children) as process:
        free = run_memuse(process.pid, *columns)
        in_limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))
        limited = run_memuse(process.pid, *columns, preexec_fn=in_limit)
    assert (limited.returncode, limited.stderr) == (0, "")
    assert limited.stdout == free.stdout
    assert int(free.stdout.splitlines()[-1].split()[1]) > pages


PLACES = ["words:/proc/PID/pagemap", "before:/proc/PID/smaps_rollup", "before:/proc/kpagecount"]


@pytest.mark.parametrize("place", [*PLACES, "words:/proc/kpagecount", "before:/proc/PID/stat"])
@pytest.mark.parametrize("how", ["MemoryError", "ENOMEM"])
def test_too_little_memory_is_told_in_one_line_and_no_fault_of_a_process(
    how: str, place: str, forked: int
) -> None:
    times = 2 if "smaps_rollup" in place else 1  # what the thread could not read, is tried again
    machine = f"OutOfMemory {how} {times} {place.replace('PID', str(forked))}"
    assert fails(inside(machine, forked)) == "memuse: there is not enough memory\n"


@pytest.mark.parametrize("kib", [0, 600, 2000, 9000])
def test_memory_that_ends_for_real_is_told_in_one_line_or_is_enough(kib: int, forked: int) -> None:
    result = simulated(f"Narrow {kib}", forked)
    if result.returncode:
        assert "not enough memory" in fails(result)
    else:
        assert result.stderr == ""
        assert result.stdout.count("\n") == 6
