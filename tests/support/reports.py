"""Report inputs with figures that a test can look for.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from common.claims import Claim, MechanismClaim, SiteClaim, TuningClaim
from common.images import ImageSet
from common.metrics import Estimate, ScoreCounts, figures
from common.study import Study
from server.checkpoints import RoundRow
from server.release.report import ReportInputs, SiteRow, ValidationRow

MECHANISM = {"name": "train", "partition": "train", "noise_multiplier": 1.5, "sample_rate": 0.1, "steps": 100,
             "sensitivity": 1.0}  # fmt: skip


def site_claim(site: str, train: float, holdout: float, basis: Literal["ledger", "plan"] = "ledger") -> SiteClaim:
    return SiteClaim(site=site, epsilon_train=train, epsilon_holdout=holdout, basis=basis)


def claim_with(**changes: Any) -> Claim:
    """A claim of two sites, with some fields changed; checked as any claim is."""
    usual = {
        "study": "s", "study_sha256": "ab" * 32, "unit": "image", "delta": 1e-5, "epsilon_ceiling": 8.0,
        "accountant": "prv", "trust_model": "local", "phantoms": False, "random_source": "aes",
        "mechanisms": (MechanismClaim(**MECHANISM),),
        "sites": (site_claim("site-1", 7.25, 3.0), site_claim("site-2", 2.0, 4.5, "plan")),
        "unprotected": ("that a site took part",), "libraries": {"opacus": "1.6.0"}, "tuning": TuningClaim(),
        "begun": "2026-01-02", "ended": "2026-01-03",
    }  # fmt: skip
    return Claim(**{**usual, **changes})


def report_inputs(study: Study, *, phantoms: bool = False) -> ReportInputs:
    rng = np.random.default_rng(0)
    classes = len(study.data.classes)
    side, channels = study.data.image_size, study.data.channels
    claim = claim_with(study=study.study.name, study_sha256=study.sha256, phantoms=phantoms)
    counts = ScoreCounts(
        np.full((classes, 8), 5.0), np.full((classes, 8), 6.0), np.full((classes, classes), 9.0)
    )  # fmt: skip
    found = figures(counts, noise_std=1.0)
    rows = [RoundRow(r, 1.0 / r, {"site-1": 2.0 * r, "site-2": 1.5 * r}, ["site-1", "site-2"], {}, 3.0)
            for r in (1, 2, 3)]  # fmt: skip
    return ReportInputs(
        run="tiny-run", finished="2026-01-02 03:04 UTC", minutes=12.5, peak_memory_mb=1234.0, machine="2 cores",
        study=study, claim=claim, rounds=rows,
        synthetic=ImageSet(rng.integers(0, 256, (20, channels, side, side), dtype=np.uint8), np.arange(20) % classes),
        validation=[ValidationRow("trained on the synthetic images", Estimate(0.876, 0.8, 0.9),
                                  Estimate(0.765, 0.7, 0.8), found)],
        sites=[SiteRow("site-1", [10.0] * classes, 3, 0, Estimate(0.8, 0.7, 0.9)),
               SiteRow("site-2", [12.0] * classes, 2, 1, None)],
        warnings=["round 2: site-2 left out"],
    )  # fmt: skip
