"""Every trap as a scene of real processes: each row's figures equal a slow and obvious count."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Callable, NamedTuple

import psutil
import pytest
import reference
import scenes
from building import HUGE
from conftest import (
    has_no_differences,
    inside,
    measured,
    measured_apart,
    needs_root,
    ready,
    run_memuse,
    setting,
)
from reference import PAGE

pytestmark = [needs_root, pytest.mark.usefixtures("few_are_wrong")]
Build = Callable[..., int]

COUNTED = "pid,frames,unique,size,tree,freed,anon,shmem,file,swap"


def compare(*roots: int, about: str = "") -> dict[str, Any]:
    """memuse's report on trees, which equals the reference; else a table of what differs."""
    pids = [pid for root in roots for pid in reference.tree(root)]
    expected = reference.count(pids)
    for _ in range(4):  # others come and go on this machine, who map the same files
        report = measured_apart(*roots)
        table = reference.differences(report, expected)
        if not table:
            break
        before, expected = expected, reference.count(pids)
        table = reference.differences(report, before, expected)
        if not table:
            break
    has_no_differences(f"{about}\nmemuse {' '.join(map(str, roots))} is wrong:", table)
    check_sums(report)
    return report


def check_sums(report: dict[str, Any]) -> None:
    """What must be so in any report."""
    rows, total = report["processes"], report["total"]
    for row in [*rows, total]:
        assert row["size"] == row["frames"] * PAGE == row["anon"] + row["shmem"] + row["file"]
        assert max(row["size"], row["freed"]) <= row["tree"]
    assert sum(row["unique"] for row in rows) == total["unique"] == total["frames"]
    assert total["tree"] >= total["size"]
    assert total["uss"] is None


def compare_parts(name: str, pid: int) -> dict[str, Any]:
    """The same for the tree of each process, where what it shares with others is outside.

    Of a crowd, only for those who have children, and a few others.
    """
    about = f"scene {name}: {scenes.about(name)}"
    pids = reference.tree(pid)
    reading = reference.read(pids)
    parents = {reading.memories[each].parent for each in pids}
    leaves = [each for each in pids if each not in parents]
    parts = [each for each in pids[1:] if each in parents or each in [*leaves[:3], leaves[-1]]]
    reports = {}
    for part in [*parts, pid]:
        report = reports[part] = measured_apart(part) if part == pid else measured(part)
        below = reading.below(part)
        if reference.differences(report, reading.count([each for each in pids if each in below])):
            reports[part] = compare(part, about=about)  # from a reading of its own
        check_sums(reports[part])
    check_gentle(pid, reports[pid])
    return reports[pid]


def check_gentle(pid: int, full: dict[str, Any]) -> None:
    """Where no smaps_rollup is read, all is the same but FREED, which others may move."""
    for _ in range(4):
        gentle = measured("-o", COUNTED, pid)
        if counted(full) == counted(gentle):
            break
        full = measured(pid)  # the kernel may have collapsed huge pages meanwhile
    assert counted(full) == counted(gentle)


