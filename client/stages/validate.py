"""Validate: the server's classifier and a private reference, tested on the site's held-out images.

SPDX-License-Identifier: Apache-2.0

The reference is trained on the site's own train partition by DP-SGD, since its score histograms depend on those
records too; the classifier itself never leaves. A held-out record adds to both histograms, so the joint release has
the sensitivity sqrt(2) × that of one.
"""

from __future__ import annotations

import torch

from client.privacy.gate import Gate, Released
from client.site import Site
from common.accounting import MechanismPlan
from common.errors import BudgetError
from common.files import atomic_write, pack_arrays, unpack_arrays, write_json
from common.messages import Spent, ValidateReply, ValidateRequest
from common.metrics import ScoreCounts, count_scores, figures
from common.model.classifier import BiomarkerClassifier


def validate(site: Site, gate: Gate, request: ValidateRequest) -> Released[ValidateReply]:
    """Release noisy score histograms and confusion counts.

    Raises:
        PolicyRefusal, BudgetError: refused; no record was touched.
        ReplyError: the classifier does not fit the study.
    """
    study, plan = request.agreement.study, request.agreement.plan
    torch.set_num_threads(site.config.performance.threads)
    classifier = BiomarkerClassifier.from_state(
        request.arrays, classes=len(study.data.classes), channels=study.data.channels,
        image_size=study.data.image_size, backbone=study.validation.backbone,
    )  # fmt: skip
    reference = None if plan.reference is None else _reference(site, gate, plan.reference, request)
    with gate.spend(plan.evaluate) as permit:
        exact = {"synthetic": _score(site, classifier, request)}
        if reference is not None:
            exact["reference"] = _score(site, reference, request)
        noisy = permit.noisy(plan.evaluate.name, {k: torch.from_numpy(v.vector()) for k, v in exact.items()})
        reply = ValidateReply(
            site=site.config.name,
            spent=Spent(0.0, 0.0, 0, 0),
            arrays={name: part.numpy() for name, part in noisy.items()},
        )
        released = permit.seal(reply)
    if site.config.own_reference:
        _write_own_reference(site, exact, request)
    return released


def _score(site: Site, classifier: BiomarkerClassifier, request: ValidateRequest) -> ScoreCounts:
    held_out, bins = site.holdout.images, request.agreement.study.validation.bins
    return count_scores(classifier.predict(held_out.images), held_out.labels, bins, weights=site.holdout.weights())


def _reference(site: Site, gate: Gate, plan: MechanismPlan, request: ValidateRequest) -> BiomarkerClassifier | None:
    """The private reference: from the site's store when it was trained before, else trained and paid for now.

    None when its budget went in a run that was killed: the synthetic figures do not depend on it.
    """
    study = request.agreement.study
    kept = site.state / f"reference-{study.sha256[:16]}.safetensors"
    classes, channels = len(study.data.classes), study.data.channels
    if kept.exists():
        state = unpack_arrays(kept.read_bytes(), where=str(kept))
        return BiomarkerClassifier.from_state(
            state,
            classes=classes,
            channels=channels,
            image_size=study.data.image_size,
            backbone=study.validation.backbone,
        )
    try:
        with gate.spend(plan) as permit:

            def noisy_mean(total: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                noisy = permit.noisy(plan.name, total)
                return {name: part / request.expected_reference_batch for name, part in noisy.items()}

            trained = BiomarkerClassifier.fit_private(
                site.train, classes=classes, channels=channels, config=study.validation, noisy_mean=noisy_mean,
                poisson_mask=lambda records: permit.sample(plan.name, records),
                max_grad_norm=plan.sensitivity, seed=study.study.seed,
                learning_rate=study.validation.reference_learning_rate,
            )  # fmt: skip
            atomic_write(kept, pack_arrays(trained.state()))
            permit.done()
            return trained
    except BudgetError:
        return None


def _write_own_reference(site: Site, exact: dict[str, ScoreCounts], request: ValidateRequest) -> None:
    """Exact figures beside those of a classifier trained without privacy: a file for this site's eyes only."""
    study = request.agreement.study
    own = BiomarkerClassifier.fit(
        site.splits.train, classes=len(study.data.classes), channels=study.data.channels, config=study.validation,
        seed=study.study.seed, symmetry=study.symmetry,
    )  # fmt: skip
    rows = {**exact, "trained on this site's real images, not private": _score(site, own, request)}
    report = {name: figures(counts, noise_std=0.0).to_json() for name, counts in rows.items()}
    write_json(site.state / "for-this-site-only.json", report)
