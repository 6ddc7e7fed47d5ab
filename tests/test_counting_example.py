"""The example that stands before the counting in memuse.py: each state that it tells."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

import memuse
from memuse import NOBODY, SINGLE, YES, Ledger, Part, Tree, Visit

PAGES = {
    1: [10, 11, 12, 13, 14, 15],
    2: [10, 11, 12, 23, 14, 15],
    3: [10, 11, 12, 13, 0, 14],
}
KPAGECOUNT = {10: 3, 11: 3, 12: 4, 13: 2, 14: 3, 15: 2, 23: 1}


@pytest.fixture(autouse=True)
def blocks_of_few_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memuse, "FEW", 0)
        yield


def visited(ledger: Ledger, row: int) -> Visit:
    chosen = bytes(YES * bool(pfn) for pfn in PAGES[row])
    part = Part(None, 0, struct.pack("<6Q", *PAGES[row]), chosen)
    visit = Visit(row, NOBODY, by_mapcount=True)
    ledger.count(visit, [part])
    return visit


def lanes(rows: dict[int, int]) -> dict[int, list[int]]:
    """By row, which of the six lanes are chosen; of rows that have any."""
    chosen = {row: [i for i in range(6) if lanes >> 8 * i & YES] for row, lanes in rows.items()}
    return {row: some for row, some in chosen.items() if some}


def record(ledger: Ledger, pfn: int) -> tuple[int, ...]:
    at = pfn % memuse.SINGLES * 3
    return tuple(ledger.singles[pfn // memuse.SINGLES][at : at + 3])


def test_the_example_of_the_counting() -> None:
    ledger = Ledger(Tree([0, 0, 1, 1]))

    visit = visited(ledger, 1)
    (block,) = ledger.blocks.values()
    assert {ledger.marks[pfn] for pfn in PAGES[1]} == {block.mark} == {3}
    assert lanes(block.first) == lanes(block.last) == {1: [0, 1, 2, 3, 4, 5]}
    assert (ledger.own[1], ledger.new[1], visit.seen) == (6, 6, {})  # `new` is seen[NOBODY]

    visit = visited(ledger, 2)
    assert lanes(block.first) == {1: [0, 1, 2, 3, 4, 5]}
    assert lanes(block.last) == {1: [3], 2: [0, 1, 2, 4, 5]}
    assert (ledger.marks[23], record(ledger, 23)) == (SINGLE, (2, 2, 1))
    assert (ledger.own[2], ledger.new[2], visit.seen) == (6, 1, {1: 5})

    visit = visited(ledger, 3)
    assert visit.astray == [14]
    assert (ledger.blocks, ledger.dissolved) == ({}, {(None, 0)})
    assert {ledger.marks[pfn] for pfn in KPAGECOUNT} == {SINGLE}
    records = {pfn: record(ledger, pfn) for pfn in KPAGECOUNT}
    assert records == {
        **dict.fromkeys([10, 11, 12, 14], (1, 3, 3)),
        **{13: (1, 3, 2), 15: (1, 2, 2), 23: (2, 2, 1)},
    }
    assert (ledger.own[3], ledger.new[3], visit.seen) == (5, 0, {1: 1, 2: 4})

    mapcounts = memoryview(bytearray(4 * 32)).cast("I")
    for pfn, times in KPAGECOUNT.items():
        mapcounts[pfn] = times
    ledger.add_up(mapcounts)
    assert ledger.own == [7, 6, 6, 5]
    assert ledger.new == [7, 6, 1, 0]
    assert ledger.of_tree == [7, 7, 6, 5]
    assert ledger.freed == [6, 6, 1, 0]
