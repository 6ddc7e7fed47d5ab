"""The benchmark runs; what it measures is for its own readers."""

from __future__ import annotations

import sys

from conftest import TESTS, needs_root, run


@needs_root
def test_the_smoke_run_prints_its_tables() -> None:
    result = run([sys.executable, TESTS / "bench.py", "--smoke"])
    assert result.returncode == 0, result.stderr
    firsts = [line.split("|")[1].strip() for line in result.stdout.splitlines() if "|" in line]
    for name in ("fork", "vmas", "sparse", "startup", "memuse", "gentle"):
        assert name in firsts
