"""Release: figures, claim and the folder that is given away, from what the other stages have kept.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.accounting import epsilon_of
from common.claims import Claim, SiteClaim
from common.images import ImageSet
from common.mechanisms import PARTITIONS
from common.metrics import Estimate, Figures, chance
from server.checkpoints import Checkpoint, RunFolder
from server.release.bundle import write_release
from server.release.documents import writer
from server.release.metrics import SYNTHETIC, Metrics
from server.release.report import ReportInputs, SiteRow, ValidationRow
from server.session import Session

UNPROTECTED = (
    "that a site took part, and in which rounds",
    "that a site's owner approved the study, and so judged its cohort large enough, by a minimum of the site's own and "
    "for delta, and its images to be pictures at all",
    "that a site refused, and by which rule of policy, ledger or request: never because of a record; or that it could "
    "not answer, which is also what is said when its images are not those that were approved, or cannot be read",
    "in a refusal for a site's own ceiling: what all studies there have cost so far",
    "how long answers took",
    "the study's settings, the number of rounds, and what the plan cost",
)
_NAMES = {
    "synthetic": SYNTHETIC,
    "reference": "reference: trained on real images at each site, privately",
}


def release(
    session: Session, state: Checkpoint, synthetic: ImageSet, merged: dict[str, Figures],
    by_site: dict[str, dict[str, Figures]], prevalence: list[float], *, seconds: float, peak_memory_mb: float,
) -> Path:  # fmt: skip
    """Write the release; returns the report's path."""
    import numpy as np

    session.progress.stage("release", "writing the report and the synthetic set")
    study, claim, folder = session.agreement.study, claim_of(session), session.folder
    classes = study.data.classes
    rows = [ValidationRow(_NAMES[name], f.auc_macro, f.f1_macro, f) for name, f in merged.items()]
    guess = chance(len(classes), np.asarray(prevalence))
    rows.append(ValidationRow("chance", _exactly(guess.auc), _exactly(guess.f1_macro)))
    sites = [
        SiteRow(
            m.name, m.counts, sum(m.name in row.accepted for row in state.rows),
            sum(m.name in row.rejected for row in state.rows),
            by_site[m.name]["synthetic"].auc_macro if m.name in by_site else None,
        )
        for m in sorted(session.members.values(), key=lambda m: m.name)
    ]  # fmt: skip
    own = _own_facts(folder, claim, seconds=seconds, peak_memory_mb=peak_memory_mb)
    metrics = Metrics.model_validate({
        "study": study.study.name, "sha256": study.sha256, "images": len(synthetic),
        "classes": dict(zip(classes, np.bincount(synthetic.labels, minlength=len(classes)).tolist(), strict=True)),
        "rounds": state.round, **own, "phantoms": claim.phantoms,
        "epsilon": {"ceiling": claim.epsilon_ceiling, "delta": claim.delta, "max": claim.epsilon_max,
                    "sum": claim.epsilon_sum, "sites": {s.site: s.epsilon for s in claim.sites}},
        "validation": [
            {"name": row.name, "auc_macro": row.auc_macro.to_json(), "f1_macro": row.f1_macro.to_json(),
             "per_class": None if row.figures is None else row.figures.to_json()} for row in rows
        ],
        "by_site": {s: {n: f.to_json() for n, f in figures.items()} for s, figures in by_site.items()},
        "loss": [row.loss for row in state.rows], "writer": writer(),
    })  # fmt: skip
    events = folder.events()
    at = datetime.fromisoformat(next(e["at"] for e in events if e["event"] == "stage" and e["stage"] == "release"))
    return write_release(folder.release, ReportInputs(
        run=folder.path.name, finished=at.strftime("%Y-%m-%d %H:%M UTC"), minutes=metrics.minutes,
        peak_memory_mb=metrics.peak_memory_mb, machine=metrics.machine, study=study, claim=claim, rounds=state.rows,
        synthetic=synthetic, validation=rows, sites=sites,
        warnings=[event["text"] for event in events if event["event"] == "warning"],
    ), metrics, state.ema)  # fmt: skip


def _own_facts(folder: RunFolder, claim: Claim, *, seconds: float, peak_memory_mb: float) -> dict[str, Any]:
    """What this run took, as it was when it first came this far: a second pass writes the same bytes.

    What the ledgers had reported is kept beside: `synthward release` compares the claim with it.
    """
    own = (folder.result("release") or {}).get("own") or {
        "minutes": round(seconds / 60, 2), "peak_memory_mb": round(peak_memory_mb, 1), "machine": _machine()
    }  # fmt: skip
    reported = {site.site: site.model_dump(mode="json") for site in claim.sites}
    folder.keep_result("release", {"own": own, "reported": reported})
    return own


def claim_of(session: Session) -> Claim:
    """The claim, from what each site's ledger reported last.

    The whole planned cost is claimed for a site that has a question open, or that took part in an earlier process of
    this run and is not there now.
    """
    study, plan = session.agreement.study, session.agreement.plan
    whole = {
        f"epsilon_{partition}": epsilon_of(
            plan.losses(partition), delta=study.privacy.delta, accountant=study.privacy.accountant
        )
        for partition in PARTITIONS
    }
    enrolled, events = session.folder.result("enrol") or {}, session.folder.events()
    reported = {m.name: m.spent for m in session.members.values() if not m.open_question}
    sites = [
        SiteClaim(site=site, epsilon_train=reported[site].train, epsilon_holdout=reported[site].holdout, basis="ledger")
        if site in reported else SiteClaim(site=site, basis="plan", **whole)
        for site in sorted(enrolled)
    ]  # fmt: skip
    return Claim.of(
        study, plan, sites=sites, phantoms=bool(enrolled) and all(entry["phantoms"] for entry in enrolled.values()),
        random_source="; ".join(sorted({entry["random_source"] for entry in enrolled.values()})),
        unprotected=UNPROTECTED, libraries=_libraries(), begun=_date(events, event="begin"),
        ended=_date(events, event="stage", stage="release"),
    )  # fmt: skip


def _date(events: list[dict[str, Any]], **values: str) -> str:
    """Date of the first event of a kind: the first, so that a second pass says the same."""
    return next((event["at"][:10] for event in events if values.items() <= event.items()), "")


def _exactly(value: float) -> Estimate:
    return Estimate(value, float("nan"), float("nan"))


def _libraries() -> dict[str, str]:
    found = {}
    for name in ("synthward", "torch", "opacus", "flwr", "timm", "numpy", "cryptography"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout or bundle that is not installed
            continue
    return found


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, Python {platform.python_version()}"
