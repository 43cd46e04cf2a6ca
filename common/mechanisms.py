"""Every noisy release that a study can make, one row each: a new one is a new row.

SPDX-License-Identifier: Apache-2.0

Planning, checking, policy, explanation, claim and messages loop over `MECHANISMS`; what a row's sum is, and why its
sensitivity holds, is where the sum is made (docs/privacy.md has the table).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from common.metrics import l2_sensitivity
from common.study import Study

Partition = Literal["train", "holdout"]
PARTITIONS: tuple[Partition, ...] = ("train", "holdout")
EVALUATIONS = 2  # one is spare, so that a site that is killed in the middle of the only one can still answer
REST = math.inf  # as a share: whatever the other mechanisms on the same records leave


@dataclass(frozen=True)
class Mechanism:
    """One kind of noisy release. The functions are of the study alone.

    Attributes:
        partition: whose records it reads.
        wanted: whether the study makes it.
        sample_rate: Poisson sampling probability of a unit; 1 = all.
        steps: noisy sums in one request.
        releases: how many requests the study may make.
        sensitivity: the bound of each sum, L2.
        share: of epsilon, what it would cost alone; REST = what the others leave.
        meaning: what is released, for a claim.
        words: the same for a reader who knows nothing of machine learning; {unit} is the privacy unit.
    """

    name: str
    partition: Partition
    wanted: Callable[[Study], bool]
    sample_rate: Callable[[Study], float]
    steps: Callable[[Study], int]
    releases: Callable[[Study], int]
    sensitivity: Callable[[Study], float]
    share: Callable[[Study], float]
    meaning: str
    words: str


def _one(_: Study) -> int:
    return 1


def _classifiers(study: Study) -> int:
    """How many classifiers the held-out records test: the reference is one where the study wants it."""
    return 2 if study.privacy.reference_share > 0 else 1


MECHANISMS = (
    Mechanism(
        "counts", "train", lambda _: True, _one, _one, _one, _one, lambda s: s.privacy.counts_share,
        meaning="class counts of the training records, once per study",
        words="how many training {unit}s each class has"),
    Mechanism(
        "features", "train", lambda s: s.privacy.features_share > 0, _one, _one, _one, _one,
        lambda s: s.privacy.features_share,
        meaning="sums over the training images of their edges and textures by class, and of products, once per study",
        words="an average of the edges and textures of the {unit}s of each class, and how the {unit}s vary around it"),
    Mechanism(
        "moments", "train", lambda s: s.privacy.moments_share > 0, _one, _one, _one, _one,
        lambda s: s.privacy.moments_share if s.training.rounds else REST,
        meaning="sums over the training images of their low frequencies by class, then of the squares of what is left "
        "after the class means, of its energy by class and frequency band, and of its squared length, once per study",
        words="a blurred average of the {unit}s of each class, and how the {unit}s vary around it"),
    Mechanism(
        "train", "train", lambda s: s.training.rounds > 0, lambda s: s.training.sample_rate,
        lambda s: s.training.local_steps, lambda s: s.training.rounds, lambda s: s.training.max_grad_norm,
        lambda _: REST,
        meaning="clipped gradients of the diffusion model (and clipped losses, for the loss curve), each training step",
        words="in which direction the model should change to draw {unit}s like the ones here, summed over the {unit}s "
        "drawn at random in a step, and how well it did",
    ),
    Mechanism(
        "reference", "train", lambda s: s.privacy.reference_share > 0, lambda s: s.validation.reference_sample_rate,
        lambda s: s.validation.reference_steps, _one, lambda s: s.training.max_grad_norm,
        lambda s: s.privacy.reference_share,
        meaning="clipped gradients of the reference classifier, each of its steps",
        words="nothing by itself: a classifier trained on {unit}s here, which stays here; its test figures leave in "
        "the next item",
    ),
    Mechanism(
        "evaluate", "holdout", lambda _: True, _one, _one, lambda _: EVALUATIONS,
        lambda s: math.sqrt(_classifiers(s)) * l2_sensitivity(len(s.data.classes)), lambda _: REST,
        meaning="score histograms and confusion counts on held-out records (one request; a second is kept in reserve)",
        words="how often the classifiers were right on held-out {unit}s, as counts",
    ),
)  # fmt: skip
BY_NAME = {mechanism.name: mechanism for mechanism in MECHANISMS}


def wanted(study: Study) -> tuple[Mechanism, ...]:
    """The study's mechanisms, in order."""
    return tuple(mechanism for mechanism in MECHANISMS if mechanism.wanted(study))
