"""What is planned and what it costs: one frozen plan behind sampler, noise and ledger.

SPDX-License-Identifier: Apache-2.0

A *mechanism* (`common/mechanisms.py`) adds Gaussian noise of standard deviation noise_multiplier × sensitivity to a sum
over records, each record being in the sum with probability sample_rate (1 = all records). Its privacy loss is the entry
(noise_multiplier, sample_rate, steps) of an Opacus accountant's history; a plain Gaussian release is (sigma, 1, 1).
Adjacency: add or remove one record.

The records of a site are split once into the partitions *train* and *holdout*; a record is in exactly one of them, so
a record's loss is that of its own partition (parallel composition) and a site's epsilon is the larger of the two.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from pydantic import Field

from common.errors import BudgetError
from common.mechanisms import REST, Mechanism, Partition, wanted
from common.settings import Settings
from common.study import Study

LARGEST_NOISE = 500.0  # beyond this no result is worth having, and the accountant's own error dominates
LEAST_NOISE = 0.4  # below it no epsilon of interest lies, and the accountants are slow
MOST_EPSILON = 5000.0  # by RDP: beyond it PRV would need gigabytes, and nothing is protected anyway


class PrivacyLoss(NamedTuple):
    """One entry of an accountant's history."""

    noise_multiplier: float
    sample_rate: float
    steps: int


