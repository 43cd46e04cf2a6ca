"""The slow, obvious way to per-record gradients: one record at a time, by plain autograd.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from client.privacy.gradients import PrivateGradients
from common.bounded import BoundedSum
from common.model.diffusion import DiffusionLoss, Draws
from common.model.diffusion_model import DiffusionModel
from common.model.record_rule import Loss, Rows
from common.model.swin_unet import SwinBlock
from support.studies import tiny_study


def randomised_net(*, size: int, channels: int, dtype: torch.dtype, shift: bool = True) -> DiffusionModel:
    """A narrow network of the shipped class with every parameter away from zero, so that no gradient vanishes.

    With `shift` the side of the Swin blocks exceeds the window and the second block is shifted; without, windows cover
    the whole side.
    """
    torch.manual_seed(7)
    side = size // 2
    window = next(w for w in range(min(side // (1 + shift), 16), 0, -1) if side % w == 0)
    study = tiny_study(
        data={"image_size": size, "channels": channels, "classes": ["a", "b", "c"]},
        network={"width": 8, "depths": [0, 2], "heads": [1, 2], "window": window, "mlp_ratio": 1.5},
    )  # fmt: skip
    net = DiffusionModel(study).to(dtype)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.25)
    shifts = [block.shift for block in net.modules() if isinstance(block, SwinBlock)]
    assert any(shifts) == shift
    return net


def rows(records: int, *, size: int, channels: int, draws: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Pixels, labels and fixed draws of some records; every class and the null class occur."""
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(records, channels, size, size, generator=generator, dtype=dtype) * 2 - 1
    made = diffusion_loss(draws).draw(records, (channels, size, size), generator=generator, dtype=dtype)
    return x, torch.arange(records) % 3, made.sigma, made.noise, made.keep_label


def diffusion_loss(draws: int) -> DiffusionLoss:
    return DiffusionLoss(draws, 0.3, 3)


def losses(net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor, noise: Tensor, keep_label: Tensor) -> Tensor:
    """The loss of rows, (B,)."""
    return diffusion_loss(sigma.shape[1]).losses(net, x, y, Draws(sigma, noise, keep_label))


def looped_gradients(net: nn.Module, loss: Loss, made: Rows) -> dict[str, Tensor]:
    """Per-record gradients (B, *shape) of what is trained, each from its own forward and backward pass."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in trained}
    for record in range(len(made[0])):
        value = loss(net, *(r[record : record + 1] for r in made)).sum()
        gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(trained, gradients, strict=True):
            found[name].append(gradient)
    return {name: torch.stack(row) for name, row in found.items()}


def norms(gradients: dict[str, Tensor]) -> Tensor:
    """L2 norm of each record's whole gradient (B,), float64."""
    return torch.stack([g.double().flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()


def clipped_loop(gradients: dict[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """The sum over records of the loop's gradients, each clipped a billionth below `max_grad_norm`, as we do."""
    factors = (max_grad_norm / (1 + 1e-9) / norms(gradients)).clamp(max=1.0)
    return {name: torch.tensordot(factors, g.double(), dims=1) for name, g in gradients.items()}


class _OwnPlaces(np.random.Generator):
    """Places that belong to the records: number n is always at n · 7 + 3, whoever else is there."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))
        self.numbers = np.zeros(0, dtype=np.int64)

    def integers(self, low, high=None, size=None, **_):  # pyright: ignore
        assert size == len(self.numbers)
        return (7 * self.numbers + 3) % high


class Engine:
    """`PrivateGradients` on rows whose draws and places belong to the records, so that sums can be compared.

    A step draws both afresh; being private for every such draw, it is private (`client/privacy/places.py`).
    """

    def __init__(
        self, net: nn.Module, loss: Loss, *, max_grad_norm: float, physical_batch: int, loss_part: bool = False
    ):
        self._padded: Rows = ()
        self._places = _OwnPlaces()
        self.gradients = PrivateGradients(
            net, loss, self._draw, max_grad_norm=max_grad_norm, physical_batch=physical_batch, loss_part=loss_part
        )
        self.gradients._choice = self._places

    def _draw(self, _: Tensor, numbers: Tensor) -> Rows:
        """The rows of the records with these numbers, from 1; 0 is nobody."""
        return tuple(r[numbers] for r in self._padded)

    def sum(self, made: Rows, kept: list[int] | None = None) -> BoundedSum:
        """Over the records `kept` of `made`; by default over all."""
        numbers = np.arange(len(made[1])) if kept is None else np.array(kept, dtype=np.int64)
        self._padded = tuple(torch.cat([r.new_zeros(1, *r.shape[1:]), r]) for r in made)
        self._places.numbers = numbers
        return self.gradients.clipped_sum(np.zeros((len(numbers), 1), dtype=np.float32), numbers + 1)


def flat(total: BoundedSum) -> Tensor:
    return torch.cat([total.parts[name].flatten() for name in sorted(total.parts)])
