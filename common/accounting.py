"""What is planned and what it costs: one frozen plan behind sampler, noise and ledger.

SPDX-License-Identifier: Apache-2.0

A *mechanism* adds Gaussian noise of standard deviation noise_multiplier × sensitivity to a sum over records, each
record being in the sum with probability sample_rate (1 = all records). Its privacy loss is the entry
(noise_multiplier, sample_rate, steps) of an Opacus accountant's history; a plain Gaussian release is (sigma, 1, 1).
Adjacency: add or remove one record.

The records of a site are split once into the partitions *train* and *holdout*; a record is in exactly one of them, so
a record's loss is that of its own partition (parallel composition) and a site's epsilon is the larger of the two.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from common.errors import BudgetError
from common.metrics import l2_sensitivity
from common.study import Study

Partition = Literal["train", "holdout"]
PARTITIONS: tuple[Partition, ...] = ("train", "holdout")
LARGEST_NOISE = 500.0  # beyond this no result is worth having, and the accountant's own error dominates
LEAST_NOISE = 0.4  # below it no epsilon of interest lies, and the accountants are slow
EVALUATIONS = 2  # one is spare, so that a site that is killed in the middle of the only one can still answer
MOMENTS_STEPS = 1  # class sums, then squares about the means they give: two parts of one release (`common/moments.py`)
LOSS_SHARE = 0.2  # of the clipping norm, for the private loss curve; costs 2 % of the gradient's norm


@dataclass(frozen=True)
class MechanismPlan:
    """One kind of noisy release, fixed before any record is touched. Every field is public.

    Attributes:
        name: the stage that uses it.
        partition: whose records it reads.
        noise_multiplier: noise standard deviation divided by `sensitivity`.
        sample_rate: Poisson sampling probability of each record; 1 = every record.
        steps: noisy sums in one request.
        releases: how many requests the whole study may make.
        sensitivity: largest L2 change of the sum when one record is added or removed.
    """

    name: str
    partition: Partition
    noise_multiplier: float
    sample_rate: float
    steps: int
    releases: int
    sensitivity: float

    @property
    def loss(self) -> PrivacyLoss:
        """The loss of one request."""
        return PrivacyLoss(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def whole_loss(self) -> PrivacyLoss:
        """The loss of all requests that the study may make."""
        return PrivacyLoss(self.noise_multiplier, self.sample_rate, self.steps * self.releases)


@dataclass(frozen=True)
class PrivacyLoss:
    """One entry of an accountant's history."""

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class StudyPlan:
    """All mechanisms of a study, by stage; `moments`, `train` and `reference` are None when the study asks for none."""

    counts: MechanismPlan
    moments: MechanismPlan | None
    train: MechanismPlan | None
    reference: MechanismPlan | None
    evaluate: MechanismPlan

    @property
    def mechanisms(self) -> tuple[MechanismPlan, ...]:
        planned = (self.counts, self.moments, self.train, self.reference, self.evaluate)
        return tuple(plan for plan in planned if plan is not None)

    def losses(self, partition: Partition) -> tuple[PrivacyLoss, ...]:
        """The losses of the whole study on one partition."""
        return tuple(plan.whole_loss for plan in self.mechanisms if plan.partition == partition)

    def to_json(self) -> dict[str, Any]:
        return {name: None if plan is None else asdict(plan) for name, plan in vars(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StudyPlan:
        """Raises TypeError or KeyError when fields are missing or unknown."""
        read = {name: None if value[name] is None else MechanismPlan(**value[name])
                for name in ("counts", "moments", "train", "reference", "evaluate")}  # fmt: skip
        return cls(**read)  # pyright: ignore[reportArgumentType]


def epsilon_of(losses: Iterable[PrivacyLoss], *, delta: float, accountant: str) -> float:
    """Epsilon of the losses composed, by Opacus; an upper bound. No loss at all costs 0.

    Args:
        losses: executed (or planned) mechanisms, in any order.
        delta: in (0, 1).
        accountant: "prv" (Gopi et al. 2021) or "rdp" (Mironov et al. 2019).

    Raises:
        BudgetError: the accountant cannot bound these losses (noise too small).
    """
    steps: Counter[tuple[float, float]] = Counter()
    for loss in losses:
        steps[loss.noise_multiplier, loss.sample_rate] += loss.steps
    history = tuple(sorted((sigma, q, n) for (sigma, q), n in steps.items() if n > 0))
    return _epsilon(history, delta, accountant) if history else 0.0


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant  # late: brings torch

    engine = PRVAccountant() if accountant == "prv" else RDPAccountant()
    engine.history = list(history)
    try:
        with warnings.catch_warnings():  # log(0) at q = 1 is handled by Opacus; the largest-alpha hint is harmless
            warnings.simplefilter("ignore")
            epsilon = float(engine.get_epsilon(delta))
    except (RuntimeError, OverflowError, ValueError, ZeroDivisionError, MemoryError) as error:
        raise BudgetError(
            f"the {accountant} accountant cannot bound these losses ({error})", remedy="Use more noise or fewer steps."
        ) from error
    if not math.isfinite(epsilon):
        raise BudgetError("the privacy loss has no finite bound", remedy="Use more noise or fewer steps.")
    return epsilon


def plan_study(study: Study) -> StudyPlan:
    """Solve for the noise of every stage so that the whole study stays at or below the target epsilon.

    Counts, moments and reference get the noise at which each *alone* would cost its share of epsilon; training gets
    what the joint composition leaves, or the moments do in a study without a round. Noise is only ever rounded up.

    Raises:
        BudgetError: no noise up to `LARGEST_NOISE` reaches the target; says what would be possible.
    """
    privacy, training, validation = study.privacy, study.training, study.validation
    counts = _calibrate(
        MechanismPlan("counts", "train", 1.0, 1.0, 1, 1, 1.0),
        (),
        privacy.epsilon * privacy.counts_share,
        study,
        share=True,
    )
    reference = None
    if privacy.reference_share > 0:
        reference = _calibrate(
            MechanismPlan("reference", "train", 1.0, validation.reference_sample_rate, validation.reference_steps, 1,
                          training.max_grad_norm),  # fmt: skip
            (), privacy.epsilon * privacy.reference_share, study, share=True,
        )  # fmt: skip
    spent = [plan.whole_loss for plan in (counts, reference) if plan is not None]
    moments, train = None, None
    if privacy.moments_share > 0:
        share, beside = (privacy.moments_share, []) if training.rounds else (1.0, spent)
        moments = _calibrate(
            MechanismPlan("moments", "train", 1.0, 1.0, MOMENTS_STEPS, 1, 1.0), tuple(beside), privacy.epsilon * share,
            study, share=training.rounds > 0,
        )  # fmt: skip
        spent.append(moments.whole_loss)
    if training.rounds:
        train = _calibrate(
            MechanismPlan("train", "train", 1.0, training.sample_rate, training.local_steps, training.rounds,
                          training.max_grad_norm),  # fmt: skip
            tuple(spent), privacy.epsilon, study,
        )  # fmt: skip
    classifiers = 1 if reference is None else 2
    evaluate = _calibrate(
        MechanismPlan("evaluate", "holdout", 1.0, 1.0, 1, EVALUATIONS,
                      math.sqrt(classifiers) * l2_sensitivity(len(study.data.classes))),  # fmt: skip
        (), privacy.epsilon, study,
    )  # fmt: skip
    return StudyPlan(counts, moments, train, reference, evaluate)


def _calibrate(
    plan: MechanismPlan, beside: tuple[PrivacyLoss, ...], epsilon: float, study: Study, *, share: bool = False
) -> MechanismPlan:
    """The plan with the smallest noise (to 0.2 %, rounded up) at which it, composed with `beside`, costs ≤ epsilon.

    Args:
        share: epsilon is a stage's share, so that PRV is asked, whatever the study's own accountant: below epsilon 0.1
            RDP has no answer. The whole is held to the study's epsilon by its own accountant all the same.
    """
    privacy = study.privacy
    accountant = "prv" if share else privacy.accountant

    def cost(sigma: float, accountant: str) -> float:
        try:
            losses = (*beside, replace(plan, noise_multiplier=sigma).whole_loss)
            return epsilon_of(losses, delta=privacy.delta, accountant=accountant)
        except BudgetError:
            return math.inf

    least = cost(LARGEST_NOISE, accountant)
    if least > epsilon:
        raise BudgetError(
            f"epsilon {epsilon:.4g} is out of reach for '{plan.name}' with {plan.steps * plan.releases} steps at "
            f"sample_rate {plan.sample_rate:g}: the least possible is {least:.3g}",
            where="privacy.epsilon",
            remedy=f"Raise privacy.epsilon to about {privacy.epsilon * least * 1.5 / epsilon:.2g}, "
            "or lower training.rounds, local_steps or sample_rate.",
        )
    # The cheap RDP bound brackets the answer; PRV is slow, so it only refines.
    high = _bisect(LEAST_NOISE, LARGEST_NOISE, lambda sigma: cost(sigma, "rdp") <= epsilon, 0.01)
    while cost(high, accountant) > epsilon:
        high = min(high * 1.3, LARGEST_NOISE)
    low = high
    while low > LEAST_NOISE and cost(low, accountant) <= epsilon:
        high, low = low, low * 0.9
    sigma = _bisect(low, high, lambda s: cost(s, accountant) <= epsilon, 0.002)
    return replace(plan, noise_multiplier=sigma)


def _bisect(low: float, high: float, good: Any, tolerance: float) -> float:
    """Smallest good value in [low, high], to a relative tolerance, from above; `high` is known to be good."""
    while high / low > 1 + tolerance:
        middle = math.ceil(math.sqrt(low * high) * 1e5) / 1e5
        if middle >= high:
            break
        if good(middle):
            high = middle
        else:
            low = middle
    return high


def check_plan(study: Study, plan: StudyPlan) -> None:
    """Check at a site that a plan it was sent is the study's own and stays at or below the study's epsilon.

    Raises:
        BudgetError: a mechanism differs from what the study says, or the sum of all costs more than the study allows.
    """
    classifiers = 1 if plan.reference is None else 2
    training, validation = study.training, study.validation
    expected = [
        ("counts", "train", 1.0, 1, 1, 1.0),
        ("evaluate", "holdout", 1.0, 1, EVALUATIONS, math.sqrt(classifiers) * l2_sensitivity(len(study.data.classes))),
    ]
    if training.rounds:
        expected.insert(1, ("train", "train", training.sample_rate, training.local_steps, training.rounds,
                            training.max_grad_norm))  # fmt: skip
    if study.privacy.moments_share > 0:
        expected.insert(1, ("moments", "train", 1.0, MOMENTS_STEPS, 1, 1.0))
    if study.privacy.reference_share > 0:
        expected.insert(-1, ("reference", "train", validation.reference_sample_rate, validation.reference_steps, 1,
                            training.max_grad_norm))  # fmt: skip
    got = [(p.name, p.partition, p.sample_rate, p.steps, p.releases, p.sensitivity) for p in plan.mechanisms]
    if got != expected or any(not 0 < p.noise_multiplier < math.inf for p in plan.mechanisms):
        raise BudgetError("the plan that came with the request is not the plan of this study", where="plan",
                          remedy="Use the same version of synthward and the same study file everywhere.")  # fmt: skip
    for partition in PARTITIONS:
        cost = epsilon_of(plan.losses(partition), delta=study.privacy.delta, accountant=study.privacy.accountant)
        if cost > study.privacy.epsilon:
            raise BudgetError(
                f"the plan costs epsilon {cost:.3f} on the {partition} records, over the study's "
                f"{study.privacy.epsilon:g}", where="plan", remedy="Raise the noise or do fewer rounds.",
            )  # fmt: skip
