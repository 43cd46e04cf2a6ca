"""What is claimed about privacy, to whom, with every number from the plan or from the sites' ledgers.

SPDX-License-Identifier: Apache-2.0

The fields are what NIST SP 800-226 (2025, "Guidelines for Evaluating Differential Privacy Guarantees") asks of a claim
and what the OpenDP deployments registry lists. `claim.schema.json` beside this file is the JSON form, held by a test.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import BudgetError

_MEANING = {
    "counts": "class counts of the training records, once a study",
    "moments": "sums of the training images' coarse outlines, by class, then of the squares of the rest, once a study",
    "train": "clipped gradients (and clipped losses, for the loss curve), each training step",
    "reference": "clipped gradients of the reference classifier, each of its steps",
    "evaluate": "score histograms and confusion counts on held-out records (one request; a second is kept in reserve)",
}

_UNITS = {  # what the unit means for a person
    "image": {
        "several": "The unit is an image: a person with several images at a site is protected less.",
        "everywhere": "A person with one image",
    },
    "patient": {
        "several": "The unit is a patient: how many images a patient has at a site makes no difference.",
        "everywhere": "A person who is a patient",
    },
}


@dataclass(frozen=True)
class MechanismClaim:
    """One kind of noisy release; the noise has standard deviation noise_multiplier × sensitivity."""

    name: str
    partition: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    sensitivity: float

    @property
    def meaning(self) -> str:
        return _MEANING.get(self.name, self.name)


@dataclass(frozen=True)
class SiteClaim:
    """What one site's ledger holds for this study.

    Attributes:
        epsilon_train, epsilon_holdout: of a record of that partition; a record is in one of the two.
        basis: "ledger" when the site reported it last; "plan" when it was asked after its last report and did not
            answer, so that the whole planned cost is claimed.
    """

    site: str
    epsilon_train: float
    epsilon_holdout: float
    basis: str

    @property
    def epsilon(self) -> float:
        """Of any record of the site: parallel composition over disjoint partitions."""
        return max(self.epsilon_train, self.epsilon_holdout)


@dataclass(frozen=True)
class Composition:
    """Which losses were put together, by what rule, and the figure that came of it."""

    over: str
    rule: str
    figure: str


@dataclass(frozen=True)
class Observer:
    """Somebody who sees something of the study, and what differential privacy promises against them.

    Attributes:
        sees: what reaches them.
        epsilon, delta: per unit at one site; None = nothing is promised.
        why: the reason for that figure.
    """

    who: str
    sees: str
    epsilon: float | None
    delta: float | None
    why: str


SCHEMA = "synthward-claim/1"
SEEDED = "SEEDED"  # how a noise source names itself when its noise can be computed again
COMPOSITION = (
    Composition(
        "all mechanisms of the study on one partition, every request that was reserved, finished or not",
        "adaptive composition by the accountant", "sites: epsilon_train, epsilon_holdout",
    ),
    Composition(
        "the train and the held-out partition of a site: a unit is in one of them",
        "parallel composition: the larger counts", "a site's epsilon: the larger of its two",
    ),
    Composition("units of different sites", "parallel composition: the largest counts", "epsilon_max"),
    Composition(
        "one person who has a unit at every site", "basic composition: the figures add up", "epsilon_sum, delta_sum"
    ),
    Composition(
        "other studies on the same records",
        "not composed here: each site's ledger adds them up, under the site's own ceiling", "none",
    ),
)  # fmt: skip
POST_PROCESSING = (
    "the Gaussian that the model starts from, made of the noisy moments",
    "averaging the sites' updates, and the moving average of the weights",
    "sampling the synthetic images",
    "training the classifier on the synthetic images",
    "every figure, chart and interval in the report",
)
RELEASE_TYPE = "one release, not interactive, from records that did not change meanwhile"
NO_TUNING_CHARGED = (
    "none charged: every setting was fixed in the study file before a record was read; choices by earlier studies on "
    "the same records are charged in the sites' ledgers, not here"
)


@dataclass(frozen=True)
class Claim:
    """The whole privacy statement of a release.

    Attributes:
        epsilon_ceiling: enforced by each site's own ledger.
        sites: one or more.
        begun: date on which the run began, ISO 8601.
        ended: date from which on no site was asked anything any more; "" in both = not known.
        tuning: what was paid for choosing the study's settings.
        public_sha256: of the public image set that the network learnt from first; "" = none but phantoms.
    """

    study: str
    study_sha256: str
    unit: str
    delta: float
    epsilon_ceiling: float
    accountant: str
    trust_model: str
    phantoms: bool
    random_source: str
    mechanisms: tuple[MechanismClaim, ...]
    sites: tuple[SiteClaim, ...]
    unprotected: tuple[str, ...]
    libraries: dict[str, str]
    begun: str = ""
    ended: str = ""
    tuning: str = NO_TUNING_CHARGED
    public_sha256: str = ""

    def __post_init__(self) -> None:
        figures = [value for s in self.sites for value in (s.epsilon_train, s.epsilon_holdout)]
        if not figures or not all(math.isfinite(value) and value >= 0 for value in figures):
            raise BudgetError("no claim without every site's own figure", where="claim", remedy="Ask the sites anew.")
        if not max(figures) <= self.epsilon_ceiling < math.inf:
            raise BudgetError(
                f"a site reports epsilon {max(figures):.3f}, over the ceiling {self.epsilon_ceiling:g}", where="claim",
                remedy="Do not release; ask the site for its ledger.",
            )  # fmt: skip
        if not 0 < self.delta < 1 or self.unit not in _UNITS or self.trust_model != "local":
            raise BudgetError(
                f"cannot claim delta {self.delta:g} per {self.unit} under the trust model '{self.trust_model}'",
                where="claim", remedy="Use a study of this version of synthward.",
            )  # fmt: skip

    @property
    def adjacency(self) -> str:
        """What neighbouring data sets differ in."""
        return f"add or remove one {self.unit}" + (" with all its images" if self.unit == "patient" else "")

    @property
    def protects(self) -> bool:
        """False when the noise came from a seed, so that whoever knows the seed can take it off."""
        return SEEDED not in self.random_source

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Under the trust model `local` every site adds its own noise, so what leaves it is safe from everybody."""
        epsilon, delta = (self.epsilon_max, self.delta) if self.protects else (None, None)
        alike = "each site adds all its noise before anything leaves it; the same holds against all of them together"
        why = alike if self.protects else "the noise came from a known seed: nothing is protected"
        seen = (
            ("public", "the release: images, model, report"),
            ("coordinator", "every answer of every site"),
            ("another site", "the weights of every round, the classifier and the release"),
        )
        own = Observer("the site itself", "its own records and answers, and what another site sees", None, None,
                       "it holds the records; what it does with them is its own matter")  # fmt: skip
        return (*(Observer(who, sees, epsilon, delta, why) for who, sees in seen), own)

    @property
    def accountant_version(self) -> str:
        """The library that composed the losses, as the coordinator has it."""
        return f"opacus {self.libraries.get('opacus', 'unknown')}"

    @property
    def epsilon_max(self) -> float:
        """For a person whose records are at one site, one record each unit."""
        return max(site.epsilon for site in self.sites)

    @property
    def epsilon_sum(self) -> float:
        """For a person with one record at every site (basic composition)."""
        return sum(site.epsilon for site in self.sites)

    @property
    def delta_sum(self) -> float:
        return self.delta * len(self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the statement and the derived figures are included for readers."""
        mechanisms = [{**asdict(m), "distribution": "gaussian", "meaning": m.meaning} for m in self.mechanisms]
        sites = [{**asdict(site), "epsilon": site.epsilon} for site in self.sites]
        return {
            "schema": SCHEMA, "statement": self.statement(), "definition": "(epsilon, delta)-differential privacy",
            **asdict(self), "mechanisms": mechanisms, "sites": sites, "unprotected": list(self.unprotected),
            "adjacency": self.adjacency, "protects": self.protects,
            "epsilon_max": self.epsilon_max, "epsilon_sum": self.epsilon_sum, "delta_sum": self.delta_sum,
            "accountant_version": self.accountant_version, "release_type": RELEASE_TYPE,
            "composition": [asdict(rule) for rule in COMPOSITION], "post_processing": list(POST_PROCESSING),
            "observers": [asdict(observer) for observer in self.observers],
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Claim:
        """The inverse of `to_json`; derived figures are computed anew, and have to agree.

        Raises:
            KeyError, TypeError, BudgetError: a field is missing or impossible, of another schema, or a derived figure
                is not what the others give.
        """
        if value["schema"] != SCHEMA:
            raise BudgetError(f"cannot read a claim of schema '{value['schema']}'", where="claim",
                              remedy="Read it with the version of synthward that wrote it.")  # fmt: skip
        plain = {k: v for k, v in value.items() if k in cls.__dataclass_fields__}
        plain["mechanisms"] = tuple(_read(MechanismClaim, entry) for entry in value["mechanisms"])
        plain["sites"] = tuple(_read(SiteClaim, entry) for entry in value["sites"])
        plain["unprotected"] = tuple(value["unprotected"])
        claim = cls(**plain)
        if _derived(value) != _derived(claim.to_json()):
            raise BudgetError("the claim contradicts itself", where="claim", remedy="Do not trust it.")
        return claim

    def same_as(self, other: Claim) -> bool:
        """Whether both say the same to the last digit."""
        return json.dumps(self.to_json(), sort_keys=True) == json.dumps(other.to_json(), sort_keys=True)

    def statement(self) -> str:
        """The claim in plain words, for a reader who knows nothing of machine learning."""
        count, unit, words = len(self.sites), self.unit, _UNITS[self.unit]
        several = count > 1
        sites = f"{count} sites" if several else "one site"
        epsilon = two_digits_up(self.epsilon_max)
        against = "the public, the coordinator and the other sites alike, even together"
        sentences = (
            "These images come from phantoms: procedurally drawn, so no patient is behind them. The figures below are "
            "what the same run would have cost real records." if self.phantoms else "",
            "" if self.protects else "The noise of this run came from a known seed, for tests: NOTHING IS PROTECTED. "
            "The figures below are what secret noise would have given.",
            f"What left the {sites} in this study (the model, the synthetic images, the figures in this report) "
            f"{'is' if self.protects else 'would be'} differentially private with epsilon {epsilon} at delta "
            f"{self.delta:g}, per {unit} at a site ({self.adjacency}).",
            f"In plain words: it changes the odds that any one {unit} was there by {_odds(self.epsilon_max)}, but for "
            f"a chance of about 1 in {round(1 / self.delta):,}. That bounds the worst case; it is no forecast.",
            words["several"],
            "Each site added all the noise that this needs before anything left it, so it holds against "
            f"{against if several else 'the public and the coordinator alike'}. The site itself sees its records.",
            f"{unit.capitalize()}s are either in the training or in the held-out part of their site, and cost what "
            "happened to that part.",
            f"{words['everywhere']} at every site is covered by the sum, epsilon {two_digits_up(self.epsilon_sum)} at "
            f"delta {self.delta_sum:g}." if several else "",
            f"Each site's ledger enforces the ceiling of epsilon {self.epsilon_ceiling:g} for this study; what other "
            "studies on the same records cost is not in these figures.",
            "The network first learnt from images that the coordinator holds to be public (file with SHA-256 "
            f"{self.public_sha256[:16]}…): whoever is in them is not covered by these figures." if self.public_sha256
            else "",
            f"Losses are added up by Opacus's {self.accountant.upper()} accountant over every noisy answer that was "
            "begun, whether or not it was finished.",
        )  # fmt: skip
        return " ".join(sentence for sentence in sentences if sentence)


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


def _read(kind: type[Any], entry: dict[str, Any]) -> Any:
    """A nested part without its derived fields."""
    return kind(**{k: v for k, v in entry.items() if k in kind.__dataclass_fields__})


def _derived(value: dict[str, Any]) -> list[Any]:
    """The figures of a claim's JSON that follow from others in it."""
    names = ("epsilon_max", "epsilon_sum", "delta_sum", "adjacency", "protects")
    observers = [(entry["who"], entry["epsilon"], entry["delta"]) for entry in value["observers"]]
    return [*(value[name] for name in names), [entry["epsilon"] for entry in value["sites"]], observers]
