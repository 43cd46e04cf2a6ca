"""The network: convolutions at high resolution, Swin blocks below (after Pan et al. 2023, Phys. Med. Biol. 68 105004).

SPDX-License-Identifier: Apache-2.0

R rows (a record's noise draws, one after another), C channels, S pixels a side, T tokens, D width, E condition width.
Every parameterised layer has the row in dim 0, so that its gradient splits by row, and rows by record, exactly.
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
    noise_embedding,
    shift_mask,
    to_windows,
)
from common.study import DataConfig, NetworkConfig

_MOST_GROUPS = 8


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions behind GroupNorm and SiLU; noise level and class scale and shift between them.

    Args:
        inner, outer: channels of what comes in and goes out.
        condition: E.
    """

    def __init__(self, inner: int, outer: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inner), _norm(outer)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * outer)
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)
        _zero(self.condition, self.conv2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (R, inner, S, S), condition (R, E) -> (R, outer, S, S)."""
        shift, scale = self.condition(condition)[..., None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


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
        _zero(self.condition)
        self.qkv = nn.Linear(width, 3 * width)
        self.position = RelativePositionBias(window, heads)
        self.proj = nn.Linear(width, width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.mask = shift_mask(side, window, shift) if shift else None  # plain attribute: it is no state

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (R, D, side, side), condition (R, E) -> the shape of x."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(condition).chunk(6, dim=-1)
        h = x.flatten(2).transpose(1, 2)  # (R, T, D)
        h = h + gate1[:, None] * self._attend(modulate(h, shift1, scale1))
        h = h + gate2[:, None] * self.contract(F.silu(self.expand(modulate(h, shift2, scale2))))
        return h.transpose(1, 2).reshape(x.shape)

    def _attend(self, x: Tensor) -> Tensor:
        groups = to_windows(self.qkv(x), self.side, self.window, self.shift)  # (R, G, N, 3D)
        r, g, n, d = *groups.shape[:3], x.shape[-1]
        q, key, value = groups.view(r, g, n, 3, self.heads, d // self.heads).permute(3, 0, 1, 4, 2, 5)
        scores = self.position(q @ key.transpose(-2, -1) / math.sqrt(d // self.heads))  # (R, G, A, N, N)
        if self.mask is not None:
            scores = scores + self.mask.to(scores.dtype)[None, :, None]
        out = (scores.softmax(dim=-1) @ value).transpose(2, 3).reshape(r, g, n, d)
        return self.proj(from_windows(out, self.side, self.window, self.shift))


class Level(nn.Module):
    """What happens at one resolution, on one way: a residual block that takes the channels, then Swin blocks.

    Args:
        inner, outer: channels of what comes in and goes out.
        side: pixels a side.
        depth: Swin blocks; plain and shifted windows take turns. With none, there is a second residual block.
    """

    def __init__(
        self, inner: int, outer: int, *, side: int, depth: int, heads: int, network: NetworkConfig, condition: int
    ) -> None:
        super().__init__()
        window = next(w for w in range(min(side, network.window), 0, -1) if side % w == 0)
        blocks: list[nn.Module] = [ResidualBlock(inner, outer, condition)]
        if depth == 0:
            blocks.append(ResidualBlock(outer, outer, condition))
        blocks += [
            SwinBlock(
                width=outer, heads=heads, side=side, window=window,
                shift=window // 2 if number % 2 and window < side else 0, mlp_ratio=network.mlp_ratio,
                condition=condition,
            )
            for number in range(depth)
        ]  # fmt: skip
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (R, inner, side, side), condition (R, E) -> (R, outer, side, side)."""
        for block in self.blocks:
            x = block(x, condition)
        return x


class SwinUNet(nn.Module):
    """From a scaled noisy image, what `common/model/diffusion_model.py: DiffusionModel` makes the clean one of.

    Args:
        network: sizes; level l has width × 2^l channels and half the pixels a side of the level before.
        data: image size, channels and classes; class index len(classes) is the null class (no label).
    """

    def __init__(self, network: NetworkConfig, data: DataConfig) -> None:
        super().__init__()
        self.width, condition = network.width, 4 * network.width
        widths = [network.width * 2**level for level in range(len(network.depths))]
        self.noise_in, self.noise_out = nn.Linear(network.width, condition), nn.Linear(condition, condition)
        self.label = nn.Embedding(len(data.classes) + 1, condition)

        def level(number: int, inner: int, depth: int) -> Level:
            return Level(
                inner, widths[number], side=data.image_size // 2**number, depth=depth, heads=network.heads[number],
                network=network, condition=condition,
            )  # fmt: skip

        self.embed = nn.Conv2d(data.channels, network.width, 3, padding=1)
        self.down = nn.ModuleList(
            level(number, widths[max(number - 1, 0)], depth) for number, depth in enumerate(network.depths)
        )
        self.up = nn.ModuleList(  # half as many Swin blocks on the way up
            level(number, widths[number] + widths[number + 1], (network.depths[number] + 1) // 2)
            for number in range(len(widths) - 1)
        )
        self.norm = _norm(network.width)
        self.head = nn.Conv2d(network.width, data.channels, 3, padding=1)
        _zero(self.head)

    def forward(self, x: Tensor, level: Tensor, y: Tensor) -> Tensor:
        """The network's answer.

        Args:
            x: noisy images of about unit variance (R, C, S, S).
            level: log(sigma) / 4, (R,).
            y: classes (R,), int64; len(classes) = null class.

        Returns:
            (R, C, S, S).
        """
        condition = F.silu(self.noise_in(noise_embedding(level, self.width)))
        condition = F.silu(self.noise_out(condition) + self.label(y[:, None])[:, 0])
        h, skips = self.embed(x), list[Tensor]()
        for number, stage in enumerate(self.down):
            h = cast(Level, stage)(h if number == 0 else F.avg_pool2d(h, 2), condition)
            skips.append(h)
        for number in reversed(range(len(self.up))):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = cast(Level, self.up[number])(torch.cat([h, skips[number]], dim=1), condition)
        return self.head(F.silu(self.norm(h)))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(next(g for g in range(_MOST_GROUPS, 0, -1) if width % g == 0), width)


def _zero(*layers: nn.Linear | nn.Conv2d) -> None:
    """So that a block begins as nothing, and the network as an answer of zero."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
