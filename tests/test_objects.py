"""Shared memory and files: all figures equal the reference's, and what is killed frees FREED."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
from conftest import KIB, measured_apart, needs_root, standing, wait_for
from test_exact import compare_parts

pytestmark = [needs_root, pytest.mark.usefixtures("few_are_wrong")]
Build = Callable[..., int]

SCENES = {  # with the fixture that each needs
    "shared_filled": "",
    "memfd_windows": "",
    "memfd_open": "",
    "memfd_open_above": "",
    "memfd_private": "",
    "memfd_of_sisters": "",
    "memfd_of_twins": "",
    "memfd_of_thread": "",
    "memfd_huge": "hugetlb",
    "memfd_swapped": "swap",
    "sysv_removed": "",
    "sysv_kept": "",
    "sysv_elsewhere": "",
    "tmpfs_files": "",
    "disk_files": "",
    "mounted": "",
}


@pytest.mark.parametrize("name", SCENES)
def test_scene(name: str, scene: Build, request: pytest.FixtureRequest) -> None:
    if SCENES[name]:
        request.getfixturevalue(SCENES[name])
    compare_parts(name, scene(name))


# ---- Killed ---------------------------------------------------------------------

BY_KILLING = [*({*SCENES} - {"memfd_huge", "memfd_swapped"}), "forked", "cousins", "lopsided"]
LEAVES_NAMES = {"disk_files", "sysv_kept", "tmpfs_files"}  # which are removed when all has ended


def memory_in_use() -> int:
    """Anonymous memory and page cache of the whole machine, in bytes."""
    Path("/proc/sys/vm/stat_refresh").write_text("1")
    text = Path("/proc/vmstat").read_text()
    pages = re.findall(r"^nr_(?:anon|file)_pages (\d+)$", text, re.M)
    return sum(map(int, pages)) * reference.PAGE


def has_memory(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/smaps_rollup").read_bytes() != b""
    return False


def fall_and_freed(name: str, whole: bool) -> tuple[int, int]:
    """By how much memory fell when a scene, or its first branch, was killed; and FREED of it."""
    with standing(name) as pid:
        os.sync()
        rows = measured_apart(pid)["processes"]
        top = 0 if whole else 1
        below = [rows[top]]
        for row in rows[top + 1 :]:
            if row["depth"] <= rows[top]["depth"]:
                break
            below.append(row)
        before = memory_in_use()
        for row in below:
            os.kill(row["pid"], signal.SIGKILL)
        wait_for(lambda: not any(has_memory(row["pid"]) for row in below))
        time.sleep(0.2)  # the last page is freed after the process is seen to be gone
        return before - memory_in_use(), rows[top]["freed"]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "branch"])
@pytest.mark.parametrize("name", sorted(BY_KILLING))
def test_what_is_freed_comes_free(name: str, whole: bool) -> None:
    if whole and name in LEAVES_NAMES:
        pytest.skip("what has a name is removed after it")
    tried = []
    for _ in range(6):  # others on this machine take and free memory, too
        try:
            fall, freed = fall_and_freed(name, whole)
        except IndexError:
            pytest.skip("it has no branch")
        tried.append((fall // KIB, freed // KIB))
        if abs(fall - freed) <= 512 * KIB:
            return
    pytest.fail(f"KiB that came free, and FREED: {tried}")
