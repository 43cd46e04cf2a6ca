"""Layers that keep the record in dim 0, so that one record moves one gradient.

SPDX-License-Identifier: Apache-2.0

B records, K noise draws a record, T tokens, D width, G window groups (K × windows), A heads, N tokens a window.
Parameters live only in nn.Linear on (B, T, D), nn.Embedding on (B, K) and RelativePositionBias on (B, G, A, N, N):
windows and draws are folded in parameter-free code. `common/model/record_rule.py` refuses what breaks this.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        """(B, G, A, N, N) -> the same shape."""
        tokens = self.index.shape[0]
        bias = self.table[self.index.flatten()].view(tokens, tokens, -1)
        return scores + bias.permute(2, 0, 1)


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the time step (Vaswani et al. 2017): t (B, K) -> (B, K, width); `width` even."""
    half = width // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64) / half)
    angles = t.double()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then scale and shift by the condition (adaLN, Peebles and Xie 2023).

    x (B, K, T, D); shift, scale (B, K, D).
    """
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, :, None]) + shift[:, :, None]


def to_windows(x: Tensor, side: int, window: int, shift: int) -> Tensor:
    """(B, K, side², D) -> (B, K·windows, window², D), after a cyclic shift."""
    b, k, _, d = x.shape
    x = x.view(b, k, side, side, d)
    if shift:
        x = torch.roll(x, (-shift, -shift), dims=(2, 3))
    n = side // window
    x = x.view(b, k, n, window, n, window, d).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, k * n * n, window * window, d)


def from_windows(x: Tensor, side: int, window: int, shift: int) -> Tensor:
    """The inverse of `to_windows`: (B, K·windows, window², D) -> (B, K, side², D)."""
    b, _, _, d = x.shape
    n = side // window
    x = x.view(b, -1, n, n, window, window, d).permute(0, 1, 2, 4, 3, 5, 6).reshape(b, -1, side, side, d)
    if shift:
        x = torch.roll(x, (shift, shift), dims=(2, 3))
    return x.reshape(b, -1, side * side, d)


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """Additive mask (windows, N, N) that keeps tokens from attending over the seam of a cyclic shift."""
    region = torch.zeros(side, side)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        region[rows, columns] = number
    parts = to_windows(region.view(1, 1, side * side, 1), side, window, 0)[0, :, :, 0]  # (windows, N)
    return (parts[:, None, :] != parts[:, :, None]).double() * -100.0
