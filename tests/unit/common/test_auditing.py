"""The lower bound on epsilon: what it must be in cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from common.auditing import epsilon_lower_bound, p_value


def test_without_delta_it_is_the_binomial_test_of_randomised_response():
    for correct, epsilon in ((700, 0.5), (980, 2.0)):
        expected = binom.sf(correct - 1, 1000, math.exp(epsilon) / (1 + math.exp(epsilon)))
        assert p_value(correct=correct, guesses=1000, canaries=5000, epsilon=epsilon, delta=0.0) == pytest.approx(
            expected
        )


def test_when_every_guess_is_right_the_bound_is_known_in_closed_form():
    found = epsilon_lower_bound(correct=1000, guesses=1000, canaries=1000, delta=0.0)
    truth = 0.05 ** (1 / 1000)
    assert found == pytest.approx(math.log(truth / (1 - truth)), abs=1e-3)


def test_guesses_no_better_than_chance_prove_nothing():
    assert epsilon_lower_bound(correct=510, guesses=1000, canaries=1000, delta=1e-5) == 0.0
    assert epsilon_lower_bound(correct=0, guesses=0, canaries=10, delta=1e-5) == 0.0


def test_more_right_guesses_prove_more_and_a_larger_delta_proves_less():
    bounds = [epsilon_lower_bound(correct=c, guesses=1000, canaries=4000, delta=1e-5) for c in (600, 800, 950, 1000)]
    assert bounds == sorted(bounds)
    assert bounds[0] > 0
    assert epsilon_lower_bound(correct=950, guesses=1000, canaries=4000, delta=1e-2) < bounds[2]


def test_randomised_response_itself_is_caught_at_its_own_epsilon_no_more_often_than_promised():
    rng = np.random.default_rng(3)
    epsilon = 1.5
    over = sum(
        epsilon_lower_bound(correct=int(rng.binomial(400, 1 / (1 + math.exp(-epsilon)))), guesses=400, canaries=400,
                            delta=0.0) > epsilon
        for _ in range(400)
    )  # fmt: skip
    assert binom.sf(over - 1, 400, 0.05) > 1e-6  # at most 5 % of the time
    assert over > 0  # and not by being idle


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="correct <= guesses"):
        epsilon_lower_bound(correct=5, guesses=4, canaries=10, delta=0.0)
