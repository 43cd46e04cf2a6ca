"""Moments: private class moments from the sites, public images carried to them, and the network that learns these.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math

import numpy as np

from common.errors import CheckpointError
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.images import ImageSet
from common.model.diffusion_model import initial_weights, space_of
from common.prior import Prior
from common.protocol import Arrays, MomentsReply, MomentsRequest
from common.study import Study
from server.checkpoints import Checkpoint
from server.federation.screening import Shapes, largest_sum_norm, most_units, screen_arrays, screen_norm
from server.session import Session
from server.synthesis.corpus import carried, carried_together, low_moments, uncarried
from server.synthesis.pretrain import pretrained
from server.synthesis.public_set import public_images
from server.synthesis.teacher import Teacher


def moments(session: Session, teacher: Teacher | None) -> None:
    """Make the weights of round 0: of a network that has learnt from public images with the sites' noisy moments.

    Nothing is done where a checkpoint stands already.

    Args:
        teacher: says of which class a carried image is; None = of the class whose moments it has.

    Raises:
        FederationError: fewer usable answers than federation.min_sites.
        DataError: the public set cannot be read.
    """
    study = session.agreement.study
    if session.folder.last_checkpoint() is not None:
        return
    weights = initial_weights(study) if study.pretrain.source == "none" else _learnt(session, teacher)
    copy = {name: array.copy() for name, array in weights.items()}
    session.folder.save_checkpoint(Checkpoint(0, weights, copy, []))


def _learnt(session: Session, teacher: Teacher | None) -> Arrays:
    """Weights of the network after the corpus; a run that was stopped goes on with it."""
    study, config = session.agreement.study, session.agreement.study.pretrain
    public = public_images(study)
    corpus = _corpus(session, public, teacher)
    kind = "drawn phantoms" if config.source == "phantoms" else f"the public images of {config.path}"
    session.progress.stage("pretrain", f"{config.steps} steps on {len(corpus)} images made of {kind}")

    def on_step(done: int, total: int, loss: float) -> None:
        session.progress.step("pretrain", done, total, f"loss {loss:.3f}", loss=round(loss, 4))

    file = session.folder.path / "checkpoints" / "pretrained.safetensors"
    return pretrained(study, corpus, file, on_step=on_step)


def _corpus(session: Session, public: ImageSet, teacher: Teacher | None) -> ImageSet:
    """Public images with the sites' moments, and with the labels that the teacher gives them."""
    study = session.agreement.study
    if session.agreement.plan.get("moments") is None:
        corpus = uncarried(public, len(study.data.classes)) if teacher is None else public
    else:
        prior, share, likely = _prior(session, public), study.pretrain.class_share, None
        if teacher is not None and share < 1.0:
            likely = teacher.scores(carried_together(public.images, prior))
        corpus = carried(public, prior, likely=likely, class_share=share)
    return corpus if teacher is None else teacher.labelled(corpus)


def _prior(session: Session, public: ImageSet) -> Prior:
    """From the sums of all sites that answer; asked once and kept, so that a resumed run has the very same corpus."""
    file = session.folder.path / "checkpoints" / "moments.safetensors"
    try:
        sums = unpack_arrays(file.read_bytes(), where=str(file))
    except (OSError, CheckpointError):  # none, or spoilt: sites answer the same question from their stores
        sums = _ask(session)
        atomic_write(file, pack_arrays(sums))
    space = space_of(session.agreement.study)
    mean, covariance = low_moments(public.images, space)
    return Prior.fit(
        space, sums["means"], sums["second_moments"], sums["band_power"], sums["norm"], sums["counts"],
        noise_std=float(sums["noise_std"][0]), public=covariance, public_mean=mean,
    )  # fmt: skip


def _ask(session: Session) -> Arrays:
    """The sums of all sites that answer, with "counts" (K,) and "noise_std" (1,), the noise of each number."""
    study, plan = session.agreement.study, session.agreement.plan["moments"]
    counts_std = session.agreement.plan["counts"].noise_std
    shapes = _shapes(study)
    numbers = sum(math.prod(shape) for shape in shapes.values())

    def screen(node: int, _body: MomentsReply, arrays: Arrays) -> None:
        screen_arrays(arrays, expected=shapes, dtype="float64")
        units = most_units(session.members[node].counts, counts_std)
        largest = largest_sum_norm(units=units, sensitivity=plan.sensitivity, noise_std=plan.noise_std, numbers=numbers)
        screen_norm(arrays, largest=largest, what="sums")

    session.progress.stage("moments", f"asking {len(session.members)} sites for private class moments")
    requests = {
        node: (MomentsRequest(agreement=session.agreement, counts=tuple(member.counts)), {})
        for node, member in session.members.items()
    }
    collected = session.ask("moments", requests, MomentsReply, screen)
    counts = np.sum([np.maximum(session.members[a.node].counts, 1.0) for a in collected.accepted], axis=0)
    total = {name: np.sum([answer.arrays[name] for answer in collected.accepted], axis=0) for name in shapes}
    return {**total, "counts": counts, "noise_std": np.array([math.sqrt(len(collected.accepted)) * plan.noise_std])}


def _shapes(study: Study) -> Shapes:
    space, classes = space_of(study), len(study.data.classes)
    return {
        "means": (classes, space.dimension), "second_moments": (space.packed,),
        "band_power": (classes, space.band_count), "norm": (1,),
    }  # fmt: skip
