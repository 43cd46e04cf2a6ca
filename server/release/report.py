"""The report: one self-contained HTML page about a release, free of real images.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from common.claims import Claim, two_digits_up
from common.images import ImageSet
from common.metrics import Estimate, Figures
from common.study import Study
from common.study_file import agreed_toml
from server.checkpoints import RoundRow
from server.release.charts import curve
from server.release.formats import contact_sheet
from server.release.page import TEMPLATE


@dataclass(frozen=True)
class ValidationRow:
    """One classifier in the validation table; None stands where a figure does not exist."""

    name: str
    auc_macro: Estimate
    f1_macro: Estimate
    figures: Figures | None = None


@dataclass(frozen=True)
class SiteRow:
    """One site in the table of sites."""

    site: str
    counts: list[float]
    rounds_in: int
    rounds_out: int
    auc: Estimate | None


@dataclass(frozen=True)
class ReportInputs:
    """Everything the report says; every number on the page comes from here."""

    run: str
    finished: str
    minutes: float
    peak_memory_mb: float
    machine: str
    study: Study
    claim: Claim
    rounds: list[RoundRow]
    synthetic: ImageSet
    validation: list[ValidationRow]
    sites: list[SiteRow]
    warnings: list[str]


def render_report(inputs: ReportInputs) -> str:
    """The page as HTML: inline style, inline pictures, no script, no request to anywhere."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["estimate"] = estimate_text
    environment.filters["up"] = two_digits_up
    numbers = [row.round for row in inputs.rounds]
    sites = sorted({site for row in inputs.rounds for site in row.epsilon})
    charts = {}
    if numbers:
        charts["loss"] = Markup(curve(numbers, {"loss": [row.loss for row in inputs.rounds]}, ylabel="loss (noisy)"))
        lines: dict[str, Any] = {site: [row.epsilon.get(site) for row in inputs.rounds] for site in sites}
        ceiling = inputs.claim.epsilon_ceiling
        charts["epsilon"] = Markup(curve(numbers, lines, ylabel="epsilon, training records", ceiling=ceiling))
    sheets = [
        (name, int((inputs.synthetic.labels == label).sum()), _data_uri(contact_sheet(inputs.synthetic, label)))
        for label, name in enumerate(inputs.study.data.classes)
    ]
    return environment.from_string(TEMPLATE).render(
        r=inputs,
        claim=inputs.claim,
        charts=charts,
        sheets=sheets,
        settings=agreed_toml(inputs.study),
    )


def estimate_text(estimate: Estimate | None) -> str:
    """ "0.912 [0.880, 0.941]", or a dash where there is no figure."""
    if estimate is None or estimate.value != estimate.value:
        return "–"
    if estimate.low != estimate.low or estimate.high != estimate.high:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
