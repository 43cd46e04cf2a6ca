"""The private reference: each step is one clipped sum made noisy, it is paid for once, and kept at the site.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from client.reference import private_reference
from common.accounting import plan_study
from common.bounded import BoundedSum
from common.errors import BudgetError, StudyError
from common.images import ImageSet, Units
from common.model.classifier import BiomarkerClassifier
from support.studies import tiny_study

STUDY = tiny_study(validation={"reference_steps": 3}, privacy={"reference_share": 0.2})
PLAN = plan_study(STUDY)["reference"]


pytestmark = pytest.mark.usefixtures("one_thread")


class _Noisy:
    def __init__(self, tensors):
        self.tensors = tensors


class _Gate:
    """In the place of gate and permit: keeps each sum, and hands it back `sign` times, without noise."""

    def __init__(self, *, sign=1.0, keep=None, refuse=False):
        self.sums: list[BoundedSum] = []
        self.spent: list[str] = []
        self.confirmed = False
        self._sign, self._keep, self._refuse = sign, keep, refuse

    @contextlib.contextmanager
    def spend(self, *names):
        if self._refuse:
            raise BudgetError("used up")
        self.spent += names
        yield self

    def plan(self, name):
        assert name == "reference"
        return PLAN

    def sample(self, name, units):
        assert name == "reference"
        mask = np.ones(units, dtype=bool)
        return mask if self._keep is None else np.isin(np.arange(units), self._keep)

    def noisy(self, name, total):
        assert name == "reference"
        self.sums.append(total)
        return _Noisy({key: self._sign * part for key, part in total.parts.items()})

    @contextlib.contextmanager
    def confirming(self):
        yield
        self.confirmed = True

    @property
    def store(self):
        return self

    admitted = None

    def made_of(self, _approval, what):
        return self.state / what


def _units(count=10, unit="image"):
    data, draws = STUDY.data, np.random.default_rng(0)
    pixels = draws.integers(0, 256, (count, data.channels, data.image_size, data.image_size), dtype=np.uint8)
    return Units.of(ImageSet(pixels, np.arange(count) % len(data.classes), np.arange(count) // 3), unit)


def _train(gate, state, *, study=STUDY, units=None, memory_mb=500):
    state.mkdir(exist_ok=True)
    gate.state = state
    return private_reference(gate, study, units or _units(), expected_batch=8.0, memory_mb=memory_mb)


def _flat(total):
    return torch.cat([total.parts[name].flatten() for name in sorted(total.parts)])


@pytest.mark.parametrize("memory_mb", [500, 64])
def test_a_unit_moves_each_sum_by_at_most_the_plans_sensitivity(tmp_path, memory_mb):
    whole, moved = _Gate(), []
    _train(whole, tmp_path / "whole", memory_mb=memory_mb)
    assert {total.bound for total in whole.sums} == {PLAN.sensitivity}
    for gone in (0, 9):
        rest = _Gate(keep=[r for r in range(10) if r != gone])
        _train(rest, tmp_path / f"rest-{gone}", memory_mb=memory_mb)
        moved.append(float((_flat(whole.sums[0]) - _flat(rest.sums[0])).norm()))
    assert max(moved) <= PLAN.sensitivity
    assert max(moved) >= 0.99 * PLAN.sensitivity  # so the bound is attained
    assert min(moved) > 0


def test_a_step_is_one_sum_under_one_mechanism_and_an_empty_batch_is_a_step_of_zeros(tmp_path):
    gate = _Gate(keep=[])
    trained = _train(gate, tmp_path)
    assert gate.spent == ["reference"]
    assert gate.confirmed
    assert len(gate.sums) == PLAN.steps == 3
    assert not any(_flat(total).any() for total in gate.sums)
    fresh = BiomarkerClassifier.fresh(STUDY).state()
    assert all(np.array_equal(fresh[name], value) for name, value in trained.state().items())


def test_the_weights_follow_the_noisy_sum_and_nothing_else(tmp_path):
    first, same, other = (_train(_Gate(sign=sign), tmp_path / name)
                          for name, sign in (("a", 1.0), ("b", 1.0), ("c", -1.0)))  # fmt: skip
    states = [model.state() for model in (first, same, other)]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not np.array_equal(states[0][name], states[2][name]) for name in states[0])
    assert not any(p.grad is not None or hasattr(p, "grad_sample") for p in first.net.parameters())
    assert not first.net.training


def test_it_is_trained_and_paid_for_once(tmp_path):
    trained, again = _train(_Gate(), tmp_path), _Gate()
    kept = _train(again, tmp_path)
    assert not again.spent
    assert all(np.array_equal(trained.state()[name], value) for name, value in kept.state().items())


def test_where_its_budget_is_gone_there_is_none_and_nothing_is_kept(tmp_path):
    assert _train(_Gate(refuse=True), tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_of_a_patient_one_image_counts_in_a_step(tmp_path):
    gate = _Gate(keep=[0])
    _train(gate, tmp_path, units=_units(unit="patient"))
    assert float(_flat(gate.sums[0]).norm()) <= PLAN.sensitivity


def test_a_backbone_that_cannot_be_trained_privately_is_refused_before_anything_is_spent(tmp_path):
    gate = _Gate()
    with pytest.raises(StudyError, match="test_resnet.* cannot be trained privately"):
        _train(gate, tmp_path, study=tiny_study(validation={"backbone": "test_resnet"}))
    assert not gate.spent
