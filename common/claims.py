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
    "train": "clipped gradients (and clipped losses, for the loss curve), each training step",
    "reference": "clipped gradients of the reference classifier, each of its steps",
    "evaluate": "score histograms and confusion counts on held-out records (one request; a second is kept in reserve)",
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


SCHEMA = "synthward-claim/1"
COMPOSITION = (
    "all mechanisms of the study on one partition are composed by the accountant, over every request that was reserved",
    "a record is in the train or in the held-out partition: parallel composition, the larger figure counts",
    "the records of different sites are different units: parallel composition, the largest figure counts; for a person "
    "who is at several sites the figures add up (epsilon_sum, delta_sum)",
)
POST_PROCESSING = (
    "averaging the sites' updates and the moving average of the weights",
    "sampling the synthetic images, and training the classifier on them",
    "every figure, chart and interval in the report",
)


@dataclass(frozen=True)
class Observer:
    """Somebody who sees something of the study, and what differential privacy promises against them.

    Attributes:
        who: "public", "coordinator" or "another site".
        sees: what reaches them.
        epsilon, delta: per unit at one site.
    """

    who: str
    sees: str
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Claim:
    """The whole privacy statement of a release.

    Attributes:
        epsilon_ceiling: enforced by each site's own ledger.
        sites: one or more.
        begun: date on which the run began, ISO 8601.
        tuning: what was paid for choosing the study's settings.
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
    tuning: str = (
        "none charged: every setting was fixed in the study file before a record was read; choices by earlier studies "
        "on the same records are charged in the sites' ledgers, not here"
    )

    @property
    def adjacency(self) -> str:
        """What neighbouring data sets differ in."""
        return f"add or remove one {self.unit}" + (" with all its images" if self.unit == "patient" else "")

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Under the trust model `local` every site adds its own noise, so what leaves it is safe from everybody."""
        seen = (
            ("public", "the release: images, model, report"),
            ("coordinator", "every answer of every site"),
            ("another site", "the weights of every round, the classifier and the release"),
        )
        return tuple(Observer(who, sees, self.epsilon_max, self.delta) for who, sees in seen)

    @property
    def accountant_version(self) -> str:
        """The library that composed the losses."""
        return f"opacus {self.libraries.get('opacus', 'unknown')}"

    def __post_init__(self) -> None:
        figures = [value for s in self.sites for value in (s.epsilon_train, s.epsilon_holdout)]
        if not figures or not all(math.isfinite(value) and value >= 0 for value in figures):
            raise BudgetError("no claim without every site's own figure", where="claim", remedy="Ask the sites anew.")
        if max(figures) > self.epsilon_ceiling:
            raise BudgetError(
                f"a site reports epsilon {max(figures):.3f}, over the ceiling {self.epsilon_ceiling:g}", where="claim",
                remedy="Do not release; ask the site for its ledger.",
            )  # fmt: skip

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
        return {
            "schema": SCHEMA, **asdict(self), "mechanisms": mechanisms, "adjacency": self.adjacency,
            "epsilon_max": self.epsilon_max, "epsilon_sum": self.epsilon_sum, "delta_sum": self.delta_sum,
            "definition": "(epsilon, delta)-differential privacy", "accountant_version": self.accountant_version,
            "composition": list(COMPOSITION), "post_processing": list(POST_PROCESSING),
            "observers": [asdict(observer) for observer in self.observers], "statement": self.statement(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Claim:
        """The inverse of `to_json`; derived figures are computed anew.

        Raises:
            KeyError, TypeError, BudgetError: a field is missing or impossible.
        """
        plain = {k: v for k, v in value.items() if k in cls.__dataclass_fields__}
        own = MechanismClaim.__dataclass_fields__
        plain["mechanisms"] = tuple(
            MechanismClaim(**{k: v for k, v in entry.items() if k in own}) for entry in value["mechanisms"]
        )
        plain["sites"] = tuple(SiteClaim(**entry) for entry in value["sites"])
        plain["unprotected"] = tuple(value["unprotected"])
        return cls(**plain)

    def same_as(self, other: Claim) -> bool:
        """Whether both say the same to the last digit."""
        return json.dumps(self.to_json(), sort_keys=True) == json.dumps(other.to_json(), sort_keys=True)

    def statement(self) -> str:
        """The claim in plain words."""
        sites = len(self.sites)
        opening = (
            "These images come from phantoms: procedurally drawn, so no patient is behind them. The figures below are "
            "what the same run would have cost real records. " if self.phantoms else ""
        )  # fmt: skip
        unit = self.unit
        who, several = ("A person with one image", " A person with several images at a site is protected less.")
        if unit == "patient":
            who, several = "A person who is a patient", " How many images a patient has at a site makes no difference."
        sentences = (
            f"{opening}Whatever anyone learns from everything that left the {sites} sites in this study (the "
            "model, the synthetic images, the figures in this report), it would have been almost as likely had any one "
            f"{unit} never been there: the release is differentially private with epsilon {self.epsilon_max:.2f} at "
            f"delta {self.delta:g}, per {unit} at a site ({self.adjacency}).",
            "Each site added all the noise that its own guarantee needs before anything left it, so the guarantee "
            "holds against the coordinator, the other sites and the public alike.",
            f"{unit.capitalize()}s are either in the training or in the held-out part of their site, and cost what "
            "happened to that part.",
            f"{who} at every site is covered by the sum, epsilon {self.epsilon_sum:.2f} at delta {self.delta_sum:g}."
            + several,
            f"The sites' ledgers enforce the ceiling of epsilon {self.epsilon_ceiling:g}.",
            f"Losses are composed by Opacus's {self.accountant.upper()} accountant over every noisy release that was "
            "reserved, whether or not it was finished.",
        )
        return " ".join(sentences)
