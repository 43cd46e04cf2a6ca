"""What is claimed about privacy, to whom, with every number from the plan or from the sites' ledgers.

SPDX-License-Identifier: Apache-2.0

The fields are what NIST SP 800-226 (2025, "Guidelines for Evaluating Differential Privacy Guarantees") asks of a claim
and what the OpenDP deployments registry lists. `claim.schema.json` beside this file is made from these types:
`python -c "from common.claims import schema_text; print(schema_text(), end='')"`; a test holds the two equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from common.accounting import MechanismPlan, StudyPlan
from common.errors import BudgetError, CheckpointError
from common.mechanisms import BY_NAME, Partition
from common.settings import Settings
from common.study import Study, TuningConfig

SCHEMA = "synthward-claim/2"
SEEDED = "SEEDED"  # how a noise source names itself when its noise can be computed again
_EVERYWHERE = {"image": "A person with one image", "patient": "A person who is a patient"}
_SEVERAL = {
    "image": "The unit is an image: a person with several images at a site is protected less.",
    "patient": "The unit is a patient: how many images a patient has at a site makes no difference.",
}
_TUNING = {  # what a study declares of its own settings; nothing here is checked by the software
    "undeclared": "the study does not say on what its settings were chosen; choices made on these records would not be "
    "covered",
    "nothing": "the study says that its settings were chosen on no images",
    "public data": "the study says that its settings were chosen on public data ({sources}); the people in it are not "
    "covered",
    "phantoms": "the study says that its settings were chosen on phantoms ({sources})",
    "earlier private runs": "the study says that its settings were chosen by earlier private runs ({sources}); their "
    "cost is in the ledgers of their sites, not in these figures",
}

Figure = Annotated[float, Field(ge=0)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Date = Annotated[str, Field(pattern=r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?$")]


class Part(Settings):
    """Base of a claim's parts; in its JSON every field is there, those that follow from others included."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True, populate_by_name=True)


class MechanismClaim(Part):
    """One kind of noisy release: Gaussian noise of standard deviation noise_multiplier × sensitivity."""

    name: str
    partition: Partition
    distribution: Literal["gaussian"] = "gaussian"
    noise_multiplier: float = Field(gt=0, description="standard deviation of the noise divided by the sensitivity")
    sample_rate: float = Field(gt=0, le=1, description="Poisson sampling probability of a unit")
    steps: int = Field(ge=1, description="noisy sums at most, over all requests")
    sensitivity: float = Field(gt=0, description="L2, of adding or removing one unit")

    @classmethod
    def of(cls, plan: MechanismPlan) -> MechanismClaim:
        """What a plan says, over all requests that the study may make."""
        return cls(
            name=plan.name, partition=plan.partition, noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate, steps=plan.steps * plan.releases, sensitivity=plan.sensitivity,
        )  # fmt: skip

    @computed_field
    @property
    def meaning(self) -> str:
        return BY_NAME[self.name].meaning if self.name in BY_NAME else self.name


class SiteClaim(Part):
    """What one site's ledger holds for this study."""

    site: str
    epsilon_train: Figure = Field(description="of a unit of the train partition; a unit is in one of the two")
    epsilon_holdout: Figure = Field(description="of a unit of the holdout partition")
    basis: Literal["ledger", "plan"] = Field(
        description="plan = its last answer is missing, so the whole planned cost is claimed"
    )

    @computed_field(description="of any unit of the site: parallel composition over disjoint partitions")
    @property
    def epsilon(self) -> Figure:
        return max(self.epsilon_train, self.epsilon_holdout)


class TuningClaim(TuningConfig, Part):
    """On what the study says that its settings were chosen; declared, not checked."""

    @computed_field
    @property
    def meaning(self) -> Text:
        return _TUNING[self.basis].format(sources=", ".join(self.sources) or "not named")


class Composition(Part):
    """Which losses were put together, by what rule, and the figure that came of it."""

    over: Text
    rule: Text
    figure: Text


