"""What every test has in common: a quiet Flower with a home of its own, repeatable hypothesis, markers by folder.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

_LONGEST_TMPDIR = 20

# A socket's path has 107 characters at most, and pytest's own folders need half of them. What the tests start still
# sees TMPDIR as it is.
if len(tempfile.gettempdir()) > _LONGEST_TMPDIR:
    tempfile.tempdir = "/tmp"

# Before anything imports flwr: it reads these once, and would else write into the home of whoever runs the tests.
_FLOWER_HOME = tempfile.mkdtemp(prefix="synthward-flower-")
atexit.register(shutil.rmtree, _FLOWER_HOME, ignore_errors=True)
os.environ |= {
    "FLWR_HOME": _FLOWER_HOME,
    "XDG_STATE_HOME": _FLOWER_HOME,  # the list of this machine's ledgers (`client/registry.py`)
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "UV_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

settings.register_profile("synthward", deadline=None, derandomize=True, database=None)
settings.load_profile("synthward")

_SUITES = ("integration", "statistical", "e2e")


@pytest.fixture(autouse=True)
def _own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is a machine of its own, on which there is no ledger yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "machine"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: more threads only wait for each other, above all on busy machines."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test in tests/integration is an integration test, and so on."""
    here = Path(__file__).parent
    for item in items:
        suite = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if suite in _SUITES:
            item.add_marker(suite)
