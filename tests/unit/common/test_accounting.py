"""The arithmetic of the budget: Opacus's figures, solved noise, refused plans."""

from __future__ import annotations

import math
import tracemalloc

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from common.accounting import LEAST_NOISE, PrivacyLoss, StudyPlan, epsilon_of, plan_study
from common.errors import BudgetError
from common.mechanisms import PARTITIONS, REST, wanted
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


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_plan_survives_json(rounds):
    plan = plan_study(tiny_study(training={"rounds": rounds}))
    assert StudyPlan.model_validate_json(plan.model_dump_json()) == plan


def test_without_a_round_the_moments_get_what_training_would_have_got():
    half = {"moments_share": 0.5}
    study = tiny_study(training={"rounds": 0}, privacy=half)
    plan, usual = plan_study(study), plan_study(tiny_study(privacy=half))
    assert plan.get("train") is None
    with pytest.raises(BudgetError, match="plans no 'train'"):
        plan["train"]
    assert plan["moments"].noise_multiplier < 0.7 * usual["moments"].noise_multiplier
    cost = epsilon_of(plan.losses("train"), delta=DELTA, accountant="rdp")
    assert 0.97 * study.privacy.epsilon < cost <= study.privacy.epsilon


@pytest.mark.parametrize("part", [0.1, 0.4, MEANS_PART, 0.7])
def test_two_parts_of_a_release_cost_what_the_whole_costs(part):
    """A sum of sensitivity p under the noise of a whole one has a noise_multiplier of sigma / p."""
    whole = plan_study(tiny_study())["moments"].whole_loss
    other = math.sqrt(1 - part**2)
    parts = [PrivacyLoss(whole.noise_multiplier / p, 1.0, 1) for p in (part, other)]
    together = epsilon_of(parts, delta=DELTA, accountant="prv")
    assert together == pytest.approx(epsilon_of([whole], delta=DELTA, accountant="prv"), abs=0.02)


def test_an_impossible_budget_says_what_would_be_possible():
    study = tiny_study(privacy={"epsilon": 0.01, "accountant": "prv"})
    with pytest.raises(BudgetError, match=r"least possible is 0\.\d+.*Raise privacy\.epsilon to about"):
        plan_study(study)


def test_every_request_that_a_study_may_make_is_in_its_cost():
    """Each mechanism's steps times its releases, written out from its row: all of them fit below epsilon together."""
    study = tiny_study(training={"rounds": 20})
    plan = plan_study(study)
    for partition in PARTITIONS:
        everything = [
            PrivacyLoss(plan[m.name].noise_multiplier, m.sample_rate(study), m.steps(study))
            for m in wanted(study) if m.partition == partition for _ in range(m.releases(study))
        ]  # fmt: skip
        assert len(everything) > 1
        assert 0.97 * 8.0 < epsilon_of(everything, delta=DELTA, accountant="rdp") <= 8.0


def test_a_mechanism_with_a_share_costs_that_share_alone_and_no_more():
    study = tiny_study(privacy={"counts_share": 0.1, "reference_share": 0.25, "moments_share": 0.3})
    for mechanism in wanted(study):
        if mechanism.share(study) != REST:
            loss = plan_study(study)[mechanism.name].whole_loss
            cost = epsilon_of([loss], delta=DELTA, accountant="prv")
            assert 0.99 * mechanism.share(study) * 8.0 < cost <= mechanism.share(study) * 8.0


def test_shares_that_add_up_to_more_than_there_is_are_refused():
    study = tiny_study(privacy={"counts_share": 0.9, "reference_share": 0.9, "moments_share": 0.0})
    with pytest.raises(BudgetError):
        plan_study(study)


def test_every_mechanism_is_planned_with_the_figures_of_its_row():
    study = tiny_study()
    for mechanism, plan in zip(wanted(study), plan_study(study).mechanisms, strict=True):
        assert (plan.name, plan.partition) == (mechanism.name, mechanism.partition)
        assert plan.sample_rate == mechanism.sample_rate(study)
        assert (plan.steps, plan.releases) == (mechanism.steps(study), mechanism.releases(study))
        assert plan.sensitivity == mechanism.sensitivity(study)
        assert plan.noise_std == plan.noise_multiplier * plan.sensitivity


def test_losses_without_bound_are_refused_quickly_and_take_no_memory():
    """Sigma 0.001 would have the PRV accountant ask for gigabytes."""
    tracemalloc.start()
    with pytest.raises(BudgetError):
        epsilon_of([PrivacyLoss(0.001, 0.5, 10_000)], delta=DELTA, accountant="prv")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(("epsilon", "accountant"), [(0.5, "rdp"), (3.0, "prv"), (100.0, "rdp")])
def test_noise_is_the_least_that_the_budget_allows(accountant, epsilon):
    """With 2 % less of it, the rest would cost more than is left."""
    study = tiny_study(privacy={"epsilon": epsilon, "accountant": accountant})
    plan = plan_study(study)
    train = plan["train"]
    if train.noise_multiplier <= LEAST_NOISE:
        return
    others = [p.whole_loss for p in plan.mechanisms if p.partition == "train" and p.name != "train"]
    less = train.whole_loss._replace(noise_multiplier=train.noise_multiplier * 0.98)
    assert epsilon_of([*others, less], delta=DELTA, accountant=accountant) > epsilon
