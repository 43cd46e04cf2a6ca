"""What an honest answer's arrays can be: names, type, shape, finite numbers, and how long a vector they can make.

SPDX-License-Identifier: Apache-2.0

Every bound is passed by an honest site with probability below 1e-9; all numbers in them are public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from common.errors import ReplyError
from common.protocol import Arrays

Shapes = Mapping[str, tuple[int, ...]]
LARGEST_COUNT = 1e9  # units that a site can have
_DEVIATIONS = 7.0  # of a normal number: beyond them with probability 1e-12


def screen_arrays(arrays: Arrays, *, expected: Shapes, dtype: str) -> None:
    """Check names, type, shape and finiteness.

    Args:
        arrays: what the site sent.
        expected: shape by name.
        dtype: numpy dtype name that every array must have.

    Raises:
        ReplyError: names the first thing that is wrong.
    """
    missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or extra:
        raise ReplyError(f"wrong names: missing {missing[:3]}, unknown {extra[:3]}", where="reply")
    for name, array in arrays.items():
        if array.dtype != np.dtype(dtype):
            raise ReplyError(f"'{name}' is {array.dtype}, not {dtype}", where="reply")
        if array.shape != tuple(expected[name]):
            raise ReplyError(f"'{name}' has shape {array.shape}, not {tuple(expected[name])}", where="reply")
        if not bool(np.isfinite(array).all()):
            raise ReplyError(f"'{name}' has values that are not finite", where="reply")


def screen_norm(arrays: Arrays, *, largest: float, what: str) -> None:
    """Check the L2 norm over all arrays together.

    Args:
        what: how an error calls them.

    Raises:
        ReplyError: it is over `largest`.
    """
    with np.errstate(over="ignore"):  # an overflow is over any bound
        squares = [float(np.sum(np.square(array, dtype=np.float64))) for array in arrays.values()]
    norm = math.sqrt(sum(squares))
    if not norm <= largest:
        raise ReplyError(f"{what} of norm {norm:.3g}, over the bound {largest:.3g}", where="reply")


def most_units(counts: Sequence[float], noise_std: float) -> float:
    """Most units that a site with these noisy class counts has."""
    return sum(max(0.0, count) for count in counts) + _DEVIATIONS * noise_std * math.sqrt(len(counts))


def most_drawn(units: float, sample_rate: float) -> float:
    """Most units in a Poisson sample of `units` (Bernstein's inequality)."""
    mean = units * sample_rate
    return min(units, mean + 6.5 * math.sqrt(mean) + 14.0)


def largest_sum_norm(*, units: float, sensitivity: float, noise_std: float, numbers: int) -> float:
    """L2 norm of an honest noisy sum over `units`, each of which adds at most `sensitivity`.

    Args:
        noise_std: of each of the `numbers` numbers.
    """
    return sensitivity * units + noise_std * (math.sqrt(numbers) + _DEVIATIONS)
