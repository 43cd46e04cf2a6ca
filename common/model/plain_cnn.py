"""A plain convolutional network: the classifier of a study unless it names another, and two judges of the panel.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, C channels, H×W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

_GROUPS = 8


def group_norm(width: int) -> nn.Module:
    """Norm of a record alone: with it there is a gradient per record."""
    return nn.GroupNorm(_GROUPS, width)


def plain_cnn(
    channels: int, classes: int, *, widths: Sequence[int], norm: Callable[[int], nn.Module] = group_norm
) -> nn.Sequential:
    """Blocks of two 3×3 convolutions, halved between; (features, last layer): (N, C, H, W) -> logits (N, K).

    Args:
        widths: channels of each block, multiples of 8; H and W are at least 2 to the power of (blocks - 1).
    """
    layers, inner = list[nn.Module](), channels
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(inner, width, 3, padding=1), norm(width), nn.ReLU()]
            inner = width
        layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(inner, classes))
