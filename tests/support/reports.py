"""Report inputs with figures that a test can look for.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np

from common.claims import Claim, MechanismClaim, SiteClaim
from common.images import ImageSet
from common.metrics import Estimate, ScoreCounts, figures
from common.study import Study
from server.checkpoints import RoundRow
from server.release.report import ReportInputs, SiteRow, ValidationRow


def report_inputs(study: Study, *, phantoms: bool = False) -> ReportInputs:
    rng = np.random.default_rng(0)
    classes = len(study.data.classes)
    side, channels = study.data.image_size, study.data.channels
    claim = Claim(
        study=study.study.name, study_sha256=study.sha256, unit="image", delta=1e-5, epsilon_ceiling=8.0,
        accountant="prv", trust_model="local", phantoms=phantoms, random_source="aes",
        mechanisms=(MechanismClaim("train", "train", 1.5, 0.1, 100, 1.0),),
        sites=(SiteClaim("site-1", 7.25, 3.0, "ledger"), SiteClaim("site-2", 6.5, 4.5, "plan")),
        unprotected=("that a site took part",), libraries={"opacus": "1.6.0"},
        begun="2026-01-02", ended="2026-01-03",
    )  # fmt: skip
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
