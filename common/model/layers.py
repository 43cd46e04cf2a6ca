"""Layers of the diffusion network that keep the row in dim 0, so that one record moves one gradient.

SPDX-License-Identifier: Apache-2.0

R rows (a record's noise draws, one after another), T tokens, D width, G windows, A heads, N tokens a window.
Parameters live only in layers that Opacus has a formula for, and in RelativePositionBias on (R, G, A, N, N): windows
are folded in parameter-free code, so that no gradient is held for each of them. `common/model/record_rule.py` refuses
what breaks this.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LOWEST, _HIGHEST = 0.25, 32.0  # turns of the embedding's sinusoids for each unit of log(sigma) / 4


class RelativePositionBias(nn.Module):
    """Adds a learned bias by relative position to attention scores (Liu et al. 2021, eq. 4).

    Args:
        window: side of the window in tokens; N = window².
        heads: A.
    """

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)
        where = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = where[:, :, None] - where[:, None, :] + window - 1  # (2, N, N)
        self.index = apart[0] * (2 * window - 1) + apart[1]  # (N, N); no buffer: it is no state

    def forward(self, scores: Tensor) -> Tensor:
        """(R, G, A, N, N) -> the same shape."""
        tokens = self.index.shape[0]
        bias = self.table[self.index.flatten()].view(tokens, tokens, -1)
        return scores + bias.permute(2, 0, 1)


def noise_embedding(level: Tensor, width: int) -> Tensor:
    """Sinusoids of the noise level, log(sigma) / 4: (R,) -> (R, width); `width` even."""
    half = width // 2
    steps = torch.arange(half, dtype=level.dtype) / max(half - 1, 1)
    angles = 2 * math.pi * level[:, None] * _LOWEST * (_HIGHEST / _LOWEST) ** steps
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then scale and shift by the condition (adaLN, Peebles and Xie 2023).

    x (R, T, D); shift, scale (R, D).
    """
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def to_windows(x: Tensor, side: int, window: int, shift: int) -> Tensor:
    """(R, side², D) -> (R, G, window², D), after a cyclic shift."""
    r, _, d = x.shape
    x = x.view(r, side, side, d)
    if shift:
        x = torch.roll(x, (-shift, -shift), dims=(1, 2))
    n = side // window
    x = x.view(r, n, window, n, window, d).transpose(2, 3)
    return x.reshape(r, n * n, window * window, d)


def from_windows(x: Tensor, side: int, window: int, shift: int) -> Tensor:
    """The inverse of `to_windows`: (R, G, window², D) -> (R, side², D)."""
    r, _, _, d = x.shape
    n = side // window
    x = x.view(r, n, n, window, window, d).transpose(2, 3).reshape(r, side, side, d)
    if shift:
        x = torch.roll(x, (shift, shift), dims=(1, 2))
    return x.reshape(r, side * side, d)


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Additive mask (G, N, N) that keeps tokens from attending over the seam of a cyclic shift."""
    region = torch.zeros(side, side)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        region[rows, columns] = number
    parts = to_windows(region.view(1, side * side, 1), side, window, 0)[0, :, :, 0]  # (G, N)
    return (parts[:, None, :] != parts[:, :, None]).double() * -100.0
