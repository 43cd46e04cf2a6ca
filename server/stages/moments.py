"""Moments: the public start of the network, and private class moments from the sites for the Gaussian beside it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math

import numpy as np

from common.errors import ReplyError
from common.messages import Arrays, MomentsReply, MomentsRequest
from common.model.diffusion_model import initial_weights, space_of, with_prior
from common.prior import Prior
from server.checkpoints import Checkpoint
from server.federation.screening import screen_arrays
from server.federation.sites import Answers
from server.session import Session
from server.synthesis.pretrain import pretrained


def moments(session: Session) -> None:
    """Make the weights of round 0: public weights, with the Gaussian that the sites' noisy moments describe.

    Nothing is done where a checkpoint stands already.

    Raises:
        FederationError: fewer usable answers than federation.min_sites.
    """
    study = session.agreement.study
    if session.folder.last_checkpoint() is not None:
        return
    prior = None if session.agreement.plan.moments is None else _ask(session)
    weights = initial_weights(study)
    if study.pretrain.source != "none" and study.training.rounds:
        kind = (
            "drawn phantoms" if study.pretrain.source == "phantoms" else f"the public images of {study.pretrain.path}"
        )
        session.progress.stage("pretrain", f"{study.pretrain.steps} steps on {kind}")
        weights = pretrained(
            study, session.folder.path / "checkpoints" / "pretrained.safetensors",
            on_step=lambda done, total: session.progress.step("pretrain", done, total, "steps"),
        )  # fmt: skip
    weights = weights if prior is None else with_prior(weights, prior)  # else what is public
    copy = {name: array.copy() for name, array in weights.items()}
    session.folder.save_checkpoint(Checkpoint(0, weights, copy, []))


def _ask(session: Session) -> Prior:
    """The prior of all sites that answer."""
    study, plan = session.agreement.study, session.agreement.plan.moments
    assert plan is not None
    session.progress.stage("moments", f"asking {len(session.members)} sites for private class moments")
    answers = session.group.ask({
        node: MomentsRequest(agreement=session.agreement, counts=tuple(member.counts))
        for node, member in session.members.items()
    })  # fmt: skip
    sums, reasons = _screen(session, answers)
    for site, reason in reasons.items():
        session.progress.warn(f"moments: {site} left out: {reason}", site=site)
    session.require(len(sums), reasons, "moments")
    counts = np.sum([np.maximum(m.counts, 1.0) for m in session.members.values() if m.site in sums], axis=0)
    total = {name: np.sum([part[name] for part in sums.values()], axis=0) for name in next(iter(sums.values()))}
    return Prior.fit(
        space_of(study), total["means"], total["squares"], total["energies"], total["norm"], counts,
        noise_std=math.sqrt(len(sums)) * plan.noise_multiplier * plan.sensitivity,
    )  # fmt: skip


def _screen(session: Session, answers: Answers) -> tuple[dict[str, Arrays], dict[str, str]]:
    """(sums by site, reasons by left-out site)."""
    study = session.agreement.study
    space = space_of(study)
    classes = len(study.data.classes)
    expected = {
        "means": (classes, space.dimension), "squares": (space.packed,), "energies": (classes, space.band_count),
        "norm": (1,),
    }  # fmt: skip
    sums: dict[str, Arrays] = {}
    reasons = session.excuses(answers)
    for node, reply in sorted(answers.replies.items()):
        member = session.members[node]
        try:
            if not isinstance(reply, MomentsReply) or reply.site != member.site:
                raise ReplyError("an answer to another question", where="reply")
            screen_arrays(reply.arrays, expected=expected, dtype="float64")
        except ReplyError as error:
            reasons[member.site] = error.what
            member.open_question = True
            continue
        member.note(reply.spent)
        sums[member.site] = reply.arrays
    return sums, reasons
