"""Every trap as a scene of real processes, compared to the frame with the slow reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest
import reference
from conftest import IN_TWO, NOT_IN_ONE, Scene, measured, memuse, needs_root, simulated

pytestmark = needs_root
Build = Callable[..., Scene]


COLUMNS = ("pid", "frames", "unique", "swap")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """What the reference counts too."""
    found = {name: report["total"][name] for name in ("frames", "swap", "uss")}
    return {**found, "rows": [tuple(p[name] for name in COLUMNS) for p in report["processes"]]}


def compare(*roots: int) -> dict[str, Any]:
    """memuse's report on trees, after it was found equal to the reference."""
    pids = [pid for root in roots for pid in reference.tree(root)]
    for _ in range(5):
        expected = reference.count(pids)
        report = measured(*roots)
        in_two = json.loads(simulated(IN_TWO, "--json", *roots).stdout)
        # Without the kernel's figures no smaps is read: the same to the frame.
        gentle = measured("-o", ",".join(COLUMNS), *roots)
        found = [figures(report), figures(in_two)]
        rows = [tuple(p.values()) for p in gentle["processes"]]
        if (found == [expected] * 2 and rows == expected["rows"]) or expected == reference.count(
            pids
        ):
            break  # else others on this machine map the same files, or pages were collapsed
    assert found[0] == expected
    assert found[1] == expected
    assert [p["rss"] for p in in_two["processes"]] == [p["rss"] for p in report["processes"]]
    assert rows == expected["rows"]
    assert gentle["total"] == {"frames": expected["frames"], "swap": expected["swap"]}
    for process in report["processes"]:
        assert process["size"] == process["frames"] * reference.PAGE
    return report


def compare_parts(pid: int) -> dict[str, Any]:
    """The same for each process's own tree, where what is shared with others is outside."""
    for part in reference.tree(pid)[1:]:
        compare(part)
    return compare(pid)


SCENES = {
    "plain": 701,
    "lopsided": 16000,
    "forked": 1499 + 99 + 83 // 2 + 200,
    "generations": 900 + 1000,
    "crowd": 17,
    "zero": 111 + 100,
    "file_twice": 768 + 60 + 20,
    "misnamed": 256 + 50,
    "shared": 1000,
    "windows": 2048,
    "scattered": 38 + 2048 + 164 + 55,
    "moved": 1200,
    "guarded": 200,
    "mappings": 5001 + 500,
    "sparse": 3127 + 300,
    "vforked": 811,
    "lone_thread": 640,
    "zombie": 0,
}


@pytest.mark.parametrize("name", SCENES)
def test_scene(name: str, scene: Build) -> None:
    report = compare_parts(scene(name).pid)
    assert report["total"]["frames"] >= SCENES[name]


@pytest.mark.parametrize("name", ["plain", "forked", "generations", "shared", "windows"])
def test_two_processes_make_a_whole(name: str, scene: Build) -> None:
    """That they are not merely tried before one is."""
    result = simulated(NOT_IN_ONE, "--json", scene(name).pid)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "name", ["huge", "huge_zero", "huge_misplaced", "homeless", "vforked_huge"]
)
def test_huge_pages(name: str, scene: Build, thp: None) -> None:
    pid = scene(name).pid
    assert "AnonHugePages:         0" not in Path(f"/proc/{pid}/smaps_rollup").read_text()
    compare_parts(pid)


def test_hugetlb_is_memory_though_not_in_rss(scene: Build, hugetlb: None) -> None:
    report = compare_parts(scene("hugetlb").pid)
    parent, child = report["processes"]
    huge = 512 * 4096
    assert parent["size"] > parent["rss"] + 2 * huge
    assert child["unique"] >= 512


def test_ksm(scene: Build, ksm: None) -> None:
    pid = scene("ksm").pid
    report = compare_parts(pid)
    assert report["processes"][0]["size"] < report["processes"][0]["rss"] - 500 * 4096


def test_swap_slots_shared_by_fork(scene: Build, swap: None) -> None:
    report = compare_parts(scene("swapped").pid)
    swaps = [process["swap"] for process in report["processes"]]
    assert swaps[0] > 1000 * 4096
    assert max(swaps) <= report["total"]["swap"] < sum(swaps)


@pytest.mark.parametrize("seed", [3, 7, 23])
def test_trees_made_by_chance(seed: int, scene: Build, thp: None) -> None:
    report = compare_parts(scene(f"anything {seed}").pid)
    assert len(report["processes"]) > 3


def test_two_families_at_the_same_addresses(scene: Build) -> None:
    """Without address randomisation, other frames are where the first family's were."""
    still = ("setarch", "-R")
    first, second = scene("forked", still).pid, scene("forked", still).pid
    report = compare(first, second)
    assert len(report["processes"]) == 8


