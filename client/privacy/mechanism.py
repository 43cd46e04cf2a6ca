"""The one noise step, and the type of what came out of it: nothing else may leave a site.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from client.privacy.randomness import NoiseSource
from common.bounded import BoundedSum

_GRID_BITS = 20  # exact while the sum is below 2^31 noise standard deviations, so for up to 1e8 records
_TOLERANCE = 1e-9  # of a bound that was added up from parts
_KEY = object()


class Noisy:
    """Numbers that a Gaussian release made, or that were computed from such and from public numbers alone.

    Made by `gaussian_release` and `LocalSteps` only. What is inside cannot be changed: `tensors` are copies.
    """

    def __init__(self, tensors: dict[str, Tensor], *, key: object) -> None:
        if key is not _KEY:
            raise TypeError("Noisy numbers are made by a mechanism only")
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, float64 unless `float32` was asked for."""
        return {name: tensor.clone() for name, tensor in self._tensors.items()}

    def __or__(self, other: Noisy) -> Noisy:
        """Both together."""
        return Noisy({**self._tensors, **other._tensors}, key=_KEY)

    def float32(self) -> Noisy:
        """The same numbers, as float32: half the bytes; numbers beyond its range stay the largest of it."""
        return Noisy({name: tensor.clamp(-3e38, 3e38).float() for name, tensor in self._tensors.items()}, key=_KEY)


def gaussian_release(total: BoundedSum, *, noise_multiplier: float, sensitivity: float, source: NoiseSource) -> Noisy:
    """Add N(0, (noise_multiplier × sensitivity)²) to every number of a sum (Dwork and Roth 2014, A.1).

    Args:
        total: of a bound up to `sensitivity`; where it is less, it is a part of a release, with the noise of a whole.
        noise_multiplier: > 0.
        sensitivity: > 0.

    Returns:
        The noisy sum in float64, rounded to a public grid of about a millionth of the noise: the lowest bits, in which
        a floating-point sum could betray its parts, are gone (post-processing).

    Raises:
        ValueError: noise or sensitivity is not positive and finite, or the sum's bound is over the sensitivity.
    """
    std = noise_multiplier * sensitivity
    if not (noise_multiplier > 0 and sensitivity > 0 and 0 < std < math.inf):
        raise ValueError("noise_multiplier and sensitivity must be positive and finite")
    if not total.bound <= sensitivity * (1 + _TOLERANCE):
        raise ValueError(f"a sum of bound {total.bound:g} under a sensitivity of {sensitivity:g}")
    grid = 2.0 ** (math.floor(math.log2(std)) - _GRID_BITS)
    noisy = {name: part + std * source.normal_like(part) for name, part in total.parts.items()}
    rounded = {name: torch.round(part / grid) * grid + 0.0 for name, part in noisy.items()}  # + 0.0: no negative zero
    return Noisy(rounded, key=_KEY)
