"""The private loss curve: what of a record's loss goes into the noisy sum at a site, and how the server reads it.

SPDX-License-Identifier: Apache-2.0

C is the clipping norm (`training.max_grad_norm`), s = LOSS_SHARE. In each step a record gives one vector: its gradient,
clipped to C·sqrt(1 - s²), and its loss, clipped to [0, LARGEST_LOSS] and scaled to at most s·C. Together they have norm
at most C, so the curve costs no epsilon, and the gradient 2 % of its norm.
"""

from __future__ import annotations

import math

LOSS_SHARE = 0.2  # s
LARGEST_LOSS = 2.0  # a network that predicts nothing has loss 1 at most


def gradient_norm(max_grad_norm: float) -> float:
    """C·sqrt(1 - s²): what the gradient alone is clipped to."""
    return max_grad_norm * math.sqrt(1 - LOSS_SHARE**2)


def scale(max_grad_norm: float) -> float:
    """s·C / LARGEST_LOSS: what a record's clipped loss is multiplied with before it is summed."""
    return LOSS_SHARE * max_grad_norm / LARGEST_LOSS


def mean_loss(noisy_sum: float, *, max_grad_norm: float, expected_batch: float, steps: int) -> float:
    """Mean loss of a record over the steps of one request; noisy, so it may be below 0.

    Args:
        noisy_sum: over records and steps, as a site sent it.
        expected_batch: public estimate of the records in a step, over 0.
    """
    return noisy_sum / (scale(max_grad_norm) * expected_batch * steps)
