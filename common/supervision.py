"""Programs that are kept running: started again when they end, their words in a log that does not grow without bound.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from logging import Formatter, LogRecord
from logging.handlers import RotatingFileHandler
from pathlib import Path

import psutil

from common.errors import StorageError
from common.files import storage_error
from common.text import printable

# For every process of Flower's: it sends nothing, fetches nothing, and idle OpenMP threads sleep.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "UV_OFFLINE": "1", "OMP_WAIT_POLICY": "passive",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}  # fmt: skip
_LOG_BYTES, _LOGS = 5_000_000, 3
_FIRST_WAIT, _LONGEST_WAIT, _STEADY_SECONDS = 2.0, 30.0, 120.0
_END_SECONDS, _COUNT_SECONDS = 15.0, 5.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass(frozen=True)
class Program:
    """What is to be kept running.

    Attributes:
        name: what it is called in messages.
        command: with all its arguments; made anew for every start, since a port that was free may not be any more.
        log: where its output goes; at most 20 MB are kept.
        on_line: told each line of it.
        why: what its last lines mean to who runs it.
        restart_on: what it says when it has to be started anew, though it does not end by itself; empty for nothing.
    """

    name: str
    command: Callable[[], tuple[str, ...]]
    environment: Mapping[str, str]
    log: Path
    on_line: Callable[[str], None] = lambda _line: None
    why: Callable[[list[str]], str] = lambda lines: lines[-1] if lines else ""
    restart_on: str = ""


class Kept:
    """One program that is kept running by calls of `look`, until `end`.

    Args:
        tell: shown what happens to it, one line each.

    Raises:
        StorageError: its log cannot be written.
    """

    def __init__(self, program: Program, tell: Callable[[str], None]) -> None:
        self._program, self._tell = program, tell
        self._wait, self._next, self._began = _FIRST_WAIT, 0.0, 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._last = deque[str](maxlen=30)
        self._family, self._counted = set[psutil.Process](), 0.0
        self._spoilt = threading.Event()
        try:
            program.log.parent.mkdir(parents=True, exist_ok=True)
            self._log = RotatingFileHandler(program.log, maxBytes=_LOG_BYTES, backupCount=_LOGS, encoding="utf-8")
        except OSError as error:
            raise storage_error(error, program.log) from error
        self._log.setFormatter(Formatter("%(asctime)s %(message)s"))

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def look(self) -> None:
        """Start it where it does not run and its wait is over; longer waits where it ends again and again."""
        now = time.monotonic()
        if self._spoilt.is_set():
            self._tell(f"{self._program.name} is started anew, since it would answer no more as it is")
            self.end()
        if self._process is not None and self._process.poll() is not None:
            self._ended(now)
        if self._process is None and now >= self._next:
            self._start(now)
        if now > self._counted + _COUNT_SECONDS:
            self._count(now)

    def end(self) -> None:
        """End it and all that it has started: asked first, then at once."""
        if self._process is None:
            return
        self._count(time.monotonic())
        for number, seconds in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, _END_SECONDS)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(seconds)
        self._drop()

    def _start(self, now: float) -> None:
        program, self._began = self._program, now
        self._spoilt.clear()
        command = program.command()
        try:
            self._process = subprocess.Popen(
                command, env=dict(program.environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent, cwd="/",
            )  # fmt: skip
        except OSError as error:
            raise StorageError(f"cannot be started ({error.strerror})", where=command[0],
                               remedy="Install it.") from error  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _ended(self, now: float) -> None:
        process = self._process
        assert process is not None
        self._drop()
        if now - self._began > _STEADY_SECONDS:
            self._wait = _FIRST_WAIT
        why = printable(self._program.why([line for line in self._last if line.strip()]))[:300]
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        self._tell(f"{self._program.name} ended ({how}{': ' if why else ''}{why}); again in {self._wait:.0f} s")
        self._next, self._wait = now + self._wait, min(2 * self._wait, _LONGEST_WAIT)

    def _count(self, now: float) -> None:
        """Remember what it has started by now."""
        self._counted = now
        if self._process is not None and self._process.poll() is None:  # else its number may be another one's
            with suppress(psutil.Error):
                self._family.update(psutil.Process(self._process.pid).children(recursive=True))

    def _drop(self) -> None:
        """Let go of a process that has ended, and of what it left behind."""
        process, self._process = self._process, None
        assert process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for other in self._family:  # some of what it starts has a group of its own, and outlives it
            with suppress(psutil.Error):
                other.kill()
        self._family.clear()
        if self._reader is not None:
            self._reader.join(2)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = printable(_COLOUR.sub("", raw.decode(errors="replace").rstrip("\r\n"))).strip()
            self._last.append(line)
            self._log.handle(LogRecord(self._program.name, 20, "", 0, line, None, None))
            self._program.on_line(line)
            if self._program.restart_on and self._program.restart_on in line:
                self._spoilt.set()


def since_boot(pid: int) -> float:
    """Seconds from the machine's start to a process's: with its number that names it, also where the clock is set.

    Raises:
        psutil.Error: there is none.
    """
    return psutil.Process(pid).create_time() - psutil.boot_time()  # both move with the clock


def _die_with_parent() -> None:
    """In the child, before it begins: when whoever keeps it is killed, nothing of it stays that holds the port."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
