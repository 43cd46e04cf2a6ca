"""Where tests find the repository and, if it is there, the real data.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("SYNTHWARD_DATA", REPOSITORY.parent / "shared" / "data"))


def real_data(name: str) -> Path:
    """Path of a real data file; skips the test, with the reason, where it is absent."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand (set SYNTHWARD_DATA to the folder that holds it)")
    return path
