"""What every stage works with: the study, its plan, the run folder, the sites and what they have said.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import FederationError
from common.messages import Agreement, Refusal, Spent
from server.checkpoints import RunFolder
from server.federation.sites import Answers, SiteGroup
from server.progress import Progress


@dataclass
class Member:
    """One enrolled site.

    Attributes:
        node: Flower's node id in this process; another one after a resume.
        counts: noisy class counts of its train partition.
        spent: the most that its ledger has reported for this study.
        open_question: it was asked something and has not answered since: its ledger may hold more than `spent`.
    """

    node: int
    site: str
    counts: list[float]
    phantoms: bool
    random_source: str
    spent: Spent
    open_question: bool = False

    @property
    def weight(self) -> float:
        """Noisy number of train records, at least 1."""
        return max(1.0, sum(max(0.0, count) for count in self.counts))

    def note(self, spent: Spent) -> None:
        """Take the larger of what was and is reported: a ledger never shrinks."""
        self.open_question = False
        self.spent = Spent(
            max(self.spent.train, spent.train), max(self.spent.holdout, spent.holdout),
            max(self.spent.reserved, spent.reserved), max(self.spent.confirmed, spent.confirmed),
        )  # fmt: skip


@dataclass
class Session:
    """One run in this process."""

    agreement: Agreement
    folder: RunFolder
    group: SiteGroup
    progress: Progress
    members: dict[int, Member] = field(default_factory=dict)

    def name(self, node: int) -> str:
        return self.members[node].site if node in self.members else f"node {node}"

    def excuses(self, answers: Answers) -> dict[str, str]:
        """By site, why it is not among the replies."""
        reasons = {self.name(node): _refused(refusal) for node, refusal in answers.refusals.items()}
        reasons |= {self.name(node): why for node, why in answers.broken.items()}
        reasons |= {self.name(node): "no answer before the deadline" for node in answers.silent}
        for node, member in self.members.items():
            refusal = answers.refusals.get(node)
            if refusal is not None and refusal.spent is not None:
                member.note(refusal.spent)  # a site that fails half-way has spent, and says so
            elif refusal is not None or node in answers.broken or node in answers.silent:
                member.open_question = True
        return reasons

    def require(self, present: int, reasons: dict[str, str], stage: str) -> None:
        """Stop cleanly when fewer sites than the study asks for have given a usable answer.

        Raises:
            FederationError: names every missing site and why.
        """
        least = self.agreement.study.federation.min_sites
        if present < least:
            why = "; ".join(f"{site}: {reason}" for site, reason in sorted(reasons.items())) or "no site answered"
            raise FederationError(
                f"{present} usable answers in '{stage}', {least} needed ({why})", where="federation.min_sites",
                remedy="Mend the sites, then `synthward run --resume RUN`; nothing that was saved is lost.",
            )  # fmt: skip


def _refused(refusal: Refusal) -> str:
    return f"refused ({refusal.kind}) {refusal.what}. {refusal.remedy}".strip()
