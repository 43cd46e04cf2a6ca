"""The fidelity figures are what their papers say: against plain loops, and at values known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.utility.fidelity import coverage, fidelity, kid, recall, two_sample_accuracy


def cloud(seed: int, count: int = 40, shift: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, spread, (count, 3))


def squared(a, b) -> float:
    return float(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))


def radius(points, index: int, neighbours: int) -> float:
    return sorted(squared(points[index], p) for j, p in enumerate(points) if j != index)[neighbours - 1]


def kernel(a, b) -> float:
    return (float(np.dot(a, b)) / len(a) + 1) ** 3


def test_kid_is_the_unbiased_estimate_of_its_paper():
    x, y = cloud(1, 12), cloud(2, 9, 0.4)
    same_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    same_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    assert kid(x, y) == pytest.approx(np.mean(same_x) + np.mean(same_y) - 2 * np.mean(across))


def test_kid_averages_to_nothing_where_there_is_no_difference():
    values = [kid(cloud(seed), cloud(1000 + seed)) for seed in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))  # a biased estimate is 5 times as far off
    assert min(values) < 0


def test_kid_grows_with_the_distance():
    near, far = kid(cloud(1), cloud(2, shift=0.5)), kid(cloud(1), cloud(2, shift=2.0))
    assert 0 < near < far


def test_coverage_and_recall_are_their_loops():
    x, y = cloud(3, 25), cloud(4, 18, 0.3, 0.6)
    covered = [any(squared(p, q) <= radius(x, i, 5) for q in y) for i, p in enumerate(x)]
    recalled = [any(squared(p, q) <= radius(y, j, 3) for j, q in enumerate(y)) for p in x]
    assert coverage(x, y) == np.mean(covered)
    assert recall(x, y) == np.mean(recalled)
    assert 0 < np.mean(covered) < 1 and 0 < np.mean(recalled) < 1


def test_a_collapsed_set_is_not_diverse_though_it_is_near():
    x = cloud(5, 100)
    collapsed = np.tile(x[:1], (100, 1)) + cloud(6, 100, spread=1e-3)
    assert recall(x, collapsed) <= 0.01 and coverage(x, collapsed) < 0.3
    assert recall(x, cloud(7, 100)) > 0.7 and coverage(x, cloud(7, 100)) > 0.8


def test_two_sample_accuracy_is_its_loop():
    x, y = cloud(8, 15), cloud(9, 15, 0.7)
    points, real = [*x, *y], [True] * 15 + [False] * 15
    right = []
    for i, point in enumerate(points):
        nearest = min((j for j in range(30) if j != i), key=lambda j: squared(point, points[j]))
        right.append(real[nearest] == real[i])
    assert two_sample_accuracy(x, y) == np.mean(right)


def test_two_sample_accuracy_knows_the_far_the_same_and_the_copied():
    assert two_sample_accuracy(cloud(1), cloud(2, shift=50.0)) == 1.0
    same = np.mean([two_sample_accuracy(cloud(seed), cloud(500 + seed)) for seed in range(50)])
    assert abs(same - 0.5) < 0.03
    assert two_sample_accuracy(cloud(1), cloud(1).copy()) == 0.0


def test_equal_neighbours_share_the_vote():
    x = np.array([[0.0], [0.0]])
    assert two_sample_accuracy(x, x.copy()) == pytest.approx(1 / 3)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="equal numbers"):
        two_sample_accuracy(cloud(1, 10), cloud(2, 11))
    with pytest.raises(ValueError, match="shapes"):
        kid(cloud(1), cloud(2)[:, :2])
    with pytest.raises(ValueError, match="neighbours"):
        coverage(cloud(1, 5), cloud(2, 5))


def test_all_figures_are_in_their_places():
    x, y = cloud(1), cloud(2, shift=0.5)
    all_four = fidelity(x, y)
    assert (all_four.kid, all_four.coverage) == (kid(x, y), coverage(x, y))
    assert (all_four.recall, all_four.two_sample) == (recall(x, y), two_sample_accuracy(x, y))
