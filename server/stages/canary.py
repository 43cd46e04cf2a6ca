"""Canary: before anything is spent, a message as large as the study's largest goes to every site and back.

SPDX-License-Identifier: Apache-2.0

A proxy that takes no large message, a site that has not approved, images that cannot be read: each would else show when
the sites have paid for the first stages.
"""

from __future__ import annotations

import time

import numpy as np

from common.features import directions_of, features_of
from common.model.classifier import BiomarkerClassifier
from common.model.diffusion_model import DiffusionModel, space_of
from common.protocol import Arrays, CanaryReply, CanaryRequest
from common.study import Study
from server.federation.screening import screen_arrays
from server.session import Session

_ARRAY = "zeros"


def canary(session: Session, nodes: list[int]) -> list[int]:
    """Which of the nodes answered; all of them, unasked, where sites have enrolled before.

    Raises:
        FederationError: fewer than federation.min_sites did; nothing was spent.
    """
    if session.folder.result("enrol") is not None:
        return nodes
    there, back = largest_messages(session.agreement.study)
    megabytes = 4 * (there + back) / 1e6
    session.progress.stage("canary", f"sending {megabytes:.1f} MB to {len(nodes)} sites and back; spends nothing")

    def screen(_node: int, _body: CanaryReply, arrays: Arrays) -> None:
        screen_arrays(arrays, expected={_ARRAY: (back,)}, dtype="float32")

    request, began = CanaryRequest(agreement=session.agreement, numbers=back), time.monotonic()
    zeros = {_ARRAY: np.zeros(there, np.float32)}
    collected = session.ask("canary", dict.fromkeys(nodes, (request, zeros)), CanaryReply, screen)
    seconds = time.monotonic() - began
    answered = [answer.node for answer in collected.accepted]
    session.progress.step("canary", len(answered), len(nodes), f"sites answered within {seconds:.1f} s",
                          seconds=round(seconds, 1), sites=sorted(collected.arrays))  # fmt: skip
    return answered


def largest_messages(study: Study) -> tuple[int, int]:
    """(to a site, from a site): how many float32 numbers the largest messages of a study are worth."""
    net = DiffusionModel(study)
    weights = sum(array.size for array in net.weights().values())
    net.set_trainable(study.training.parameters)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    classifier = sum(array.size for array in BiomarkerClassifier.fresh(study).state().values())
    classes, wide, low = len(study.data.classes), directions_of(study), space_of(study)
    view = features_of(study).dimension * (wide + 1)
    features = classes * wide + wide * (wide + 1) // 2
    moments = classes * (low.dimension + low.band_count) + low.packed + 1
    return max(weights, view, classifier), max(trained + 1, 2 * features, 2 * moments)  # those sums are float64
