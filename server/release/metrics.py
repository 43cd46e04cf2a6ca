"""metrics.json: every figure of a release that is not in its claim, as one checked object.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from common.settings import Settings

SYNTHETIC = "trained on the synthetic images"  # the headline: the first row of every release


class Figure(Settings):
    """A figure with its 95 % interval; null where there is none."""

    value: float | None
    low: float | None
    high: float | None


class Row(Settings):
    """One classifier, tested on the sites' held-out images."""

    name: str = Field(max_length=200)
    auc_macro: Figure
    f1_macro: Figure
    per_class: dict[str, Any] | None


class Epsilon(Settings):
    """What the claim says, for readers of this file alone."""

    ceiling: float
    delta: float
    max: float
    sum: float
    sites: dict[str, float]


class Metrics(Settings):
    """Everything in metrics.json.

    Attributes:
        classes: synthetic images of each class, in the study's order.
        rounds: training rounds that were finished.
        minutes, peak_memory_mb, machine: of the coordinator's run.
        validation: the classifier that was trained on the synthetic images first.
        by_site: the same figures at each site.
        loss: noisy mean of each round.
        writer: what `server/release/documents.py: writer` was; only the same one writes the same words.
    """

    study: str
    sha256: str
    images: int = Field(ge=0)
    classes: dict[str, int]
    rounds: int
    minutes: float
    peak_memory_mb: float
    machine: str
    phantoms: bool
    epsilon: Epsilon
    validation: tuple[Row, ...] = Field(min_length=1)
    by_site: dict[str, dict[str, Any]]
    loss: tuple[float | None, ...]
    writer: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")

    @property
    def headline(self) -> Row:
        """The classifier that was trained on the synthetic images."""
        return self.validation[0]