class Observer(Part):
    """Somebody who sees something of the study, and what differential privacy promises against them."""

    who: Literal["public", "coordinator", "another site", "the site itself"]
    sees: Text = Field(description="what reaches them")
    epsilon: Figure | None = Field(description="per unit at one site; null = nothing is promised")
    delta: Delta | None
    why: Text = Field(description="the reason for that figure")


COMPOSITION = tuple(
    Composition(over=over, rule=rule, figure=figure)
    for over, rule, figure in (
        ("all mechanisms of the study on one partition, every request that was reserved, finished or not",
         "adaptive composition by the accountant", "sites: epsilon_train, epsilon_holdout"),
        ("the train and the holdout partition of a site: a unit is in one of them",
         "parallel composition: the larger counts", "a site's epsilon: the larger of its two"),
        ("units of different sites", "parallel composition: the largest counts", "epsilon_max"),
        ("one person who has a unit at every site", "basic composition: the figures add up", "epsilon_sum, delta_sum"),
        ("other studies on the same records",
         "not composed here: each site's ledger adds them up, under the site's own ceiling", "none"),
    )
)  # fmt: skip
POST_PROCESSING = (
    "carrying public images to the noisy moments, and training the network on them",
    "labelling the images that it learns from, and choosing those of its own that are kept, by noisy features if any",
    "averaging the sites' updates, and the moving average of the weights",
    "sampling the synthetic images",
    "training the classifier on the synthetic images",
    "every figure, chart and interval in the report",
)
RELEASE_TYPE = "one release, not interactive, from records that did not change meanwhile"


