"""Memory that is an inode's: its figures by a slow and obvious count, and what killing gives."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
import reference
import scenes
from conftest import (
    has_no_differences,
    kill,
    measured_apart,
    needs_root,
    ready,
    reported,
    run_memuse,
    simulated,
    standing,
    state_of,
    wait_for,
)
from reference import PAGE
from test_exact import compare_parts

pytestmark = [needs_root, pytest.mark.usefixtures("few_are_wrong")]
Build = Callable[..., int]


# The kernel maps up to 16 pages around one that is touched; scenes touch a few ranges each.
FAULTED_AROUND = 64


class Held(NamedTuple):
    beyond: int  # pages that no page table has, at least
    setting: str = ""  # of the kernel, a fixture of conftest.py


HELD = {
    "shared_filled": Held(2900 + 2200),
    "memfd_windows": Held(1700 + 1200),
    "memfd_strewn": Held(0),
    "memfd_open": Held(1024 + 2048 + 1536),
    "memfd_open_above": Held(1000 + 500),
    "memfd_private": Held(1000 + 1024),
    "memfd_of_sisters": Held(200 + 600 + 2048),
    "memfd_of_twins": Held(1400 + 1536 + 500),
    "memfd_of_thread": Held(1300),
    "memfd_huge": Held(4 * 512, "hugetlb"),
    "memfd_swapped": Held(0, "swap"),
    "sysv_removed": Held(1200 + 1900),
    "sysv_kept": Held(900),
    "sysv_elsewhere": Held(400 + 1100),
    "tmpfs_files": Held(0),
    "disk_files": Held(0),
    "mounted": Held(1900 + 1536 + 800),
    "mounted_elsewhere": Held(1024 + 512 + 1436 + 1848),
}


@pytest.mark.parametrize("name", HELD)
def test_scene(name: str, scene: Build, request: pytest.FixtureRequest) -> None:
    held = HELD[name]
    if held.setting:
        request.getfixturevalue(held.setting)
    total = compare_parts(name, scene(name))["total"]
    assert total["tree"] - total["size"] >= (held.beyond - FAULTED_AROUND) * PAGE


# ---- Killing --------------------------------------------------------------------

# Scenes, and which branches of them are killed: 0 is the whole, 1 the first child with what is
# below it.  Whose end has a file removed, or a segment, is not killed as a whole.
KILLED = {
    **{name: [0, 1, 2] for name in ("shared_filled", "memfd_windows", "memfd_open")},
    **{name: [0, 1, 2] for name in ("memfd_open_above", "memfd_private", "memfd_of_sisters")},
    **{name: [0, 1, 2] for name in ("sysv_removed", "sysv_elsewhere", "mounted", "memfd_huge")},
    "mounted_elsewhere": [0, 1, 2],
    **{name: [1, 2] for name in ("sysv_kept", "tmpfs_files", "disk_files")},
    **{name: [0, 1] for name in ("memfd_of_twins", "memfd_of_thread", "memfd_swapped")},
    **{name: [0, 1] for name in ("forked", "cousins", "lopsided")},
}
ENOUGH = (512 << 10) // PAGE


@pytest.mark.parametrize(
    ("name", "branch"), [(name, branch) for name in KILLED for branch in KILLED[name]]
)
def test_what_is_freed_comes_free(name: str, branch: int, request: pytest.FixtureRequest) -> None:
    """Anonymous memory and page cache fall by FREED, or the free hugetlb pages grow by it."""
    setting = HELD[name].setting if name in HELD else ""
    if setting:
        request.getfixturevalue(setting)
    occupied = hugetlb_pages if name == "memfd_huge" else pages_in_use
    table = ["    FREED CAME FREE DIFFERENCE"]
    for _ in range(5):  # others come and go on this machine
        with standing(name) as root:
            said, came = killed(root, branch, occupied)
        if abs(said - came) <= ENOUGH:
            return
        table.append(f"{said:>9} {came:>9} {came - said:>+10}")
    has_no_differences(f"scene {name}: {scenes.about(name)}\nFREED of {branch} is wrong:", table)


@pytest.mark.parametrize("branch", [0, 1])
def test_huge_pages_that_are_partly_mapped_come_free_whole(branch: int, thp: None) -> None:
    """Free memory, which many move, grows by FREED, of which nobody maps two thirds."""
    table = ["    FREED CAME FREE DIFFERENCE"]
    for _ in range(5):
        with standing("emptied 8") as root:
            said, came = killed(root, branch, pages_not_free)
        assert said > 20000
        if abs(said - came) <= said // 20:
            return
        table.append(f"{said:>9} {came:>9} {came - said:>+10}")
    has_no_differences(f"huge pages, of which parts are left: FREED of {branch} is wrong:", table)


def killed(root: int, branch: int, occupied: Callable[[], int]) -> tuple[int, int]:
    """FREED of a scene's branch, in pages, and what came free when it was killed."""
    pids = reference.tree(root)
    rows = {row["pid"]: row for row in measured_apart(root)["processes"]}
    top = [root, *(pid for pid in pids if rows[pid]["ppid"] == root)][branch]
    end = reference.tree(top)
    said: int = rows[top]["freed"] // PAGE
    if occupied == hugetlb_pages:
        reading = reference.read(pids)
        alone = reading.mapped_alone(set(end), set(pids))
        said -= len(alone & reading.together("anon", set(end)))
    os.sync()
    before = once_quiet(occupied)
    for pid in end:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(state_of(pid) in "ZX" for pid in end))
    came = before - occupied()
    if abs(said - came) > ENOUGH:
        time.sleep(0.05)  # namespaces end a little later
        came = before - occupied()
    return said, came