def counted(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of all rows but FREED."""
    names = {*COUNTED.split(",")} - {"freed"}
    rows = [*report["processes"], report["total"]]
    return [{name: row[name] for name in row if name in names} for row in rows]


# ---- Scenes ---------------------------------------------------------------------

Report = dict[str, Any]


class Trap(NamedTuple):
    frames: int  # that it has at least
    setting: str = ""  # of the kernel, a fixture of conftest.py
    proof: Callable[[Report], object] = bool  # that it is what it says


def kernel_has(field: str) -> Callable[[Report], object]:
    """A field of the first row's smaps_rollup that is not 0."""

    def proof(report: Report) -> object:
        pid = report["processes"][0]["pid"]
        return f"{field}:         0" not in Path(f"/proc/{pid}/smaps_rollup").read_text()

    return proof


def has_slots_in_common(report: Report) -> object:
    swaps = [row["swap"] for row in report["processes"]]
    return max(swaps) > 500 * PAGE and max(swaps) <= report["total"]["swap"] < sum(swaps)


def has_unmapped(pages: int) -> Callable[[Report], object]:
    """So many pages, at least, of huge pages that are mapped in part."""
    return lambda report: report["total"]["tree"] - report["total"]["size"] >= pages * PAGE


def has_hugetlb(report: Report) -> object:
    parent, child = report["processes"]
    return parent["size"] > parent["rss"] + 2 * HUGE and child["unique"] >= HUGE // PAGE


# The first have none, or a single trap; others, several at once.
TRAPS = {
    "shells": Trap(200),
    "zero": Trap(111 + 100),
    "huge_zero": Trap(512, "thp"),
    "guarded": Trap(200),
    "swapped": Trap(300, "swap", has_slots_in_common),
    "ksm": Trap(205, "ksm", lambda r: r["processes"][0]["size"] < r["total"]["rss"] - 500 * PAGE),
    "file_twice": Trap(768 + 60 + 20),
    "plain": Trap(701),
    "zombie": Trap(0),
    "lone_thread": Trap(640),
    "vforked": Trap(811),
    "hugetlb": Trap(1024 + 512, "hugetlb", has_hugetlb),
    "packet_ring": Trap(128),
    "crowd": Trap(17),
    "mappings": Trap(5001 + 500),
    "sparse": Trap(3127 + 300),
    "lopsided": Trap(16000),
    "forked": Trap(1499 + 99 + 83 // 2 + 200),
    "huge": Trap(4096, "thp", kernel_has("AnonHugePages")),
    "shared": Trap(1000),
    "moved": Trap(1200),
    "windows": Trap(2048),
    "misnamed": Trap(256 + 50),
    "scattered": Trap(38 + 2048 + 164 + 55),
    "generations": Trap(900 + 1000),
    "cousins": Trap(200 + 370),
    "backends": Trap(1000),
    "many": Trap(300),
    "ksm_branches": Trap(70, "ksm", lambda r: r["total"]["tree"] < r["total"]["rss"] - 900 * PAGE),
    "swapped_branches": Trap(0, "swap", has_slots_in_common),
    "twins": Trap(650),
    "twin_siblings": Trap(600 + 120),
    "twins_huge": Trap(2048, "thp"),
    "vforked_huge": Trap(512, "thp", kernel_has("AnonHugePages")),
    "huge_misplaced": Trap(2048, "thp", kernel_has("AnonHugePages")),
    "homeless": Trap(1024, "thp", kernel_has("AnonHugePages")),
    "emptied": Trap(2 * 800, "thp", has_unmapped(2 * 1900)),
    "emptied_moved": Trap(130, "thp", has_unmapped(1200)),
    "emptied_branches": Trap(1000, "thp", has_unmapped(144)),
    "emptied_twins": Trap(900, "thp", has_unmapped(500)),
    "emptied_swapped": Trap(300, "thp,swap"),  # while it swaps, the kernel may split any of them
    "tmpfs_huge": Trap(3 * 512, "", kernel_has("ShmemPmdMapped")),
    **{f"anything {seed}": Trap(1000, "thp") for seed in (3, 7, 23)},
}


@pytest.mark.parametrize("name", TRAPS)
def test_scene(name: str, scene: Build, request: pytest.FixtureRequest) -> None:
    trap = TRAPS[name]
    for fixture in filter(None, trap.setting.split(",")):
        request.getfixturevalue(fixture)
    for _ in range(3):  # the kernel may have had no huge page for it, or have split it since
        report = compare_parts(name, scene(name))
        assert report["total"]["frames"] >= trap.frames
        if trap.proof(report):
            return
    pytest.fail(f"scene {name}: the trap that it is for was not there in three trees")


@pytest.mark.parametrize("kib", [16, 64, 1024])
@pytest.mark.parametrize("name", ["folios", "folios_emptied"])
def test_multi_size_huge_pages(name: str, kib: int, scene: Build) -> None:
    directory = f"/sys/kernel/mm/transparent_hugepage/hugepages-{kib}kB"
    with setting(f"{directory}/enabled", "madvise"):
        allocated = Path(f"{directory}/stats/anon_fault_alloc")
        before = int(allocated.read_text())
        pid = scene(f"{name} {kib}")
        assert int(allocated.read_text()) > before
        compare_parts(f"{name} {kib}", pid)


# ---- Sets of trees --------------------------------------------------------------


def test_two_families_at_the_same_addresses(scene: Build) -> None:
    """Without address randomisation, other frames are where the first family's were."""
    still = ("setarch", "-R")
    first, second = scene("forked", still), scene("forked", still)
    report = compare(first, second, about="frames of two families taken for each other's?")
    assert len(report["processes"]) == 8


def test_several_roots_are_one_set(scene: Build) -> None:
    first, second = scene("plain"), scene("forked")
    report = compare(first, second, about="memory that two trees share counted twice?")
    compare(second, first, about="the second tree's +UNIQUE counted in the order of PIDs?")
    together = report["total"]["frames"]
    alone = [measured(pid)["total"]["frames"] for pid in (first, second)]
    assert max(alone) < together < sum(alone)  # they share Python
    assert tree_of(report)[0] == (first, 0)
    assert tree_of(measured(second, first))[0] == (second, 0)


def test_a_part_of_those_who_share_memory_is_counted_like_others(scene: Build) -> None:
    """Of siblings in one address space, one that is measured without the others."""
    pid = scene("twin_siblings")
    for child in reference.tree(pid)[1:]:
        compare(child, about="its private memory lost, since others share it?")
    first, *_, last = reference.tree(pid)[1:]
    compare(last, first, about="private memory of siblings counted twice, named as roots?")


def test_the_whole_system_agrees_with_the_sum_of_pss() -> None:
    """Processes that even root may not read, as some machines' first, are named."""
    reports: list[dict[str, Any]] = []
    for _ in range(30):
        roots, unreadable = [], []
        for process in psutil.process_iter(["ppid"]):
            try:
                Path(f"/proc/{process.pid}/maps").open().close()
            except PermissionError:
                unreadable.append(process.pid)
            except FileNotFoundError:
                continue
            if process.info["ppid"] in (0, *unreadable):
                roots.append(process.pid)
        result = run_memuse("--json", *roots)
        if not re.search("there is no process|exited while it was", result.stderr):  # a root
            reports.append(json.loads(result.stdout))
        if len(reports) == 3:
            break
    for report in reports:
        assert [skipped["pid"] for skipped in report["skipped"]] == unreadable
    # memuse shares some libraries, and its part of their PSS is missing; the rest is drift,
    # which is not the same each time.
    pairs = [(report["total"]["size"], report["total"]["pss"]) for report in reports]
    size, pss = min(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    assert abs(size - pss) < 0.02 * size + (6 << 20)


# ---- Rows -----------------------------------------------------------------------


def tree_of(report: dict[str, Any]) -> list[tuple[int, int]]:
    return [(process["pid"], process["depth"]) for process in report["processes"]]


def test_tree_is_depth_first_with_siblings_by_pid(forked: int) -> None:
    parent = psutil.Process(forked)
    first, second = sorted(parent.children(), key=lambda child: child.pid)
    (grandchild,) = (*first.children(), *second.children())
    under_first = grandchild.ppid() == first.pid
    rows = [(forked, 0), (first.pid, 1), (second.pid, 1)]
    rows.insert(2 if under_first else 3, (grandchild.pid, 2))
    assert tree_of(measured(forked)) == rows
    child = grandchild.ppid()
    assert tree_of(measured(child)) == [(child, 0), (grandchild.pid, 1)]
    # Roots within another's tree, or named twice, are where they belong, once.
    assert tree_of(measured(grandchild.pid, forked, forked, child)) == rows


def test_memuse_leaves_itself_out() -> None:
    pids = [process["pid"] for process in measured_apart(os.getpid())["processes"]]
    assert pids[0] == os.getpid()
    assert len(pids) == 1 + len(psutil.Process().children(recursive=True))


def test_zombies_and_kernel_threads_are_rows_of_zeros(scene: Build) -> None:
    pid = scene("zombie")
    for _ in range(10):
        result = inside(None, "--json", pid, 2)
        if not result.stderr:  # else a kernel thread exited meanwhile
            break
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    rows = [p for p in report["processes"] if p["command"].startswith("[")]
    assert any(p["command"] == "[kthreadd]" and p["pid"] == 2 for p in rows)
    figures = (*COUNTED.split(",")[1:], "rss", "pss", "uss")
    assert not any(p[name] for p in rows for name in figures)
    assert sum(p["ppid"] != 2 and p["pid"] != 2 for p in rows) == 1


def kernel_sums(pid: int) -> dict[str, int]:
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    sums: dict[str, int] = {}
    for name, kib in re.findall(r"^(\w+): +(\d+) kB$", smaps, re.M):
        sums[name] = sums.get(name, 0) + int(kib) * 1024
    return sums


def test_figures_of_the_kernel(forked: int) -> None:
    vmas = len(Path(f"/proc/{forked}/maps").read_text().splitlines())
    sums = kernel_sums(forked)
    for _ in range(20):  # other Pythons come and go
        before, process, sums = sums, measured(forked)["processes"][0], kernel_sums(forked)
        if sums == before:
            break
    assert process["rss"] == sums["Rss"]
    # While memuse runs, the libraries that it uses too are not private.
    dirty = sums["Private_Dirty"]
    assert dirty <= process["uss"] <= dirty + sums["Private_Clean"]
    assert 0 < process["pss"] <= sums["Pss"] + vmas * 1024  # each VMA's is rounded down
    assert process["ppid"] == os.getpid()


BRIEF = """
import os
print("ready", flush=True)
while True:
    if not os.fork(): os._exit(0)
    os.wait()
"""


def test_children_that_end_while_they_are_read_are_no_failure() -> None:
    with ready(BRIEF) as process:
        for _ in range(5):
            result = inside(None, "--json", process.pid)
            assert result.returncode == 0
            assert json.loads(result.stdout)["skipped"] == []