def test_whole_system_agrees_with_the_sum_of_pss() -> None:
    """Processes that even root may not read, as some machines' first, are named."""
    reports: list[dict[str, Any]] = []
    for _ in range(30):
        roots, unreadable = [], []
        for process in psutil.process_iter(["ppid"]):
            try:
                Path(f"/proc/{process.pid}/maps").open().close()
            except PermissionError:
                unreadable.append(process.pid)
            if process.info["ppid"] in (0, *unreadable):
                roots.append(process.pid)
        result = memuse("--json", *roots)
        if result.stdout:  # else one of the roots exited
            reports.append(json.loads(result.stdout))
        if len(reports) == 3:
            break
    for report in reports:
        assert [skipped["pid"] for skipped in report["skipped"]] == unreadable
    # memuse shares some libraries, and its part of their PSS is missing; the rest is drift,
    # which is not the same each time.
    totals = [report["total"] for report in reports]
    size, pss = min(
        ((t["size"], t["pss"]) for t in totals), key=lambda pair: abs(pair[0] - pair[1])
    )
    assert abs(size - pss) < 0.02 * size + (6 << 20)


# ---- Which processes ------------------------------------------------------------


def tree_of(report: dict[str, Any]) -> list[tuple[int, int]]:
    return [(process["pid"], process["depth"]) for process in report["processes"]]


def test_tree_is_depth_first_with_siblings_by_pid(scene: Build) -> None:
    pid = scene("forked").pid
    parent = psutil.Process(pid)
    first, second = sorted(parent.children(), key=lambda child: child.pid)
    (grandchild,) = (*first.children(), *second.children())
    under_first = grandchild.ppid() == first.pid
    rows = [(pid, 0), (first.pid, 1), (second.pid, 1)]
    rows.insert(2 if under_first else 3, (grandchild.pid, 2))
    assert tree_of(measured(pid)) == rows
    child = grandchild.ppid()
    assert tree_of(measured(child)) == [(child, 0), (grandchild.pid, 1)]
    # Roots within another's tree, or named twice, are where they belong, once.
    assert tree_of(measured(grandchild.pid, pid, pid, child)) == rows


def test_several_roots_are_one_set(scene: Build) -> None:
    first, second = scene("plain").pid, scene("forked").pid
    report = compare(first, second)
    together = report["total"]["frames"]
    alone = [measured(pid)["total"]["frames"] for pid in (first, second)]
    assert max(alone) < together < sum(alone)  # they share Python
    assert tree_of(report)[0] == (first, 0)
    assert tree_of(measured(second, first))[0] == (second, 0)


def test_memuse_leaves_itself_out() -> None:
    pids = [process["pid"] for process in measured(os.getpid())["processes"]]
    assert pids[0] == os.getpid()
    assert len(pids) == 1 + len(psutil.Process().children(recursive=True))


def test_zombies_and_kernel_threads_are_rows_of_zeros(scene: Build) -> None:
    pid = scene("zombie").pid
    for _ in range(10):
        result = memuse("--json", pid, 2)
        if not result.stderr:  # else a kernel thread exited meanwhile
            break
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    rows = [p for p in report["processes"] if p["command"].startswith("[")]
    assert any(p["command"] == "[kthreadd]" and p["pid"] == 2 for p in rows)
    figures = ("frames", "unique", "size", "rss", "pss", "uss", "swap")
    assert not any(p[name] for p in rows for name in figures)
    assert sum(p["ppid"] != 2 and p["pid"] != 2 for p in rows) == 1


def kernel_sums(pid: int) -> dict[str, int]:
    sums: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *value = line.split()
        if value[1:] == ["kB"]:
            sums[name] = sums.get(name, 0) + int(value[0]) * 1024
    return sums


def test_figures_of_the_kernel(scene: Build) -> None:
    pid = scene("forked").pid
    vmas = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
    sums = kernel_sums(pid)
    for _ in range(20):  # other Pythons come and go
        before, process, sums = sums, measured(pid)["processes"][0], kernel_sums(pid)
        if sums == before:
            break
    assert process["rss"] == sums["Rss:"]
    # While memuse runs, the libraries that it uses too are not private.
    dirty = sums["Private_Dirty:"]
    assert dirty <= process["uss"] <= dirty + sums["Private_Clean:"]
    assert 0 < process["pss"] <= sums["Pss:"] + vmas * 1024  # each VMA's is rounded down
    assert process["ppid"] == os.getpid()


def test_a_process_that_ends_while_it_is_read_is_left_out(scene: Build) -> None:
    code = "import os\nwhile True:\n if not os.fork(): os._exit(0)\n os.wait()"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            time.sleep(0.2)
            for _ in range(5):
                result = memuse("--json", process.pid)
                assert result.returncode == 0
                assert json.loads(result.stdout)["skipped"] == []
        finally:
            process.kill()
