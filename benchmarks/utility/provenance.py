"""What a figure came from: the software's version and the machine.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

from benchmarks.utility.grid import REPOSITORY

_SOFTWARE = ("common", "client", "server")  # the study's settings have a hash of their own
_WATCHED = (*_SOFTWARE, "configs", "constraints.txt")


def code_version(root: Path = REPOSITORY) -> str:
    """Digest of the software's files as they are now.

    Not the commit: committing a result would then make every result one of an older version, and a changed file that
    is not committed would go unseen.
    """
    digest = hashlib.sha256()
    for folder in _SOFTWARE:
        for path in sorted((root / folder).rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def commit(root: Path = REPOSITORY) -> tuple[str, str]:
    """(git's HEAD, "yes" where software or configs differ from it); "unknown" outside of a clone."""
    head, changed = _git(root, "rev-parse", "--short=12", "HEAD"), _git(root, "status", "--porcelain", "--", *_WATCHED)
    return head or "unknown", "unknown" if changed is None else "yes" if changed else "no"


def hardware() -> str:
    """Processor, cores and memory, in one line."""
    return f"{_processor()}, {os.cpu_count()} cores, {_memory_gib()}{platform.system()}"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory_gib() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB, "
    except (ValueError, OSError):
        return ""