class MechanismPlan(Settings):
    """One kind of noisy release, fixed before any record is touched. Every field is public.

    Attributes:
        name: of the mechanism, and the stage that uses it.
        partition: whose records it reads.
        noise_multiplier: noise standard deviation divided by `sensitivity`.
        sample_rate: Poisson sampling probability of each record; 1 = every record.
        steps: noisy sums in one request.
        releases: how many requests the whole study may make.
        sensitivity: largest L2 change of the sum when one record is added or removed.
    """

    name: str
    partition: Partition
    noise_multiplier: float = Field(gt=0)
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    releases: int = Field(ge=1)
    sensitivity: float = Field(gt=0)

    @classmethod
    def of(cls, mechanism: Mechanism, study: Study, *, noise_multiplier: float) -> MechanismPlan:
        """The study's plan of one mechanism, with that noise."""
        return cls(
            name=mechanism.name, partition=mechanism.partition, noise_multiplier=noise_multiplier,
            sample_rate=mechanism.sample_rate(study), steps=mechanism.steps(study), releases=mechanism.releases(study),
            sensitivity=mechanism.sensitivity(study),
        )  # fmt: skip

    @property
    def noise_std(self) -> float:
        """Of each number that is released."""
        return self.noise_multiplier * self.sensitivity

    @property
    def loss(self) -> PrivacyLoss:
        """The loss of one request."""
        return PrivacyLoss(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def whole_loss(self) -> PrivacyLoss:
        """The loss of all requests that the study may make."""
        return PrivacyLoss(self.noise_multiplier, self.sample_rate, self.steps * self.releases)


class StudyPlan(Settings):
    """All mechanisms of a study, in the order of `common/mechanisms.py`."""

    mechanisms: tuple[MechanismPlan, ...] = Field(max_length=16)

    def get(self, name: str) -> MechanismPlan | None:
        """The plan of a mechanism, or None where the study makes none of it."""
        return next((plan for plan in self.mechanisms if plan.name == name), None)

    def __getitem__(self, name: str) -> MechanismPlan:
        plan = self.get(name)
        if plan is None:
            raise BudgetError(f"the study plans no '{name}'", where="plan")
        return plan

    def losses(self, partition: Partition) -> tuple[PrivacyLoss, ...]:
        """The losses of the whole study on one partition."""
        return tuple(plan.whole_loss for plan in self.mechanisms if plan.partition == partition)


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
    if accountant == "prv" and _epsilon(history, delta, "rdp") > MOST_EPSILON:
        raise BudgetError("the privacy loss is too large to be bounded", remedy="Use more noise or fewer steps.")
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


@lru_cache(maxsize=64)
def plan_study(study: Study) -> StudyPlan:
    """Solve for the noise of every mechanism so that the whole study stays at or below the target epsilon.

    A mechanism with a share gets the noise at which it *alone* would cost that share of epsilon; the one that takes the
    rest of a partition, and every partition has one, gets what the joint composition leaves. Noise is only ever rounded
    up. A site solves the plan itself when it approves a study, and takes no other (`client/privacy/gate.py`).

    Raises:
        BudgetError: no noise up to `LARGEST_NOISE` reaches the target; says what would be possible.
    """
    solved: dict[str, MechanismPlan] = {}
    epsilon = study.privacy.epsilon
    for mechanism in sorted(wanted(study), key=lambda m: m.share(study) == REST):  # those with a share first
        if mechanism.share(study) != REST:
            solved[mechanism.name] = _calibrate(mechanism, (), epsilon * mechanism.share(study), study, share=True)
            continue
        beside = tuple(plan.whole_loss for plan in solved.values() if plan.partition == mechanism.partition)
        solved[mechanism.name] = _calibrate(mechanism, beside, epsilon, study)
    return StudyPlan(mechanisms=tuple(solved[mechanism.name] for mechanism in wanted(study)))


def _calibrate(
    mechanism: Mechanism, beside: tuple[PrivacyLoss, ...], epsilon: float, study: Study, *, share: bool = False
) -> MechanismPlan:
    """The mechanism's plan with the least noise at which it, composed with `beside`, costs at most epsilon.

    Args:
        share: epsilon is a stage's share, so that PRV is asked, whatever the study's own accountant: below epsilon 0.1
            RDP has no answer. The whole is held to the study's epsilon by its own accountant all the same.
    """
    privacy = study.privacy
    accountant = "prv" if share else privacy.accountant
    plan = MechanismPlan.of(mechanism, study, noise_multiplier=LARGEST_NOISE)

    def cost(sigma: float, accountant: str) -> float:
        try:
            losses = (*beside, plan.whole_loss._replace(noise_multiplier=sigma))
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
    # The cheap RDP bound is where to begin: PRV is slow, so it only refines.
    begin = _bisect(LEAST_NOISE, LARGEST_NOISE, lambda sigma: cost(sigma, "rdp") <= epsilon, 0.02)
    sigma = _smallest(lambda sigma: cost(sigma, accountant), epsilon, begin)
    return MechanismPlan.of(mechanism, study, noise_multiplier=sigma)


def _bisect(low: float, high: float, good: Callable[[float], bool], tolerance: float) -> float:
    """Smallest good value in [low, high], to a relative tolerance, from above; `high` is taken to be good."""
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _smallest(cost: Callable[[float], float], epsilon: float, begin: float) -> float:
    """Noise from `LEAST_NOISE` to `LARGEST_NOISE` whose cost is at most epsilon, and at least 0.998 of it.

    Cost falls about as a power of the noise: each guess follows from the power between the last two.
    """
    low, high = LEAST_NOISE, LARGEST_NOISE  # high is known to be good
    sigma, last, power = math.ceil(begin * 1e5) / 1e5, None, 1.0
    for _ in range(60):
        value = cost(sigma)
        if value <= epsilon:
            high = sigma
            if value >= 0.998 * epsilon or sigma <= LEAST_NOISE:
                break
        else:
            low = sigma
        if high / low < 1.0005:
            break
        if math.isfinite(value) and value > 0:
            if last is not None and abs(math.log(sigma / last[0])) > 1e-6:
                power = min(4.0, max(0.25, math.log(last[1] / value) / math.log(sigma / last[0])))
            last = (sigma, value)
            guess = sigma * (value / (0.9992 * epsilon)) ** (1 / power)
        else:
            guess = sigma * 1.3
        if low < LEAST_NOISE * 1.0001 and guess <= LEAST_NOISE:
            guess = LEAST_NOISE
        elif not low < guess < high:
            guess = math.sqrt(low * high)
        sigma = min(math.ceil(guess * 1e5) / 1e5, LARGEST_NOISE)
    return high
