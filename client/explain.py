"""What a study would take, ask and give, in plain words: the page that a hospital's approver reads and signs.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from client.approval import MOST_STUDIES, Verdict
from client.site import Site
from common.accounting import MechanismPlan, StudyPlan, epsilon_of
from common.mechanisms import BY_NAME, PARTITIONS, Partition
from common.study import Study

_WIDTH = 100
_PART = {"train": "training", "holdout": "held-out"}


def explain(site: Site, study: Study, plan: StudyPlan, verdict: Verdict) -> str:
    """The page, as text."""
    lines = [f'Study "{study.study.name}" at {site.config.name}', f"SHA-256 {study.sha256}", ""]
    lines += _section("What it is for", _purpose(study))
    lines += _section("What it uses here", [_records(site, study), *verdict.warnings])
    lines += _section("What leaves this hospital", [*_leaving(study, plan),
        "Nothing else leaves: no image, no patient's name or number, no exact count, no error text."])  # fmt: skip
    lines += _section("What it costs", _cost(site, study, plan, verdict))
    lines += _section("This hospital's policy", _policy(verdict))
    lines += [
        "",
        "Name ______________________________   Date ______________   Signature ______________________________",
    ]
    return "\n".join(lines) + "\n"


def cost_in_words(study: Study, plan: StudyPlan) -> str:
    """What the whole study costs a record on each side."""
    privacy, unit = study.privacy, study.privacy.unit
    ours = _ours(study, plan)
    return (
        f"epsilon {ours['train']:.2f} for a training {unit}, {ours['holdout']:.2f} for a held-out one, at delta "
        f"{privacy.delta:g}; its ceiling is {privacy.epsilon:g}"
    )


def room_in_words(verdict: Verdict, ceiling: float) -> str:
    """What the ceiling allows after the study."""
    more = f"at least {verdict.more}" if verdict.more >= MOST_STUDIES - 1 else str(verdict.more)
    return (
        f"with this one all studies here come to {_both(verdict.after)}, of {ceiling:g}; after it the ceiling allows "
        f"{more} more of this size"
    )


def _purpose(study: Study) -> Iterator[str]:
    yield study.study.description or "(the study gives no description)"
    yield (
        "The hospitals of the study together train a model that draws artificial images of the classes "
        + ", ".join(study.data.classes) + ". The images it draws, the model and a report will be released."
    )  # fmt: skip
    if study.pretrain.sha256 is not None:
        yield (
            "The coordinator also trains the model on images that it holds to be public, matched to what the hospitals "
            f"release of theirs: a file with SHA-256 {study.pretrain.sha256}. People in it are not protected. Ask "
            "whose images these are, and whether any are from here."
        )


def _records(site: Site, study: Study) -> str:
    report = site.report
    return (
        f"{sum(report.train_counts)} training images ({_by_class(study, report.train_counts)}) and "
        f"{sum(report.holdout_counts)} held-out images ({_by_class(study, report.holdout_counts)}); these exact "
        f"numbers are shown to you only. Privacy unit: {study.privacy.unit} ({len(site.train)} in training)."
    )


def _leaving(study: Study, plan: StudyPlan) -> Iterator[str]:
    privacy = study.privacy
    for number, mechanism in enumerate(plan.mechanisms, start=1):
        alone = epsilon_of([mechanism.whole_loss], delta=privacy.delta, accountant=privacy.accountant)
        yield (
            f"{number}. {mechanism.name}: {BY_NAME[mechanism.name].words.format(unit=privacy.unit)}. {_how(mechanism)} "
            f"One {privacy.unit} can move the sum by at most {mechanism.sensitivity:.3g}; random noise of standard "
            f"deviation {mechanism.noise_std:.3g} is added to every number of it before it leaves. By itself: epsilon "
            f"{alone:.2f}."
        )


def _how(mechanism: MechanismPlan) -> str:
    part, times = _PART[mechanism.partition], mechanism.steps * mechanism.releases
    often = "Once" if times == 1 else f"At most {times} times"
    if mechanism.sample_rate >= 1:
        return f"{often}, over all {part} records."
    return f"{often}, each over about {mechanism.sample_rate:.1%} of the {part} records, drawn at random."


def _cost(site: Site, study: Study, plan: StudyPlan, verdict: Verdict) -> Iterator[str]:
    policy, privacy = site.config.policy, study.privacy
    worst = max(_ours(study, plan).values())
    yield f"This study, if it runs to its end: {cost_in_words(study, plan)}."
    yield (
        f"All studies here so far: {_both(verdict.before)}; {room_in_words(verdict, policy.max_epsilon)} (delta "
        f"{policy.max_delta:g})."
    )
    yield (
        f"In words: whoever sees everything that leaves, and before was in two minds (50 %) whether one certain "
        f"{privacy.unit} was among the data, can become at most {100 / (1 + math.exp(-worst)):.2f} % sure of it, "
        f"whatever else they know, but for a chance of {privacy.delta:g}. This is a limit for the worst case, not a "
        "forecast." + ("" if privacy.unit == "patient" else " A patient with several images here is protected less.")
    )


def _policy(verdict: Verdict) -> Iterator[str]:
    for refusal in verdict.refusals:
        yield f"NO: {refusal}"
    if verdict.possible:
        yield "YES: every rule of the policy allows this study, and the ceilings leave room for all of it."
    approval = verdict.approval
    if approval is None:
        yield "Not approved yet, so it gets nothing but a refusal."
    else:
        yield f"Approved by {approval.by}, {approval.at}."
    if approval is not None and not verdict.same_images:
        yield "That was for other images than are here now: it gets no answer until it is approved again."


def _ours(study: Study, plan: StudyPlan) -> dict[Partition, float]:
    privacy = study.privacy
    return {p: epsilon_of(plan.losses(p), delta=privacy.delta, accountant=privacy.accountant) for p in PARTITIONS}


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
