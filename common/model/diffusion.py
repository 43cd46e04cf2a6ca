"""Noise schedule and training loss of the diffusion model.

SPDX-License-Identifier: Apache-2.0

B records, K noise draws a record, C channels, H W pixels; t from 0 (nearly clean) to timesteps - 1 (noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from common.study import Study

MIN_SNR = 5.0  # as its authors advise


class NoiseSchedule:
    """Cosine schedule (Nichol and Dhariwal 2021, eq. 17).

    Attributes:
        alphas_bar: float64 (timesteps,), share of the signal's power left at t, falling from nearly 1 to nearly 0.
    """

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps
        s = 0.008
        grid = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((grid + s) / (1 + s) * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.alphas_bar = torch.cumprod(1 - betas, dim=0)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(ā) x0 + sqrt(1 - ā) noise (Ho et al. 2020, eq. 4); t broadcasts over the trailing axes."""
        a = self.alphas_bar[t].view(*t.shape, *[1] * (noise.dim() - t.dim()))
        return (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(noise.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(ā) noise - sqrt(1 - ā) x0 (Salimans and Ho 2022): what the network predicts.

        It says the same as the noise, x0 = sqrt(ā) x_t - sqrt(1 - ā) v, but an error of the network is not divided by
        sqrt(ā): predicting the noise itself, the nearly blind first steps of a sampler ruin the brightness of an image
        unless the network is trained far longer than noisy gradients allow.
        """
        a = self.alphas_bar[t].view(*t.shape, *[1] * (noise.dim() - t.dim()))
        return (a.sqrt() * noise - (1 - a).sqrt() * x0).to(noise.dtype)


@dataclass(frozen=True)
class Draws:
    """The randomness of one loss.

    Attributes:
        t: (B, K) int64.
        noise: (B, K, C, H, W).
        keep_label: (B, K) bool; False trains the null class.
    """

    t: Tensor
    noise: Tensor
    keep_label: Tensor


class DiffusionLoss:
    """One loss a record: the mean over K draws of the squared error of the predicted velocity.

    Ho et al. 2020, eq. 14, weighted as Salimans and Ho 2022 (v-prediction), with the noise multiplicity of Dockhorn et
    al. 2022 (eq. 6): the draws are averaged *before* clipping, so that a record counts once however many draws it has.
    Records do not interact. Where a record is a patient, the draws range over that patient's images.

    Args:
        noise_multiplicity: K.
        weighting: "velocity", or "min-snr": times min(SNR, 5) / (SNR + 1), SNR = ā / (1 - ā), so that the nearly clean
            steps, whose velocity is nearly all noise, do not outweigh the rest (Hang et al. 2023, eq. 7, for velocity).
        label_dropout: probability of training a draw on the null class (Ho and Salimans 2022).
        null_class: index of the null class.
        steps: time steps are drawn from 0 … steps - 1; by default from all.
    """

    def __init__(
        self, schedule: NoiseSchedule, noise_multiplicity: int, label_dropout: float, null_class: int, *,
        weighting: Literal["velocity", "min-snr"] = "velocity", steps: int | None = None,
    ) -> None:  # fmt: skip
        self.weighting, self.steps = weighting, steps or schedule.timesteps
        self.schedule, self.draws_per_record = schedule, noise_multiplicity
        self.label_dropout, self.null_class = label_dropout, null_class

    def draw(self, records: int, shape: tuple[int, ...], *, generator: torch.Generator, dtype: torch.dtype) -> Draws:
        """Fresh draws for `records` images of `shape` (C, H, W)."""
        k = self.draws_per_record
        return Draws(
            t=torch.randint(self.steps, (records, k), generator=generator),
            noise=torch.randn(records, k, *shape, generator=generator, dtype=dtype),
            keep_label=torch.rand(records, k, generator=generator) >= self.label_dropout,
        )

    def losses(self, net: nn.Module, x0: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """x0 (B, C, H, W) in [-1, 1] and y (B,), or (B, K, C, H, W) and (B, K), an image a draw -> (B,)."""
        x0, y = (x0, y) if y.dim() == 2 else (x0[:, None], y[:, None])
        noisy = self.schedule.add_noise(x0, draws.noise, draws.t)
        labels = torch.where(draws.keep_label, y, self.null_class)
        wanted = self.schedule.velocity(x0, draws.noise, draws.t)
        squares = (net(noisy, draws.t, labels) - wanted).square().flatten(2).mean(dim=2)
        if self.weighting == "min-snr":
            a = self.schedule.alphas_bar[draws.t]
            squares = squares * ((a / (1 - a)).clamp(max=MIN_SNR) * (1 - a)).to(squares.dtype)
        return squares.mean(dim=1)

    def __call__(self, net: nn.Module, x0: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """`losses` with fresh draws."""
        draws = self.draw(len(y), tuple(x0.shape[-3:]), generator=generator, dtype=x0.dtype)
        return self.losses(net, x0, y, draws)


def record_loss(
    study: Study, generator: torch.Generator
) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """The study's loss as `common/model/record_rule.py` wants it: (loss of a network and rows, what makes the rows).

    Rows are pixels, labels and the tensors of `Draws`, each (B, ...), so that the loss itself has no randomness.
    """
    diffusion = study.diffusion
    loss = DiffusionLoss(
        NoiseSchedule(diffusion.timesteps), diffusion.noise_multiplicity, diffusion.label_dropout,
        len(study.data.classes), weighting=diffusion.weighting, steps=study.network_steps,
    )  # fmt: skip

    def draw(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        made = loss.draw(len(y), tuple(x.shape[-3:]), generator=generator, dtype=x.dtype)
        return x, y, made.t, made.noise, made.keep_label

    def losses(net: nn.Module, x: Tensor, y: Tensor, t: Tensor, noise: Tensor, keep_label: Tensor) -> Tensor:
        return loss.losses(net, x, y, Draws(t, noise, keep_label))

    return losses, draw
