"""Processes of other users of the machine, where the tests run as root: site, carrier and coordinator, each its own.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from support.paths import REPOSITORY

SITE, CARRIER, COORDINATOR, SHARED = 61001, 61002, 61004, 61003  # uids, and the socket's group; nobody here has them
_PACKAGES = [REPOSITORY, Path(sysconfig.get_path("purelib"))]


def _open_to_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in path.parents)


def interpreter() -> str | None:
    """One of this version that other users may run."""
    own, system = Path(sys.executable).resolve(), Path(f"/usr/bin/python3.{sys.version_info.minor}")
    return next((str(python) for python in (own, system) if python.exists() and _open_to_all(python)), None)


def why_not() -> str:
    """Why other users cannot run this code here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root, to become other users"
    if interpreter() is None or not all(map(_open_to_all, _PACKAGES)):
        return "interpreter and packages lie in folders that others cannot enter"
    return ""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user with that home, who finds what is installed here and nothing of root's."""
    packages = os.pathsep.join(map(str, _PACKAGES))
    own = {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "HOME": str(home), **more}
    theirs = ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "FLWR_HOME", "TMPDIR")
    return {name: value for name, value in os.environ.items() if name not in theirs} | own


def start(
    uid: int, *command: object, env: Mapping[str, str], cwd: Path | str, groups: Iterable[int] = (), **options: Any
) -> subprocess.Popen[bytes]:
    """Python of `interpreter` as another user, its output in pipes."""
    python = interpreter()
    assert python is not None
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [python, *map(str, command)], user=uid, group=uid, extra_groups=list(groups), env=dict(env), cwd=cwd,
        umask=0o022, **pipes,
    )  # fmt: skip


def owners(folder: Path) -> set[int]:
    """Whose the files below a folder are."""
    return {path.lstat().st_uid for path in folder.rglob("*")}
