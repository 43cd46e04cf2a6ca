"""The one clip-and-noise step: Gaussian noise on a sum whose sensitivity is bounded.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from client.privacy.randomness import NoiseSource

_GRID_BITS = 20  # exact while the sum is below 2^31 noise standard deviations, so for up to 1e8 records


def gaussian_release(
    total: Mapping[str, torch.Tensor], *, noise_multiplier: float, sensitivity: float, source: NoiseSource
) -> dict[str, torch.Tensor]:
    """Add N(0, (noise_multiplier × sensitivity)²) to every coordinate of a sum (Dwork and Roth 2014, A.1).

    Args:
        total: the exact sum, in parts; ALL parts together change by at most `sensitivity` in L2 when one record is
            added or removed.
        noise_multiplier: > 0.
        sensitivity: > 0.

    Returns:
        The noisy sum in float64, same names and shapes, rounded to a public grid of about a millionth of the noise:
        the lowest bits, in which a floating-point sum could betray its parts, are gone (post-processing).

    Raises:
        ValueError: noise or sensitivity is not positive and finite, or the sum is not finite.
    """
    std = noise_multiplier * sensitivity
    if not (noise_multiplier > 0 and sensitivity > 0 and 0 < std < math.inf):
        raise ValueError("noise_multiplier and sensitivity must be positive and finite")
    if not all(bool(torch.isfinite(part).all()) for part in total.values()):
        raise ValueError("a sum with non-finite values cannot be released")
    grid = 2.0 ** (math.floor(math.log2(std)) - _GRID_BITS)
    noisy = {name: part.detach().double() + std * source.normal_like(part) for name, part in total.items()}
    return {name: torch.round(part / grid) * grid + 0.0 for name, part in noisy.items()}  # + 0.0: no negative zero
