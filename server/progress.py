"""What the coordinator sees while a run goes on, and the same in events.jsonl.

SPDX-License-Identifier: Apache-2.0

Lines, one per step; on a terminal also a bar at its foot for the stage that is under way.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from server.checkpoints import RunFolder


class Progress:
    """Shows steps and writes the run's events.

    Args:
        folder: where the events go.
        out: where lines are printed; standard error by default, so that standard output stays for results.
    """

    def __init__(self, folder: RunFolder, out: TextIO | None = None) -> None:
        self._folder = folder
        self._out = out or sys.stderr
        self._began: dict[str, float] = {}
        self._before: dict[str, int] = {}
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        self._bars = Bars(*columns, console=Console(file=self._out), transient=True) if self._out.isatty() else None

    def stage(self, name: str, text: str, *, done: int = 0) -> None:
        """A stage begins, or goes on after `done` of its steps."""
        self._began[name] = time.monotonic()
        self._before[name] = done
        self._line(name, text)
        self._folder.event("stage", stage=name, text=text)

    def step(self, stage: str, done: int, total: int, text: str, **values: Any) -> None:
        """`done` of `total` is behind us; the time left is estimated from the stage's pace so far in this process."""
        elapsed = time.monotonic() - self._began.setdefault(stage, time.monotonic())
        pace = elapsed / max(1, done - self._before.get(stage, 0))
        left = pace * (total - done)
        self._line(stage, f"{done}/{total}  {text}  {_clock(left)} left")
        self._bar(stage, done, total, f"{_clock(left)} left")
        self._folder.event(
            "step", stage=stage, done=done, total=total, text=text, seconds_left=round(left, 1), **values
        )

    def wait(self, stage: str, text: str) -> None:
        """Nothing goes on for a while; it stands in the events, not in the report."""
        self._line(stage, text)
        self._folder.event("wait", stage=stage, text=text)

    def warn(self, text: str, **values: Any) -> None:
        """Something the coordinator should know; the run goes on."""
        self._line("warning", text)
        self._folder.event("warning", text=text, **values)

    def close(self) -> None:
        """Give the terminal back; the next step takes it again."""
        if self._bars is not None:
            self._bars.stop()

    def _line(self, stage: str, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {stage:<9} {text}"
        if self._bars is None:
            print(line, file=self._out, flush=True)
        else:
            self._bars.console.print(Text(line))

    def _bar(self, stage: str, done: int, total: int, left: str) -> None:
        if self._bars is None:
            return
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        if done < total:
            self._bars.add_task(stage, completed=done, total=total, left=left)
            self._bars.start()
        else:
            self._bars.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
