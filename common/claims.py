"""What is claimed about privacy, to whom, with every number from the plan or from the sites' ledgers.

SPDX-License-Identifier: Apache-2.0
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


@dataclass(frozen=True)
class Claim:
    """The whole privacy statement of a release.

    Attributes:
        epsilon_ceiling: enforced by each site's own ledger.
        sites: one or more.
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
    adjacency: str = "add or remove one record"

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
        return {
            **asdict(self), "epsilon_max": self.epsilon_max, "epsilon_sum": self.epsilon_sum,
            "delta_sum": self.delta_sum, "statement": self.statement(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Claim:
        """The inverse of `to_json`; derived figures are computed anew."""
        plain = {k: v for k, v in value.items() if k in cls.__dataclass_fields__}
        plain["mechanisms"] = tuple(MechanismClaim(**entry) for entry in value["mechanisms"])
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
        sentences = (
            f"{opening}Whatever anyone learns from everything that left the {sites} sites in this study (the "
            "model, the synthetic images, the figures in this report), it would have been almost as likely had any one "
            f"{unit} never been there: the release is differentially private with epsilon {self.epsilon_max:.2f} at "
            f"delta {self.delta:g}, per {unit} at a site ({self.adjacency}).",
            "Each site added all the noise that its own guarantee needs before anything left it, so the guarantee "
            "holds against the coordinator, the other sites and the public alike.",
            "A record is either in the training or in the held-out part of its site, so its cost is that of its own "
            "part.",
            f"A person with one {unit} at every site is covered by the sum, epsilon {self.epsilon_sum:.2f} at delta "
            f"{self.delta_sum:g}; a person with several {unit}s at a site is covered by a correspondingly weaker "
            "guarantee.",
            f"The sites' ledgers enforce the ceiling of epsilon {self.epsilon_ceiling:g}.",
            f"Losses are composed by Opacus's {self.accountant.upper()} accountant over every noisy release that was "
            "reserved, whether or not it was finished.",
        )
        return " ".join(sentences)
