"""What leaves a site: noisy, reserved first, once, and never beyond the plan.

Each guard here was seen to fail with clipping, noise or the ledger taken out of the code (CONTRIBUTING.md tells how).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import client.privacy.gate as gate_module
import client.stages.train as train_module
from client.privacy.gate import Released
from client.privacy.randomness import NoiseSource
from client.stages.enrol import enrol
from client.stages.train import LARGEST_LOSS, load_model, train
from common.accounting import LOSS_SHARE, PrivacyLoss
from common.errors import BudgetError, PolicyRefusal, ReplyError
from common.messages import EnrolReply, EnrolRequest, TrainReply, TrainRequest, encode, identity
from common.model.diffusion_model import initial_weights
from support.sites import open_phantom_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()


def _weights(study=STUDY):
    torch.manual_seed(0)
    return initial_weights(study)


def _ask(site, request):
    gate = site.gate(request.agreement, identity(encode(request)))
    if isinstance(request, EnrolRequest):
        return gate, gate.stored(EnrolReply) or enrol(site, gate, request)
    return gate, gate.stored(TrainReply) or train(site, gate, request)


def _train_request(study=STUDY, number=1, expected_batch=12.0):
    return TrainRequest(agreement(study), round=number, expected_batch=expected_batch, arrays=_weights(study))


@pytest.fixture
def site(tmp_path):
    return open_phantom_site(tmp_path, STUDY)


@pytest.fixture
def releases(monkeypatch):
    """Every exact sum that the gate was asked to make noisy, with what it made of it and the reservations then."""
    seen = []
    original = gate_module.gaussian_release

    def spy(total, **settings):
        noisy = original(total, **settings)
        seen.append(({k: v.clone() for k, v in total.items()}, dict(noisy), settings))
        return noisy

    monkeypatch.setattr(gate_module, "gaussian_release", spy)
    return seen


def _norm(parts):
    return math.sqrt(sum(float(p.double().square().sum()) for p in parts.values()))


def test_counts_leave_with_noise_and_one_reservation(site, releases):
    gate, released = _ask(site, EnrolRequest(agreement()))
    exact = np.bincount(site.splits.train.labels, minlength=2)
    assert np.array_equal(releases[0][0]["counts"].numpy(), exact)
    assert not np.allclose(released.reply.arrays["counts"], exact)
    assert gate.ledger.counts(STUDY.sha256) == (1, 1)
    assert released.reply.spent.train > 0


def test_where_the_patient_is_the_unit_counts_batches_and_cohort_are_of_patients(tmp_path, releases, monkeypatch):
    study = tiny_study(privacy={"unit": "patient"})
    site = open_phantom_site(tmp_path, study)
    patients = len(np.unique(site.splits.train.patients))
    assert patients < len(site.splits.train)
    assert site.cohort.units == patients
    asked = []
    original = NoiseSource.poisson_mask
    monkeypatch.setattr(
        NoiseSource, "poisson_mask", lambda self, n, rate: (asked.append(n), original(self, n, rate))[1]
    )
    _ask(site, EnrolRequest(agreement(study)))
    assert float(releases[0][0]["counts"].sum()) == pytest.approx(patients)
    _ask(site, _train_request(study))
    assert set(asked) == {patients}


def test_each_round_reserves_exactly_the_planned_loss(site, releases):
    for number in (1, 2):
        gate, _ = _ask(site, _train_request(number=number))
    plan = agreement().plan.train
    assert gate.ledger.losses("train") == [plan.loss, plan.loss]
    assert gate.ledger.counts(STUDY.sha256) == (2, 2)
    assert len(releases) == 2 * plan.steps
    assert all(s["noise_multiplier"] == plan.noise_multiplier for _, _, s in releases)
    assert all(s["sensitivity"] == STUDY.training.max_grad_norm for _, _, s in releases)


@pytest.mark.parametrize("unit", ["image", "patient"])
def test_one_unit_with_its_gradient_and_loss_moves_the_sum_by_at_most_the_clipping_norm(
    tmp_path, releases, monkeypatch, unit
):
    study = tiny_study(privacy={"unit": unit}, diffusion={"noise_multiplicity": 3})
    site = open_phantom_site(tmp_path, study)

    def one(self, records, rate):
        mask = np.zeros(records, dtype=bool)
        mask[0] = True
        return mask

    monkeypatch.setattr(NoiseSource, "poisson_mask", one)
    _ask(site, _train_request(study))
    for exact, _, _ in releases:
        norm = STUDY.training.max_grad_norm
        assert 0 < _norm(exact) <= norm * (1 + 1e-6)
        gradients = {name: part for name, part in exact.items() if name != "loss"}
        assert _norm(gradients) <= norm * math.sqrt(1 - LOSS_SHARE**2) * (1 + 1e-6)
        assert 0 <= float(exact["loss"]) <= LOSS_SHARE * norm * (1 + 1e-9)


def test_on_an_empty_batch_the_update_is_noise_of_sigma_c_over_b(site, monkeypatch):
    monkeypatch.setattr(NoiseSource, "poisson_mask", lambda self, records, rate: np.zeros(records, dtype=bool))
    gradients = []
    original = train_module.Adam.step
    monkeypatch.setattr(
        train_module.Adam, "step", lambda self, given: (gradients.append(dict(given)), original(self, given))[1]
    )
    _ask(site, _train_request(expected_batch=12.0))
    plan = agreement().plan.train
    sample = torch.cat([g.flatten() for step in gradients for g in step.values()]).numpy()
    expected = plan.noise_multiplier * STUDY.training.max_grad_norm / 12.0
    statistic = (len(sample) - 1) * sample.var(ddof=1) / expected**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(sample) - 1)  # over 30,000 numbers: 3 % off is seen
    assert low < statistic < high
    assert len(sample) > 20_000


def test_the_noisy_loss_is_an_unbiased_mean_of_the_clipped_losses(site, releases):
    _, released = _ask(site, _train_request(expected_batch=12.0))
    steps = agreement().plan.train.steps
    from_noisy = sum(float(noisy["loss"]) for _, noisy, _ in releases)
    expected = from_noisy * LARGEST_LOSS / LOSS_SHARE / (12.0 * steps)
    assert released.reply.loss == pytest.approx(expected, rel=1e-9)


def test_the_same_request_is_answered_from_the_store_and_spends_nothing(site, releases):
    request = _train_request()
    _, first = _ask(site, request)
    made = len(releases)
    gate, second = _ask(site, request)
    assert len(releases) == made
    assert gate.ledger.counts(STUDY.sha256) == (1, 1)
    for name, array in first.reply.arrays.items():
        np.testing.assert_array_equal(array, second.reply.arrays[name])


def test_training_stops_before_the_ceiling_not_after(site):
    for number in (1, 2):
        _ask(site, _train_request(number=number))
    with pytest.raises(BudgetError, match="all 2 planned releases"):
        _ask(site, _train_request(number=3))
    gate = site.gate(agreement(), "x")
    assert gate.spent().train <= STUDY.privacy.epsilon


def test_a_crash_while_training_counts_as_spent(site, monkeypatch):
    monkeypatch.setattr(train_module._Step, "noisy_sum", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ask(site, _train_request())
    gate = site.gate(agreement(), "x")
    plan = agreement().plan.train
    assert gate.ledger.losses("train") == [PrivacyLoss(plan.noise_multiplier, plan.sample_rate, plan.steps)]
    assert gate.ledger.counts(STUDY.sha256) == (1, 0)


def test_a_reservation_is_on_the_disk_before_the_first_record_is_sampled(site, monkeypatch):
    reserved = []

    def spy(self, records, rate):
        reserved.append(site.gate(agreement(), "x").ledger.counts(STUDY.sha256))
        return np.zeros(records, dtype=bool)

    monkeypatch.setattr(NoiseSource, "poisson_mask", spy)
    _ask(site, _train_request())
    assert reserved[0] == (1, 0)


def test_a_mechanism_makes_no_more_than_its_planned_steps(site):
    gate = site.gate(agreement(), "x")
    with gate.spend(agreement().plan.counts) as permit:
        permit.noisy("counts", {"counts": torch.zeros(2)})
        with pytest.raises(BudgetError, match="planned steps"):
            permit.noisy("counts", {"counts": torch.zeros(2)})


def test_parts_of_a_release_add_up_by_their_squares_and_have_the_noise_of_a_whole_one(site, releases):
    plan = agreement().plan.counts
    gate = site.gate(agreement(), "x")
    with gate.spend(plan) as permit:
        permit.noisy("counts", {"counts": torch.zeros(2)}, part=0.6)
        with pytest.raises(BudgetError, match="planned steps"):
            permit.noisy("counts", {"counts": torch.zeros(2)}, part=0.81)
        permit.noisy("counts", {"counts": torch.zeros(2)}, part=0.79)
        with pytest.raises(BudgetError, match="planned steps"):
            permit.noisy("counts", {"counts": torch.zeros(2)}, part=0.3)
    for _, _, settings in releases:
        assert (settings["noise_multiplier"], settings["sensitivity"]) == (plan.noise_multiplier, plan.sensitivity)
    gate = site.gate(agreement(), "y")
    with gate.spend(agreement().plan.train) as permit:
        for part in (0.5, 0.0, -0.5, 1.5, math.nan):  # of a sampled sum there are no parts
            with pytest.raises(ValueError, match="no part"):
                permit.noisy("train", {"counts": torch.zeros(2)}, part=part)


@pytest.mark.parametrize(
    ("policy", "rule"),
    [("max_epsilon = 1.0", "max_epsilon"), ("max_study_delta = 1e-9", "max_study_delta"),
     ("max_study_epsilon = 1.0", "max_study_epsilon"),
     ('allowed_studies = ["abc"]', "allowed_studies"), ("max_stage_share = 0.1", "max_stage_share"),
     ('allowed_mechanisms = ["counts"]', "allowed_mechanisms"), ("min_units_per_class = 79", "min_units_per_class")],
)  # fmt: skip
def test_a_policy_refusal_spends_nothing_and_names_the_rule(tmp_path, policy, rule):
    site = open_phantom_site(tmp_path, STUDY, policy=policy)
    with pytest.raises(PolicyRefusal, match=rule) as caught:
        _ask(site, EnrolRequest(agreement()))
    assert bool(caught.value.asked) == bool(caught.value.allowed) == (rule != "min_units_per_class")
    assert site.gate(agreement(), "x").ledger.counts(STUDY.sha256) == (0, 0)


def test_a_study_that_is_not_approved_gets_nothing_and_a_revoked_one_gets_nothing_more(tmp_path):
    site = open_phantom_site(tmp_path, STUDY, approval=True)
    request = EnrolRequest(agreement())
    with pytest.raises(PolicyRefusal, match="require_approval"):
        _ask(site, request)
    ledger = site.config.ledger()
    ledger.note("approved", STUDY.sha256, by="somebody", name="tiny")
    _ask(site, request)
    ledger.note("revoked", STUDY.sha256, by="somebody", name="tiny")
    with pytest.raises(PolicyRefusal, match="require_approval"):
        _ask(site, _train_request())
    assert ledger.counts(STUDY.sha256) == (1, 1)
    other = tiny_study(training={"rounds": 1})
    ledger.note("approved", STUDY.sha256, by="somebody", name="tiny")
    with pytest.raises(PolicyRefusal, match="require_approval"):  # one byte of the study's settings is another study
        _ask(site, EnrolRequest(agreement(other)))


def test_a_plan_with_less_noise_than_the_study_can_afford_is_refused_before_anything_is_spent(site):
    agreed = agreement()
    weak = replace(agreed, plan=replace(agreed.plan, train=replace(agreed.plan.train, noise_multiplier=0.5)))
    with pytest.raises(BudgetError, match="the plan costs"):
        _ask(site, replace(_train_request(), agreement=weak))
    assert site.gate(agreed, "x").ledger.counts(STUDY.sha256) == (0, 0)


def test_released_is_made_by_the_gate_only():
    with pytest.raises(TypeError, match="by the gate only"):
        Released("raw data", key=object())


def test_weights_that_do_not_fit_are_refused_before_anything_is_spent(site):
    request = _train_request()
    broken = {**request.arrays, "swin.embed.weight": np.full_like(request.arrays["swin.embed.weight"], np.nan)}
    for arrays in (broken, {"other": np.zeros(3, np.float32)}):
        with pytest.raises(ReplyError):
            _ask(site, replace(request, arrays=arrays))
    for batch in (0.0, -1.0):
        with pytest.raises(ReplyError, match="expected batch"):
            _ask(site, replace(request, expected_batch=batch))
    assert site.gate(agreement(), "x").ledger.counts(STUDY.sha256) == (0, 0)
    with pytest.raises(ReplyError):
        load_model(STUDY, {"other": np.zeros(3, np.float32)})
