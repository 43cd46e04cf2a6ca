"""Swin U-Net of the diffusion model, conditional on time and class (after Pan et al. 2023, Phys. Med. Biol. 68 105004).

SPDX-License-Identifier: Apache-2.0

B records, K noise draws a record, C channels, H W pixels, T tokens a draw, D width, E condition width.
Draws are an axis of their own: they share nothing but the record, whose loss is their mean. Every parameterised
layer sees (B, K·T, D) or (B, K, E), so its gradient splits by record exactly.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.model.layers import (
    RelativePositionBias,
    from_windows,
    modulate,
    shift_mask,
    time_embedding,
    to_windows,
)
from common.study import DataConfig, NetworkConfig


class SwinBlock(nn.Module):
    """(Shifted-)window attention and MLP, each behind adaLN with a gate that begins at zero.

    Args:
        width: D.
        side: tokens a side; divisible by `window`.
        shift: cyclic shift in tokens; 0 = plain windows.
        condition: E.
    """

    def __init__(
        self, *, width: int, heads: int, side: int, window: int, shift: int, mlp_ratio: float, condition: int
    ) -> None:
        super().__init__()
        self.side, self.window, self.shift, self.heads = side, window, shift, heads
        hidden = int(width * mlp_ratio)
        self.condition = nn.Linear(condition, 6 * width)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        self.qkv = nn.Linear(width, 3 * width)
        self.position = RelativePositionBias(window, heads)
        self.proj = nn.Linear(width, width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.mask = shift_mask(side, window, shift) if shift else None  # plain attribute: it is no state

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, K, T, D), condition (B, K, E) -> (B, K, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(condition).chunk(6, dim=-1)
        x = x + gate1[:, :, None] * self._attend(modulate(x, shift1, scale1))
        h = F.silu(self.expand(modulate(x, shift2, scale2).flatten(1, 2)))  # (B, K·T, hidden)
        return x + gate2[:, :, None] * self.contract(h).view_as(x)

    def _attend(self, x: Tensor) -> Tensor:
        b, k, t, d = x.shape
        qkv = self.qkv(x.flatten(1, 2)).view(b, k, t, 3 * d)
        groups = to_windows(qkv, self.side, self.window, self.shift)  # (B, G, N, 3D)
        g, n = groups.shape[1:3]
        q, key, value = groups.view(b, g, n, 3, self.heads, d // self.heads).permute(3, 0, 1, 4, 2, 5)
        scores = self.position(q @ key.transpose(-2, -1) / math.sqrt(d // self.heads))  # (B, G, A, N, N)
        if self.mask is not None:
            mask = self.mask.to(scores.dtype).repeat(k, 1, 1)  # windows turn fastest within a draw
            scores = scores + mask[None, :, None]
        out = (scores.softmax(dim=-1) @ value).transpose(2, 3).reshape(b, g, n, d)
        out = from_windows(out, self.side, self.window, self.shift)  # (B, K, T, D)
        return self.proj(out.flatten(1, 2)).view(b, k, t, d)


class SwinUNet(nn.Module):
    """Predicts the noise in an image at a time step.

    Args:
        network: sizes; level l has width × 2^l channels and half the tokens a side of the level before.
        data: image size, channels and classes; class index len(classes) is the null class (no label).
    """

    def __init__(self, network: NetworkConfig, data: DataConfig) -> None:
        super().__init__()
        self.patch, self.channels = network.patch_size, data.channels
        self.side = data.image_size // network.patch_size
        self.width, pixels = network.width, network.patch_size**2 * data.channels
        condition = 2 * network.width
        self.embed = nn.Linear(pixels, network.width)
        self.time_in, self.time_out = nn.Linear(network.width, condition), nn.Linear(condition, condition)
        self.label = nn.Embedding(len(data.classes) + 1, condition)
        levels = len(network.depths)

        def blocks(level: int) -> nn.ModuleList:
            side = self.side // 2**level
            window = _window(side, network.window)
            return nn.ModuleList(
                SwinBlock(
                    width=network.width * 2**level, heads=network.heads[level], side=side, window=window,
                    shift=window // 2 if number % 2 and window < side else 0,
                    mlp_ratio=network.mlp_ratio, condition=condition,
                )
                for number in range(network.depths[level])
            )  # fmt: skip

        widths = [network.width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(blocks(level) for level in range(levels))
        self.merge = nn.ModuleList(nn.Linear(4 * w, 2 * w) for w in widths[:-1])
        self.split = nn.ModuleList(nn.Linear(2 * w, 4 * w) for w in widths[:-1])
        self.join = nn.ModuleList(nn.Linear(2 * w, w) for w in widths[:-1])
        self.up = nn.ModuleList(blocks(level) for level in range(levels - 1))
        self.last_condition = nn.Linear(condition, 2 * network.width)
        self.head = nn.Linear(network.width, pixels)
        for layer in (self.last_condition, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predicted velocity (`NoiseSchedule.velocity`), which says how much of x is noise.

        Args:
            x: noisy images (B, K, C, H, W).
            t: time steps (B, K), int64.
            y: classes (B, K), int64; len(classes) = null class.

        Returns:
            (B, K, C, H, W).
        """
        b, k = t.shape
        times = time_embedding(t, self.width).to(x.dtype)
        condition = F.silu(self.time_out(F.silu(self.time_in(times))) + self.label(y))  # (B, K, E)
        h = self.embed(self._to_patches(x).flatten(1, 2)).view(b, k, self.side**2, self.width)
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            for block in cast(nn.ModuleList, stage):
                h = block(h, condition)
            if level < len(self.merge):
                skips.append(h)
                h = self._run(self.merge[level], _fold(h, self.side // 2**level))
        for level in reversed(range(len(self.up))):
            h = _unfold(self._run(self.split[level], h), self.side // 2 ** (level + 1))
            h = self._run(self.join[level], torch.cat([h, skips[level]], dim=-1))
            for block in cast(nn.ModuleList, self.up[level]):
                h = block(h, condition)
        shift, scale = self.last_condition(condition).chunk(2, dim=-1)
        return self._from_patches(self._run(self.head, modulate(h, shift, scale)))

    @staticmethod
    def _run(layer: nn.Module, x: Tensor) -> Tensor:
        """A Linear on (B, K, T, D) with the draws folded into the tokens: (B, K·T, D)."""
        return layer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def _to_patches(self, x: Tensor) -> Tensor:
        """(B, K, C, H, W) -> (B, K, T, C·p·p)."""
        b, k, c = x.shape[:3]
        x = x.view(b, k, c, self.side, self.patch, self.side, self.patch).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(b, k, self.side**2, c * self.patch**2)

    def _from_patches(self, x: Tensor) -> Tensor:
        """(B, K, T, C·p·p) -> (B, K, C, H, W)."""
        b, k = x.shape[:2]
        x = x.view(b, k, self.side, self.side, self.channels, self.patch, self.patch).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(b, k, self.channels, self.side * self.patch, self.side * self.patch)


def _window(side: int, largest: int) -> int:
    """The largest window side ≤ `largest` that divides `side`."""
    return next(window for window in range(min(side, largest), 0, -1) if side % window == 0)


def _fold(x: Tensor, side: int) -> Tensor:
    """Patch merging: (B, K, side², D) -> (B, K, side²/4, 4D)."""
    b, k, _, d = x.shape
    x = x.view(b, k, side // 2, 2, side // 2, 2, d).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, k, side * side // 4, 4 * d)


def _unfold(x: Tensor, side: int) -> Tensor:
    """Patch splitting, the inverse of `_fold`: (B, K, side², 4D) -> (B, K, 4·side², D)."""
    b, k, _, d = x.shape
    x = x.view(b, k, side, side, 2, 2, d // 4).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(b, k, 4 * side * side, d // 4)
