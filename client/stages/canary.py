"""Canary: the site answers with zeros, before a study spends anything, so that it shows whether messages get through.

SPDX-License-Identifier: Apache-2.0

The one answer that no mechanism made. Nothing of a record can be in it: its arrays are zeros of a number that the
request gives, and the rest is what a site says of itself with every answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.privacy.gate import Gate
from common.errors import ReplyError
from common.protocol import Answer, CanaryReply, CanaryRequest, encode

ARRAY = "zeros"


@dataclass(frozen=True)
class Blank:
    """The bytes of an answer with nothing of a record in it."""

    data: bytes


def canary(gate: Gate, request: CanaryRequest, *, most_bytes: int) -> Blank:
    """Zeros, float32, as many as the study's largest answer has numbers; nothing is reserved.

    Args:
        most_bytes: of an answer.

    Raises:
        ReplyError: more are asked for.
    """
    if 4 * request.numbers > most_bytes:
        raise ReplyError(f"an answer of {request.numbers} numbers is larger than this site sends", where="request",
                         remedy="Raise performance.max_message_mb of the site file.")  # fmt: skip
    zeros = np.zeros(request.numbers, np.float32)
    return Blank(encode(Answer(site=gate.facts, spent=gate.spent(), body=CanaryReply()), {ARRAY: zeros}))
