"""Weights that came from elsewhere: none is used before all of them fit.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import ReplyError
from common.protocol import Arrays, bounded_arrays

LARGEST_WEIGHT = 1e6  # no trained network comes near it; larger ones overflow in float32 further on


def fitting(arrays: Arrays, wanted: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The arrays as tensors (copies), once names, types, shapes and sizes are those of `wanted`.

    Raises:
        ReplyError: a name is missing or unknown, or an array is not float32, has another shape, or holds a value that
            is not a number of at most LARGEST_WEIGHT in absolute value.
    """
    if arrays.keys() != wanted.keys():
        odd = sorted(arrays.keys() ^ wanted.keys())[0][:80]
        raise _refused("names differ from those of the network", where, odd)
    for name, target in wanted.items():
        array = arrays[name]
        if array.dtype != "float32" or array.shape != tuple(target.shape):
            raise _refused(f"{array.dtype} {array.shape} instead of float32 {tuple(target.shape)}", where, name)
        if not bounded_arrays({name: array}, LARGEST_WEIGHT):
            raise _refused(f"contains NaN, or a value over {LARGEST_WEIGHT:g}", where, name)
    return {name: torch.from_numpy(arrays[name].copy()) for name in wanted}


def _refused(what: str, where: str, name: str) -> ReplyError:
    return ReplyError(what, where=f"{where}: {name}", remedy="Use weights of this study's network.")
