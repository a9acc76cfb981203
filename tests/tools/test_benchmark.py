"""The benchmark runs, and its contenders compute the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_operators_agree_and_every_column_is_filled(repository: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory on a CPU is read from Linux's /proc")
    command = [sys.executable, "tools/benchmark.py", "op", "--threads", "1"]
    command += ["--height", "256", "--width", "256", "--repeats", "1"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    headings, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {"PyTorch (grid_sample)", "PyTorch, all samples at once"} <= {row[0] for row in rows}
    for row in rows:
        assert len(row) == len(headings) and all(row)
        assert all(float(difference) < 1e-5 for difference in row[1].split(", ")), row
        for cell in row[2:]:
            number, unit, gain = cell.split()
            assert float(number) > 0 and unit in ("ms", "MiB") and gain.endswith("x)"), row
