"""Features: the site answers with noisy class features of its train partition, along the request's directions.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import torch

from client.privacy.gate import Gate, Released
from client.privacy.places import at_places, own_places
from client.site import Site
from common.features import View, directions_of, feature_sums, features_of
from common.images import Units
from common.moments import Floats
from common.protocol import Arrays, FeaturesReply, FeaturesRequest
from common.study import Study

_AT_ONCE = 32  # images of a pass


def features(site: Site, gate: Gate, request: FeaturesRequest, arrays: Arrays) -> Released:
    """Release class sums of feature vectors and of their products.

    Raises:
        NotApproved, PolicyRefusal, BudgetError: refused; nothing leaves.
        ReplyError: the directions do not fit the study.
    """
    study = request.agreement.study
    gate.require_room("features")
    view = View.read(study, arrays)
    torch.set_num_threads(site.config.performance.threads)
    with gate.spend("features") as permit:
        sums = feature_sums(site.train, vectors(site.train, study, view), len(study.data.classes))
        return permit.seal(FeaturesReply(), permit.noisy("features", sums))


def vectors(units: Units, study: Study, view: View) -> Floats:
    """Of each image, (N, m), computed at a place of its own (`client/privacy/places.py`)."""
    images, of, choice = units.images.images, features_of(study).of, np.random.default_rng()
    found = np.zeros((len(images), directions_of(study)))
    for places in own_places(len(images), _AT_ONCE, choice):
        taken = places >= 0
        found[places[taken]] = view.of(of(at_places(images, places)))[taken]
    return found
