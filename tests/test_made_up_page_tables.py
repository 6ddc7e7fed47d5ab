"""Whatever is in page tables is counted as sets would: made-up ones, of other machines, too."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import reference
from conftest import KIB, has_no_differences, inside
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from made_up import FIRST_PID, KINDS, Area, MadeUp

import memuse

pytestmark = pytest.mark.usefixtures("few_are_wrong")

# Page size in KiB, and pages in a PMD-mapped huge page: x86-64, s390x, arm64 with 16 and with
# 64 KiB, ppc64el (radix), and a kernel without huge pages.
MACHINES = [(4, 512), (4, 256), (16, 2048), (64, 8192), (64, 32), (4, 0)]
COUNTED = "pid,frames,unique,size,tree,freed,anon,shmem,file,swap"


def depth_first(machine: MadeUp) -> list[int]:
    """All PIDs in the order of the rows."""

    def below(pid: int) -> list[int]:
        children = [each for each, memory in machine.memories.items() if memory.parent == pid]
        return [pid, *(found for child in children for found in below(child))]

    return below(FIRST_PID)


def check(machine: MadeUp, with_outsiders: bool = True, about: str = "any page tables") -> None:
    """memuse's report equals the reference on the same page tables; else a table of what differs.

    A process that vanishes has no row, and one whose page tables are torn has no figures.
    """
    reading = machine.finish(with_outsiders)
    expected = reading.count(depth_first(machine))
    gone = set(machine.vanishing.values())
    expected["rows"] = [row for row in expected["rows"] if row["pid"] not in gone]
    for row in expected["rows"]:
        if row["pid"] in machine.torn:
            row.update(dict.fromkeys(row.keys() - {"pid"}))
    result = inside(machine, "--json", "-o", COUNTED, FIRST_PID)
    assert "Traceback" not in result.stderr
    assert result.returncode == bool(machine.torn)
    assert bool(result.stderr) == bool(machine.torn | gone)
    report = json.loads(result.stdout)
    table = reference.differences(report, expected)
    kind = f"{machine.page_size // KIB} KiB pages, {machine.pmd_pages} in a huge page"
    has_no_differences(f"made up: {about}; {kind}, {machine.byteorder}-endian", table)
    assert {left_out["pid"] for left_out in report["skipped"]} == machine.torn


# ---- Each kind of entry ---------------------------------------------------------

ABOUT = {
    "private": "exclusive anonymous pages: counted, and freed with their process?",
    "shared": "copy-on-write pages: counted once?",
    "file": "pages of a file: counted once?",
    "file_alone": "pages of a file that are mapped once: file, not private anonymous memory?",
    "zero": "zero page counted?",
    "huge_zero": "huge zero page counted?",
    "device": "a device's memory counted?",
    "swap": "swap slots of all types: the same offset in two types taken for one?",
    "marker": "migration, poison and other markers counted as swap?",
    "guard": "guard pages counted as swap?",
    "huge": "huge page: counted as a whole?",
    "part": "part of a huge page: counted once, and what nobody maps in TREE and FREED?",
    "folio": "parts of multi-size huge pages: what nobody maps in TREE and FREED?",
    "huge_file": "huge page of a file: counted once?",
    "huge_untold": "huge page of a file, of which its entries do not tell: file, counted once?",
}


@pytest.mark.parametrize("kind", ABOUT)
def test_each_kind_of_entry(kind: str, tmp_path: Path) -> None:
    """A process, its child that has some of the same, and a child of that with all of it."""
    machine = MadeUp(tmp_path)
    machine.add([(True, 10, [(kind, 40, 0)]), (False, 900, [(kind, 400, 3)])])
    machine.add([(True, 30, [(kind, 20, 20)]), (False, 900, [(kind, 200, 103)])], FIRST_PID)
    machine.add([(True, 10, [(kind, 40, 0)]), (False, 900, [(kind, 400, 3)])], FIRST_PID + 1)
    check(machine, about=ABOUT[kind])


@pytest.mark.parametrize("kind", ["shared", "file", "swap", "device"])
def test_pages_that_lie_far_apart(kind: str, tmp_path: Path) -> None:
    """Their entries are packed, in a file's mapping and elsewhere; a child has those between."""
    far = [(kind, 1, 0), ("nothing", 200, 0), (kind, 1, 201), ("nothing", 190, 0), (kind, 1, 392)]
    machine = MadeUp(tmp_path)
    machine.add([(True, 10, far), (False, 900, far)])
    machine.add([(True, 10, [(kind, 400, 0)]), (False, 893, [(kind, 400, 0)])], FIRST_PID)
    machine.add([(True, 10, far), (False, 900, far)], FIRST_PID + 1)
    check(machine, about="pages far apart: their entries taken for those of others?")


