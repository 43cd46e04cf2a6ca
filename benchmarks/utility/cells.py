"""Results by cell of the grid: means over seeds, and the interval that goes with them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.utility.grid import DATASETS, RECIPES
from benchmarks.utility.results import Result, newest


@dataclass(frozen=True)
class Cell:
    """One set, epsilon and recipe with the newest result of each seed."""

    dataset: str
    epsilon: float
    recipe: str
    results: tuple[Result, ...]

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.status == "ok"]

    @property
    def over_budget(self) -> list[Result]:
        return [result for result in self.results if result.status == "over budget"]

    def mean(self, name: str) -> float | None:
        """Mean over the finished seeds that have the figure."""
        values = _values(self.finished, name)
        return fmean(values) if values else None

    def text(self, name: str, digits: int = 3) -> str:
        """ "0.912 [0.880, 0.941]", "0.912", or a dash."""
        mean, (low, high) = self.mean(name), spread(self.finished, name)
        if mean is None:
            return "–"
        if low is None or high is None:
            return figure(mean, digits)
        return f"{figure(mean, digits)} [{figure(low, digits)}, {figure(high, digits)}]"


def cells_of(results: Sequence[Result]) -> list[Cell]:
    """Cells in the order of the sets, epsilon from large to small, then of the recipes; unknown ones are left out."""
    groups: dict[tuple[str, float, str], list[Result]] = {}
    for result in newest(list(results)):
        if result.dataset in DATASETS and result.recipe in RECIPES:
            groups.setdefault(result.cell, []).append(result)
    sets, recipes = list(DATASETS), list(RECIPES)
    order = sorted(groups, key=lambda cell: (sets.index(cell[0]), -cell[1], recipes.index(cell[2])))
    return [Cell(*cell, tuple(sorted(groups[cell], key=lambda result: result.seed))) for cell in order]


def spread(results: Sequence[Result], name: str) -> tuple[float | None, float | None]:
    """Smallest and largest seed; of one seed its own interval, where it has one."""
    values = _values(results, name)
    if len(values) > 1:
        return min(values), max(values)
    lows, highs = _values(results, f"{name}_low"), _values(results, f"{name}_high")
    return (lows[0], highs[0]) if lows and highs else (None, None)


def figure(value: float, digits: int = 3) -> str:
    """A figure with that many decimals, without the minus of a rounded zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _values(results: Sequence[Result], name: str) -> list[float]:
    values = (getattr(result, name, None) for result in results)
    return [float(value) for value in values if value is not None]
