"""A sum and its bound are one value: no row, whatever it holds, moves the sum by more than the bound says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.bounded import BoundedSum, RunningSum, joined, sum_over_units
from common.images import ImageSet, Units

ANY_FLOAT32 = arrays(np.float32, (5, 3), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
SHAPES = {"a": (3,), "b": (3,)}


def _sum(rows: list[dict[str, np.ndarray]], bound: float) -> BoundedSum:
    running = RunningSum(SHAPES, bound)
    for row in rows:
        running.add(row)
    return running.total()


def _distance(one: BoundedSum, other: BoundedSum) -> float:
    return math.sqrt(sum(float((one.parts[n] - other.parts[n]).square().sum()) for n in one.parts))


def test_nobody_states_a_bound():
    with pytest.raises(TypeError, match="by clipping only"):
        BoundedSum({"a": torch.zeros(3)}, 1e-9, key=object())


@given(ANY_FLOAT32, ANY_FLOAT32, st.floats(1e-3, 1e3), st.integers(0, 4))
def test_one_row_moves_the_sum_by_at_most_the_bound_whatever_it_holds(a, b, bound, which):
    rows = {"a": a, "b": b}
    without = {name: np.delete(part, which, axis=0) for name, part in rows.items()}
    whole, less = _sum([rows], bound), _sum([without], bound)
    assert all(bool(torch.isfinite(part).all()) for part in whole.parts.values())
    assert _distance(whole, less) <= bound * (1 + 1e-7)


def test_a_long_row_is_shortened_to_the_bound_and_a_short_one_is_left_alone():
    total = _sum([{"a": np.array([[3.0, 0, 0], [0, 0.1, 0]]), "b": np.array([[0, 4.0, 0], [0, 0, 0.0]])}], 0.5)
    expected = {"a": [0.3, 0.1, 0.0], "b": [0.0, 0.4, 0.0]}
    for name, values in expected.items():
        assert torch.allclose(total.parts[name], torch.tensor(values, dtype=torch.float64), atol=1e-8)
    assert total.bound == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_adds_nothing_and_is_counted(bad):
    running = RunningSum({"a": (2,)}, 1.0)
    running.add({"a": torch.tensor([[0.5, 0.0], [bad, 0.0]])})
    assert torch.equal(running.total().parts["a"], torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert running.left_out == 1


def test_the_largest_float32_numbers_are_clipped_and_not_lost():
    running = RunningSum({"a": (4,)}, 1.0)
    running.add({"a": torch.full((1, 4), 3.4e38)})
    assert float(running.total().parts["a"].norm()) == pytest.approx(1.0)
    assert running.left_out == 0


def test_many_rows_of_one_sign_do_not_add_up_to_more_than_their_bounds():
    """In float32 the rounding of a long sum lets one row more move it by more than the bound."""
    rows = np.full((1000, 3), 1.0, np.float32)
    one = _sum([{"a": rows, "b": rows}] * 300, 0.1)
    more = _sum([{"a": rows, "b": rows}] * 300 + [{"a": rows[:1], "b": rows[:1]}], 0.1)
    assert _distance(one, more) <= 0.1 * (1 + 1e-7)
    single = np.cumsum(np.full(300_000, 0.1 / math.sqrt(6.0), np.float32), dtype=np.float32)[-1]
    assert abs(float(single) - 300_000 * 0.1 / math.sqrt(6.0)) > 0.1  # what the sum in float32 would be off by


def test_sums_join_by_the_root_of_squares_and_names_do_not_collide():
    a, b = RunningSum({"a": (1,)}, 3.0).total(), RunningSum({"b": (1,)}, 4.0).total()
    both = joined(a, b)
    assert both.bound == pytest.approx(5.0)
    assert set(both.parts) == {"a", "b"}
    with pytest.raises(ValueError, match="same name"):
        joined(a, a)


def test_a_sum_is_a_copy_so_that_later_rows_do_not_enter_it():
    running = RunningSum({"a": (1,)}, 1.0)
    total = running.total()
    running.add({"a": torch.ones(1, 1)})
    assert float(total.parts["a"]) == 0.0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_is_positive_and_finite(bound):
    with pytest.raises(ValueError, match="bound"):
        RunningSum({"a": (1,)}, bound)


def test_rows_have_the_parts_of_the_sum():
    with pytest.raises(ValueError, match="other parts"):
        RunningSum({"a": (1,)}, 1.0).add({"b": torch.zeros(1, 1)})


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 7))
def test_a_patient_adds_no_more_than_one_image_however_many_it_has(patients, at_once):
    rng = np.random.default_rng(0)
    images = ImageSet(
        rng.integers(0, 256, (len(patients), 1, 2, 2), dtype=np.uint8),
        np.zeros(len(patients), np.int64), np.array(patients),
    )  # fmt: skip

    def total(kept):
        def rows(these):
            return {"x": kept.images[these].reshape(-1, 4).astype(np.float64) * 1e6}

        return sum_over_units(Units.of(kept, "patient"), {"x": (4,)}, 1.0, rows, at_once=at_once)

    everybody, gone = total(images), patients[0]
    rest = total(images.select(np.array([p != gone for p in patients])))
    assert _distance(everybody, rest) <= 1 + 1e-7


def test_what_was_made_cannot_be_changed():
    total = RunningSum({"a": (2,)}, 1.0).total()
    total.parts["a"] += 7.0
    assert torch.equal(total.parts["a"], torch.zeros(2, dtype=torch.float64))
    with pytest.raises(AttributeError):
        total.bound = 1e-9  # pyright: ignore[reportAttributeAccessIssue]
