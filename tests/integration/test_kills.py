"""A site that is killed at any moment has never spent more than its ledger says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.paths import REPOSITORY


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_no_kill_hides_a_loss(kills):
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "kills.py"), str(kills)], capture_output=True, text=True,
        check=False, timeout=800,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "under_counts=0" in result.stdout
    assert "unfinished=0" not in result.stdout  # some kills did hit the middle of an answer
    assert "answered=0" not in result.stdout
