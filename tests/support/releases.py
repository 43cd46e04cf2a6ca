"""A release as a run writes it, without the run: its claim, figures and weights are those of the tiny study.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from common.accounting import MechanismPlan, StudyPlan, epsilon_of
from common.claims import Claim
from common.images import ImageSet
from common.mechanisms import PARTITIONS, wanted
from common.model.diffusion_model import initial_weights
from common.study import Study
from server.checkpoints import Checkpoint, RoundRow, RunFolder
from server.release.bundle import write_release
from server.release.documents import writer
from server.release.metrics import Metrics
from server.release.report import ReportInputs
from server.stages.release import UNPROTECTED
from support.reports import report_inputs, site_claim
from support.studies import tiny_study


def plan_of(study: Study) -> StudyPlan:
    """A plan of the study's mechanisms, under its epsilon; solving for a tight one would take seconds."""
    return StudyPlan(mechanisms=tuple(MechanismPlan.of(m, study, noise_multiplier=2.0) for m in wanted(study)))


def claim_of(study: Study, *, phantoms: bool = True) -> Claim:
    """Two sites; the ledger of the first has reported the whole plan, of the second less."""
    privacy, plan = study.privacy, plan_of(study)
    train, holdout = (epsilon_of(plan.losses(p), delta=privacy.delta, accountant="rdp") for p in PARTITIONS)
    return Claim.of(
        study, plan, sites=(site_claim("site-1", train, holdout), site_claim("site-2", 2.0, 1.5)),
        phantoms=phantoms, random_source="aes", unprotected=UNPROTECTED,
        libraries={"opacus": "1.6.0", "synthward": version("synthward")}, begun="2026-01-02", ended="2026-01-03",
    )  # fmt: skip


def images_of(study: Study) -> ImageSet:
    shape = (study.generation.images, study.data.channels, study.data.image_size, study.data.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ImageSet(pixels, np.arange(len(pixels), dtype=np.int64) % len(study.data.classes))


def metrics_of(study: Study, claim: Claim, inputs: ReportInputs, **changes: Any) -> Metrics:
    labels = np.bincount(images_of(study).labels, minlength=len(study.data.classes)).tolist()
    return Metrics.model_validate({
        "study": study.study.name, "sha256": study.sha256, "images": study.generation.images,
        "classes": dict(zip(study.data.classes, labels, strict=True)), "rounds": 2, "minutes": 12.5,
        "peak_memory_mb": 1234.0, "machine": "2 cores", "phantoms": claim.phantoms,
        "epsilon": {"ceiling": claim.epsilon_ceiling, "delta": claim.delta, "max": claim.epsilon_max,
                    "sum": claim.epsilon_sum, "sites": {s.site: s.epsilon for s in claim.sites}},
        "validation": [{"name": r.name, "auc_macro": r.auc_macro.to_json(), "f1_macro": r.f1_macro.to_json(),
                        "per_class": None if r.figures is None else r.figures.to_json()} for r in inputs.validation],
        "by_site": {}, "loss": [1.0, None], "writer": writer(), **changes,
    })  # fmt: skip


@cache
def parts_of(study: Study, *, phantoms: bool = True) -> tuple[ReportInputs, Metrics]:
    """What `write_release` takes; the headline's AUC is 0.876."""
    claim = claim_of(study, phantoms=phantoms)
    inputs = replace(report_inputs(study, phantoms=phantoms), claim=claim, synthetic=images_of(study))
    return inputs, metrics_of(study, claim, inputs)


def a_release(folder: Path, study: Study | None = None, *, phantoms: bool = True) -> Path:
    """A whole release at `folder`."""
    study = study or tiny_study()
    inputs, metrics = parts_of(study, phantoms=phantoms)
    write_release(folder, inputs, metrics, initial_weights(study))
    return folder


def a_finished_run(parent: Path, study: Study | None = None) -> RunFolder:
    """A run folder with its release, as far as `synthward release` and `verify` read it."""
    study = study or tiny_study()
    run, claim = RunFolder.create(parent, study, plan_of(study)), claim_of(study)
    weights = initial_weights(study)
    row = RoundRow(2, 0.5, {site.site: site.epsilon_train for site in claim.sites}, ["site-1", "site-2"], {}, 1.0)
    run.save_checkpoint(Checkpoint(2, weights, weights, [row]))
    run.keep_result("release", {"reported": {site.site: site.model_dump(mode="json") for site in claim.sites}})
    a_release(run.release, study)
    return run
