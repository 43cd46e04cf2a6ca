"""The utility benchmark, small, on real images: from the command to the table, and nothing twice."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.utility.grid import quick_grid
from benchmarks.utility.results import load
from support.paths import REPOSITORY, SHARED_DATA, real_data


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quick_benchmark_ends_in_ten_minutes_and_runs_nothing_twice(tmp_path):
    real_data("pneumoniamnist.npz")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.utility.run", "--quick", "--data", str(SHARED_DATA), "--out", str(out)]

    def bench() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=1400)

    began = time.monotonic()
    first = bench()
    assert first.returncode == 0, first.stderr
    assert time.monotonic() - began < 600
    results, broken = load(out / "results.csv")
    assert [(r.recipe, r.status) for r in results] == [(row.recipe, "ok") for row in quick_grid()] and not broken
    for result in results:
        assert result.epsilon_spent is not None and 0 < result.epsilon_spent <= result.epsilon
        for name in ("test_auc", "test_f1", "val_auc", "released_auc", "coverage", "recall", "two_sample"):
            assert 0 <= getattr(result, name) <= 1, name
        assert result.kid is not None and result.floor_kid is not None and result.floor_kid < result.kid
        assert result.real_auc is not None and result.real_auc > 0.8
    readme = (out / "README.md").read_text()
    assert readme.count("| default |") >= 2 and "pneumoniamnist-sheet.png" in readme

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "pneumonia-" in str(path)}
    second = bench()
    assert second.returncode == 0 and second.stderr.count("done before") == len(results), second.stderr
    assert load(out / "results.csv")[0] == results
    assert {path: path.stat().st_mtime_ns for path in before} == before
