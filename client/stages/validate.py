"""Validate: the server's classifier and a private reference, tested on the site's held-out images.

SPDX-License-Identifier: Apache-2.0

The reference is trained on the site's own train partition by DP-SGD, since its score histograms depend on those
records too; the classifier itself never leaves. A held-out record adds to the histograms of both, which are joined.
"""

from __future__ import annotations

import torch

from client.privacy.gate import Gate, Released
from client.reference import private_reference
from client.site import Site
from common.bounded import joined
from common.files import write_json
from common.metrics import count_scores, figures, score_sum
from common.model.classifier import BiomarkerClassifier
from common.protocol import Arrays, ValidateReply, ValidateRequest
from common.study import Study

_TRIED = 5  # random images on which it is tried that rounding depends on no place in a batch


def validate(site: Site, gate: Gate, request: ValidateRequest, arrays: Arrays) -> Released:
    """Release noisy score histograms and confusion counts.

    Raises:
        NotApproved, PolicyRefusal, BudgetError: refused; no record was touched.
        ReplyError: the classifier does not fit the study.
        StudyError: the study's backbone cannot be trained privately.
    """
    study = request.agreement.study
    torch.set_num_threads(site.config.performance.threads)
    classifiers = {
        "synthetic": BiomarkerClassifier.from_state(
            arrays, classes=len(study.data.classes), channels=study.data.channels, image_size=study.data.image_size,
            backbone=study.validation.backbone,
        )
    }  # fmt: skip
    if request.agreement.plan.get("reference") is not None:
        reference = private_reference(
            gate, study, site.train, state=site.state, expected_batch=request.expected_reference_batch,
            memory_mb=site.config.performance.memory_mb,
        )  # fmt: skip
        if reference is not None:
            classifiers["reference"] = reference
    images, bins = site.holdout.images.images, study.validation.bins
    with gate.spend("evaluate") as permit:
        sums = [score_sum(site.holdout, c.predict(images), bins, name=name) for name, c in classifiers.items()]
        released = permit.seal(ValidateReply(), permit.noisy("evaluate", joined(*sums)))
    if site.config.own_reference:
        _write_own_reference(site, study, classifiers)
    return released


def _write_own_reference(site: Site, study: Study, classifiers: dict[str, BiomarkerClassifier]) -> None:
    """Exact figures beside those of a classifier trained without privacy: a file for this site's eyes only."""
    own = BiomarkerClassifier.fit(
        site.splits.train, classes=len(study.data.classes), channels=study.data.channels, config=study.validation,
        seed=study.study.seed, symmetry=study.symmetry,
    )  # fmt: skip
    held_out = site.holdout.images
    report = {
        name: figures(
            count_scores(c.predict(held_out.images), held_out.labels, study.validation.bins), noise_std=0.0
        ).to_json()
        for name, c in {**classifiers, "trained on this site's real images, not private": own}.items()
    }
    write_json(site.state / "for-this-site-only.json", report)
