"""What a site permits, whatever a study or the coordinator asks.

SPDX-License-Identifier: Apache-2.0

The rules about the records themselves (how many, whether patients are known) are judged when a study is approved, at
the site and for its own screen. When a request comes, only the rules about the study are: so no refusal that leaves
depends on a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from common.accounting import StudyPlan, epsilon_of
from common.errors import PolicyRefusal
from common.images import Units
from common.mechanisms import BY_NAME
from common.settings import Settings
from common.study import Study

_SAFE = 0.1  # of 1/N: the most that delta should be (Dwork and Roth 2014, section 2.3, want it far below)


def _known(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"no mechanism '{name}'; there are {', '.join(BY_NAME)}")
    return name


@dataclass(frozen=True)
class Cohort:
    """What the policy asks of the records: exact numbers, so for the site's own eyes.

    Attributes:
        units: privacy units (images or patients) in the train partition.
        held_out: units in the holdout.
        smallest_class: units that have an image of the rarest class.
        patients_known: whether it is known whose each image is.
    """

    units: int
    held_out: int
    smallest_class: int
    patients_known: bool

    @classmethod
    def of(cls, train: Units, holdout: Units, classes: int) -> Cohort:
        """Of a site's partitions."""
        known = train.images.patients is not None
        return cls(len(train), len(holdout), int(train.with_class(classes).min()), known)

    @property
    def largest_delta(self) -> float:
        """One over the units of the larger partition: a larger delta allows to publish a whole record of it."""
        return 1.0 / max(1, self.units, self.held_out)

    def warnings(self, study: Study) -> list[str]:
        """What a study's numbers mean for so many records, one line each."""
        delta, most = study.privacy.delta, self.largest_delta
        return (
            [
                f"delta {delta:g} is over a tenth of 1/N, {most:.2g} for the {study.privacy.unit}s of the larger part"
                " here: a promise that may fail so often says little; ask for a smaller one"
            ]
            if delta > _SAFE * most
            else []
        )


class SitePolicy(Settings):
    """The `[policy]` part of the site file; the hospital's own, never sent anywhere."""

    max_epsilon: float = Field(default=10.0, gt=0, description="ceiling over all studies on these records")
    max_delta: float = Field(default=1e-5, gt=0, lt=1, description="delta at which all studies are composed")
    max_study_epsilon: float = Field(default=10.0, gt=0, description="ceiling of a single study")
    max_study_delta: float = Field(default=1e-5, gt=0, lt=1)
    max_stage_share: float = Field(
        default=1.0, gt=0, le=1, description="of a study's epsilon, what one stage alone may cost"
    )
    accountant: Literal["prv", "rdp"] = "prv"
    unit: Literal["patient where known", "image"] = Field(
        default="patient where known", description="what a study must protect: whole patients, or single images"
    )
    min_units: int = Field(default=20, ge=1, description="smallest train partition that may take part")
    min_units_per_class: int = Field(default=2, ge=0)
    allowed_studies: tuple[str, ...] = Field(default=(), description="SHA-256 of permitted studies; empty = any")
    allowed_mechanisms: tuple[Annotated[str, AfterValidator(_known)], ...] = tuple(BY_NAME)

    def permit(self, study: Study, plan: StudyPlan, cohort: Cohort | None = None) -> None:
        """Check a study against every rule.

        Raises:
            PolicyRefusal: the first rule that says no, what was asked and what is allowed.
        """
        for refusal in self.refusals(study, plan, cohort):
            raise refusal

    def refusals(self, study: Study, plan: StudyPlan, cohort: Cohort | None = None) -> Iterator[PolicyRefusal]:
        """Every rule that says no, in order; the rules about records only where a cohort is given."""
        yield from self._of_study(study)
        yield from self._of_mechanisms(study, plan)
        if cohort is not None:
            yield from self._of_records(study, cohort)

    def _of_study(self, study: Study) -> Iterator[PolicyRefusal]:
        if self.allowed_studies and study.sha256 not in self.allowed_studies:
            yield PolicyRefusal(
                f"study {study.sha256[:12]} asked, the listed studies allowed", where="policy.allowed_studies",
                asked=f"study {study.sha256[:12]}", allowed="the listed studies",
                remedy="The site's owner adds the study's SHA-256 to allowed_studies.",
            )  # fmt: skip
        privacy = study.privacy
        limits = (
            ("max_epsilon", privacy.epsilon, self.max_epsilon, "epsilon"),
            ("max_study_epsilon", privacy.epsilon, self.max_study_epsilon, "epsilon"),
            ("max_study_delta", privacy.delta, self.max_study_delta, "delta"),
        )
        for rule, asked, allowed, setting in limits:
            if asked > allowed:
                yield _no(rule, f"{setting} {asked:g}", f"{allowed:g}", f"a lower privacy.{setting}")

    def _of_mechanisms(self, study: Study, plan: StudyPlan) -> Iterator[PolicyRefusal]:
        privacy = study.privacy
        for mechanism in plan.mechanisms:
            name = mechanism.name
            if name not in self.allowed_mechanisms:
                yield _no("allowed_mechanisms", name, ", ".join(self.allowed_mechanisms), f"no '{name}'")
            if self.max_stage_share == 1:
                continue
            alone = epsilon_of([mechanism.whole_loss], delta=privacy.delta, accountant=privacy.accountant)
            if alone > self.max_stage_share * privacy.epsilon:
                yield _no("max_stage_share", f"{name} at epsilon {alone:.3f} alone",
                          f"{self.max_stage_share:g} of {privacy.epsilon:g}", f"less for '{name}'")  # fmt: skip

    def _of_records(self, study: Study, cohort: Cohort) -> Iterator[PolicyRefusal]:
        unit = study.privacy.unit
        if unit == "image" and cohort.patients_known and self.unit != "image":
            yield PolicyRefusal(
                "the study protects single images, and patients are known here", where="policy.unit",
                asked="privacy unit image", allowed="privacy unit patient",
                remedy='Ask the coordinator for a study with privacy.unit = "patient", or set [policy] unit = "image".',
            )  # fmt: skip
        few = (("min_units", f"{cohort.units} training {unit}s", cohort.units, self.min_units),
               ("min_units_per_class", f"{cohort.smallest_class} {unit}s in the smallest class", cohort.smallest_class,
                self.min_units_per_class))  # fmt: skip
        if study.privacy.delta > cohort.largest_delta:
            yield PolicyRefusal(
                f"delta {study.privacy.delta:g} is over 1/N, {cohort.largest_delta:.2g} for the {unit}s of the larger"
                " partition here, and so no promise", where="privacy.delta",
                remedy="Ask the coordinator for a study with a far smaller privacy.delta.",
            )  # fmt: skip
        for rule, what, found, least in few:
            if found < least:
                yield PolicyRefusal(
                    f"{what}, at least {least} needed", where=f"policy.{rule}", remedy="Take part with more records."
                )


def _no(rule: str, asked: str, allowed: str, wanted: str) -> PolicyRefusal:
    """A study that asks for more than the site gives: the study is the coordinator's, the policy the site's."""
    return PolicyRefusal(
        f"{asked} asked, {allowed} allowed", where=f"policy.{rule}", asked=asked, allowed=allowed,
        remedy=f"Ask the coordinator for a study with {wanted}, or change {rule} in the site file's [policy].",
    )  # fmt: skip
