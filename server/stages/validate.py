"""Validate: a classifier trained on the synthetic set, tested on real held-out images at the sites.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from common.files import atomic_write, pack_arrays, unpack_arrays
from common.images import ImageSet
from common.metrics import Figures, ScoreCounts, figures, vector_length
from common.model.classifier import BiomarkerClassifier
from common.protocol import Arrays, ValidateReply, ValidateRequest
from server.federation.screening import LARGEST_COUNT, largest_sum_norm, screen_arrays, screen_norm
from server.session import Session


@dataclass(frozen=True)
class Validation:
    """Figures by classifier ("synthetic", "reference"), merged over the sites and for each site alone."""

    merged: dict[str, Figures]
    by_site: dict[str, dict[str, Figures]]
    prevalence: list[float]


def validate(session: Session, synthetic: ImageSet) -> Validation:
    """Train the classifier, ask the sites, merge their noisy histograms.

    Raises:
        FederationError: fewer usable answers than federation.min_sites.
    """
    study, plan = session.agreement.study, session.agreement.plan["evaluate"]
    state, shapes = _classifier(session, synthetic), _shapes(session)
    session.progress.stage("validate", "testing on held-out real images at the sites")

    def screen(_node: int, _body: ValidateReply, arrays: Arrays) -> None:
        # The reference is missing where its budget went in a run that was killed.
        expected = {name: shape for name, shape in shapes.items() if name in arrays or name == "synthetic"}
        screen_arrays(arrays, expected=expected, dtype="float64")
        largest = largest_sum_norm(
            units=LARGEST_COUNT, sensitivity=plan.sensitivity, noise_std=plan.noise_std,
            numbers=sum(math.prod(shape) for shape in shapes.values()),
        )  # fmt: skip
        screen_norm(arrays, largest=largest, what="counts")

    requests = {
        node: (
            ValidateRequest(
                agreement=session.agreement,
                expected_reference_batch=study.validation.reference_sample_rate * member.weight,
            ),
            state,
        )
        for node, member in session.members.items()
    }
    collected = session.ask("validate", requests, ValidateReply, screen)
    return _merge(session, collected.arrays, plan.noise_std)


def _shapes(session: Session) -> dict[str, tuple[int, ...]]:
    study = session.agreement.study
    size = (vector_length(len(study.data.classes), study.validation.bins),)
    names = ["synthetic"] if session.agreement.plan.get("reference") is None else ["synthetic", "reference"]
    return dict.fromkeys(names, size)


def _merge(session: Session, vectors: dict[str, Arrays], noise_std: float) -> Validation:
    study = session.agreement.study
    classes, bins = len(study.data.classes), study.validation.bins
    merged: dict[str, Figures] = {}
    by_site: dict[str, dict[str, Figures]] = {site: {} for site in vectors}
    prevalence = np.full(classes, 1 / classes)
    for name in _shapes(session):
        present = {site: arrays[name] for site, arrays in vectors.items() if name in arrays}
        if not present:
            continue
        counts = ScoreCounts.from_vector(np.sum(list(present.values()), axis=0), classes, bins)
        merged[name] = figures(counts, noise_std=math.sqrt(len(present)) * noise_std, seed=study.study.seed)
        if name == "synthetic":
            rows = np.maximum(counts.confusion.sum(axis=1), 0.0)
            prevalence = rows / rows.sum() if rows.sum() > 0 else prevalence
        for site, vector in present.items():
            own = ScoreCounts.from_vector(vector, classes, bins)
            by_site[site][name] = figures(own, noise_std=noise_std, seed=study.study.seed)
    return Validation(merged, by_site, [float(share) for share in prevalence])


def _classifier(session: Session, synthetic: ImageSet) -> Arrays:
    """The classifier's state; trained once on this set and kept, so that a resumed run asks the very same question."""
    study = session.agreement.study
    images = hashlib.sha256(synthetic.images.tobytes()).hexdigest()[:16]
    path = session.folder.path / "checkpoints" / f"classifier-{images}.safetensors"
    if path.exists():
        return unpack_arrays(path.read_bytes(), where=str(path))
    session.progress.stage("classify", f"training {study.validation.backbone} on {len(synthetic)} synthetic images")

    def on_step(done: int, total: int) -> None:
        if done % max(1, total // 5) == 0 or done == total:
            session.progress.step("classify", done, total, "steps")

    classifier = BiomarkerClassifier.fit(
        synthetic, classes=len(study.data.classes), channels=study.data.channels, config=study.validation,
        seed=study.study.seed, symmetry=study.symmetry, progress=on_step,
    )  # fmt: skip
    state = classifier.state()
    atomic_write(path, pack_arrays(state))
    return state
