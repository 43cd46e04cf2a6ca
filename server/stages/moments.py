"""Moments: private class moments from the sites, and a network that has learnt to draw what they describe.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math

import numpy as np

from common.errors import ReplyError
from common.messages import Arrays, MomentsReply, MomentsRequest
from common.moments import Prior
from server.checkpoints import Checkpoint
from server.federation.screening import screen_arrays
from server.federation.sites import Answers
from server.session import Session
from server.synthesis.warm_start import warm_start


def moments(session: Session) -> None:
    """Ask, add up, train on samples of what comes out, and keep the weights as the checkpoint of round 0.

    Nothing is done where the study plans no moments, or where a checkpoint stands already.

    Raises:
        FederationError: fewer usable answers than federation.min_sites.
    """
    study, plan = session.agreement.study, session.agreement.plan.moments
    if plan is None or session.folder.last_checkpoint() is not None:
        return
    session.progress.stage("moments", f"asking {len(session.members)} sites for private class moments")
    answers = session.group.ask(dict.fromkeys(session.members, MomentsRequest(agreement=session.agreement)))
    sums, reasons = _screen(session, answers)
    for site, reason in reasons.items():
        session.progress.warn(f"moments: {site} left out: {reason}", site=site)
    session.require(len(sums), reasons, "moments")
    counts = np.sum([m.counts for m in session.members.values() if m.site in sums], axis=0)
    counts = np.maximum(counts, 1.0)
    prior = Prior.fit(
        {name: np.sum([part[name] for part in sums.values()], axis=0) for name in ("means", "squares")}, counts,
        noise_std=math.sqrt(len(sums)) * plan.noise_multiplier * plan.sensitivity, size=study.data.image_size,
        channels=study.data.channels,
    )  # fmt: skip
    session.progress.stage(
        "warm start", f"{study.warm_start.steps} steps on samples of the moments ({len(prior.scales)} directions kept)"
    )
    weights = warm_start(
        study, prior, counts / counts.sum(),
        on_step=lambda done, total: session.progress.step("warm start", done, total, "steps"),
    )  # fmt: skip
    copy = {name: array.copy() for name, array in weights.items()}
    session.folder.save_checkpoint(Checkpoint(0, weights, copy, []))


def _screen(session: Session, answers: Answers) -> tuple[dict[str, Arrays], dict[str, str]]:
    """(sums by site, reasons by left-out site)."""
    study = session.agreement.study
    d = study.data.channels * study.warm_start.components**2
    expected = {"means": (len(study.data.classes), d), "squares": (d * (d + 1) // 2,)}
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
