"""The one gate out of a site: nothing leaves but what a recorded mechanism has made noisy.

SPDX-License-Identifier: Apache-2.0

    gate.admit()                               approved here, the pinned plan, policy: before any file is opened
    with gate.spend("train") as permit:        ceilings checked, loss reserved on the disk: counted as spent
        mask = permit.sample("train", units)   Poisson sampling at the plan's rate
        noisy = permit.noisy("train", total)   a BoundedSum + noise; at most plan.steps times, or in parts of a step
        released = permit.seal(noisy)          approval and images looked at again; encoded once, stored, confirmed

The same request (the same bytes) is answered from the store and spends nothing. What is not sealed is not sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from client.privacy.ledger import Approval, Bounds, Ceiling, Ledger
from client.privacy.mechanism import Noisy, gaussian_release
from client.privacy.policy import SitePolicy
from client.privacy.randomness import NoiseSource
from client.privacy.store import Store
from common.accounting import MechanismPlan
from common.bounded import BoundedSum
from common.errors import BudgetError, NotApproved
from common.protocol import Agreement, Answer, Reply, SiteFacts, Spent, encode

_KEY = object()
_WHOLE = 1e-9  # by how much a bound that was added up may miss the whole


class Released:
    """The bytes of an answer that may leave the site; only the gate makes one."""

    def __init__(self, data: bytes, *, key: object) -> None:
        if key is not _KEY:
            raise TypeError("Released is made by the gate only")
        self.data = data


class Permit:
    """Leave to run one or more planned mechanisms once; made by `Gate.spend`."""

    def __init__(self, gate: Gate, plans: tuple[MechanismPlan, ...], numbers: tuple[int, ...]) -> None:
        self._gate = gate
        self._numbers = numbers
        self._left = {plan.name: float(plan.steps) for plan in plans}
        self._plans = {plan.name: plan for plan in plans}

    def plan(self, name: str) -> MechanismPlan:
        """What was agreed of a mechanism."""
        return self._plans[name]

    def sample(self, name: str, units: int) -> NDArray[np.bool_]:
        """A Poisson mask over `units` units at the plan's sample_rate."""
        return self._gate.source.poisson_mask(units, self._plans[name].sample_rate)

    def noisy(self, name: str, total: BoundedSum) -> Noisy:
        """Release one sum of mechanism `name`, or a part of one, with the noise of a whole one.

        Gaussian releases of all records compose exactly by the squares of sensitivity over noise, and a later one may
        be chosen after an earlier one is seen (Dong, Roth and Su 2022, corollary 3.3). So parts whose squares sum to 1
        cost what one whole release costs. How large a part it is, the sum's own bound says.

        Raises:
            BudgetError: the mechanism's planned steps are used up.
            ValueError: a bound over the plan's sensitivity, or a part of a release of sampled records, which do not
                compose like this.
        """
        plan = self._plans[name]
        part = total.bound / plan.sensitivity
        if part > 1 + _WHOLE or (part < 1 - _WHOLE and plan.sample_rate != 1):
            raise ValueError(f"a release of '{name}' has no part of {part:g}")
        if self._left[name] < part**2 - _WHOLE:
            raise BudgetError(f"'{name}' has made all its planned steps", where="gate")
        self._left[name] -= part**2
        return gaussian_release(
            total, noise_multiplier=plan.noise_multiplier, sensitivity=plan.sensitivity, source=self._gate.source
        )

    def confirming(self) -> contextlib.AbstractContextManager[None]:
        """Confirm the spending after what is done inside; for a noisy result that stays at the site for now.

        Raises:
            NotApproved, DataError: as `seal`; nothing is done.
        """
        return self._gate.still(*self._numbers)

    def seal(self, body: Reply, noisy: Noisy) -> Released:
        """Encode the answer, store it under the request's identity, confirm the spending, and let it leave.

        What was revoked, approved anew or computed of images that are others by now is not stored and does not leave;
        its cost stays counted. Stored first: a crash before the confirmation costs nothing, since the same request then
        finds its answer.

        Args:
            body: which stage's answer it is; says nothing of records.

        Raises:
            TypeError: not `Noisy`.
            NotApproved: the approval was taken back or made anew meanwhile.
            DataError: the images are not those of the approval any more.
        """
        if type(noisy) is not Noisy:
            raise TypeError("only Noisy numbers can be sealed")
        spent = self._gate.spent()
        spent = spent.model_copy(update={"confirmed": spent.confirmed + len(self._numbers)})
        answer = Answer(site=self._gate.facts, spent=spent, body=body)
        data = encode(answer, {name: tensor.numpy() for name, tensor in noisy.tensors.items()})
        with self.confirming():
            self._gate.store.keep_answer(self._gate.request, data)
        return Released(data, key=_KEY)


