"""What a study would take, ask and give, in plain words: the page that a hospital's approver reads and signs.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from client.privacy.ledger import Ledger
from client.site import Site
from common.accounting import PARTITIONS, MechanismPlan, Partition, StudyPlan, epsilon_of
from common.errors import PolicyRefusal
from common.study import Study

_WIDTH = 100
_PART = {"train": "training", "holdout": "held-out"}
_WORDS = {
    "counts": "how many training {unit}s each class has",
    "moments": "a blurred average of the {unit}s of each class, and how the blurred {unit}s vary around it",
    "train": "in which direction the model should change to draw {unit}s like the ones here, summed over the {unit}s "
    "drawn at random in a step, and how well it did",
    "reference": "nothing by itself: a classifier trained on {unit}s here, which stays here; its test figures leave in "
    "the next item",
    "evaluate": "how often the classifiers were right on held-out {unit}s, as counts",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a study may run at a site.

    Attributes:
        refusals: what the policy says no to; its approval is not among them.
        before, after: epsilon of all studies on each partition, at the policy's delta.
        over: the partitions whose ceiling the study would pass before its end.
        approved: by whom and when, or None.
    """

    refusals: tuple[PolicyRefusal, ...]
    before: dict[Partition, float]
    after: dict[Partition, float]
    over: tuple[Partition, ...]
    approved: str | None

    @property
    def possible(self) -> bool:
        return not self.refusals and not self.over


def judge(site: Site, ledger: Ledger, study: Study, plan: StudyPlan) -> Verdict:
    """Hold a study against a site's policy and ledger; spends nothing."""
    policy = site.config.policy

    def in_all(partition: Partition, *more: StudyPlan) -> float:
        others = [loss for entry in ledger.entries() if entry.kind == "reserved" and entry.study != study.sha256
                  and entry.body["partition"] == partition for loss in (entry.loss,)]  # fmt: skip
        losses = ledger.losses(partition) if not more else [*others, *more[0].losses(partition)]
        return epsilon_of(losses, delta=policy.max_delta, accountant=policy.accountant)

    after: dict[Partition, float] = {partition: in_all(partition, plan) for partition in PARTITIONS}
    approval = ledger.approval(study.sha256)
    return Verdict(
        refusals=tuple(policy.refusals(study, plan, site.cohort, approved=True)),
        before={partition: in_all(partition) for partition in PARTITIONS}, after=after,
        over=tuple(partition for partition in PARTITIONS if after[partition] > policy.max_epsilon),
        approved=None if approval is None else f"{approval.body['by']}, {approval.at}",
    )  # fmt: skip


def explain(site: Site, study: Study, plan: StudyPlan, verdict: Verdict) -> str:
    """The page, as text."""
    unit, privacy, policy = study.privacy.unit, study.privacy, site.config.policy
    lines = [f'Study "{study.study.name}" at {site.config.name}', f"SHA-256 {study.sha256}", ""]
    lines += _section("What it is for", [
        study.study.description or "(the study gives no description)",
        "The hospitals of the study together train a model that draws artificial images of the classes "
        + ", ".join(study.data.classes) + ". The images it draws, the model and a report will be released.",
        *_public_set(study),
    ])  # fmt: skip
    lines += _section("What it uses here", [
        f"{sum(site.report.train_counts)} training images ({_by_class(study, site.report.train_counts)}) and "
        f"{sum(site.report.holdout_counts)} held-out images ({_by_class(study, site.report.holdout_counts)}); these "
        f"exact numbers are shown to you only. Privacy unit: {unit}.", *site.report.warnings,
    ])  # fmt: skip
    lines += _section("What leaves this hospital", [*_leaving(study, plan),
        "Nothing else leaves: no image, no patient's name or number, no exact count, no error text."])  # fmt: skip
    ours = {p: epsilon_of(plan.losses(p), delta=privacy.delta, accountant=privacy.accountant) for p in PARTITIONS}
    worst = max(ours.values())
    lines += _section("What it costs", [
        f"This study, if it runs to its end: epsilon {ours['train']:.2f} for a training {unit}, {ours['holdout']:.2f} "
        f"for a held-out one, at delta {privacy.delta:g}; its ceiling is {privacy.epsilon:g}.",
        f"All studies here so far: {_both(verdict.before)}; with this one: {_both(verdict.after)}; the ceiling of this "
        f"hospital is {policy.max_epsilon:g} at delta {policy.max_delta:g}.",
        f"In words: whoever sees everything that leaves, and before was in two minds (50 %) whether one certain {unit} "
        f"was among the data, can become at most {100 / (1 + math.exp(-worst)):.2f} % sure of it, whatever else they "
        f"know, but for a chance of {privacy.delta:g}. This is a limit for the worst case, not a forecast."
        + ("" if unit == "patient" else " A patient with several images here is protected less than this."),
    ])  # fmt: skip
    lines += _section("This hospital's policy", _policy(verdict))
    lines += [
        "",
        "Name ______________________________   Date ______________   Signature ______________________________",
    ]
    return "\n".join(lines) + "\n"


