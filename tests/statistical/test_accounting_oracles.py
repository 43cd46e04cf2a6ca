"""Our epsilon against two other accountants, on random histories of mechanisms.

Google's dp-accounting gives, for the same history, privacy loss distributions rounded up (an upper bound on the truth)
and rounded down (a lower bound). Ours must never be below the lower one: that would be a false claim. How far it may be
above is the accountant's own slack.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from opacus.accountants import RDPAccountant

from common.accounting import PrivacyLoss, epsilon_of

pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
INTERVAL = 1e-4
PRV_SLACK = 0.012  # Opacus's PRV accountant is built to err by at most 0.01, upwards


def _history(seed):
    """1 to 4 kinds of mechanisms as studies have them: a few plain Gaussians, and many sampled steps."""
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(rng.integers(1, 5)):
        if rng.random() < 0.3:
            losses.append(PrivacyLoss(round(float(rng.uniform(1.5, 20)), 4), 1.0, int(rng.integers(1, 4))))
        else:
            sigma, q = float(np.exp(rng.uniform(np.log(0.7), np.log(8)))), float(np.exp(rng.uniform(-5.3, -1.2)))
            losses.append(PrivacyLoss(round(sigma, 4), round(q, 4), int(rng.integers(1, 900))))
    return losses, float(10 ** rng.uniform(-6, -4))


def _bounds(losses, delta):
    """(lower, upper) bound on the true epsilon."""
    out = []
    for pessimistic in (False, True):
        whole = None
        for loss in losses:
            one = pld.from_gaussian_mechanism(
                loss.noise_multiplier, value_discretization_interval=INTERVAL, sampling_prob=loss.sample_rate,
                pessimistic_estimate=pessimistic,
            ).self_compose(loss.steps)  # fmt: skip
            whole = one if whole is None else whole.compose(one)
        assert whole is not None
        out.append(whole.get_epsilon_for_delta(delta))
    return out


@pytest.mark.statistical
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(s, marks=pytest.mark.slow) for s in range(4, 40))])
def test_epsilon_is_never_below_the_truth_and_prv_is_tight(seed):
    losses, delta = _history(seed)
    lower, upper = _bounds(losses, delta)
    prv, rdp = (epsilon_of(losses, delta=delta, accountant=name) for name in ("prv", "rdp"))
    assert lower <= upper
    assert prv >= lower - 1e-9
    assert prv <= upper + PRV_SLACK
    assert rdp >= lower - 1e-9
    assert rdp >= prv - PRV_SLACK - 0.01  # the looser of the two, by its nature
    oracle = RDPAccountant()
    oracle.history = [(loss.noise_multiplier, loss.sample_rate, loss.steps) for loss in losses]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hint that a larger alpha might be tighter
        assert rdp == pytest.approx(oracle.get_epsilon(delta), rel=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("broken", ["noise", *(pytest.param(b, marks=pytest.mark.slow) for b in ("steps", "rate"))])
def test_a_figure_for_less_than_was_done_is_seen(broken):
    """The twin that must fail: 3 % less noise, one step in ten forgotten, a sample rate 5 % too low."""
    seen = 0
    for seed in (1, 2, 3):
        losses, delta = _history(seed)
        lower, _ = _bounds(losses, delta)
        said = [
            PrivacyLoss(loss.noise_multiplier * (1.03 if broken == "noise" else 1),
                        min(1.0, loss.sample_rate * (0.95 if broken == "rate" else 1)),
                        max(1, int(loss.steps * (0.9 if broken == "steps" else 1))))
            for loss in losses
        ]  # fmt: skip
        seen += epsilon_of(said, delta=delta, accountant="prv") < lower - 1e-9
    assert seen >= 1


@pytest.mark.statistical
@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_splitting_and_reordering_a_history_changes_nothing(accountant):
    losses = [PrivacyLoss(1.4, 0.06, 300), PrivacyLoss(3.2, 1.0, 1), PrivacyLoss(2.3, 0.1, 100)]
    whole = epsilon_of(losses, delta=1e-5, accountant=accountant)
    pieces = [PrivacyLoss(1.4, 0.06, 30)] * 10 + [PrivacyLoss(2.3, 0.1, 1)] * 100 + [PrivacyLoss(3.2, 1.0, 1)]
    assert epsilon_of(pieces, delta=1e-5, accountant=accountant) == whole
