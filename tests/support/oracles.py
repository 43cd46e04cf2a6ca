"""The slow, obvious way to per-record gradients: one record at a time, by plain autograd.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.model.diffusion import DiffusionLoss, Draws, NoiseSchedule
from common.model.swin_unet import SwinUNet
from common.study import DataConfig, NetworkConfig


def randomised_net(*, size: int, channels: int, patch: int, dtype: torch.dtype, shift: bool = True) -> SwinUNet:
    """A narrow network of the shipped class with every parameter away from zero, so that no gradient vanishes.

    With `shift` the token side exceeds the window and the second block of a level is shifted; without, windows cover
    the whole side.
    """
    torch.manual_seed(7)
    tokens = size // patch
    network = NetworkConfig(
        patch_size=patch, width=8, depths=(2, 1), heads=(2, 2), window=tokens // 2 if shift else tokens, mlp_ratio=1.5
    )
    data = DataConfig(image_size=size, channels=channels, classes=("a", "b", "c"))
    net = SwinUNet(network, data).to(dtype)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.25)
    shifts = [block.shift for stage in net.down for block in stage]  # pyright: ignore
    assert any(shifts) == shift
    return net


def batch(records: int, *, size: int, channels: int, draws: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Draws]:
    """Images, labels and fixed draws; every class and the null class occur."""
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(records, channels, size, size, generator=generator, dtype=dtype) * 2 - 1
    y = torch.arange(records) % 3
    made = diffusion_loss(draws).draw(records, (channels, size, size), generator=generator, dtype=dtype)
    return x, y, made


def diffusion_loss(draws: int) -> DiffusionLoss:
    return DiffusionLoss(NoiseSchedule(50), draws, 0.3, 3)


def one(draws: Draws, record: int) -> Draws:
    """The draws of a single record."""
    part = slice(record, record + 1)
    return Draws(draws.t[part], draws.noise[part], draws.keep_label[part])


def looped_gradients(net: SwinUNet, x: Tensor, y: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Per-record gradients (B, *parameter shape), each from its own forward and backward pass."""
    names = [name for name, _ in net.named_parameters()]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for record in range(len(y)):
        loss = diffusion_loss(draws.t.shape[1]).losses(net, x[record : record + 1], y[record : record + 1],
                                                       one(draws, record))  # fmt: skip
        gradients = torch.autograd.grad(loss.sum(), list(net.parameters()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(names, gradients, strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(row) for name, row in rows.items()}


def norms(gradients: dict[str, Tensor]) -> Tensor:
    """L2 norm of each record's whole gradient (B,)."""
    return torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()
