"""Enrol: the site answers with noisy class counts of its train partition.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import torch

from client.privacy.gate import Gate, Released
from client.site import Site
from common.messages import EnrolReply, EnrolRequest, Spent


def enrol(site: Site, gate: Gate, request: EnrolRequest) -> Released[EnrolReply]:
    """Release the class counts; one unit adds 1 in all (a patient in shares), so their L2 sensitivity is 1.

    Raises:
        PolicyRefusal, BudgetError: refused; no record was counted.
    """
    plan = request.agreement.plan.counts
    classes = len(request.agreement.study.data.classes)
    with gate.spend(plan) as permit:
        counts = site.train.class_shares(classes)
        noisy = permit.noisy(plan.name, {"counts": torch.from_numpy(counts)})
        reply = EnrolReply(
            site=site.config.name,
            phantoms=site.splits.phantom,
            random_source=gate.source.name,
            spent=Spent(0.0, 0.0, 0, 0),
            arrays={"counts": noisy["counts"].numpy()},
        )
        return permit.seal(reply)
