"""The one gate out of a site: nothing leaves but what a recorded mechanism has made noisy.

SPDX-License-Identifier: Apache-2.0

    with gate.spend(plan, ...) as permit:      policy and ceilings checked, loss reserved on the disk: counted as spent
        for _ in range(plan.steps):
            mask = permit.sample(records)      Poisson sampling at the plan's rate
            noisy = permit.noisy(total)        clip-bounded sum + noise; at most plan.steps times, or in parts of a step
        released = permit.seal(reply)          stored at the site, then confirmed; only this can be sent

The same request (the same bytes) is answered from the store and spends nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from client.privacy.ledger import Ceiling, Ledger
from client.privacy.mechanism import gaussian_release
from client.privacy.policy import Cohort, SitePolicy
from client.privacy.randomness import NoiseSource
from common.accounting import MechanismPlan, check_plan
from common.errors import BudgetError
from common.files import atomic_write
from common.messages import Agreement, EnrolReply, MomentsReply, Spent, TrainReply, ValidateReply, decode_reply, encode

R = TypeVar("R", EnrolReply, MomentsReply, TrainReply, ValidateReply)
_KEY = object()


class Released(Generic[R]):
    """A reply that may leave the site; only the gate makes one."""

    def __init__(self, reply: R, *, key: object) -> None:
        if key is not _KEY:
            raise TypeError("Released is made by the gate only")
        self.reply = reply


class Permit:
    """Leave to run one or more planned mechanisms once; made by `Gate.spend`."""

    def __init__(self, gate: Gate, plans: tuple[MechanismPlan, ...], numbers: tuple[int, ...]) -> None:
        self._gate = gate
        self._numbers = numbers
        self._left = {plan.name: float(plan.steps) for plan in plans}
        self._plans = {plan.name: plan for plan in plans}

    def sample(self, name: str, records: int) -> NDArray[np.bool_]:
        """A Poisson mask over `records` records at the plan's sample_rate."""
        return self._gate.source.poisson_mask(records, self._plans[name].sample_rate)

    def noisy(self, name: str, total: Mapping[str, torch.Tensor], *, part: float = 1.0) -> dict[str, torch.Tensor]:
        """Release one sum of mechanism `name`, or a part of one, with the noise of a whole one.

        Gaussian releases of all records compose exactly by the squares of sensitivity over noise, and a later one may
        be chosen after an earlier one is seen (Dong, Roth and Su 2022, corollary 3.3). So parts whose squares sum to 1
        cost what one whole release costs.

        Args:
            total: changes by at most `part` × the plan's sensitivity in L2 when one record is added or removed.
            part: in (0, 1].

        Raises:
            BudgetError: the mechanism's planned steps are used up.
            ValueError: not a part, or a part of a release of sampled records, which do not compose like this.
        """
        plan = self._plans[name]
        if not 0 < part <= 1 or (part < 1 and plan.sample_rate != 1):
            raise ValueError(f"a release of '{name}' has no part of {part:g}")
        if self._left[name] < part**2:
            raise BudgetError(f"'{name}' has made all its planned steps", where="gate")
        self._left[name] -= part**2
        return gaussian_release(
            total, noise_multiplier=plan.noise_multiplier, sensitivity=plan.sensitivity, source=self._gate.source
        )

    def done(self) -> None:
        """Confirm the spending; for a mechanism whose noisy result stays at the site for now."""
        self._gate.ledger.confirm(*self._numbers)

    def seal(self, reply: R) -> Released[R]:
        """Store the reply under the request's identity, confirm the spending, and let it leave.

        Stored first: a crash between the two costs nothing, since the same request then finds its answer.
        """
        spent = self._gate.spent()
        reply = replace(reply, spent=replace(spent, confirmed=spent.confirmed + len(self._numbers)))
        self._gate.store(encode(reply))
        self.done()
        return Released(reply, key=_KEY)


class Gate:
    """Policy, ledger and noise of one site for one request of one study.

    Args:
        request: the request's identity.
        cohort: what the policy's smallest numbers are compared with; never sent.
        replies: folder of the sealed answers.
    """

    def __init__(
        self, *, agreement: Agreement, request: str, policy: SitePolicy, ledger: Ledger, source: NoiseSource,
        cohort: Cohort, replies: Path,
    ) -> None:  # fmt: skip
        self.agreement, self.request, self.policy, self.ledger = agreement, request, policy, ledger
        self.source, self.cohort, self._replies = source, cohort, replies

    def stored(self, kind: type[R]) -> Released[R] | None:
        """The answer that this very request has had before, if it had one; sending it again costs nothing."""
        path = self._replies / f"{self.request}.reply"
        if not path.exists():
            return None
        reply = decode_reply(path.read_bytes())
        return Released(reply, key=_KEY) if isinstance(reply, kind) else None

    @contextlib.contextmanager
    def spend(self, *plans: MechanismPlan) -> Iterator[Permit]:
        """Reserve the loss of one request of each plan; an exception inside leaves it reserved, that is spent.

        Raises:
            PolicyRefusal, BudgetError: refused before any record is touched.
        """
        study, plan, policy = self.agreement.study, self.agreement.plan, self.policy
        policy.permit(study, plan, self.cohort, approved=self.ledger.approval(study.sha256) is not None)
        check_plan(study, plan)
        unknown = [mechanism.name for mechanism in plans if mechanism not in plan.mechanisms]
        if unknown:
            raise BudgetError(f"{unknown[0]} is not in the agreed plan", where="plan")
        privacy = study.privacy
        numbers = self.ledger.reserve(
            *plans, study=study.sha256, request=self.request,
            study_ceiling=Ceiling(privacy.epsilon, privacy.delta, privacy.accountant),
            ceiling=Ceiling(policy.max_epsilon, policy.max_delta, policy.accountant),
        )  # fmt: skip
        yield Permit(self, plans, numbers)

    def store(self, data: bytes) -> None:
        """Keep the sealed answer to this request."""
        atomic_write(self._replies / f"{self.request}.reply", data)

    def spent(self) -> Spent:
        """What this study has spent here; a function of plan and history, not of the data."""
        privacy, study = self.agreement.study.privacy, self.agreement.study.sha256
        cost = self.ledger.spent(delta=privacy.delta, accountant=privacy.accountant, study=study)
        reserved, confirmed = self.ledger.counts(study)
        return Spent(cost["train"], cost["holdout"], reserved, confirmed)
