"""Preconditioning, noise levels and training loss of the diffusion model (Karras et al. 2022, "EDM").

SPDX-License-Identifier: Apache-2.0

B records, K noise draws a record, R = B·K rows, C channels, S pixels a side. An image x_0 in [-1, 1] is seen as
x_0 + sigma · n. It is the DDPM of Ho et al. 2020 in other units: x_t = sqrt(ā)(x_0 + sigma n), sigma² = (1 - ā) / ā.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.study import Study

SIGMA_DATA = 0.5  # standard deviation of a pixel in [-1, 1], about
_P_MEAN, _P_STD = -1.2, 1.2  # of log(sigma) in training (table 1)


@dataclass(frozen=True)
class Preconditioning:
    """How a network's answer F becomes a clean image: c_skip x + c_out F(c_in x), table 1 of the paper.

    With F = 0 it is the best linear guess for pixels of standard deviation SIGMA_DATA.

    Attributes:
        skip, out, into: (R, 1, 1, 1).
    """

    skip: Tensor
    out: Tensor
    into: Tensor

    @classmethod
    def at(cls, sigma: Tensor) -> Preconditioning:
        """For noise levels (R,)."""
        sigma = sigma[:, None, None, None]
        whole = sigma.square() + SIGMA_DATA**2
        return cls(SIGMA_DATA**2 / whole, sigma * SIGMA_DATA * whole.rsqrt(), whole.rsqrt())


@dataclass(frozen=True)
class Draws:
    """The randomness of one loss.

    Attributes:
        sigma: (B, K).
        noise: (B, K, C, S, S), standard normal.
        keep_label: (B, K) bool; False trains the null class.
    """

    sigma: Tensor
    noise: Tensor
    keep_label: Tensor


class DiffusionLoss:
    """One loss a record: the mean over K draws of EDM's weighted squared error (eq. 8), about 1 for no network.

    Draws are averaged *before* clipping (noise multiplicity, Dockhorn et al. 2022, eq. 6), so that a record counts once
    however many draws it has. Records do not interact. Where a record is a patient, draws range over its images.

    Args:
        noise_multiplicity: K.
        label_dropout: probability of training a draw on the null class (Ho and Salimans 2022).
        null_class: index of the null class.
    """

    def __init__(self, noise_multiplicity: int, label_dropout: float, null_class: int) -> None:
        self.draws_per_record, self.label_dropout, self.null_class = noise_multiplicity, label_dropout, null_class

    def draw(self, records: int, shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype) -> Draws:
        """Fresh draws for `records` images of `shape` (C, S, S)."""
        k = self.draws_per_record
        return Draws(
            sigma=(torch.randn(records, k, generator=generator, dtype=dtype) * _P_STD + _P_MEAN).exp(),
            noise=torch.randn(records, k, *shape, generator=generator, dtype=dtype),
            keep_label=torch.rand(records, k, generator=generator) >= self.label_dropout,
        )

    def losses(self, model: nn.Module, x0: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """x0 (B, C, S, S) and y (B,), or (B, K, C, S, S) and (B, K), an image a draw -> (B,)."""
        b, k = draws.sigma.shape
        x0, y = (x0, y) if y.dim() == 2 else (x0[:, None], y[:, None])
        x0, sigma = x0.expand_as(draws.noise).flatten(0, 1), draws.sigma.flatten()
        labels = torch.where(draws.keep_label, y, self.null_class).flatten()
        noisy, by = x0 + sigma[:, None, None, None] * draws.noise.flatten(0, 1), Preconditioning.at(sigma)
        wanted = (x0 - by.skip * noisy) / by.out  # λ ‖D - x_0‖² is ‖F - wanted‖²
        return (model(noisy, sigma, labels) - wanted).square().flatten(1).mean(dim=1).view(b, k).mean(dim=1)


def record_loss(
    study: Study, generator: torch.Generator
) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """The study's loss as `common/model/record_rule.py` wants it: (loss of a network and rows, what makes the rows).

    Rows are pixels, labels and the tensors of `Draws`, each (B, ...), so that the loss itself has no randomness.
    """
    diffusion = study.diffusion
    loss = DiffusionLoss(diffusion.noise_multiplicity, diffusion.label_dropout, len(study.data.classes))

    def draw(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        made = loss.draw(len(y), tuple(x.shape[-3:]), generator=generator, dtype=x.dtype)
        return x, y, made.sigma, made.noise, made.keep_label

    def losses(net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor, noise: Tensor, keep_label: Tensor) -> Tensor:
        return loss.losses(net, x, y, Draws(sigma, noise, keep_label))

    return losses, draw
