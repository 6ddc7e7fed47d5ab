"""The benchmark runs; what it measures is for its own readers."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT, needs_root


@needs_root
def test_smoke() -> None:
    command = [sys.executable, str(ROOT / "tests/bench.py"), "--smoke"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    firsts = [line.split("|")[1].strip() for line in result.stdout.splitlines() if "|" in line]
    for name in ("fork", "vmas", "sparse", "startup", "memuse", "gentle"):
        assert name in firsts
