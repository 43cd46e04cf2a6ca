"""Generate: the synthetic set from the averaged weights; no question to the sites, no cost.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import time

import numpy as np

from common.files import pack_arrays
from common.images import ImageSet
from server.checkpoints import Checkpoint
from server.session import Session
from server.synthesis.generation import generate as sample_set
from server.synthesis.generation import planned_labels
from server.synthesis.teacher import Teacher


def generate(session: Session, state: Checkpoint, teacher: Teacher | None) -> ImageSet:
    """Sample the set, and keep of the candidates those that the teacher finds most of their class.

    A resumed run takes up the finished batches.
    """
    study = session.agreement.study
    counts = np.sum([member.counts for member in session.members.values()], axis=0)
    counts = np.ones_like(counts) if study.generation.balance == "even" else counts
    labels = planned_labels(counts.tolist(), study.generation.images, seed=study.study.seed)
    kept = session.folder.result("generate")
    if kept is not None:  # the classes were settled then, whoever is enrolled now
        labels = np.asarray(kept["labels"], dtype=np.int64)
    else:
        session.folder.keep_result("generate", {"labels": labels.tolist()})
    config = study.generation
    asked = np.tile(labels, 1 if teacher is None else config.candidates)
    session.progress.stage("generate", f"{len(asked)} images, {config.sampler}, {config.steps} steps")
    began = time.monotonic()

    def on_batch(done: int, total: int) -> None:
        pace = done / max(time.monotonic() - began, 1e-3)
        session.progress.step("generate", done, total, f"{pace:.1f} images/s", images_per_second=round(pace, 2))

    weights = hashlib.sha256(pack_arrays(state.ema)).hexdigest()[:16]  # no image of other weights is taken up
    folder = session.folder.path / "checkpoints" / f"generated-{weights}"
    drawn = sample_set(study, state.ema, asked, folder, on_batch=on_batch)
    return drawn if teacher is None else teacher.chosen(drawn, labels)
