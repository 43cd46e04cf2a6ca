"""What a run's events say of it, one after another.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from common.text import printable

_WARNINGS = 5
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"


class RunStatus(BaseModel):
    """One run.

    Attributes:
        state: finished, running, stopped, or failed.
        at: of its last event, UTC.
        stage, done, total, seconds_left: of the newest step.
        text: of the newest event that has one.
        epsilon: by site, as last reported, of its train partition.
        heard: by site, when an answer of it was last taken.
        left_out: by site, why it was left out of the newest round.
        losses: of the rounds so far, noisy.
        warnings: the newest.
        error: what it failed with.
    """

    folder: str
    state: str
    at: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0
    seconds_left: float = 0.0
    text: str = ""
    epsilon: dict[str, float] = {}
    heard: dict[str, str] = {}
    left_out: dict[str, str] = {}
    losses: list[float] = []
    warnings: list[str] = []
    error: str = ""

    @property
    def sites(self) -> list[str]:
        """All that were heard of."""
        return sorted({*self.epsilon, *self.heard, *self.left_out})

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in the next event."""
        kind = event.get("event")
        self.at = str(event.get("at", ""))
        if event.get("text"):
            self.text = printable(str(event["text"]))
        if kind == "begin":
            self.error, self.warnings = "", []
        elif kind == "stage":
            self.stage, self.done, self.total, self.seconds_left = str(event.get("stage", "")), 0, 0, 0.0
        elif kind == "step":
            self._step(event)
        elif kind == "warning":
            self.warnings = [*self.warnings, self.text][-_WARNINGS:]
        elif kind == "failed":
            self.error = printable(str(event.get("what", "")))

    def _step(self, event: Mapping[str, Any]) -> None:
        self.stage, self.done, self.total = str(event.get("stage", "")), int(event["done"]), int(event["total"])
        self.seconds_left = float(event.get("seconds_left") or 0.0)
        spent = event.get("epsilon")
        if isinstance(spent, dict):
            self.epsilon |= {str(site): float(value) for site, value in spent.items()}
        elif spent is not None and event.get("site"):
            self.epsilon[str(event["site"])] = float(spent)
        for site in event.get("accepted") or ([event["site"]] if event.get("site") else []):
            self.heard[str(site)] = self.at
        if self.stage == "train":
            self.left_out = {str(site): printable(str(why)) for site, why in (event.get("rejected") or {}).items()}
            if isinstance(event.get("loss"), float):
                self.losses = [*self.losses[: self.done - 1], float(event["loss"])]


def told_by(events: Iterable[Mapping[str, Any]], *, folder: str, state: str) -> RunStatus:
    """What all its events say together."""
    found = RunStatus(folder=folder, state=state)
    for event in events:
        found.take(event)
    return found