def _public_set(study: Study) -> Iterator[str]:
    if study.pretrain.sha256 is not None:
        yield (
            "Before it asks any hospital, the coordinator trains the model on images that it holds to be public: a "
            f"file with SHA-256 {study.pretrain.sha256}. People in it are not protected. Ask whose images these are, "
            "and whether any are from here."
        )


def _leaving(study: Study, plan: StudyPlan) -> Iterator[str]:
    privacy = study.privacy
    for number, mechanism in enumerate(plan.mechanisms, start=1):
        alone = epsilon_of([mechanism.whole_loss], delta=privacy.delta, accountant=privacy.accountant)
        yield (
            f"{number}. {mechanism.name}: {_WORDS[mechanism.name].format(unit=privacy.unit)}. {_how(mechanism)} "
            f"One {privacy.unit} can move the sum by at most {mechanism.sensitivity:.3g}; random noise of standard "
            f"deviation {mechanism.noise_multiplier * mechanism.sensitivity:.3g} is added to every number of it before "
            f"it leaves. By itself: epsilon {alone:.2f}."
        )


def _how(mechanism: MechanismPlan) -> str:
    part, times = _PART[mechanism.partition], mechanism.steps * mechanism.releases
    often = "Once" if times == 1 else f"At most {times} times"
    if mechanism.sample_rate >= 1:
        return f"{often}, over all {part} records."
    return f"{often}, each over about {mechanism.sample_rate:.1%} of the {part} records, drawn at random."


def _policy(verdict: Verdict) -> Iterator[str]:
    for refusal in verdict.refusals:
        yield f"NO: {refusal}."
    for partition in verdict.over:
        yield (
            f"NO, not to its end: the ceiling would be reached on the {_PART[partition]} records; the site would stop "
            "there by itself."
        )
    if verdict.possible:
        yield "YES: every rule of the policy allows this study, and the ceilings leave room for all of it."
    yield (
        f"Approved by {verdict.approved}."
        if verdict.approved
        else "Not approved yet, so it gets nothing but a refusal."
    )


def _section(title: str, paragraphs: Iterator[str] | list[str]) -> list[str]:
    lines = ["", title, "-" * len(title)]
    for paragraph in paragraphs:
        hanging = "   " if paragraph[:1].isdigit() and paragraph[1:2] == "." else ""
        lines += textwrap.wrap(" ".join(paragraph.split()), _WIDTH, subsequent_indent=hanging)
    return lines


def _by_class(study: Study, counts: tuple[int, ...]) -> str:
    return ", ".join(f"{name} {count}" for name, count in zip(study.data.classes, counts, strict=True))


def _both(values: dict[Partition, float]) -> str:
    return f"epsilon {values['train']:.2f} (training) and {values['holdout']:.2f} (held-out)"
