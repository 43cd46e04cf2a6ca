"""One enrolled site, as the server keeps it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from common.protocol import SiteFacts, Spent


@dataclass
class Member:
    """One enrolled site.

    Attributes:
        node: Flower's node id; another one after a resume under the simulation engine.
        facts: what it said of itself when it enrolled.
        counts: noisy class counts of its train partition.
        spent: the most that its ledger has reported for this study.
        heard: when it last answered.
        open_question: it was asked something and has not answered since: its ledger may hold more than `spent`.
    """

    node: int
    facts: SiteFacts
    counts: list[float]
    spent: Spent
    open_question: bool = False
    heard: datetime = field(default_factory=datetime.now)

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def weight(self) -> float:
        """Noisy number of train units, at least 1."""
        return max(1.0, sum(max(0.0, count) for count in self.counts))

    def note(self, spent: Spent) -> None:
        """Take the larger of what was and is reported: a ledger never shrinks."""
        self.open_question = False
        before, now = self.spent.model_dump(), spent.model_dump()
        self.spent = Spent(**{name: max(before[name], now[name]) for name in before})
