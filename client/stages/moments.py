"""Moments: the site answers with noisy class moments of its train partition, in a public low-frequency basis.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import torch

from client.privacy.gate import Gate, Released
from client.site import Site
from common.errors import BudgetError
from common.messages import MomentsReply, MomentsRequest, Spent
from common.moments import class_sums


def moments(site: Site, gate: Gate, request: MomentsRequest) -> Released[MomentsReply]:
    """Release sums of feature vectors by class, and of their squares (`common/moments.py` bounds both).

    Raises:
        PolicyRefusal, BudgetError: refused; no image was read.
    """
    study, plan = request.agreement.study, request.agreement.plan.moments
    if plan is None:
        raise BudgetError("the study plans no moments", where="plan")
    with gate.spend(plan) as permit:
        exact = class_sums(site.train, len(study.data.classes), study.warm_start.components)
        noisy = permit.noisy(plan.name, {name: torch.from_numpy(part) for name, part in exact.items()})
        reply = MomentsReply(
            site=site.config.name, spent=Spent(0.0, 0.0, 0, 0),
            arrays={name: part.numpy() for name, part in noisy.items()},
        )  # fmt: skip
        return permit.seal(reply)
