"""Enrol: the site answers with noisy class counts of its train partition.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from client.privacy.gate import Gate, Released
from client.site import Site
from common.moments import class_counts
from common.protocol import Arrays, EnrolReply, EnrolRequest


def enrol(site: Site, gate: Gate, request: EnrolRequest, _arrays: Arrays) -> Released:
    """Release the class counts; one unit adds 1 in all (a patient in shares), so their L2 sensitivity is 1.

    Raises:
        NotApproved, PolicyRefusal, BudgetError: refused; nothing leaves.
    """
    with gate.spend("counts") as permit:
        counts = class_counts(site.train, len(request.agreement.study.data.classes))
        return permit.seal(EnrolReply(), permit.noisy("counts", counts))
