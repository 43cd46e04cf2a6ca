"""A headless browser, where one is installed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page, with its own profile; skips the test where there is no Chromium.

    Its sockets lie in profile and TMPDIR, so both have short paths, whatever the tests' own is.
    """
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    with tempfile.TemporaryDirectory(prefix="sw-", dir="/tmp", ignore_cleanup_errors=True) as profile:
        return subprocess.run(
            [found, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()], capture_output=True, text=True,
            timeout=120, check=False, env={**os.environ, "TMPDIR": "/tmp"},
        )  # fmt: skip
