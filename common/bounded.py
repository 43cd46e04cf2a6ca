"""A sum over privacy units together with how far one unit can move it: one value, made where clipping happens.

SPDX-License-Identifier: Apache-2.0

B rows at once, one row of numbers per unit (or per image of a unit). Everything here is float64: norms are taken of the
very numbers that are summed, so no identity, block or precision stands between what is clipped and what is added.
Nothing raises because of what a row holds: one whose norm is not finite adds zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from common.images import Units

Rows = Mapping[str, "Tensor | NDArray[Any]"]  # by part, (B, *shape)
Shapes = Mapping[str, tuple[int, ...]]
RowsOf = Callable[[slice], Rows]  # of the images at these positions
_KEY = object()
# Rows are clipped a little below the bound: by more than float64 loses in the norm of a row of 1e6 numbers (1e-10 at
# worst) and, as errors of a sum have either sign, in a sum of 1e8 rows (about 1e-12; were all of one sign, 1).
_SLACK = 1e-9


class BoundedSum:
    """A sum in named parts, float64; all parts together move by at most `bound` in L2 when one unit comes or goes.

    Only `RunningSum`, `sum_over_units` and `joined` make one, so that a bound is never a number somebody wrote down.
    """

    def __init__(self, parts: dict[str, Tensor], bound: float, *, key: object) -> None:
        if key is not _KEY:
            raise TypeError("a BoundedSum is made by clipping only")
        self._parts, self._bound = parts, bound

    @property
    def parts(self) -> dict[str, Tensor]:
        """By name, float64; copies."""
        return {name: part.clone() for name, part in self._parts.items()}

    @property
    def bound(self) -> float:
        """L2, of all parts together."""
        return self._bound


class RunningSum:
    """The sum of rows, each clipped to `bound` in L2 over all its parts together; one row per unit.

    Args:
        shapes: of one row's parts.
        bound: in (0, inf).
    """

    def __init__(self, shapes: Shapes, bound: float) -> None:
        if not 0 < bound < math.inf:
            raise ValueError(f"a bound of {bound}")
        self._total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self._bound = bound
        self.left_out = 0  # rows that were not finite: for the site's own eyes

    def add(self, rows: Rows) -> None:
        """Add rows; every part has the same B."""
        self._add(rows, None)

    def _add(self, rows: Rows, shares: Tensor | None) -> None:
        if rows.keys() != self._total.keys():
            raise ValueError("the rows have other parts than the sum")
        tensors = {name: torch.as_tensor(part).flatten(1) for name, part in rows.items()}
        norms = torch.stack([torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in tensors.values()])
        norm = torch.linalg.vector_norm(norms, dim=0)
        finite = torch.isfinite(norm)
        left_out = int((~finite).sum())
        self.left_out += left_out
        factors = (self._bound / (1 + _SLACK) / norm[finite]).clamp(max=1.0)
        if shares is not None:
            factors = factors * shares[finite]
        for name, part in tensors.items():  # 0 × NaN is NaN: a row that is left out is cut, not scaled
            kept = part[finite] if left_out else part
            self._total[name] += (factors @ kept.double()).view(self._total[name].shape)

    def total(self) -> BoundedSum:
        """The sum so far."""
        return BoundedSum({name: part.clone() for name, part in self._total.items()}, self._bound, key=_KEY)


def sum_over_units(units: Units, shapes: Shapes, bound: float, rows_of: RowsOf, *, at_once: int = 256) -> BoundedSum:
    """Sum over units of the mean of their images' rows, each clipped to `bound`: a unit adds no more than one image.

    Args:
        rows_of: rows of the units' images at some positions; a row depends on its own image and label alone.
        at_once: images whose rows are in memory together.
    """
    running, shares = RunningSum(shapes, bound), torch.from_numpy(units.weights())
    for start in range(0, len(shares), at_once):
        these = slice(start, start + at_once)
        running._add(rows_of(these), shares[these])
    return running.total()


def joined(*sums: BoundedSum) -> BoundedSum:
    """Several sums over the same units as one: bounds add up as the root of the sum of their squares."""
    parts = {name: part for each in sums for name, part in each.parts.items()}
    if len(parts) != sum(len(each.parts) for each in sums):
        raise ValueError("two parts have the same name")
    return BoundedSum(parts, math.hypot(*(each.bound for each in sums)), key=_KEY)
