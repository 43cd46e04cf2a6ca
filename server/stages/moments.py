"""Moments: private class moments from the sites, public images carried to them, and the network that learns these.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from common.images import ImageSet
from common.model.diffusion_model import initial_weights, space_of
from common.prior import Prior
from common.protocol import Arrays, MomentsReply, MomentsRequest
from common.study import Study
from server.checkpoints import Checkpoint
from server.federation.screening import Shapes
from server.session import Session
from server.synthesis.corpus import carried, carried_together, low_moments, uncarried
from server.synthesis.pretrain import pretrained
from server.synthesis.public_set import ANY_CLASS, public_images
from server.synthesis.teacher import Teacher

_KEPT = 0.5  # of the images that were carried to a class: by KID and the panel, val splits (docs/adr/0020)


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
    """Public images with the sites' moments, of each class those that the teacher finds most of it."""
    study = session.agreement.study
    if session.agreement.plan.get("moments") is None:
        shared = bool((public.labels == ANY_CLASS).all())  # every class has all of them
        corpus, kept = uncarried(public, len(study.data.classes)), 1.0 / len(study.data.classes) if shared else _KEPT
    else:
        prior, share, likely = _prior(session, public), study.pretrain.class_share, None
        if teacher is not None and share < 1.0:
            likely = teacher.scores(carried_together(public.images, prior))
        corpus, kept = carried(public, prior, likely=likely, class_share=share), _KEPT
    return corpus if teacher is None else teacher.kept(corpus, kept)


def _prior(session: Session, public: ImageSet) -> Prior:
    """From the sums of all sites that answer; asked once and kept, so that a resumed run has the very same corpus."""
    sums = session.folder.made_once("moments", lambda: _ask(session))
    space = space_of(session.agreement.study)
    mean, covariance = low_moments(public.images, space)
    return Prior.fit(
        space, sums["means"], sums["second_moments"], sums["band_power"], sums["norm"], sums["counts"],
        noise_std=float(sums["noise_std"][0]), public=covariance, public_mean=mean,
    )  # fmt: skip


def _ask(session: Session) -> Arrays:
    requests = {
        node: (MomentsRequest(agreement=session.agreement, counts=tuple(member.counts)), {})
        for node, member in session.members.items()
    }
    return session.ask_sums("moments", requests, MomentsReply, _shapes(session.agreement.study))


def _shapes(study: Study) -> Shapes:
    space, classes = space_of(study), len(study.data.classes)
    return {
        "means": (classes, space.dimension), "second_moments": (space.packed,),
        "band_power": (classes, space.band_count), "norm": (1,),
    }  # fmt: skip
