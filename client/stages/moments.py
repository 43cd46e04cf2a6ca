"""Moments: the site answers with noisy class moments of its train partition, in public coordinates.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np

from client.privacy.gate import Gate, Released
from client.site import Site
from common.errors import ReplyError
from common.model.diffusion_model import space_of
from common.moments import class_means, class_sums, spread_sums
from common.protocol import Arrays, MomentsReply, MomentsRequest


def moments(site: Site, gate: Gate, request: MomentsRequest, _arrays: Arrays) -> Released:
    """Release class sums, then squares about the means that those noisy sums give: two parts of one release.

    Raises:
        NotApproved, PolicyRefusal, BudgetError: refused; nothing leaves.
        ReplyError: the counts in the request are no counts.
    """
    study = request.agreement.study
    classes, space = len(study.data.classes), space_of(study)
    if len(request.counts) != classes:
        raise ReplyError(f"{len(request.counts)} class counts for {classes} classes", where="request")
    counts = np.asarray(request.counts, dtype=np.float64)
    with gate.spend("moments") as permit:
        sums = permit.noisy("moments", class_sums(site.train, classes, space))
        noise_std = permit.plan("moments").noise_std
        centres = class_means(sums.tensors["means"].numpy(), counts, space, noise_std=noise_std)
        spread = permit.noisy("moments", spread_sums(site.train, centres, space))
        return permit.seal(MomentsReply(), sums | spread)
