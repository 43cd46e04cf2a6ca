"""A site's own durable account of every privacy loss: reserve, then compute, then confirm.

SPDX-License-Identifier: Apache-2.0

Entries are only ever added (`client/privacy/chain.py` says how they are kept). A reservation counts as spent from the
moment it is written, confirmed or not: a crash can waste budget but never hide a loss. The write lock is held from
reading the history to writing the reservation, so two processes cannot both pass a ceiling.

A record's loss is that of its own partition. That holds for as long as a record stays on its side: so an approval keeps
fingerprints of both sides, and a study whose data would put a record on the other one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from client.privacy.chain import Chain, Entry, Kind, NoLedger
from client.privacy.fingerprints import Fingerprints, in_words
from common.accounting import MechanismPlan, PrivacyLoss, StudyPlan, epsilon_of
from common.errors import BudgetError, NotApproved, PolicyRefusal
from common.mechanisms import PARTITIONS, Partition
from common.study import Study

__all__ = ["Approval", "Ceiling", "Entry", "Ledger", "NoLedger"]

MOST_OF_A_STUDY = 100  # refusals that are written: one study must not crowd out the others
MOST_REFUSALS = 1000  # in the whole ledger: who asks in vain without end must not fill the disk


@dataclass(frozen=True)
class Ceiling:
    """An upper bound that the composed losses must not pass."""

    epsilon: float
    delta: float
    accountant: str


@dataclass(frozen=True)
class Approval:
    """What somebody at the hospital agreed to.

    Attributes:
        study: its SHA-256.
        name: what the study calls itself.
        plan: every mechanism with its noise; no other is run.
        data: digest of both partitions as they were (`Fingerprints.digest`); with others the study gets no answer.
    """

    number: int
    at: str
    by: str
    study: str
    name: str
    plan: StudyPlan
    data: str

    @classmethod
    def of(cls, entry: Entry) -> Approval:
        body, plan = entry.body, StudyPlan.model_validate(entry.body["plan"])
        return cls(entry.number, entry.at, body["by"], entry.study, body["name"], plan, body["data"])


class Bounds(TypedDict):
    """Whose losses are bounded by what: the study's SHA-256, its own ceiling, and that of all studies."""

    study: str
    study_ceiling: Ceiling
    ceiling: Ceiling