def once_quiet(occupied: Callable[[], int]) -> int:
    """As many as there are when for a moment nobody takes or frees much."""
    for _ in range(100):
        before = occupied()
        time.sleep(0.05)
        after = occupied()
        if abs(after - before) < ENOUGH // 8:
            break
    return after


def pages_in_use() -> int:
    """Pages of anonymous memory, of shared memory, and of files in the page cache.

    What has been swapped out may still be in memory for a while, as swap cache.
    """
    Path("/proc/sys/vm/stat_refresh").write_text("1")
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    of_swap = int(counts.get("nr_swapcached", 0))
    return int(counts["nr_anon_pages"]) + int(counts["nr_file_pages"]) - of_swap


def hugetlb_pages() -> int:
    meminfo = Path("/proc/meminfo").read_text()
    number, free, kib = (
        int(re.findall(rf"{name}: +(\d+)", meminfo)[0])
        for name in ("HugePages_Total", "HugePages_Free", "Hugepagesize")
    )
    return (number - free) * kib * 1024 // PAGE


def pages_not_free() -> int:
    """But for the page cache: the pages of a huge page that nobody maps are among them.

    What waits in the processors' lists is free, too.  compact_memory would empty these, and split
    huge pages that are partly mapped.
    """
    Path("/proc/sys/vm/stat_refresh").write_text("1")
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    lists = re.findall(r"^ +count: +(\d+)$", Path("/proc/zoneinfo").read_text(), re.M)
    return -int(counts["nr_free_pages"]) - sum(map(int, lists)) - int(counts["nr_file_pages"])


@pytest.mark.parametrize("how", ["in_flight", "ring_of_file", "ring_of_memory"])
@pytest.mark.parametrize("branch", [0, 1])
def test_what_only_the_kernel_holds_is_taken_for_freed(how: str, branch: int) -> None:
    """A limit: /proc does not tell who has it so.  It comes free when that process ends, too."""
    stays = [0, 1536][branch]
    table = ["    FREED CAME FREE EXPECTED"]
    for _ in range(5):
        with standing(f"unseen {how}") as root:
            said, came = killed(root, branch, pages_in_use)
            came -= pinned(root)  # which is in no page cache any more
        if abs(said - stays - came) <= ENOUGH:
            return
        table.append(f"{said:>9} {came:>9} {said - stays:>8}")
    has_no_differences(f"memfd {how}: of FREED of {branch}, {stays} pages should stay:", table)


def pinned(pid: int) -> int:
    """The pages that a process has pinned, in page tables or not."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kib) * 1024 // PAGE for kib in re.findall(r"VmPin:\s+(\d+)", status))


def test_a_segment_that_ends_with_its_last_attachment_is_freed(scene: Build) -> None:
    pid = scene("sysv_forced")
    prefix = ["nsenter", f"--ipc=/proc/{pid}/ns/ipc"]
    report = reported(run_memuse("--json", pid, prefix=prefix))
    parent, child = (row["freed"] // PAGE for row in report["processes"])
    assert child < 2048 < parent
    before = once_quiet(pages_in_use)
    for each in report["processes"]:
        kill(each["pid"])
    wait_for(lambda: before - pages_in_use() > 2048)


# ---- What is refused, or gone ---------------------------------------------------


def test_a_refused_look_at_an_object_is_told_and_costs_that_object_alone(scene: Build) -> None:
    pid = scene("shared_filled")
    whole = measured_apart(pid)["total"]
    result = simulated("NoMapFiles EPERM", "--json", pid)
    assert result.returncode == 1
    line = r"memuse: /proc/[0-9]+/map_files/\S+: Operation not permitted \(needs CAP_SYS_ADMIN\)\n"
    assert re.fullmatch(line, result.stderr)
    total = json.loads(result.stdout)["total"]
    assert total["size"] == total["tree"] == whole["size"] < whole["tree"]
    assert total["freed"] < whole["freed"]


def test_an_object_that_is_gone_meanwhile_costs_itself_alone(scene: Build) -> None:
    pid = scene("shared_filled")
    result = simulated("NoMapFiles ENOENT", "--json", pid)
    assert (result.returncode, result.stderr) == (0, "")
    total = json.loads(result.stdout)["total"]
    assert total["size"] == total["tree"]


@pytest.mark.parametrize("name", ["disk_files", "unmounted_disk"])
def test_nothing_is_looked_at_but_memory(name: str, scene: Build, tmp_path: Path) -> None:
    """A look at a file of a network or a FUSE file system could wait for good."""
    pid = scene(name)  # which has deleted files of a disk mapped, or open
    log = tmp_path / "log"
    assert simulated(f"LooksLogged {log}", "--json", pid).returncode == 0
    assert log.read_text() == ""


# Has a file open whose path is longer than the kernel tells, and after it a memory object.
DEEP = """
import os, sys
os.chdir(sys.argv[1])
for _ in range(20):
    os.mkdir("d" * 250)
    os.chdir("d" * 250)
file = os.open("file", os.O_CREAT | os.O_RDWR)
memfd = os.memfd_create("object")
os.write(memfd, bytes(1 << 20))
print("ready", flush=True)
os.read(0, 1)
"""


def test_an_open_file_with_a_path_that_is_too_long_costs_nothing(tmp_path: Path) -> None:
    with ready(DEEP, tmp_path) as process:
        total = measured_apart(process.pid)["total"]
    assert total["tree"] - total["size"] == 1 << 20
