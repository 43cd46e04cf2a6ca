"""One step of the optimizer on the sum of the sites' noisy gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.errors import ReplyError
from common.optimizer import Adam
from server.federation.aggregation import mean_gradient
from server.federation.screening import largest_sum_norm, most_drawn, most_units, screen_norm


def test_the_common_gradient_is_the_sum_over_the_records_of_the_sites_that_answered():
    sums = {"a": {"w": np.array([6.0], np.float32)}, "b": {"w": np.array([-2.0], np.float32)}}
    mean = mean_gradient(sums, {"a": 3.0, "b": 5.0, "absent": 100.0})
    np.testing.assert_allclose(mean["w"], [0.5])


def test_an_optimizer_that_is_stopped_and_taken_up_makes_the_same_steps():
    gradients = [{"w": torch.tensor([1.0, -2.0, 0.5]) * scale} for scale in (1, 3, -2, 0.1)]
    one, two = torch.zeros(3), torch.zeros(3)
    whole = Adam({"w": one}, learning_rate=0.1)
    state = {}
    for gradient in gradients:
        whole.step(gradient)
        part = Adam({"w": two}, learning_rate=0.1)
        if state:
            part.load(state)
        part.step(gradient)
        state = {name: array.copy() for name, array in part.state().items()}
    torch.testing.assert_close(one, two)
    assert int(state["steps"][0]) == 4


@pytest.mark.parametrize(("units", "rate"), [(1, 1.0), (40, 0.05), (300, 0.1), (20_000, 0.01)])
def test_an_honest_noisy_sum_passes_the_door_and_one_a_few_times_as_long_does_not(units, rate):
    rng = np.random.default_rng(0)
    drawn = most_drawn(units, rate)
    bound = largest_sum_norm(units=drawn, sensitivity=0.1, noise_std=0.05, numbers=2000)
    for _ in range(300):
        honest = 0.05 * rng.standard_normal(2000)
        honest[0] += 0.1 * rng.binomial(units, rate)  # all records pull one way
        screen_norm({"w": honest.astype(np.float32)}, largest=bound, what="update")
    likely = 0.1 * units * rate + 0.05 * 2000**0.5
    assert bound < 3 * likely + 2.0  # the bound is of the honest sum's own size
    with pytest.raises(ReplyError, match="over the bound"):
        screen_norm({"w": np.array([1.001 * bound], np.float32)}, largest=bound, what="update")


def test_the_most_units_that_a_site_can_have_hold_however_the_counts_noise_fell():
    rng, sizes = np.random.default_rng(1), np.array([3.0, 40.0, 0.0])
    counts = sizes + 30.0 * rng.standard_normal((5000, 3))
    most = np.array([most_units(row.tolist(), 30.0) for row in counts])
    assert (most >= sizes.sum()).all()
    assert np.median(most) < sizes.sum() + 30.0 * 18
    assert most_units([5.0, -3.0], 0.0) == 5.0
    assert most_drawn(10.0, 1.0) == 10.0
