"""The arithmetic of the budget: Opacus's figures, solved noise, refused plans."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from common.accounting import PARTITIONS, PrivacyLoss, StudyPlan, check_plan, epsilon_of, plan_study
from common.errors import BudgetError
from common.moments import MEANS_PART
from support.studies import tiny_study

DELTA = 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "engine"), [("prv", PRVAccountant), ("rdp", RDPAccountant)])
@pytest.mark.parametrize("history", [[(1.1, 0.05, 200)], [(6.0, 1.0, 1), (1.3, 0.08, 90)]])
def test_epsilon_is_the_figure_of_opacus(name, engine, history):
    accountant = engine()
    for sigma, rate, steps in history:
        for _ in range(steps):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
    losses = [PrivacyLoss(*entry) for entry in history]
    assert epsilon_of(losses, delta=DELTA, accountant=name) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_splitting_a_run_over_rounds_and_restarts_gives_the_same_epsilon(accountant):
    whole = [PrivacyLoss(1.2, 0.1, 60)]
    split = [PrivacyLoss(1.2, 0.1, 7), PrivacyLoss(1.2, 0.1, 33), PrivacyLoss(1.2, 0.1, 20)]
    assert epsilon_of(whole, delta=DELTA, accountant=accountant) == epsilon_of(
        split, delta=DELTA, accountant=accountant
    )


def test_a_plain_gaussian_is_bounded_from_above_and_tightly():
    """Against the exact epsilon of one Gaussian release (Balle and Wang 2018, theorem 8)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    for sigma in (0.8, 2.0, 10.0):

        def excess(e, s=sigma):
            return norm.cdf(0.5 / s - e * s) - math.exp(e) * norm.cdf(-0.5 / s - e * s) - DELTA

        exact = brentq(excess, 0, 50)
        got = epsilon_of([PrivacyLoss(sigma, 1.0, 1)], delta=DELTA, accountant="prv")
        assert exact <= got <= exact + 0.02


def test_no_loss_costs_nothing_and_more_loss_costs_more():
    assert epsilon_of([], delta=DELTA, accountant="rdp") == 0.0
    one = epsilon_of([PrivacyLoss(2.0, 0.1, 10)], delta=DELTA, accountant="rdp")
    two = epsilon_of([PrivacyLoss(2.0, 0.1, 10), PrivacyLoss(5.0, 1.0, 1)], delta=DELTA, accountant="rdp")
    assert 0 < one < two


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_whole_study_stays_at_or_just_below_its_epsilon(accountant, epsilon):
    study = tiny_study(privacy={"epsilon": epsilon, "accountant": accountant}, training={"rounds": 20})
    plan = plan_study(study)
    for partition in PARTITIONS:
        cost = epsilon_of(plan.losses(partition), delta=DELTA, accountant=accountant)
        assert 0.97 * epsilon < cost <= epsilon
    check_plan(study, plan)


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_plan_survives_json(rounds):
    plan = plan_study(tiny_study(training={"rounds": rounds}))
    assert StudyPlan.from_json(plan.to_json()) == plan


def test_without_a_round_the_moments_get_what_training_would_have_got():
    half = {"moments_share": 0.5}
    study = tiny_study(training={"rounds": 0}, privacy=half)
    plan, usual = plan_study(study), plan_study(tiny_study(privacy=half))
    assert plan.train is None
    assert plan.moments.noise_multiplier < 0.7 * usual.moments.noise_multiplier
    cost = epsilon_of(plan.losses("train"), delta=DELTA, accountant="rdp")
    assert 0.97 * study.privacy.epsilon < cost <= study.privacy.epsilon
    check_plan(study, plan)
    with pytest.raises(BudgetError):
        check_plan(study, usual)
    with pytest.raises(BudgetError):
        check_plan(tiny_study(), plan)


@pytest.mark.parametrize("part", [0.1, 0.4, MEANS_PART, 0.7])
def test_two_parts_of_a_release_cost_what_the_whole_costs(part):
    """A sum of sensitivity p under the noise of a whole one has a noise_multiplier of sigma / p."""
    whole = plan_study(tiny_study()).moments.whole_loss
    other = math.sqrt(1 - part**2)
    parts = [PrivacyLoss(whole.noise_multiplier / p, 1.0, 1) for p in (part, other)]
    together = epsilon_of(parts, delta=DELTA, accountant="prv")
    assert together == pytest.approx(epsilon_of([whole], delta=DELTA, accountant="prv"), abs=0.02)


def test_an_impossible_budget_says_what_would_be_possible():
    study = tiny_study(privacy={"epsilon": 0.01, "accountant": "prv"})
    with pytest.raises(BudgetError, match=r"least possible is 0\.\d+.*Raise privacy\.epsilon to about"):
        plan_study(study)


@pytest.mark.parametrize(
    "tamper",
    [
        lambda p: replace(p, train=replace(p.train, noise_multiplier=p.train.noise_multiplier / 2)),
        lambda p: replace(p, train=replace(p.train, sensitivity=p.train.sensitivity / 2)),
        lambda p: replace(p, train=replace(p.train, releases=p.train.releases + 5)),
        lambda p: replace(p, train=replace(p.train, sample_rate=p.train.sample_rate / 2)),
        lambda p: replace(p, counts=replace(p.counts, partition="holdout")),
        lambda p: replace(p, moments=replace(p.moments, steps=2)),
        lambda p: replace(p, moments=None),
        lambda p: replace(p, train=None),
        lambda p: replace(p, evaluate=replace(p.evaluate, sensitivity=1.0)),
        lambda p: replace(p, counts=replace(p.counts, noise_multiplier=math.inf)),
    ],
)
def test_a_site_refuses_a_plan_that_is_not_the_studys(tamper):
    study = tiny_study()
    plan = plan_study(study)
    check_plan(study, plan)
    with pytest.raises(BudgetError):
        check_plan(study, tamper(plan))
