"""One command under a time limit: its output in a log, and nothing of it left running, however this process ends.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.utility.grid import REPOSITORY
from common.errors import StorageError

_POLL_SECONDS = 0.2
_TICK_SECONDS = 5.0
_GRACE_SECONDS = 30.0  # an interrupted run saves its state and ends its engine
_LEFTOVER_SECONDS = 3.0  # what a command that has ended left behind


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or None where the limit was reached."""

    code: int | None
    seconds: float


def run_limited(
    command: Sequence[str], *, log: Path, limit_seconds: float, tick: Callable[[float], None], keep: Sequence[int] = ()
) -> Ended:
    """Run a command from the repository, in a process group of its own.

    Args:
        log: its output is added here.
        limit_seconds: after that its whole group is ended: asked first, then made to.
        tick: called with the seconds so far, every few seconds and at the end.
        keep: file descriptors that the command holds open too.

    Raises:
        StorageError: the log or the command cannot be opened.
        KeyboardInterrupt: passed on, after the group has ended.
    """
    began = time.monotonic()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=REPOSITORY,
                start_new_session=True, pass_fds=tuple(keep),
            )  # fmt: skip
    except OSError as error:
        raise StorageError(f"cannot be started ({error.strerror})", where=command[0]) from error
    ticked = began
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now - began >= limit_seconds:
                return Ended(None, now - began)
            if now - ticked >= _TICK_SECONDS:
                tick(now - began)
                ticked = now
            time.sleep(_POLL_SECONDS)
        return Ended(process.returncode, time.monotonic() - began)
    finally:
        _end_group(process, _GRACE_SECONDS if process.poll() is None else _LEFTOVER_SECONDS)
        tick(time.monotonic() - began)


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End what is left of the command's group; the group has the number of its first process."""
    for number, wait in ((signal.SIGINT, grace), (signal.SIGTERM, grace / 6), (signal.SIGKILL, grace / 6)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        except PermissionError:  # macOS says so of a group of which only the ended are left
            break
        until = time.monotonic() + wait
        while time.monotonic() < until and _alive(process):
            time.sleep(_POLL_SECONDS / 4)
    process.poll()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # takes the ended one off the list, or its group would look alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
