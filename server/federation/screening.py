"""The one door into the server: what a site sent is checked before it is used.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from common.errors import ReplyError
from common.messages import Arrays, finite

Shapes = Mapping[str, tuple[int, ...]]


def screen_arrays(arrays: Arrays, *, expected: Shapes, dtype: str) -> None:
    """Check names, shapes, dtype and finiteness.

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
    if not finite(arrays):
        raise ReplyError("values that are not finite", where="reply")


def screen_update(update: Arrays, *, expected: Shapes, largest_norm: float, loss: float) -> None:
    """Check a site's change of the weights, or its sum of gradients.

    Args:
        update: float32 arrays by parameter name.
        expected: the network's parameter shapes.
        largest_norm: L2 bound over all parameters.
        loss: the noisy loss that came with it.

    Raises:
        ReplyError: names the first thing that is wrong.
    """
    screen_arrays(update, expected=expected, dtype="float32")
    norm = math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in update.values()))
    if norm > largest_norm:
        raise ReplyError(f"update of norm {norm:.3g}, over the bound {largest_norm:.3g}", where="reply")
    if not math.isfinite(loss):
        raise ReplyError("a loss that is not finite", where="reply")


def largest_sum_norm(*, records: float, max_grad_norm: float, noise_std: float, numbers: int) -> float:
    """L2 bound of an honest noisy sum of clipped gradients: passed with probability below 1e-9.

    Args:
        records: public estimate of the records in it, itself from a noisy count: taken double, and 50 more.
        noise_std: of each of the `numbers` numbers.
    """
    return max_grad_norm * (2.0 * records + 50.0) + noise_std * (math.sqrt(numbers) + 7.0)
