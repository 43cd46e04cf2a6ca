"""Canaries in the shipped training step: records whose gradient lies in a direction of their own, known to an attacker.

SPDX-License-Identifier: Apache-2.0

The strongest attacker of Steinke et al. 2023 (white box): it has put m canaries into the gradient, each in a direction
of its own, and sees the noisy sum of every step. Everything else is the shipped path: gate, ledger, Poisson sampling,
units, clipping, the loss coordinate, noise. Two networks carry the canaries:

    table   one number a canary: a canary's whole gradient is one coordinate. Nothing is left for an attacker to gain.
    swin    the shipped network, loss and per-record gradients, with weights as a malicious coordinator would send them;
            a canary is an image of a class of its own, so that a row of the label table is its alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import client.stages.train as train_module
from client.privacy.fingerprints import Fingerprints
from client.privacy.gate import Gate
from client.privacy.gradients import PrivateGradients
from client.privacy.ledger import Ledger
from client.privacy.policy import SitePolicy
from client.privacy.randomness import NoiseSource
from client.privacy.store import Store
from client.site import Performance
from common.accounting import MechanismPlan, epsilon_of
from common.auditing import epsilon_lower_bound, p_value
from common.images import ImageSet, Units
from common.loss_curve import LOSS_SHARE
from common.model.diffusion_model import DiffusionModel
from common.protocol import Agreement, SiteFacts
from common.study import Study
from support.studies import agreement, tiny_study

GROUPS = {"table": 2_000, "swin": 250}  # canaries at one site
UNCLIPPED = 1000.0  # gradient norm of a canary before clipping
# Largest share of the clipping norm that a canary brings in its own direction: the loss coordinate takes a part, and in
# the Swin U-Net the bias of the last layer of the noise level has the same gradient as the row of the label table.
REACH = {"table": math.sqrt(1 - LOSS_SHARE**2), "swin": math.sqrt((1 - LOSS_SHARE**2) / 2)}


@dataclass(frozen=True)
class Case:
    """What is claimed, what is run, and how the attacker plays.

    Attributes:
        guess_in, guess_out: fixed beforehand: "in" for the largest scores, "out" for the smallest, else no guess.
    """

    epsilon: float
    delta: float
    sample_rate: float
    steps: int
    canaries: int
    guess_in: int
    guess_out: int
    network: Literal["table", "swin"] = "table"

    @property
    def agreed(self) -> Agreement:
        """A study whose epsilon goes to the training steps, but for a twentieth that the counts need."""
        return agreement(tiny_study(
            data={"image_size": 8, "channels": 1, "classes": ["clear", "opacity"]},
            network={"width": 26, "depths": [1], "heads": [2], "window": 4},
            diffusion={"noise_multiplicity": 1, "label_dropout": 0.0}, generation={"guidance": 0.0},
            training={"rounds": 1, "local_steps": self.steps, "sample_rate": self.sample_rate},
            pretrain={"source": "none"},
            privacy={"epsilon": self.epsilon, "delta": self.delta, "accountant": "prv", "counts_share": 0.05,
                     "moments_share": 0.0, "features_share": 0.0, "reference_share": 0.0},
        ))  # fmt: skip

    @property
    def claimed(self) -> float:
        """Epsilon of the training steps alone."""
        return epsilon_of([training_plan(self.agreed).whole_loss], delta=self.delta, accountant="prv")

    @property
    def guesses(self) -> int:
        return self.guess_in + self.guess_out

    def proven(self, correct: int) -> float:
        """95 % lower bound on epsilon."""
        return epsilon_lower_bound(
            correct=correct, guesses=self.guesses, canaries=self.canaries, delta=self.delta, confidence=0.95
        )

    def correct(self, scores: np.ndarray, inside: np.ndarray) -> int:
        """Right guesses."""
        order = np.argsort(scores, kind="stable")
        return int(inside[order[self.canaries - self.guess_in :]].sum() + (~inside[order[: self.guess_out]]).sum())


def attack(folder: Path, case: Case, *, seed: int) -> int:
    """Run the planned steps over the canaries that the coin put in, and guess: how many guesses are right."""
    inside = np.random.default_rng(seed).random(case.canaries) < 0.5
    return case.correct(_scores(folder, case, np.flatnonzero(inside), seed), inside)


def simulated(case: Case, *, noise: float = 1.0, runs: int, seed: int) -> np.ndarray:
    """Right guesses of `runs` attacks by the law that the scores should have, with `noise` times the planned noise."""
    rng, plan = np.random.default_rng(seed), training_plan(case.agreed)
    spread, found = noise * plan.noise_multiplier * math.sqrt(plan.steps), []
    for _ in range(runs):
        inside = rng.random(case.canaries) < 0.5
        times = rng.binomial(plan.steps, plan.sample_rate, case.canaries) if plan.sample_rate < 1 else plan.steps
        scores = REACH[case.network] * times * inside + spread * rng.standard_normal(case.canaries)
        found.append(case.correct(scores, inside))
    return np.array(found)


@lru_cache(maxsize=32)
def needed(case: Case) -> int:
    """Fewest right guesses that prove more than is claimed; more than there are guesses when none do."""

    def proves(correct: int) -> bool:
        return (
            p_value(
                correct=correct, guesses=case.guesses, canaries=case.canaries, epsilon=case.claimed, delta=case.delta
            )
            < 0.05
        )

    low, high = 0, case.guesses + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def _scores(folder: Path, case: Case, inside: np.ndarray, seed: int) -> np.ndarray:
    """What was released in each canary's direction, summed over the steps, in units of the clipping norm.

    Every group of canaries is at a site of their own, since a gradient has as many numbers as there are directions.
    Sites share no record, so all answers together have the epsilon of one.
    """
    scores, group = [], GROUPS[case.network]
    for first in range(0, case.canaries, group):
        here = inside[(inside >= first) & (inside < first + group)] - first
        scores.append(_scores_of_a_site(folder / f"site-{seed}-{first}", case, here, seed * case.canaries + first))
    return np.concatenate(scores)[: case.canaries]


def _scores_of_a_site(folder: Path, case: Case, inside: np.ndarray, seed: int) -> np.ndarray:
    """Scores of a group of canaries, of which those numbered `inside` are records."""
    agreed, plan, group = case.agreed, training_plan(case.agreed), GROUPS[case.network]
    ledger = Ledger.create(folder)
    data = Fingerprints.of(ledger.key, _records(inside, 1), _nobody())
    ledger.approve(agreed.study, agreed.plan, data, by="Dr. Test")
    gate = Gate(
        facts=SiteFacts(name="audit", phantoms=True, random_source="seeded"), agreement=agreed, request="audit",
        policy=SitePolicy(), ledger=ledger, source=NoiseSource(seed), store=Store(folder), images=lambda _: None,
    )  # fmt: skip
    total = np.zeros(group)
    with gate.spend("train") as permit:
        make, name = (_TableStep, "weight") if case.network == "table" else (_swin_step, "net.label.weight")
        step = make(agreed, inside)
        for _ in range(plan.steps):
            rows = step.noisy_sum(permit).tensors[name][:group]
            total += (rows.sum(dim=1) / math.sqrt(rows.shape[1])).numpy()  # along the unit vector (1, ..., 1)
        with permit.confirming():
            pass
    ledger.close()
    return total / plan.sensitivity


def _records(inside: np.ndarray, side: int) -> ImageSet:
    """One image of noise for each canary that is in; its label is its number."""
    images = np.random.default_rng(0).integers(0, 256, (len(inside), 1, side, side), np.uint8)
    return ImageSet(images, inside.astype(np.int64))


def _nobody() -> ImageSet:
    return ImageSet(np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int64))


class _TableStep(train_module._Step):
    """The shipped step, over other records: record i has the gradient UNCLIPPED × e_i, whatever the weights."""

    def __init__(self, agreed: Agreement, inside: np.ndarray) -> None:
        self._units, self._draws = Units.of(_records(inside, 1), "image"), 1
        self._choice, self.expected_batch = np.random.default_rng(0), GROUPS["table"] / 2
        net = nn.Embedding(GROUPS["table"], 1)
        nn.init.zeros_(net.weight)
        self._gradients = PrivateGradients(
            net, lambda net, _, y: UNCLIPPED * net(y).flatten(1).sum(dim=1), lambda x, y: (x, y),
            max_grad_norm=agreed.study.training.max_grad_norm, physical_batch=128, loss_part=True,
        )  # fmt: skip


def _swin_step(agreed: Agreement, inside: np.ndarray) -> train_module._Step:
    """The shipped step as a site makes it, over images of noise; only the limit on the number of classes is lifted."""
    data = agreed.study.data.model_copy(update={"classes": tuple(map(str, range(GROUPS["swin"])))})
    study = agreed.study.model_copy(update={"data": data})
    site = SimpleNamespace(
        train=Units.of(_records(inside, data.image_size), "image"), config=SimpleNamespace(performance=Performance())
    )
    rate = training_plan(agreed).sample_rate
    with patch.object(train_module, "_physical_batch", return_value=64):  # found with a network of as many classes
        step = train_module._Step(site, study, malicious_net(study), rate * GROUPS["swin"] / 2)  # pyright: ignore
    step._generator.manual_seed(0)  # the draws of the loss do not move the scores; seeded all the same
    return step


def malicious_net(study: Study) -> DiffusionModel:
    """Weights under which nearly the whole gradient of an image is in the row of its class, along (1, ..., 1).

    The output is far too large, everywhere alike, so that noise and image no longer matter. On the way back a gate of
    the Swin block amplifies: the condition moves one channel of its group of thirteen. The gate's own weights have no
    gradient, because the condition is 0; nor have the layers of the noise level.
    """
    net = DiffusionModel(study)
    parts = dict(net.named_parameters())
    block, width = "net.down.0.blocks.1.", study.network.width
    with torch.no_grad():
        for parameter in parts.values():
            parameter.zero_()
        parts[f"{block}contract.bias"].fill_(1.0)
        parts[f"{block}condition.bias"][5 * width :] = torch.linspace(-1, 1, width) ** 3  # the gate of the MLP
        parts[f"{block}condition.weight"][5 * width] = 100 * UNCLIPPED
        parts["net.norm.weight"].fill_(1.0)
        parts["net.norm.bias"].fill_(1.0)
        parts["net.head.weight"][:, 0, 1, 1] = 1.0
        parts["net.head.bias"].fill_(UNCLIPPED)
    return net


def training_plan(agreed: Agreement) -> MechanismPlan:
    """The plan of the training steps, which every case has."""
    return agreed.plan["train"]
