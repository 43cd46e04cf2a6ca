"""What a site permits, whatever a study or the coordinator asks.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from common.accounting import StudyPlan, epsilon_of
from common.errors import PolicyRefusal
from common.study import Settings, Study

MechanismName = Literal["counts", "moments", "train", "reference", "evaluate"]


@dataclass(frozen=True)
class Cohort:
    """How many privacy units the site's train partition has: in all, and in its smallest class."""

    units: int
    smallest_class: int


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
    min_units: int = Field(default=20, ge=1, description="smallest train partition that may take part")
    min_units_per_class: int = Field(default=2, ge=0)
    allowed_studies: tuple[str, ...] = Field(default=(), description="SHA-256 of permitted studies; empty = any")
    allowed_mechanisms: tuple[MechanismName, ...] = ("counts", "moments", "train", "reference", "evaluate")
    exact_aggregates: Literal[False] = Field(
        default=False, description="no exact figure leaves; nothing can ask for it"
    )
    require_approval: bool = Field(default=True, description="a study needs `synthward-site approve` first")

    def permit(self, study: Study, plan: StudyPlan, cohort: Cohort, *, approved: bool) -> None:
        """Check a study against every rule, before any record is touched.

        Raises:
            PolicyRefusal: the first rule that says no, what was asked and what is allowed.
        """
        for refusal in self.refusals(study, plan, cohort, approved=approved):
            raise refusal

    def refusals(self, study: Study, plan: StudyPlan, cohort: Cohort, *, approved: bool) -> Iterator[PolicyRefusal]:
        """Every rule that says no, in order."""
        name, privacy = study.sha256[:12], study.privacy
        if self.require_approval and not approved:
            yield _no("require_approval", f"study {name}", "approved studies",
                      "The site approves it: synthward-site approve SITE.toml STUDY.toml --by NAME.")  # fmt: skip
        if self.allowed_studies and study.sha256 not in self.allowed_studies:
            yield _no("allowed_studies", f"study {name}", "the listed studies",
                      "The site's owner adds the study's SHA-256 to allowed_studies.")  # fmt: skip
        limits = (
            ("max_epsilon", privacy.epsilon, self.max_epsilon, "epsilon"),
            ("max_study_epsilon", privacy.epsilon, self.max_study_epsilon, "epsilon"),
            ("max_study_delta", privacy.delta, self.max_study_delta, "delta"),
        )
        for rule, asked, allowed, setting in limits:
            if asked > allowed:
                yield _no(rule, f"{setting} {asked:g}", f"{allowed:g}", f"Lower privacy.{setting} in the study.")
        for plan_ in plan.mechanisms:
            if plan_.name not in self.allowed_mechanisms:
                yield _no("allowed_mechanisms", plan_.name, ", ".join(self.allowed_mechanisms), "Leave the stage out.")
            alone = 0.0
            if self.max_stage_share < 1:
                alone = epsilon_of([plan_.whole_loss], delta=privacy.delta, accountant=privacy.accountant)
            if alone > self.max_stage_share * privacy.epsilon:
                yield _no("max_stage_share", f"{plan_.name} at epsilon {alone:.3f} alone",
                          f"{self.max_stage_share:g} of {privacy.epsilon:g}", "Give that stage less.")  # fmt: skip
        # The figures of these two would tell something about the records; that the rule was not met has to be told.
        if cohort.units < self.min_units:
            yield _cohort("min_units", f"the site has too few {privacy.unit}s for its policy")
        elif cohort.smallest_class < self.min_units_per_class:
            yield _cohort("min_units_per_class", f"a class has too few {privacy.unit}s for the site's policy")


def _no(rule: str, asked: str, allowed: str, remedy: str) -> PolicyRefusal:
    what = f"{asked} asked, {allowed} allowed"
    return PolicyRefusal(what, where=f"policy.{rule}", asked=asked, allowed=allowed, remedy=remedy)


def _cohort(rule: str, what: str) -> PolicyRefusal:
    return PolicyRefusal(what, where=f"policy.{rule}", remedy="Take part with more records.")
