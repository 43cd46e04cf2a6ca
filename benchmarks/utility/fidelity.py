"""How alike two sets of features are: one figure a question, each from its paper.

SPDX-License-Identifier: Apache-2.0

Shapes: N real and M other points, D features. Every function takes float arrays (N, D) and (M, D).

None of this is private: it reads real images, and is for simulated sites only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_COVERAGE_NEIGHBOURS = 5  # as in Naeem et al. 2020
_RECALL_NEIGHBOURS = 3  # as in Kynkäänniemi et al. 2019
FEWEST = _COVERAGE_NEIGHBOURS + 1  # points a side, for every figure to be defined


@dataclass(frozen=True)
class Fidelity:
    """The four figures of one comparison, or their means over several."""

    kid: float
    coverage: float
    recall: float
    two_sample: float


def fidelity(real: NDArray[Any], other: NDArray[Any]) -> Fidelity:
    """All figures of `other` (N, D) against `real` (N, D), N at least `FEWEST`."""
    return Fidelity(kid(real, other), coverage(real, other), recall(real, other), two_sample_accuracy(real, other))


def kid(real: NDArray[Any], other: NDArray[Any]) -> float:
    """Kernel inception distance: unbiased MMD² with k(x, y) = (x·y / D + 1)³ (Bińkowski et al. 2018, section 4).

    Returns:
        0 on average where both are of one distribution, then also below 0; it has no upper end. The features are not
        those of the Inception network, so the figure compares with others of the same set only.
    """
    x, y = _pair(real, other)
    n, m = len(x), len(y)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    same_x = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    same_y = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(same_x + same_y - 2.0 * _kernel(x, y).mean())


def coverage(real: NDArray[Any], other: NDArray[Any], neighbours: int = _COVERAGE_NEIGHBOURS) -> float:
    """Share of real points that have another point as near as their own k-th real neighbour (Naeem et al. 2020, eq. 8).

    Returns:
        0 to 1; expected 1 - (N-1)…(N-k) / (2N-1)…(2N-k) ≈ 1 - 2^-k where N = M and both are of one distribution.
    """
    x, y = _pair(real, other)
    return float((_distances(x, y).min(axis=1) <= _radii(x, neighbours)).mean())


def recall(real: NDArray[Any], other: NDArray[Any], neighbours: int = _RECALL_NEIGHBOURS) -> float:
    """Share of real points that lie within the k-neighbour ball of some other point (Kynkäänniemi et al. 2019, eq. 2).

    Returns:
        0 to 1; low where the other set lacks a part of what is real. Widely scattered points raise it too: read it
        beside the two-sample accuracy.
    """
    x, y = _pair(real, other)
    return float((_distances(x, y) <= _radii(y, neighbours)[None, :]).any(axis=1).mean())


def two_sample_accuracy(real: NDArray[Any], other: NDArray[Any]) -> float:
    """Accuracy of a leave-one-out nearest neighbour that tells real from other (Lopez-Paz & Oquab 2017).

    Where several neighbours are equally near, each has its share of the vote.

    Args:
        real, other: as many of the one as of the other; else chance would not be one half.

    Returns:
        0 to 1: about 0.5 where nobody could tell, 1 where every point is known; well below 0.5 where each point of
        the other set sits on a real one, a sign of copies.
    """
    x, y = _pair(real, other)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} real and {len(y)} other points: equal numbers are needed")
    points = np.concatenate([x, y])
    is_real = np.arange(len(points)) < len(x)
    between = _distances(points, points)
    np.fill_diagonal(between, np.inf)
    nearest = between == between.min(axis=1, keepdims=True)
    agreeing = (nearest & (is_real[:, None] == is_real[None, :])).sum(axis=1)
    return float((agreeing / nearest.sum(axis=1)).mean())


def _pair(real: NDArray[Any], other: NDArray[Any]) -> tuple[Floats, Floats]:
    x, y = np.asarray(real, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features of shapes {x.shape} and {y.shape}: (N, D) and (M, D) needed, N and M at least 2")
    return x, y


def _kernel(x: Floats, y: Floats) -> Floats:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _distances(x: Floats, y: Floats) -> Floats:
    """Squared Euclidean distances (N, M); exactly 0 between equal points, and the same both ways.

    Not by |x|² + |y|² - 2 x·y: its rounding would tell copies apart.
    """
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(x, y, "sqeuclidean"), dtype=np.float64)


def _radii(points: Floats, neighbours: int) -> Floats:
    """Squared distance of each point (N, D) to its k-th nearest other one, (N,)."""
    if not 1 <= neighbours < len(points):
        raise ValueError(f"{neighbours} neighbours among {len(points)} points")
    return np.partition(_distances(points, points), neighbours, axis=1)[:, neighbours]  # 0 is the point itself
