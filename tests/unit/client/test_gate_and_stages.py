"""What leaves a site: bounded, noisy, reserved first, once, and never beyond the plan that was approved.

Each guard here was seen to fail with clipping, noise or the ledger taken out of the code (tests/mutations.py).
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

import client.privacy.gate as gate_module
import client.stages.train as train_module
from client.privacy.chain import Chain
from client.privacy.gate import Released
from client.privacy.local_steps import LocalSteps
from client.privacy.mechanism import Noisy
from client.privacy.randomness import NoiseSource
from client.stages.enrol import enrol
from client.stages.train import train
from common import loss_curve
from common.accounting import PrivacyLoss
from common.bounded import BoundedSum, RunningSum
from common.errors import BudgetError, NotApproved, ReplyError
from common.images import Units
from common.model.diffusion_model import initial_weights
from common.protocol import Answer, EnrolReply, EnrolRequest, TrainReply, TrainRequest, decode_answer, decode_arrays
from support.sites import gate_of, open_phantom_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()
C = STUDY.training.max_grad_norm


def _ask(site, study=STUDY, number=1, expected_batch=12.0):
    """One round, as the service runs it."""
    request = TrainRequest(agreement=agreement(study), round=number, expected_batch=expected_batch)
    gate = gate_of(site, study, f"round {number} {study.sha256}")
    return _opened(gate.stored() or train(site, gate, request, initial_weights(study)))


def _enrol(site, study=STUDY, request="enrol"):
    gate = gate_of(site, study, request)
    return _opened(gate.stored() or enrol(site, gate, EnrolRequest(agreement=agreement(study)), {}))


def _opened(released: Released) -> tuple[Answer, dict]:
    answer, rest = decode_answer(released.data)
    return answer, decode_arrays(rest, "reply")


def _zeros(bound=1.0, size=2) -> BoundedSum:
    return RunningSum({"counts": (size,)}, bound).total()


def _counts(site, study=STUDY):
    with closing(site.config.ledger()) as ledger:
        return ledger.counts(study.sha256)


@pytest.fixture
def site(tmp_path):
    return open_phantom_site(tmp_path, STUDY)


@dataclass
class Release:
    """A sum that was made noisy, and with what."""

    exact: dict[str, torch.Tensor]
    bound: float
    noisy: dict[str, torch.Tensor]
    settings: dict


@pytest.fixture
def releases(monkeypatch):
    """Every exact sum that the gate was asked to make noisy, with what it made of it."""
    seen: list[Release] = []
    original = gate_module.gaussian_release

    def spy(total, **settings):
        noisy = original(total, **settings)
        seen.append(Release(dict(total.parts), total.bound, noisy.tensors, settings))
        return noisy

    monkeypatch.setattr(gate_module, "gaussian_release", spy)
    return seen


def _norm(parts):
    return math.sqrt(sum(float(p.double().square().sum()) for p in parts.values()))


def test_counts_leave_with_noise_and_one_reservation(site, releases):
    answer, arrays = _enrol(site)
    exact = np.bincount(site.splits.train.labels, minlength=2)
    assert np.allclose(releases[0].exact["counts"].numpy(), exact, atol=1e-5)
    assert not np.allclose(arrays["counts"], exact, atol=1e-3)
    assert releases[0].settings["noise_multiplier"] == agreement().plan["counts"].noise_multiplier
    assert answer.body == EnrolReply()
    assert (answer.spent.reserved, answer.spent.confirmed) == (1, 1) == _counts(site)
    assert answer.spent.train > 0


def test_where_the_patient_is_the_unit_counts_and_batches_are_of_patients(tmp_path, releases, monkeypatch):
    study = tiny_study(privacy={"unit": "patient"})
    site = open_phantom_site(tmp_path, study)
    patients = len(np.unique(site.splits.train.patients))
    assert patients < len(site.splits.train)
    assert site.cohort.units == patients
    asked = []
    original = NoiseSource.poisson_mask
    monkeypatch.setattr(
        NoiseSource, "poisson_mask", lambda self, n, rate: (asked.append((n, rate)), original(self, n, rate))[1]
    )
    _enrol(site, study)
    assert float(releases[0].exact["counts"].sum()) == pytest.approx(patients)
    _ask(site, study)
    assert set(asked) == {(patients, study.training.sample_rate)}


def test_each_round_reserves_exactly_the_planned_loss_and_is_sampled_at_the_planned_rate(site, releases, monkeypatch):
    rates = []
    original = NoiseSource.poisson_mask
    monkeypatch.setattr(NoiseSource, "poisson_mask", lambda s, n, rate: (rates.append(rate), original(s, n, rate))[1])
    for number in (1, 2):
        _ask(site, number=number)
    plan = agreement().plan["train"]
    with closing(site.config.ledger()) as ledger:
        assert ledger.losses("train") == [plan.loss._replace(steps=2 * plan.steps)]
    assert _counts(site) == (2, 2)
    assert len(releases) == 2 * plan.steps
    assert set(rates) == {plan.sample_rate}
    assert all(r.settings["noise_multiplier"] == plan.noise_multiplier for r in releases)
    assert all(r.settings["sensitivity"] == C == pytest.approx(r.bound) for r in releases)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.7])
def test_a_batch_is_a_poisson_sample_at_its_rate(rate):
    """Two-sided binomial test at alpha 1e-6; 1.5 times the rate is seen with power > 0.9999."""
    mask = NoiseSource(seed=1).poisson_mask(20_000, rate)
    assert stats.binomtest(int(mask.sum()), len(mask), rate).pvalue > 1e-6
    assert stats.binomtest(int(mask.sum()), len(mask), min(1.0, 1.5 * rate)).pvalue < 1e-6


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
    _ask(site, study)
    for release in releases:
        assert 0 < _norm(release.exact) <= C * (1 + 1e-6)
        gradients = {name: part for name, part in release.exact.items() if name != "loss"}
        assert _norm(gradients) <= C * math.sqrt(1 - loss_curve.LOSS_SHARE**2) * (1 + 1e-6)
        assert 0 <= float(release.exact["loss"]) <= loss_curve.LOSS_SHARE * C * (1 + 1e-9)


def test_on_an_empty_batch_the_update_is_noise_of_sigma_c_over_b(site, monkeypatch):
    monkeypatch.setattr(NoiseSource, "poisson_mask", lambda self, records, rate: np.zeros(records, dtype=bool))
    gradients = []
    original = LocalSteps.step

    def spy(self, gradient, *, expected_batch):
        tensors = {n: t / expected_batch for n, t in gradient.tensors.items() if n != "loss"}
        gradients.append(tensors)
        original(self, gradient, expected_batch=expected_batch)

    monkeypatch.setattr(train_module.LocalSteps, "step", spy)
    _ask(site, expected_batch=12.0)
    plan = agreement().plan["train"]
    sample = torch.cat([g.flatten() for step in gradients for g in step.values()]).numpy()
    expected = plan.noise_multiplier * C / 12.0
    statistic = (len(sample) - 1) * sample.var(ddof=1) / expected**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(sample) - 1)  # over 30,000 numbers: 3 % off is seen
    assert low < statistic < high
    assert len(sample) > 20_000


def test_the_divisor_is_the_public_estimate_and_never_the_true_batch(site, monkeypatch):
    """Half the estimate doubles the gradient that the optimizer sees, whatever the batch was."""
    seen = {}
    for batch in (12.0, 6.0):
        monkeypatch.setattr(NoiseSource, "normal_like", lambda self, part: torch.ones_like(part))
        monkeypatch.setattr(NoiseSource, "poisson_mask", lambda self, records, rate: np.zeros(records, dtype=bool))
        given = []
        monkeypatch.setattr("client.privacy.local_steps.Adam.step", lambda self, g, given=given: given.append(dict(g)))
        _ask(site, number=1 if batch == 12.0 else 2, expected_batch=batch)
        seen[batch] = given[0]
    for name, gradient in seen[12.0].items():
        assert torch.allclose(2 * gradient, seen[6.0][name])


def test_the_loss_leaves_as_the_noisy_sum_over_the_steps(site, releases):
    answer, arrays = _ask(site)
    expected = sum(float(release.noisy["loss"]) for release in releases)
    assert arrays["loss"].shape == (1,)
    assert float(arrays["loss"][0]) == pytest.approx(expected, rel=1e-6)
    assert answer.body == TrainReply(round=1)


def test_with_fedsgd_the_noisy_sum_itself_leaves(tmp_path, releases):
    study = tiny_study(training={"algorithm": "fedsgd", "local_steps": 1})
    _, arrays = _ask(open_phantom_site(tmp_path, study), study)
    assert len(releases) == 1
    for name, part in releases[0].noisy.items():
        np.testing.assert_array_equal(arrays[name], part.float().numpy())


def test_the_same_request_is_answered_with_the_stored_bytes_and_spends_nothing(site, releases):
    _, first = _ask(site)
    made = len(releases)
    _, second = _ask(site)
    assert len(releases) == made
    assert _counts(site) == (1, 1)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_training_stops_before_the_ceiling_not_after(site):
    for number in (1, 2):
        _ask(site, number=number)
    with pytest.raises(BudgetError, match="all 2 planned releases"):
        _ask(site, number=3)
    assert gate_of(site, STUDY).spent().train <= STUDY.privacy.epsilon


def test_a_crash_while_training_counts_as_spent(site, monkeypatch):
    monkeypatch.setattr(train_module._Step, "noisy_sum", lambda self, permit: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ask(site)
    plan = agreement().plan["train"]
    with closing(site.config.ledger()) as ledger:
        assert ledger.losses("train") == [PrivacyLoss(plan.noise_multiplier, plan.sample_rate, plan.steps)]
    assert _counts(site) == (1, 0)


def test_a_reservation_is_on_the_disk_before_the_first_record_is_sampled(site, monkeypatch):
    reserved = []

    def spy(self, records, rate):
        reserved.append(_counts(site))
        return np.zeros(records, dtype=bool)

    monkeypatch.setattr(NoiseSource, "poisson_mask", spy)
    _ask(site)
    assert reserved[0] == (1, 0)


def test_counts_are_reserved_before_a_record_is_counted(site, monkeypatch):
    reserved = []
    original = Units.weights
    monkeypatch.setattr(Units, "weights", lambda self: (reserved.append(_counts(site)), original(self))[1])
    _enrol(site)
    assert reserved
    assert set(reserved) == {(1, 0)}


def test_an_answer_is_stored_before_it_is_confirmed(site, monkeypatch):
    """A crash between the two costs nothing: the same request finds its answer, and the loss is counted."""
    append = Chain.append

    def fails(chain, kind, *rest):
        return 1 / 0 if kind == "confirmed" else append(chain, kind, *rest)

    monkeypatch.setattr(Chain, "append", fails)
    with pytest.raises(ZeroDivisionError):
        _enrol(site)
    monkeypatch.undo()
    assert _counts(site) == (1, 0)
    answer, _ = _enrol(site)
    assert answer.spent.reserved == 1
    assert _counts(site) == (1, 0)


def test_a_mechanism_makes_no_more_than_its_planned_steps(site):
    with gate_of(site, STUDY).spend("counts") as permit:
        permit.noisy("counts", _zeros())
        with pytest.raises(BudgetError, match="planned steps"):
            permit.noisy("counts", _zeros())


def test_parts_of_a_release_add_up_by_their_squares_and_have_the_noise_of_a_whole_one(site, releases):
    plan = agreement().plan["counts"]
    with gate_of(site, STUDY).spend("counts") as permit:
        permit.noisy("counts", _zeros(0.6))
        with pytest.raises(BudgetError, match="planned steps"):
            permit.noisy("counts", _zeros(0.81))
        permit.noisy("counts", _zeros(0.79))
        with pytest.raises(BudgetError, match="planned steps"):
            permit.noisy("counts", _zeros(0.3))
    for release in releases:
        assert release.settings["noise_multiplier"] == plan.noise_multiplier
        assert release.settings["sensitivity"] == plan.sensitivity
    with gate_of(site, STUDY, "y").spend("train") as permit:
        for bound in (0.5 * C, 1.5 * C):  # of a sampled sum there are no parts, and nothing has a bound over the plan's
            with pytest.raises(ValueError, match="no part"):
                permit.noisy("train", _zeros(bound))


def test_a_sum_of_a_larger_bound_than_planned_is_never_made_noisy(site, releases):
    with gate_of(site, STUDY).spend("counts") as permit, pytest.raises(ValueError, match="no part"):
        permit.noisy("counts", _zeros(1.001))
    assert not releases


@pytest.mark.parametrize("raw", [torch.zeros(2), {"counts": torch.zeros(2)}, np.zeros(2), None])
def test_nothing_but_noisy_numbers_can_be_sealed_and_nothing_is_stored(site, raw):
    with gate_of(site, STUDY).spend("counts") as permit, pytest.raises(TypeError, match="only Noisy"):
        permit.seal(EnrolReply(), raw)
    assert not list((site.state / "replies").glob("*"))


def test_noisy_numbers_cannot_be_made_or_changed_from_outside(site):
    with pytest.raises(TypeError, match="by a mechanism only"):
        Noisy({"counts": torch.zeros(2)}, key=object())
    with gate_of(site, STUDY).spend("counts") as permit:
        noisy = permit.noisy("counts", _zeros())
        before = noisy.tensors["counts"].clone()
        noisy.tensors["counts"].fill_(7.0)
        assert torch.equal(noisy.tensors["counts"], before)
        _, arrays = _opened(permit.seal(EnrolReply(), noisy))
    np.testing.assert_array_equal(arrays["counts"], before.numpy())


def test_released_is_made_by_the_gate_only():
    with pytest.raises(TypeError, match="by the gate only"):
        Released(b"raw data", key=object())


def test_a_study_that_is_not_approved_gets_nothing_and_a_revoked_one_gets_nothing_more(tmp_path):
    site = open_phantom_site(tmp_path, STUDY)
    _enrol(site)
    with closing(site.config.ledger()) as ledger:
        ledger.revoke(STUDY.sha256, by="Dr. B. Test")
    for again in (lambda: _ask(site), lambda: gate_of(site, STUDY, "enrol").admit()):
        with pytest.raises(NotApproved):
            again()
    assert _counts(site) == (1, 1)
    other = tiny_study(training={"rounds": 1})  # one setting more or less is another study
    with pytest.raises(NotApproved):
        _enrol(site, other, "other")


@pytest.mark.parametrize(
    ("mechanism", "change"),
    [
        ("counts", {"noise_multiplier": 0.62}), ("counts", {"noise_multiplier": 500.0}),
        ("train", {"noise_multiplier": 0.5}), ("train", {"sample_rate": 0.3}), ("train", {"releases": 7}),
        ("train", {"sensitivity": 0.5}), ("evaluate", {"partition": "train"}), ("moments", {"steps": 2}),
    ],
)  # fmt: skip
def test_any_plan_but_the_one_that_was_approved_is_refused_before_anything_is_spent(site, mechanism, change):
    agreed = agreement()
    plans = tuple(p.model_copy(update=change) if p.name == mechanism else p for p in agreed.plan.mechanisms)
    assert plans != agreed.plan.mechanisms
    weak = agreed.model_copy(update={"plan": agreed.plan.model_copy(update={"mechanisms": plans})})
    gate = gate_of(site, STUDY)
    gate.agreement = weak
    with pytest.raises(BudgetError, match="not the one that was approved"):
        train(site, gate, TrainRequest(agreement=weak, round=1, expected_batch=12.0), initial_weights(STUDY))
    assert _counts(site) == (0, 0)


def test_weights_that_do_not_fit_are_refused_before_anything_is_spent(site):
    weights = initial_weights(STUDY)
    name = "net.embed.weight"
    bad = [
        {**weights, name: np.full_like(weights[name], value)} for value in (np.nan, np.inf, 1e9, -1e9)
    ] + [{"other": np.zeros(3, np.float32)}, {**weights, name: weights[name].astype(np.float64) * 1e300},
         {**weights, name: weights[name].astype(np.float64)}, {**weights, name: weights[name].astype(np.float16)},
         {**weights, name: weights[name][:1]}]  # fmt: skip
    request = TrainRequest(agreement=agreement(), round=1, expected_batch=12.0)
    for arrays in bad:
        with pytest.raises(ReplyError):
            train(site, gate_of(site, STUDY), request, arrays)
    assert _counts(site) == (0, 0)
