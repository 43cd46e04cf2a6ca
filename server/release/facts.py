"""What the documents of a release are written from: its study, claim and metrics, and nothing else.

SPDX-License-Identifier: Apache-2.0

So a document is the same bytes whoever writes it, and `synthward verify` can write it again and compare.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from common.claims import Claim, two_digits_up
from common.study import Study
from server.release.limits import unmet
from server.release.metrics import Figure, Metrics

_KNOWN = {  # licences that Hugging Face has a name for; by their SPDX identifiers, in lower case
    "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "cdla-permissive-2.0", "mit", "odc-by", "odbl", "pddl",
}  # fmt: skip
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]|#"} | {"<": "&lt;", "\n": " ", "\t": " "})


@dataclass(frozen=True)
class Facts:
    """One release, as its documents tell it."""

    study: Study
    claim: Claim
    metrics: Metrics

    @property
    def title(self) -> str:
        own = f"{self.study.study.name}: synthetic {self.study.study.modality} images"
        return self.study.release.title or (f"{own} (from phantoms)" if self.claim.phantoms else own)

    @property
    def summary(self) -> str:
        """What it is, where no other words are beside it: phantoms first."""
        behind = "PHANTOMS: no patient is behind these images, and no figure speaks about real ones. "
        seeded = "NOTHING IS PROTECTED: the noise came from a known seed. "
        return f"{behind * self.claim.phantoms}{seeded * (not self.claim.protects)}{self.essence}"

    @property
    def essence(self) -> str:
        """What it is, in one sentence."""
        claim, side = self.claim, self.study.data.image_size
        sites = f"{len(claim.sites)} sites" if len(claim.sites) > 1 else "one site"
        return (
            f"{self.metrics.images} synthetic images ({side} x {side} px, {self.colour}) of "
            f"{len(self.study.data.classes)} classes, drawn by a diffusion model that {sites} helped to train "
            f"with differential privacy: epsilon {two_digits_up(claim.epsilon_max)} at delta {claim.delta:g}, per "
            f"{claim.unit} and per site."
        )

    @property
    def colour(self) -> str:
        return "grey" if self.study.data.channels == 1 else "colour"

    @property
    def authors(self) -> tuple[str, ...]:
        return self.study.release.authors or (f"The participants of the study {self.study.study.name}",)

    @property
    def date(self) -> str:
        """On which the release was made: the day from which on no site was asked anything."""
        return self.claim.ended or self.claim.begun

    @property
    def address(self) -> str:
        """Where it is published, or else a name that no other study has."""
        return self.study.release.url or f"urn:synthward:study:{self.study.sha256}"

    @property
    def licence_address(self) -> str:
        """Where the licence can be read; what is not given is said to be so."""
        release = self.study.release
        return release.licence_url or (f"https://spdx.org/licenses/{release.licence}.html" if release.licence else "")

    @property
    def hugging_face_licence(self) -> str:
        name = self.study.release.licence.lower()
        return name if name in _KNOWN else "other" if name else "unknown"

    @property
    def size(self) -> str:
        return next((words for least, words in _SIZES if self.metrics.images < least), "1M<n<10M")

    @property
    def unmet(self) -> list[str]:
        return unmet(self.study, self.metrics)

    def fill(self, template: str, **values: Any) -> str:
        """A template's text with these facts in it, as `f`, `claim`, `study` and `metrics`."""
        environment = Environment(  # Markdown and YAML: a letter that means something there is escaped by a filter
            autoescape=False,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters |= {"up": two_digits_up, "md": markdown, "yaml": quoted, "figure": figure}
        return environment.from_string(template).render(
            f=self, claim=self.claim, study=self.study, metrics=self.metrics, **values
        )


def markdown(text: object) -> str:
    """Somebody's text, on one line, as Markdown shows it and takes none of it for its own."""
    return str(text).translate(_SPECIAL)


def quoted(text: object) -> str:
    """A YAML string: JSON's are such, where no letter is written by its number."""
    return json.dumps(str(text), ensure_ascii=False)


def figure(value: Figure) -> str:
    """ "0.912 [0.880, 0.941]", or a dash where there is no figure."""
    if value.value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
