"""Kernels and machines that are not here: the same figures, or one line on what is missing."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Callable

import pytest
import reference
import scenes
from conftest import fails, has_no_differences, inside, measured, needs_root, simulated
from made_up import FIRST_PID, FOLIO, FOLIOS, MadeUp

import memuse

pytestmark = [needs_root, pytest.mark.usefixtures("few_are_wrong")]
Build = Callable[..., int]


def compare(machine: str, name: str, pid: int) -> dict[str, Any]:
    """What is counted on another machine is what the reference counts on this one."""
    for _ in range(4):  # others on this machine map the same files
        expected = reference.count(reference.tree(pid))
        result = simulated(machine, "--json", pid)
        assert (result.returncode, result.stderr) == (0, "")
        report: dict[str, Any] = json.loads(result.stdout)
        table = reference.differences(report, expected)
        if not table:
            break
    about = f"scene {name} on {machine}: {scenes.about(name)}"
    has_no_differences(about, table)
    return report


# ---- PAGEMAP_SCAN ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero", "guarded", "forked", "file_twice", "lone_thread"])
def test_without_pagemap_scan_all_is_counted_by_reading_more(name: str, scene: Build) -> None:
    """As before Linux 6.7, of which the ioctl is unknown."""
    pid = scene(name)
    report = compare("NoScan ENOTTY", name, pid)
    with_scan = measured("-o", "pid,rss", pid)["processes"]
    assert [row["rss"] for row in report["processes"]] == [row["rss"] for row in with_scan]


@pytest.mark.parametrize("name", ["zero", "lone_thread"])
def test_a_pagemap_scan_that_refuses_its_arguments_is_done_without(name: str, scene: Build) -> None:
    compare("NoScan EINVAL", name, scene(name))


def test_without_pagemap_scan_hugetlb_pages_are_found(scene: Build, hugetlb: None) -> None:
    """They are in no RSS, by which VMAs might be chosen."""
    compare("NoScan ENOTTY", "hugetlb", scene("hugetlb"))


# ---- Byte order and page sizes --------------------------------------------------


@pytest.mark.parametrize("name", ["forked", "zero", "guarded", "huge"])
def test_words_of_the_other_byte_order_are_understood(name: str, scene: Build, thp: None) -> None:
    compare("BigEndian", name, scene(name))


def test_a_kernel_without_huge_pages_names_no_size_of_them(forked: int) -> None:
    """No hpage_pmd_size; with huge pages there, their exclusive bits could not be told."""
    compare("Refusing ENOENT hpage_pmd_size", "forked", forked)


# ---- Huge pages that are partly mapped ------------------------------------------


@pytest.mark.parametrize(
    ("statistics", "vmstat", "looked_for"),
    [
        ({16: "0", 512: "0"}, "thp_deferred_split_page 7", []),
        ({16: "2", 512: "0"}, "thp_deferred_split_page 0", [0, 1]),
        ({16: "0", 512: "2"}, "thp_deferred_split_page 0", [0]),
        ({}, "thp_deferred_split_page 0", []),  # before Linux 6.12
        ({}, "thp_deferred_split_page 7", [0]),
        ({}, "nr_free_pages 7", []),
    ],
)
def test_huge_pages_are_looked_up_where_some_may_be_partly_mapped(
    statistics: dict[int, str], vmstat: str, looked_for: list[int], tmp_path: Path
) -> None:
    machine = MadeUp(tmp_path)
    machine.add([(False, 0, [("part", 100, 0), ("folio", 30, 0)])])
    reading = machine.finish()
    pmd_sized, *multi_size = (page.unmapped for page in reading.huge_pages)
    unmapped = [pmd_sized, sum(multi_size)]
    machine.partly_mapped.unlink()
    machine.partly_mapped.parent.rmdir()
    for pages, number in statistics.items():
        machine.say_partly_mapped(pages, number)
    (tmp_path / "vmstat").write_text(f"nr_mapped 3\n{vmstat}\n")
    result = inside(machine, "--json", "-o", "size,tree,freed", FIRST_PID)
    assert (result.returncode, result.stderr) == (0, "")
    total = json.loads(result.stdout)["total"]
    beyond = (total["tree"] - total["size"]) // machine.page_size
    assert beyond == sum(unmapped[which] for which in looked_for)
    assert total["freed"] == total["tree"]


def test_neighbouring_huge_pages_are_looked_at_twice_and_not_one_by_one(tmp_path: Path) -> None:
    """All that lie where a PMD could map one: while processes are read, and at the end."""
    looks: Counter[int] = Counter()

    class Counting(MadeUp):
        def words(self, fd: memuse.Descriptor, first: int, number: int) -> bytes:
            if fd.path.endswith("kpageflags") and number == self.pmd_pages:
                looks[first] += 1
            return super().words(fd, first, number)

    machine = Counting(tmp_path)
    machine.add([(False, 0, [("folio", 10, FOLIO * at) for at in range(20)])])
    unmapped = sum(page.unmapped for page in machine.finish().huge_pages)
    result = inside(machine, "--json", "-o", "size,tree", FIRST_PID)
    total = json.loads(result.stdout)["total"]
    assert (total["tree"] - total["size"]) // machine.page_size == unmapped == 20 * 6
    assert looks[FOLIOS] == 2


# ---- What is refused, or missing ------------------------------------------------


def test_a_kernel_that_refuses_to_open_pagemap_is_told_as_a_missing_right(forked: int) -> None:
    """Linux 4.0 and 4.1 do not even open it without the capability."""
    fails(inside("Refusing EPERM pagemap", forked), "CAP_SYS_ADMIN", "sudo")


def test_a_kernel_without_user_namespaces_gets_the_same_advice(tmp_path: Path) -> None:
    class Older(MadeUp):
        def opened(self, path: str, directory: Any = None) -> Any:
            if path.endswith("kpageflags"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return super().opened(path, directory)

    machine = Older(tmp_path)
    machine.add([])
    (tmp_path / "self" / "ns").mkdir()
    (tmp_path / "self" / "ns" / "pid").symlink_to("/proc/self/ns/pid")
    fails(inside(machine, FIRST_PID), "CAP_DAC_READ_SEARCH", "run sudo")


@pytest.mark.parametrize("names", ["pagemap smaps smaps_rollup", "kpageflags", "kpagecount"])
def test_a_kernel_without_page_monitor_is_told_so(names: str, forked: int) -> None:
    machine = f"Refusing ENOENT {names}"
    fails(inside(machine, forked), "CONFIG_PROC_PAGE_MONITOR")
    free = inside(machine, "-o", "pid,command", forked)
    assert (free.returncode, free.stderr) == (0, "")
    assert free.stdout.split()[0] == "PID"


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("name", ["kpageflags", "kpagecount"])
def test_files_of_frames_that_read_empty_are_named(name: str, form: list[str], forked: int) -> None:
    line = fails(inside(f"WithoutWords {name}", *form, forked))
    assert line == f"memuse: /proc/{name} reads empty, so that no frame can be counted\n"