def test_a_drivers_memory_far_above_all_other_takes_no_address_space(tmp_path: Path) -> None:
    """Nor a look at all that is below it: only frames that are counted have marks."""
    machine = MadeUp(tmp_path, pmd_pages=0)
    machine.add([(True, 0, [("high_device", 40, 0), ("shared", 20, 0)])])
    machine.add([(True, 0, [("high_device", 40, 0), ("shared", 20, 0)])], FIRST_PID)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), limits[1]))
    try:
        check(machine, about="a driver's memory at 64 TiB counted?")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_frame_twice_in_a_part_that_is_new(tmp_path: Path) -> None:
    """Its second page is met while the first one is entered."""
    machine = MadeUp(tmp_path)
    machine.add([(False, 0, [("shared", 40, 0), ("shared", 1, 7), ("shared", 20, 50)])])
    machine.add([(False, 0, [("shared", 40, 0), ("shared", 1, 7)])], FIRST_PID)
    check(machine, about="a frame that one process has at two neighbouring pages: counted twice?")


@pytest.mark.parametrize(("kib", "pmd_pages"), [(64, 32), (4, 256)])
def test_the_size_of_huge_pages_is_the_kernels(kib: int, pmd_pages: int, tmp_path: Path) -> None:
    """Not the page size's square over 8: 2 MiB of 64 KiB pages, 1 MiB of 4 KiB pages.

    Else the huge zero page would be counted, and the exclusive bit be believed of pages that
    others have.  The first PFN of a huge page of 32 pages need not end in eight zero bits.
    """
    machine = MadeUp(tmp_path, kib * KIB, "little", pmd_pages)
    machine.add([(False, 0, [("huge_zero", 1, 0), ("huge", 1, 1), ("huge", 1, 2)])])
    machine.add([(False, 0, [("part", pmd_pages // 2, 1), ("part", 3, 2)])], FIRST_PID)
    machine.add([(False, 0, [("huge_zero", 1, 0), ("huge", 1, 3)])], FIRST_PID)
    check(machine, about="exclusive bit of huge pages believed, or the huge zero page counted?")


def test_frames_that_are_used_anew_between_two_processes(tmp_path: Path) -> None:
    """Freed as pages of a file once one process is read, and anonymous memory of the next."""
    machine = MadeUp(tmp_path)
    machine.add([(True, 0, [("file", 100, 0)])])
    machine.add([(False, 0, [("anew", 50, 20), ("nothing", 3000, 0), ("anew", 3, 80)])], FIRST_PID)
    machine.finish()
    result = inside(machine, "--json", "-o", "frames,anon,file,freed", FIRST_PID)
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(result.stdout)["processes"]
    page = machine.page_size
    assert [(row["file"] / page, row["anon"] / page) for row in rows] == [(100, 9), (0, 53 + 9)]


def test_a_number_of_zero_is_one_as_any_other(tmp_path: Path) -> None:
    """The highest of a Block's pages has swap slot 0, which another process has elsewhere."""
    machine = MadeUp(tmp_path)
    machine.add([(False, 0, [("swap_down", 20, 0)])])
    machine.add([(False, 9, [("swap_down", 20, 0)])], FIRST_PID)
    check(machine, about="slot 0 taken for none?")


class Late(MadeUp):
    """One in which processes call exec, or exit, once all of them is read."""

    execs: frozenset[int] = frozenset()

    def read(
        self, path: str, directory: memuse.Descriptor | None = None, at_most: int = -1
    ) -> bytes:
        pid = int(os.path.basename(directory.path)) if directory is not None else 0
        if path == "stat" and pid in self.execs.union(self.vanishing.values()):
            if pid in self.vanishing.values():
                shutil.rmtree(self.root / str(pid))
            self.execs -= {pid}
            raise ProcessLookupError
        return super().read(path, directory, at_most)


class Splitting(MadeUp):
    """One that splits all huge pages once their mapcounts were read."""

    def words(self, fd: memuse.Descriptor, first: int, number: int) -> bytes:
        words = super().words(fd, first, number)
        if fd.path.endswith("kpagecount"):
            (self.root / "kpageflags").write_bytes(bytes(1 << 16))
        return words


def test_a_huge_page_that_is_split_meanwhile_holds_nothing_more(tmp_path: Path) -> None:
    machine = Splitting(tmp_path)
    machine.add([(False, 0, [("part", 100, 0)])])
    machine.finish()
    result = inside(machine, "--json", "-o", "size,tree,freed", FIRST_PID)
    total = json.loads(result.stdout)["total"]
    assert total["tree"] == total["freed"] == total["size"]


def test_a_process_that_is_read_again_is_not_its_own_sibling(tmp_path: Path) -> None:
    machine = Late(tmp_path)
    machine.add(OTHER_PAGES[0])
    machine.execs = frozenset({machine.add(OTHER_PAGES[1], FIRST_PID)})
    check(machine, about="mappings left out, as if they were another's, too?")
    assert not machine.execs


def test_siblings_of_one_that_exits_while_it_is_read(tmp_path: Path) -> None:
    machine = Late(tmp_path)
    machine.add(OTHER_PAGES[0])
    machine.vanishing = {0: machine.add_twin(FIRST_PID, FIRST_PID)}
    machine.add_twin(FIRST_PID, FIRST_PID)
    check(machine, about="address space not known again?")


# ---- Any page tables ------------------------------------------------------------

runs = st.tuples(st.sampled_from(KINDS.split()), st.integers(1, 700), st.integers(0, 600))
areas = st.tuples(st.booleans(), st.integers(0, 600), st.lists(runs, min_size=1, max_size=6))
processes = st.lists(st.lists(areas, min_size=1, max_size=4), min_size=1, max_size=6)
patches = st.fixed_dictionaries(
    {},
    optional={
        "SPAN": st.sampled_from([96, 512, 1536]),
        "FEW": st.sampled_from([0, 3]),
        "MAX_ROWS": st.sampled_from([1, 2]),
        "LANES": st.sampled_from([256, 1000]),
    },
)
CHAIN, FAN, TWO_BRANCHES = [0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 1, 0, 3, 3]


def case(made: list[list[Area]], **others: Any) -> Any:
    """An example: a chain of processes, on x86-64, unless others than the usual are given."""
    usual: dict[str, Any] = {"parents": CHAIN, "twins": set(), "fates": {}, "machine": (4, 512)}
    usual |= {"byteorder": "little", "outsiders": False, "patches": {}}
    return example(made=made, **{**usual, **others})


# Examples are not made smaller: that takes minutes, and the tests above are small.
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(
    made=processes,
    parents=st.one_of(
        st.sampled_from([CHAIN, FAN, TWO_BRANCHES]),
        st.tuples(*(st.integers(0, i) for i in range(5))).map(list),
    ),
    twins=st.sets(st.integers(2, 5), max_size=2),
    fates=st.dictionaries(st.integers(1, 5), st.sampled_from(["torn", "vanish"]), max_size=1),
    machine=st.sampled_from(MACHINES),
    byteorder=st.sampled_from(["little", "big"]),
    outsiders=st.booleans(),
    patches=patches,
)
@case(
    [
        [(False, 0, [("huge", 1, 0), ("private", 5, 0), ("swap", 30, 2)])],
        [(False, 0, [("part", 400, 8), ("part", 400, 16)]), (True, 3, [("device", 9, 1)])],
    ],
)
@case(  # one that vanishes when some of it was read, and had much and part of it new
    [
        [(False, 0, [("shared", 100, 0), ("private", 1, 0)])],
        [(False, 0, [("shared", 3300, 0)])],
        [(False, 0, [("shared", 3300, 0)]), (True, 0, [("file", 40, 0)])],
        [(False, 9, [("shared", 3300, 0)])],
    ],
    parents=FAN,
    fates={1: "vanish"},
    patches={"SPAN": 512},
)
@case(
    [
        [(False, 0, [("shared", 100, 0)])],
        [(False, 0, [("shared", 50, 200), ("huge", 1, 0), ("private", 3300, 0)])],
        [(False, 0, [("shared", 50, 200), ("part", 300, 0)])],
        [(False, 0, [("part", 300, 0), ("shared", 50, 200)])],
    ],
    fates={1: "torn"},
    outsiders=True,
)
@case(  # the same with pages that are too few for a Block
    [
        [(False, 0, [("shared", 5, 0), ("private", 1, 0)])],
        [(False, 0, [("shared", 9, 0), ("swap", 30, 0)])],
        [(False, 0, [("shared", 300, 3), ("swap", 30, 0)])],
        [(False, 0, [("shared", 9, 0), ("nothing", 9, 0), ("shared", 9, 5), ("swap", 20, 9)])],
    ],
    fates={1: "torn"},
    outsiders=True,
)
def test_any_entries_are_counted_as_sets_would(
    made: list[list[Area]],
    parents: list[int],
    twins: set[int],
    fates: dict[int, str],
    machine: tuple[int, int],
    byteorder: str,
    outsiders: bool,
    patches: dict[str, int],
) -> None:
    """In trees of any shape, and wherever the portions end in which page tables are read.

    Process i is below `parents[i - 1]`; twins share the address space of the one before them.
    """
    kib, pmd_pages = machine
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        made_up = MadeUp(Path(directory), kib * KIB, byteorder, pmd_pages)
        for i, content in enumerate(made):
            parent = FIRST_PID + parents[i - 1] if i else None
            if parent and i in twins and not fates.keys() & {i - 1, i}:
                made_up.add_twin(FIRST_PID + i - 1, parent)
            else:
                made_up.add(content, parent, fates.get(i, ""))
        for name, value in patches.items():
            patch.setattr(memuse, name, value)
        check(made_up, outsiders)


# ---- Machines that are not here -------------------------------------------------

OTHER_PAGES: list[list[Area]] = [
    [
        (False, 7, [("private", 701, 0), ("shared", 997, 3), ("zero", 300, 0), ("swap", 211, 5)]),
        (True, 100, [("file", 500, 11), ("shared", 40, 900), ("device", 30, 0)]),
        (False, 0, [("huge", 1, 1), ("huge_zero", 1, 0), ("guard", 20, 0)]),
    ],
    [
        (False, 7, [("nothing", 701, 0), ("shared", 997, 3), ("part", 20, 9), ("swap", 99, 80)]),
        (True, 100, [("file", 600, 100), ("file_alone", 70, 0), ("marker", 100, 0)]),
    ],
    [(False, 7, [("huge", 1, 2), ("shared", 300, 3)])],
]


@pytest.mark.parametrize(("kib", "pmd_pages"), MACHINES)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_page_sizes_huge_page_sizes_and_byte_orders(
    kib: int, pmd_pages: int, byteorder: str, tmp_path: Path
) -> None:
    machine = MadeUp(tmp_path, kib * KIB, byteorder, pmd_pages)
    machine.add(OTHER_PAGES[0])
    machine.add(OTHER_PAGES[1], FIRST_PID)
    machine.add(OTHER_PAGES[2], FIRST_PID + 1)
    machine.add_twin(FIRST_PID + 2, FIRST_PID)
    check(machine)
    report = json.loads(inside(machine, "--json", FIRST_PID, "-o", "pid,swap").stdout)
    assert report["page_size"] == kib * KIB


# ---- Numbers that are greater than what holds them ------------------------------


def test_a_page_that_is_mapped_more_often_than_two_bytes_tell(tmp_path: Path) -> None:
    """33,000 times by one process; and 300 times by others."""
    machine = MadeUp(tmp_path)
    machine.add([(True, 1, [("file", 1, 0)])] * 33_000)
    machine.add([(True, 1, [("file", 20, 0)])] * 300, FIRST_PID)
    machine.add([(True, 1, [("file", 20, 0)])] * 254, FIRST_PID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memuse, "FEW", 0)
        check(machine, with_outsiders=False, about="thousands of mappings lost?")


@pytest.mark.parametrize("rows", [17, 256, 300])
def test_a_group_of_pages_that_many_rows_have_at_random(rows: int, tmp_path: Path) -> None:
    """More than are kept for a group: as many more as the numbers of their rows go on."""
    machine = MadeUp(tmp_path)
    machine.add([(False, 0, [("shared", 60, 0)])])
    for number in range(1, rows):
        first = number * 7 % 50
        run = [("nothing", first, 0), ("shared", 60 - first, first)]
        machine.add([(False, 0, run)], FIRST_PID + (number // 3 if number % 2 else 0))
    check(machine, about="first and last rows of frames that many rows have?")
