"""How much memory the processes of a deployment take over time, each by its name and by each of its lives.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from support.deployment import Loopback

_SECONDS = 4.0
_LASTING = {"flower-superlink": "SuperLink", "nginx": "nginx", "flower-supernode": "SuperNode",
            "flower-superexec": "SuperExec"}  # fmt: skip


@dataclass
class Life:
    """One process from its start to its end.

    Attributes:
        number: 1 for the first process of that name, 2 for the one that was started after it.
        samples: seconds since the watch began, resident MB, and rounds finished by then.
    """

    name: str
    number: int
    samples: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.samples[-1][0] - self.samples[0][0]

    def at(self, share: float) -> float:
        """The middle of what was seen in the tenth of its life that begins there."""
        first, long = self.samples[0][0], self.seconds
        near = [mb for at, mb, _ in self.samples if share <= (at - first) / max(long, 1e-9) <= share + 0.1]
        return statistics.median(near or [self.samples[-1][1]])

    @property
    def growth(self) -> float:
        """MB from a third of its life to its end."""
        return self.at(0.9) - self.at(1 / 3)

    @property
    def rounds(self) -> int:
        """Finished between a third of its life and its end."""
        first = self.samples[0][0] + self.seconds / 3
        then = [count for at, _, count in self.samples if at >= first]
        return then[-1] - then[0]

    @property
    def row(self) -> str:
        start, peak = self.samples[0][1], max(mb for _, mb, _ in self.samples)
        each = f"{1000 * self.growth / self.rounds:+8.0f}" if self.rounds else "       -"
        return (f"{self.name:<22} {self.number:>2} {self.seconds:>6.0f} {start:>7.1f} {self.at(1 / 3):>7.1f} "
                f"{self.at(0.9):>7.1f} {peak:>7.1f} {self.growth:>+8.1f} {each}")  # fmt: skip


HEAD = (f"{'process':<22} {'#':>2} {'s':>6} {'start':>7} {'third':>7} {'end':>7} {'peak':>7} {'growth':>8} "
        f"{'kB/round':>8}   (MB, resident)")  # fmt: skip


class MemoryWatch:
    """Looks at every process of a deployment every few seconds, in a thread of its own.

    Attributes:
        seen: every process that was ever there, the short ones as far as they were met.
        rounds: finished so far; set by who drives the studies.
    """

    def __init__(self, deployment: Loopback) -> None:
        self._deployment, self._began, self._stop = deployment, time.monotonic(), threading.Event()
        self._lives = dict[psutil.Process, Life]()
        self.seen, self.rounds = set[psutil.Process](), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def lives(self) -> list[Life]:
        return sorted(self._lives.copy().values(), key=lambda life: (life.name, life.number))

    def end(self) -> None:
        self._stop.set()
        self._thread.join()

    def left_over(self) -> list[str]:
        """What was seen, lives, and belongs to nothing that was started and lives."""
        owned = {process for process, _ in self._now()}
        return [" ".join(_line(process)) for process in self.seen - owned if _lives(process)]

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS):
            now = time.monotonic() - self._began
            for process, name in self._now():
                self.seen.add(process)
                if not name:
                    continue
                with suppress(psutil.Error):
                    resident = process.memory_info().rss / 1e6
                    if process not in self._lives:
                        number = 1 + sum(life.name == name for life in self._lives.values())
                        self._lives[process] = Life(name, number)
                    self._lives[process].samples.append((now, resident, self.rounds))

    def _now(self) -> Iterator[tuple[psutil.Process, str]]:
        """Each process that lives, and what it is called; nothing for one that lives for one message only."""
        for running in list(self._deployment.started):
            with suppress(psutil.Error):
                own, name = psutil.Process(running.process.pid), running.log.stem
                if not _lives(own):
                    continue
                yield own, name
                for child in own.children(recursive=True):
                    yield child, _called(child, name)


def _called(process: psutil.Process, of: str) -> str:
    text = " ".join(_line(process)[:3])
    kind = next((told for words, told in _LASTING.items() if words in text), "")
    if kind == "nginx":
        return f"nginx {'master' if 'master' in text else 'worker'}"
    whose = of.removesuffix("-carry") if of.endswith("-carry") else "coordinator"
    return f"{whose} {kind}" if kind else ""


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
