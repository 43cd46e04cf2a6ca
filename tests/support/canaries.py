"""Canaries in the shipped training step: records whose whole gradient is one coordinate of their own.

SPDX-License-Identifier: Apache-2.0

The strongest attacker of Steinke et al. 2023 (white box): it has put m canaries into the gradient, each in a direction
of its own, and sees the noisy sum of every step. Everything else is the shipped path: gate, ledger, Poisson sampling,
units, clipping, the loss coordinate, noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import client.privacy.gate as gate_module
import client.stages.train as train_module
from client.privacy.gate import Gate
from client.privacy.ledger import Ledger
from client.privacy.policy import Cohort, SitePolicy
from client.privacy.randomness import NoiseSource
from common.accounting import epsilon_of, plan_study
from common.auditing import epsilon_lower_bound
from common.images import ImageSet, Units
from common.messages import Agreement
from support.studies import tiny_study

UNCLIPPED = 1000.0  # gradient norm of a canary before clipping


@dataclass(frozen=True)
class Attack:
    """How the attacker plays: r guesses "in" for the largest scores, and r' guesses "out" for the smallest."""

    canaries: int
    guess_in: int
    guess_out: int


@dataclass(frozen=True)
class Audit:
    claimed: float
    proven: float
    accuracy: float


def audit(
    folder: Path, attack: Attack, *, epsilon: float, delta: float, sample_rate: float, steps: int, seed: int
) -> Audit:
    """Run the planned steps over the canaries that the coin put in, guess, and bound epsilon from below."""
    study = tiny_study(
        training={"rounds": 1, "local_steps": steps, "sample_rate": sample_rate},
        privacy={"epsilon": epsilon, "delta": delta, "counts_share": 0.05, "reference_share": 0.0, "accountant": "prv"},
    )  # fmt: skip
    agreed = Agreement(study, plan_study(study))
    plan = agreed.plan.train
    inside = np.random.default_rng(seed).random(attack.canaries) < 0.5
    scores = _scores(folder, agreed, np.flatnonzero(inside), attack.canaries, seed)
    order = np.argsort(scores)
    correct = int(inside[order[attack.canaries - attack.guess_in :]].sum() + (~inside[order[: attack.guess_out]]).sum())
    guesses = attack.guess_in + attack.guess_out
    return Audit(
        claimed=epsilon_of([plan.whole_loss], delta=delta, accountant="prv"),
        proven=epsilon_lower_bound(correct=correct, guesses=guesses, canaries=attack.canaries, delta=delta),
        accuracy=correct / guesses,
    )


def _scores(folder: Path, agreed: Agreement, inside: np.ndarray, canaries: int, seed: int) -> np.ndarray:
    """What was released in each canary's direction, summed over the steps."""
    ledger = Ledger(folder / "ledger.sqlite")
    gate = Gate(
        agreement=agreed, request="audit", policy=SitePolicy(require_approval=False), ledger=ledger,
        source=NoiseSource(seed), cohort=Cohort(len(inside), len(inside)), replies=folder,
    )  # fmt: skip
    total = np.zeros(canaries)
    with gate.spend(agreed.plan.train) as permit:
        step = _CanaryStep(agreed, permit, inside, canaries)
        for _ in range(agreed.plan.train.steps):
            total += step.noisy_sum()["weight"][:, 0].numpy()
        permit.done()
    ledger.close()
    return total


class _CanaryStep(train_module._Step):
    """The shipped step, over other records: record i has the gradient UNCLIPPED × e_i, whatever the weights."""

    def __init__(self, agreed: Agreement, permit: gate_module.Permit, inside: np.ndarray, canaries: int) -> None:
        records = ImageSet(np.zeros((len(inside), 1, 1, 1), np.uint8), inside.astype(np.int64))
        self._units, self._draws, self._choice = Units.of(records, "image"), 1, np.random.default_rng(0)
        net = nn.Embedding(canaries, 1)
        nn.init.zeros_(net.weight)
        self._net, self._permit = net, permit  # pyright: ignore[reportAttributeAccessIssue]
        self._norm, self._physical, self.nonfinite = agreed.study.training.max_grad_norm, 4096, 0

    def _per_record(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return UNCLIPPED * self._net(y).flatten(1).sum(dim=1)