class Ledger:
    """The account of one site, in its state folder; made by `create`, opened by `open`."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.state, self.key = chain, chain.state, chain.key

    @classmethod
    def create(cls, state: Path) -> Ledger:
        """Begin a ledger; for `synthward-site init` alone.

        Raises:
            StorageError: there is one, or something that only one could have left; or the folder cannot be written.
        """
        Chain.create(state)
        return cls.open(state)

    @classmethod
    def open(cls, state: Path) -> Ledger:
        """Open a ledger; writes nothing.

        Raises:
            NoLedger: there is none.
            StorageError: it is damaged or incomplete, was changed, or does not belong to what lies beside it.
        """
        return cls(Chain.open(state))

    def close(self) -> None:
        self.chain.close()

    @property
    def identity(self) -> str:
        """A random name, given when it was begun: a copy has the same."""
        return str(self.chain.entries("number = 1")[0].body["ledger"])

    def reserve(
        self, *plans: MechanismPlan, study: str, request: str, study_ceiling: Ceiling, ceiling: Ceiling,
        approval: Approval | None,
    ) -> tuple[int, ...]:  # fmt: skip
        """Write the loss of one request of each plan as spent, or refuse all.

        Args:
            study: the study's SHA-256.
            request: the request's identity.
            study_ceiling: bounds this study's losses on each partition.
            ceiling: bounds the losses of all studies on each partition.
            approval: under which the request was let in; another one, or none, may have taken its place meanwhile. None
                asks for none.

        Returns:
            The reservations' numbers, to confirm.

        Raises:
            BudgetError: a plan's releases are used up, or a ceiling would be passed; nothing is written.
            StorageError: the file cannot be written; nothing may be computed.
        """
        numbers = []
        with self.chain.exclusive():
            self._require_still(study, approval)
            for plan in plans:
                self._require(plan, study, study_ceiling, ceiling)
                body = {"request": request, "mechanism": plan.name, "partition": plan.partition,
                        "noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate,
                        "steps": plan.steps, "sensitivity": plan.sensitivity,
                        "data": approval.data if approval is not None else ""}  # fmt: skip
                numbers.append(self.chain.append("reserved", study, body).number)
        return tuple(numbers)

    def may_repeat(self, request: str, approval: Approval) -> bool:
        """Whether a stored answer may be sent: it was confirmed, or is of the very images of that approval.

        One that was not may never have left: its process was killed, and somebody may have withdrawn since.
        """
        reserved = self.chain.entries("kind = 'reserved' AND json_extract(body, '$.request') = ?", request)
        confirmed = {entry.body["reservation"] for entry in self.chain.entries("kind = 'confirmed'")}
        return all(entry.number in confirmed or entry.body.get("data") == approval.data for entry in reserved)

    def require_room(self, *plans: MechanismPlan, study: str, study_ceiling: Ceiling, ceiling: Ceiling) -> None:
        """See that `reserve` would take each plan now; writes nothing.

        Raises:
            BudgetError: as `reserve`.
        """
        for plan in plans:
            self._require(plan, study, study_ceiling, ceiling)

    @contextmanager
    def confirming(self, *reservations: int, study: str, approval: Approval | None) -> Iterator[None]:
        """Note that the reserved mechanisms have run to their end, after what is done inside; nobody revokes meanwhile.

        Args:
            study, approval: as in `reserve`.

        Raises:
            NotApproved: that approval is not in force any more; nothing is done or noted.
        """
        with self.chain.exclusive(patient=True):  # an answer that is paid for would be lost
            self._require_still(study, approval)
            yield
            for number in reservations:
                self.chain.append("confirmed", study, {"reservation": number})

    def approve(self, study: Study, plan: StudyPlan, partitions: Fingerprints, *, by: str) -> Approval:
        """Let a study ask for what `plan` says, of these very records.

        Raises:
            PolicyRefusal: a record would be on two sides, at once or over several studies; nothing is written.
            StorageError: the file cannot be written.
        """
        with self.chain.exclusive():
            self.require_sides(partitions, study.sha256)
            body = {
                "by": by, "name": study.study.name, "epsilon": study.privacy.epsilon, "delta": study.privacy.delta,
                "plan": plan.model_dump(mode="json"), "data": partitions.digest,
                "fingerprints": self.chain.keep(*partitions.packed()),
            }  # fmt: skip
            return Approval.of(self.chain.append("approved", study.sha256, body))

    def revoke(self, study: str, *, by: str) -> None:
        """Take the approval of a study (its SHA-256) back; what was spent stays spent."""
        with self.chain.exclusive():
            approval = self.approval(study)
            if approval is not None:
                self.chain.append("revoked", study, {"by": by, "name": approval.name})

    def refused(self, study: Study, **body: str) -> None:
        """Write what was refused to a study that was approved at some time; of others, and of too many, nothing."""
        with self.chain.exclusive():
            few = self._count("refused", study.sha256) < MOST_OF_A_STUDY and self._count("refused") < MOST_REFUSALS
            if self._count("approved", study.sha256) and few:
                self.chain.append("refused", study.sha256, {"name": study.study.name, **body})

    def approval(self, study: str) -> Approval | None:
        """The approval of a study (its SHA-256), if it has one that was not revoked."""
        entries = self.chain.entries("study = ? AND kind IN ('approved', 'revoked')", study)
        return Approval.of(entries[-1]) if entries and entries[-1].kind == "approved" else None

    def approvals(self) -> list[Approval]:
        """Every approval in force, oldest first."""
        newest = {entry.study: entry for entry in self.chain.entries("kind IN ('approved', 'revoked')")}
        return [Approval.of(entry) for entry in newest.values() if entry.kind == "approved"]

    def held(self, *, but: str = "") -> list[tuple[Approval, Fingerprints]]:
        """The data of every approval that has cost something or still may.

        Args:
            but: a study whose approval in force does not count, since it is about to be replaced.
        """
        newest: dict[str, Entry] = {}
        held = {approval.number for approval in self.approvals() if approval.study != but}
        for entry in self.chain.entries("kind IN ('approved', 'reserved')"):
            if entry.kind == "approved":
                newest[entry.study] = entry
            elif entry.study in newest:
                held.add(newest[entry.study].number)
        found = [entry for entry in self.chain.entries("kind = 'approved'") if entry.number in held]
        return [(Approval.of(e), Fingerprints.unpacked(*self.chain.kept(e.body["fingerprints"]), e.body["data"]))
                for e in found]  # fmt: skip

    def require_sides(self, partitions: Fingerprints, study: str) -> None:
        """Check that no record is on two sides.

        Raises:
            PolicyRefusal: it is in train and holdout of these data, or on the other side of another study's.
        """
        both = partitions.on_both_sides
        if both:
            raise PolicyRefusal(
                f"{in_words(both)} in train and in the holdout at once: their loss would be split over two accounts",
                where="ledger.sides", remedy="Leave each out of one of the two.",
            )  # fmt: skip
        for approval, before in self.held(but=study):
            moved = partitions.changed_sides(before)
            if moved:
                raise PolicyRefusal(
                    f"{in_words(moved)} on the other side of train and holdout than in study {approval.name}"
                    f" ({approval.study[:12]}): their loss would be split over two accounts", where="ledger.sides",
                    remedy="Put them back on their old side, or leave them out.",
                )  # fmt: skip

    def entries(self) -> list[Entry]:
        """Everything, oldest first."""
        return self.chain.entries()

    def losses(self, partition: Partition, *, study: str | None = None) -> list[PrivacyLoss]:
        """All losses on a partition, reserved or confirmed; of one study or of all; equal ones as one of more steps."""
        rows = self.chain.db.execute(
            "SELECT json_remove(body, '$.request'), COUNT(*) FROM entries"
            " WHERE kind = 'reserved' AND (?1 IS NULL OR study = ?1) GROUP BY 1", (study,),
        )  # fmt: skip
        found = [(json.loads(body), count) for body, count in rows]
        return [PrivacyLoss(body["noise_multiplier"], body["sample_rate"], body["steps"] * count)
                for body, count in found if body["partition"] == partition]  # fmt: skip

    def spent(self, *, delta: float, accountant: str, study: str | None = None) -> dict[Partition, float]:
        """Epsilon spent so far on each partition."""
        return {
            partition: epsilon_of(self.losses(partition, study=study), delta=delta, accountant=accountant)
            for partition in PARTITIONS
        }

    def counts(self, study: str) -> tuple[int, int]:
        """(reserved, confirmed) requests of a study."""
        return self._count("reserved", study), self._count("confirmed", study)

    def head(self) -> tuple[int, str]:
        """(number, hash) of the newest entry: whoever notes it down can later show that nothing before it changed."""
        return self.chain.head()

    def _require_still(self, study: str, approval: Approval | None) -> None:
        now = self.approval(study)
        if approval is not None and (now is None or (now.plan, now.data) != (approval.plan, approval.data)):
            raise NotApproved("the approval was taken back meanwhile, or made anew of other images", where="approval")

    def _require(self, plan: MechanismPlan, study: str, study_ceiling: Ceiling, ceiling: Ceiling) -> None:
        made = self._count("reserved", study, "json_extract(body, '$.mechanism') = ?", plan.name)
        if made >= plan.releases:
            raise BudgetError(
                f"all {plan.releases} planned releases of '{plan.name}' are used up", where="ledger.releases",
                asked=str(plan.releases + 1), allowed=str(plan.releases),
                remedy="The stage ends here; its results so far stand.",
            )  # fmt: skip
        for bound, scope in ((study_ceiling, study), (ceiling, None)):
            losses = [*self.losses(plan.partition, study=scope), plan.loss]
            cost = epsilon_of(losses, delta=bound.delta, accountant=bound.accountant)
            if cost > bound.epsilon:
                raise BudgetError(
                    f"'{plan.name}' would bring epsilon to {cost:.3f}, over the ceiling {bound.epsilon:g} of "
                    + ("this study" if scope else "the site"), where="ledger.ceiling", asked=f"{cost:.3f}",
                    allowed=f"{bound.epsilon:g}", remedy="Nothing was spent for this request; the site stops here.",
                )  # fmt: skip

    def _count(self, kind: Kind, study: str | None = None, where: str = "1", *values: object) -> int:
        query = f"SELECT COUNT(*) FROM entries WHERE kind = ? AND (? IS NULL OR study = ?) AND {where}"
        return int(self.chain.db.execute(query, (kind, study, study, *values)).fetchone()[0])