class Claim(Part):
    """What is promised about privacy in one release, to whom, with every parameter that the figures follow from."""

    schema_: Literal["synthward-claim/2"] = Field(default=SCHEMA, alias="schema")
    study: str
    study_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the settings that all parties agreed on")
    unit: Literal["image", "patient"] = Field(description="whose whole contribution at a site is protected")
    delta: Delta = Field(description="for a unit at one site")
    epsilon_ceiling: Figure = Field(description="enforced by each site's own ledger")
    accountant: Literal["prv", "rdp"] = Field(description="prv = Gopi et al. 2021, rdp = Mironov et al. 2019")
    trust_model: Literal["local"] = Field(description="each site adds all the noise that its own guarantee needs")
    phantoms: bool = Field(description="no patient is behind the data")
    random_source: Text = Field(description="where the noise came from, of all sites")
    mechanisms: tuple[MechanismClaim, ...] = Field(min_length=1)
    sites: tuple[SiteClaim, ...] = Field(min_length=1)
    unprotected: tuple[str, ...] = Field(min_length=1, description="what the figures do not cover")
    libraries: dict[str, str] = Field(description="versions at the coordinator")
    tuning: TuningClaim = TuningClaim()
    begun: Date = Field(default="", description="date on which the run began, ISO 8601; empty = not known")
    ended: Date = Field(default="", description="date from which on no site was asked anything; empty = not known")
    public_sha256: str = Field(
        default="", pattern=r"^([0-9a-f]{64})?$",
        description="of the public image set that the network learnt from, too; empty = none but phantoms",
    )  # fmt: skip

    @classmethod
    def of(
        cls, study: Study, plan: StudyPlan, *, sites: Iterable[SiteClaim], phantoms: bool, random_source: str,
        unprotected: tuple[str, ...], libraries: dict[str, str], begun: str = "", ended: str = "",
    ) -> Claim:  # fmt: skip
        """The claim of a run: what the study says, beside what its sites have reported."""
        privacy = study.privacy
        return cls(
            study=study.study.name, study_sha256=study.sha256, unit=privacy.unit, delta=privacy.delta,
            epsilon_ceiling=privacy.epsilon, accountant=privacy.accountant, trust_model=privacy.trust,
            phantoms=phantoms, random_source=random_source,
            mechanisms=tuple(MechanismClaim.of(each) for each in plan.mechanisms), sites=tuple(sites),
            unprotected=unprotected, libraries=libraries, tuning=TuningClaim(**study.tuning.model_dump()),
            begun=begun, ended=ended,
            public_sha256=study.pretrain.sha256 or "",
        )  # fmt: skip

    @model_validator(mode="after")
    def _under_the_ceiling(self) -> Claim:
        if not self.epsilon_max <= self.epsilon_ceiling:
            raise BudgetError(
                f"a site reports epsilon {self.epsilon_max:.3f}, over the ceiling {self.epsilon_ceiling:g}",
                where="claim", remedy="Do not release; ask the site for its ledger.",
            )  # fmt: skip
        return self

    @computed_field(description="what neighbouring data sets differ in")
    @property
    def adjacency(self) -> Text:
        return f"add or remove one {self.unit}" + (" with all its images" if self.unit == "patient" else "")

    @computed_field(description="false = the noise came from a known seed, which can be taken off again")
    @property
    def protects(self) -> bool:
        return SEEDED not in self.random_source

    @computed_field(description="under the trust model local every site adds its own noise, so the same for everybody")
    @property
    def observers(self) -> tuple[Observer, ...]:
        epsilon, delta = (self.epsilon_max, self.delta) if self.protects else (None, None)
        alike = "each site adds all its noise before anything leaves it; the same holds against all of them together"
        why = alike if self.protects else "the noise came from a known seed: nothing is protected"
        seen: tuple[tuple[Any, str], ...] = (
            ("public", "the release: images, model, report"),
            ("coordinator", "every answer of every site"),
            ("another site", "the weights of every round, the classifier and the release"),
        )
        own = Observer(
            who="the site itself", sees="its own records and answers, and what another site sees", epsilon=None,
            delta=None, why="it holds the records; what it does with them is its own matter",
        )  # fmt: skip
        return (*(Observer(who=who, sees=sees, epsilon=epsilon, delta=delta, why=why) for who, sees in seen), own)

    @computed_field(description="library and version at the coordinator that composed the losses")
    @property
    def accountant_version(self) -> str:
        return f"opacus {self.libraries.get('opacus', 'unknown')}"

    @computed_field(description="for a unit at one site, the largest over the sites")
    @property
    def epsilon_max(self) -> Figure:
        return max(site.epsilon for site in self.sites)

    @computed_field(description="for a person with one unit at every site")
    @property
    def epsilon_sum(self) -> Figure:
        return sum(site.epsilon for site in self.sites)

    @computed_field(description="for a person with one unit at every site")
    @property
    def delta_sum(self) -> Figure:
        return float(f"{self.delta * len(self.sites):.12g}")  # 3e-05, not 3.0000000000000004e-05

    @computed_field
    @property
    def definition(self) -> Literal["(epsilon, delta)-differential privacy"]:
        return "(epsilon, delta)-differential privacy"

    @computed_field(description="which losses were put together, and how")
    @property
    def composition(self) -> tuple[Composition, ...]:
        return COMPOSITION

    @computed_field(description="what was done with noisy answers afterwards; costs nothing")
    @property
    def post_processing(self) -> tuple[str, ...]:
        return POST_PROCESSING

    @computed_field(description="how often, and from what kind of data, something is released")
    @property
    def release_type(self) -> Text:
        return RELEASE_TYPE

    @computed_field(description="the claim in plain words, for a reader who knows nothing of machine learning")
    @property
    def statement(self) -> Text:
        return " ".join(sentence for sentence in _sentences(self) if sentence)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the statement and the derived figures are included for readers."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_json(cls, value: Any) -> Claim:
        """The inverse of `to_json`; derived figures are computed anew, and have to agree.

        Raises:
            CheckpointError: a field is missing or impossible, or it is of another schema.
            BudgetError: over its ceiling, or a derived figure is not what the others give.
        """
        try:
            claim = cls.model_validate(_given(cls, value))
            if _derived(value) == _derived(claim.to_json()):
                return claim
        except (ValidationError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("not a claim that this version can read", where="claim",
                                  remedy="Read it with the version of synthward that wrote it.") from error  # fmt: skip
        raise BudgetError("the claim contradicts itself", where="claim", remedy="Do not trust it.")


def _sentences(claim: Claim) -> tuple[str, ...]:
    """The claim in plain words; an empty sentence where there is nothing to say."""
    count, unit, epsilon = len(claim.sites), claim.unit, claim.epsilon_max
    several, left = count > 1, "the model, the synthetic images, the figures in this report"
    against = "the public, the coordinator and the other sites alike, even together"
    tuning = claim.tuning.meaning
    return (
        "These images come from phantoms: procedurally drawn, so no patient is behind them. The figures below are "
        "what the same run would have cost real records." if claim.phantoms else "",
        "" if claim.protects else "The noise of this run came from a known seed, for tests: NOTHING IS PROTECTED. "
        "The figures below are what secret noise would have given.",
        f"What left the {f'{count} sites' if several else 'one site'} in this study ({left}) "
        f"{'is' if claim.protects else 'would be'} differentially private with epsilon "
        f"{two_digits_up(epsilon)} at delta {claim.delta:g}, per {unit} and per site ({claim.adjacency}).",
        f"In plain words: it changes the odds that any one {unit} was there by {_odds(epsilon)}, but for "
        f"a chance of about 1 in {round(1 / claim.delta):,}. That bounds the worst case; it is no forecast.",
        _SEVERAL[unit],
        f"{_EVERYWHERE[unit]} at every site is covered by the sum over the sites only: epsilon "
        f"{two_digits_up(claim.epsilon_sum)} at delta {claim.delta_sum:g}." if several else "",
        "Each site added all the noise that this needs before anything left it, so it holds against "
        f"{against if several else 'the public and the coordinator alike'}. The site itself sees its records.",
        f"{unit.capitalize()}s are either in the training or in the held-out part of their site, and cost what "
        "happened to that part.",
        f"Each site's ledger enforces the ceiling of epsilon {claim.epsilon_ceiling:g} for this study; what other "
        "studies on the same records cost is not in these figures.",
        f"{tuning[0].upper()}{tuning[1:]}.",
        "The network learnt from images, too, that the coordinator holds to be public (file with SHA-256 "
        f"{claim.public_sha256[:16]}…): whoever is in them is not covered by these figures." if claim.public_sha256
        else "",
        f"Losses are added up by Opacus's {claim.accountant.upper()} accountant over every noisy answer that was "
        "begun, whether or not it was finished.",
    )  # fmt: skip


def two_digits_up(value: float) -> str:
    """A privacy figure for readers: rounded up, so never less than what was spent (but for 1e-8)."""
    return f"{math.ceil(round(value * 100, 6)) / 100:.2f}"


def _odds(epsilon: float) -> str:
    """e to the power of epsilon, rounded up, as a reader can say it."""
    if epsilon > math.log(1e6):
        return "more than a factor of a million, which is no promise"
    factor = math.exp(epsilon)
    digits = 2 if factor < 10 else 1 if factor < 100 else 0
    return f"a factor of at most {math.ceil(round(factor * 10**digits, 6)) / 10**digits:,.{digits}f}"


def _given(kind: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """A claim's JSON without what follows from other fields."""
    parts = {k: v for k, v in value.items() if k not in kind.model_computed_fields}
    if kind is Claim:
        parts |= {"mechanisms": [_given(MechanismClaim, entry) for entry in value["mechanisms"]],
                  "sites": [_given(SiteClaim, entry) for entry in value["sites"]],
                  "tuning": _given(TuningClaim, value["tuning"])}  # fmt: skip
    return parts


def _derived(value: dict[str, Any]) -> list[Any]:
    """The figures of a claim's JSON that follow from others in it."""
    names = ("epsilon_max", "epsilon_sum", "delta_sum", "adjacency", "protects")
    observers = [(entry["who"], entry["epsilon"], entry["delta"]) for entry in value["observers"]]
    return [*(value[name] for name in names), [entry["epsilon"] for entry in value["sites"]], observers]


def schema_text() -> str:
    """The JSON schema of a claim, as `claim.schema.json` holds it."""
    schema = Claim.model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "synthward privacy claim"}
    return json.dumps({**schema, **head}, indent=2, sort_keys=True) + "\n"