class Gate:
    """Policy, ledger and noise of one site for one request of one study.

    Args:
        request: the request's identity.
        images: raises DataError where the site's images are not those of an approval; asked before every sealing.
        store: of the sealed answers.
    """

    def __init__(self, *, facts: SiteFacts, agreement: Agreement, request: str, policy: SitePolicy, ledger: Ledger,
                 source: NoiseSource, images: Callable[[Approval], object], store: Store) -> None:  # fmt: skip
        self.facts, self.agreement, self.request, self.policy = facts, agreement, request, policy
        self.ledger, self.source, self.images, self.store = ledger, source, images, store
        self._admitted: Approval | None = None  # under which the request was let in

    def admit(self) -> Approval:
        """Whether this study gets an answer at all: a question to ledger and policy, never to a record.

        Raises:
            NotApproved: nobody here approved it, or it was revoked.
            BudgetError: the plan that came with the request is not the one that was approved.
            PolicyRefusal: the policy was changed since.
        """
        study = self.agreement.study
        approval = self.ledger.approval(study.sha256)
        if approval is None:
            raise NotApproved("the study has no approval at this site", where="approval",
                              remedy="The site's owner decides: synthward-site explain, then approve.")  # fmt: skip
        if approval.plan != self.agreement.plan:
            raise BudgetError(
                "the plan that came with the request is not the one that was approved", where="plan",
                remedy="Use the same version of synthward and the same study file everywhere.",
            )  # fmt: skip
        self.policy.permit(study, approval.plan)
        if self._admitted is None:
            self._admitted = approval
        return approval

    @property
    def admitted(self) -> Approval:
        """The approval under which the request was let in; it alone counts from then on.

        Raises:
            NotApproved: it was not let in.
        """
        return self._admitted or self.admit()

    @contextlib.contextmanager
    def still(self, *reservations: int) -> Iterator[None]:
        """Do something while the approval cannot be taken back, of the approved images, then confirm reservations.

        Raises:
            NotApproved: it was taken back, or made anew of other images.
            DataError: the images are not those of the approval any more.
        """
        with self.ledger.confirming(*reservations, study=self.admitted.study, approval=self.admitted):
            self.images(self.admitted)
            yield

    def stored(self) -> Released | None:
        """The answer that this very request has had before, if it had one; sending it again costs nothing.

        Raises:
            StorageError: the file is damaged.
        """
        data = self.store.answer(self.request) if self.ledger.may_repeat(self.request, self.admitted) else None
        return None if data is None else Released(data, key=_KEY)

    def require_room(self, *names: str) -> None:
        """See that one more request of each mechanism would be allowed, before work is done for it; reserves nothing.

        Raises:
            NotApproved, PolicyRefusal, BudgetError: as `spend` would.
        """
        plans = self.admit().plan
        self.ledger.require_room(*(plans[name] for name in names), **self._bounds())

    def _bounds(self) -> Bounds:
        study, policy = self.agreement.study, self.policy
        privacy = study.privacy
        return {
            "study": study.sha256, "study_ceiling": Ceiling(privacy.epsilon, privacy.delta, privacy.accountant),
            "ceiling": Ceiling(policy.max_epsilon, policy.max_delta, policy.accountant),
        }  # fmt: skip

    @contextlib.contextmanager
    def spend(self, *names: str) -> Iterator[Permit]:
        """Reserve the loss of one request of each mechanism; an exception inside leaves it reserved, that is spent.

        Raises:
            NotApproved, PolicyRefusal, BudgetError: refused before any record is touched.
            DataError: the images are not those of the approval any more.
        """
        agreed = self.admit().plan
        self.images(self.admitted)
        plans = tuple(agreed[name] for name in names)
        numbers = self.ledger.reserve(*plans, request=self.request, approval=self.admitted, **self._bounds())
        yield Permit(self, plans, numbers)

    def spent(self) -> Spent:
        """What this study has spent here; a function of plan and history, not of the data."""
        privacy, study = self.agreement.study.privacy, self.agreement.study.sha256
        cost = self.ledger.spent(delta=privacy.delta, accountant=privacy.accountant, study=study)
        reserved, confirmed = self.ledger.counts(study)
        return Spent(train=cost["train"], holdout=cost["holdout"], reserved=reserved, confirmed=confirmed)
