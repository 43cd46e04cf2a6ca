"""The private loss curve: gradient and loss together stay within the clipping norm, and the mean comes back."""

from __future__ import annotations

import math

import pytest

from common.loss_curve import LARGEST_LOSS, LOSS_SHARE, gradient_norm, mean_loss, scale


@pytest.mark.parametrize("norm", [1e-3, 0.1, 1.0, 1e3])
def test_the_largest_gradient_and_the_largest_loss_together_have_the_clipping_norm(norm):
    assert math.hypot(gradient_norm(norm), scale(norm) * LARGEST_LOSS) == pytest.approx(norm, rel=1e-12)
    assert 0 < LOSS_SHARE < 1


@pytest.mark.parametrize(("records", "steps"), [(1, 1), (40, 1), (12, 5)])
def test_the_server_reads_the_mean_that_the_records_had(records, steps):
    losses = [0.3 + 0.01 * n for n in range(records * steps)]
    total = sum(loss * scale(0.1) for loss in losses)
    read = mean_loss(total, max_grad_norm=0.1, expected_batch=records, steps=steps)
    assert read == pytest.approx(sum(losses) / len(losses))
