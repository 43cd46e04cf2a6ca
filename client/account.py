"""What a hospital sees of its ledger: what was asked, allowed, refused and spent, by study.

SPDX-License-Identifier: Apache-2.0

Everything is composed at the policy's delta and by its accountant, so that the figures of all studies compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from client.privacy.ledger import Entry, Ledger
from client.privacy.policy import SitePolicy
from common.accounting import epsilon_of
from common.mechanisms import PARTITIONS, Partition

MOST_POINTS = 12  # of the curve; each costs the accountant about a second


@dataclass(frozen=True)
class Stage:
    """One mechanism of one study.

    Attributes:
        asked, finished: requests that were reserved, and those that ran to their end. Both are spent.
        steps: noisy sums in all.
        epsilon: of this mechanism alone.
    """

    name: str
    partition: Partition
    asked: int
    finished: int
    steps: int
    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True)
class Refused:
    """One request that got nothing."""

    at: str
    stage: str
    rule: str
    asked: str
    allowed: str
    what: str


@dataclass(frozen=True)
class Decision:
    """Somebody at the hospital approved a study, or took the approval back."""

    at: str
    by: str
    kind: str


@dataclass(frozen=True)
class StudyAccount:
    """One study; `name` is the first twelve digits of its SHA-256 where the ledger knows no other."""

    sha256: str
    name: str
    decisions: tuple[Decision, ...]
    stages: tuple[Stage, ...]
    refusals: tuple[Refused, ...]
    epsilon: dict[Partition, float]

    @property
    def approved(self) -> bool:
        return bool(self.decisions) and self.decisions[-1].kind == "approved"


@dataclass(frozen=True)
class Point:
    """Epsilon of all studies after the n-th reservation."""

    reservation: int
    at: str
    epsilon: dict[Partition, float]


@dataclass(frozen=True)
class Account:
    """A site's whole ledger.

    Attributes:
        epsilon: of all studies on each partition; a record is in one of the two.
        bands: consecutive reservations of one stage: (study's name, stage, first, last).
    """

    site: str
    studies: tuple[StudyAccount, ...]
    epsilon: dict[Partition, float]
    ceiling: float
    delta: float
    accountant: str
    curve: tuple[Point, ...]
    bands: tuple[tuple[str, str, int, int], ...]
    entries: int
    newest_hash: str

    @property
    def left(self) -> float:
        """Room under the ceiling, on the partition that has spent more (epsilon does not simply add up)."""
        return max(0.0, self.ceiling - max(self.epsilon.values()))

    def to_json(self) -> dict[str, Any]:
        studies = [{**asdict(study), "approved": study.approved} for study in self.studies]
        return {**asdict(self), "studies": studies, "left": self.left}


def account_of(site: str, ledger: Ledger, policy: SitePolicy) -> Account:
    """Read a ledger; writes nothing.

    Args:
        site: its name, for the heading.
    """
    entries = ledger.entries()
    reserved = [entry for entry in entries if entry.kind == "reserved"]
    names = {entry.study: str(entry.body["name"]) for entry in entries if "name" in entry.body}
    studies = list(dict.fromkeys(entry.study for entry in entries if entry.study))
    number, newest = ledger.head()
    return Account(
        site=site,
        studies=tuple(_study(study, names.get(study, study[:12]), entries, policy) for study in studies),
        epsilon=_epsilon(entries, policy), ceiling=policy.max_epsilon, delta=policy.max_delta,
        accountant=policy.accountant, curve=_curve(reserved, policy), bands=_bands(reserved, names), entries=number,
        newest_hash=newest,
    )  # fmt: skip


def _epsilon(entries: Sequence[Entry], policy: SitePolicy) -> dict[Partition, float]:
    """Of the reservations among these entries, by partition."""
    losses = {part: [e.loss for e in entries if e.kind == "reserved" and e.body["partition"] == part]
              for part in PARTITIONS}  # fmt: skip
    return {part: epsilon_of(losses[part], delta=policy.max_delta, accountant=policy.accountant) for part in PARTITIONS}


def _study(study: str, name: str, everything: Sequence[Entry], policy: SitePolicy) -> StudyAccount:
    entries = [entry for entry in everything if entry.study == study]
    finished = {entry.body["reservation"] for entry in entries if entry.kind == "confirmed"}
    by_stage: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind == "reserved":
            by_stage.setdefault(entry.body["mechanism"], []).append(entry)
    stages = tuple(
        Stage(
            name=stage, partition=rows[0].body["partition"], asked=len(rows),
            finished=sum(row.number in finished for row in rows), steps=sum(row.body["steps"] for row in rows),
            noise_multiplier=min(row.body["noise_multiplier"] for row in rows),
            epsilon=max(_epsilon(rows, policy).values()),
        )
        for stage, rows in by_stage.items()
    )  # fmt: skip
    decisions = tuple(
        Decision(e.at, str(e.body.get("by", "")), e.kind) for e in entries if e.kind in ("approved", "revoked")
    )
    refusals = tuple(
        Refused(e.at, *(str(e.body.get(key, "")) for key in ("stage", "rule", "asked", "allowed", "what")))
        for e in entries if e.kind == "refused"
    )  # fmt: skip
    return StudyAccount(study, name, decisions, stages, refusals, _epsilon(entries, policy))


def _curve(reserved: Sequence[Entry], policy: SitePolicy) -> tuple[Point, ...]:
    total = len(reserved)
    points = min(total, MOST_POINTS)
    chosen = sorted({round(total * (n + 1) / points) for n in range(points)}) if total else []
    return tuple(Point(n, reserved[n - 1].at, _epsilon(reserved[:n], policy)) for n in chosen)


def _bands(reserved: Sequence[Entry], names: dict[str, str]) -> tuple[tuple[str, str, int, int], ...]:
    bands: list[tuple[str, str, int, int]] = []
    for number, entry in enumerate(reserved, start=1):
        name, stage = names.get(entry.study, entry.study[:12]), entry.body["mechanism"]
        if bands and bands[-1][:2] == (name, stage):
            bands[-1] = (name, stage, bands[-1][2], number)
        else:
            bands.append((name, stage, number, number))
    return tuple(bands)


def budget_table(account: Account) -> str:
    """The account as plain text."""
    lines = [f"{account.site}: epsilon {account.epsilon['train']:.3f} on training records and "
             f"{account.epsilon['holdout']:.3f} on held-out ones, of {account.ceiling:g} (delta {account.delta:g}, "
             f"{account.accountant.upper()}); {account.left:.3f} left"]  # fmt: skip
    for study in account.studies:
        state = "approved" if study.approved else ("revoked" if study.decisions else "not approved")
        lines += ["", f"{study.name}  {study.sha256[:12]}  {state}"]
        if study.stages:
            lines.append(
                f"  {'stage':<12}{'records':<10}{'asked':>7}{'finished':>10}{'steps':>8}{'noise':>9}{'epsilon':>10}"
            )
        for s in study.stages:
            lines.append(f"  {s.name:<12}{s.partition:<10}{s.asked:>7}{s.finished:>10}{s.steps:>8}"
                         f"{s.noise_multiplier:>9.3f}{s.epsilon:>10.3f}")  # fmt: skip
        if study.stages:
            lines.append(f"  together: {study.epsilon['train']:.3f} on training, {study.epsilon['holdout']:.3f} on "
                         "held-out records")  # fmt: skip
        unfinished = sum(s.asked - s.finished for s in study.stages)
        if unfinished:
            lines.append(f"  {unfinished} asked and not finished: counted all the same")
        if study.refusals:
            last = study.refusals[-1]
            lines.append(f"  {len(study.refusals)} refused, last {last.at}: {last.rule}: {last.what}"[:100])
    return "\n".join(lines)
