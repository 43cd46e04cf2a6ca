"""Validate: the server's classifier and a private reference, tested on the site's held-out images.

SPDX-License-Identifier: Apache-2.0

The reference is trained on the site's own train partition by DP-SGD, since its score histograms depend on those
records too; the classifier itself never leaves. A held-out record adds to the histograms of both, which are joined.
"""

from __future__ import annotations

import numpy as np
import torch

from client.privacy.gate import Gate, Released
from client.privacy.places import at_places, own_places
from client.reference import private_reference
from client.site import Site
from common.bounded import BoundedSum, joined
from common.files import write_json
from common.metrics import count_scores, figures, score_sum
from common.model.classifier import BiomarkerClassifier
from common.protocol import Arrays, ValidateReply, ValidateRequest
from common.study import Study

_AT_ONCE = 32  # images of a pass


def validate(site: Site, gate: Gate, request: ValidateRequest, arrays: Arrays) -> Released:
    """Release noisy score histograms and confusion counts.

    Raises:
        NotApproved, PolicyRefusal, BudgetError: refused; nothing leaves.
        ReplyError: the classifier does not fit the study.
        StudyError: the study's backbone cannot be trained privately.
    """
    study = request.agreement.study
    gate.require_room("evaluate")
    torch.set_num_threads(site.config.performance.threads)
    classifiers = {
        "synthetic": BiomarkerClassifier.from_state(
            arrays, classes=len(study.data.classes), channels=study.data.channels, image_size=study.data.image_size,
            backbone=study.validation.backbone,
        )
    }  # fmt: skip
    if request.agreement.plan.get("reference") is not None:
        reference = private_reference(
            gate, study, site.train, expected_batch=request.expected_reference_batch,
            memory_mb=site.config.performance.memory_mb,
        )  # fmt: skip
        if reference is not None:
            classifiers["reference"] = reference
    with gate.spend("evaluate") as permit:
        sums = joined(*(_sum(site, study, name, c) for name, c in classifiers.items()))
        released = permit.seal(ValidateReply(), permit.noisy("evaluate", sums))
    if site.config.own_reference:
        with site.logged("its own reference"):  # the answer is sealed: it leaves, whatever happens here
            _write_own_reference(site, study, classifiers, gate)
    return released


def _sum(site: Site, study: Study, name: str, classifier: BiomarkerClassifier) -> BoundedSum:
    """Counts of one classifier's scores; each image is scored at a place of its own (`client/privacy/places.py`)."""
    images, choice = site.holdout.images.images, np.random.default_rng()
    scores = np.zeros((len(images), classifier.classes), dtype=np.float32)
    for places in own_places(len(images), _AT_ONCE, choice):
        taken = places >= 0
        scores[places[taken]] = classifier.predict(at_places(images, places), _AT_ONCE)[taken]
    return score_sum(site.holdout, scores, study.validation.bins, name=name)


def _write_own_reference(site: Site, study: Study, classifiers: dict[str, BiomarkerClassifier], gate: Gate) -> None:
    """Exact figures beside those of a classifier trained without privacy: a file for this site's eyes only."""
    own = BiomarkerClassifier.fit(
        site.splits.train, classes=len(study.data.classes), channels=study.data.channels, config=study.validation,
        seed=study.study.seed, symmetry=study.symmetry,
    )  # fmt: skip
    holdout = site.holdout.images
    report = {
        name: figures(
            count_scores(c.predict(holdout.images), holdout.labels, study.validation.bins), noise_std=0.0
        ).to_json()
        for name, c in {**classifiers, "trained on this site's real images, not private": own}.items()
    }
    with gate.still():  # who withdrew meanwhile is not in it
        write_json(site.state / "for-this-site-only.json", report)
