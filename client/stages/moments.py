"""Moments: the site answers with noisy class moments of its train partition, in public coordinates.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import torch

from client.privacy.gate import Gate, Released
from client.site import Site
from common.errors import BudgetError, ReplyError
from common.messages import MomentsReply, MomentsRequest, Spent
from common.model.diffusion_model import space_of
from common.moments import MEANS_PART, SPREAD_PART, class_means, class_sums, spread_sums


def moments(site: Site, gate: Gate, request: MomentsRequest) -> Released[MomentsReply]:
    """Release class sums, then squares about the means that those noisy sums give (`common/moments.py` bounds both).

    Raises:
        PolicyRefusal, BudgetError: refused; no image was read.
        ReplyError: the counts in the request are no counts.
    """
    study, plan = request.agreement.study, request.agreement.plan.moments
    if plan is None:
        raise BudgetError("the study plans no moments", where="plan")
    classes, space = len(study.data.classes), space_of(study)
    counts = np.asarray(request.counts, dtype=np.float64)
    if counts.shape != (classes,) or not np.isfinite(counts).all():
        raise ReplyError(f"{len(counts)} class counts for {classes} classes, or not finite", where="request")
    with gate.spend(plan) as permit:
        first = {"means": torch.from_numpy(class_sums(site.train, classes, space))}
        sums = permit.noisy(plan.name, first, part=MEANS_PART)
        centres = class_means(sums["means"].numpy(), counts, space, noise_std=plan.noise_multiplier * plan.sensitivity)
        spread = {name: torch.from_numpy(part) for name, part in spread_sums(site.train, centres, space).items()}
        noisy = {**sums, **permit.noisy(plan.name, spread, part=SPREAD_PART)}
        reply = MomentsReply(
            site=site.config.name, spent=Spent(0.0, 0.0, 0, 0),
            arrays={name: part.numpy() for name, part in noisy.items()},
        )  # fmt: skip
        return permit.seal(reply)
