"""From noise to images: ancestral, DDIM and DPM-Solver++ sampling.

SPDX-License-Identifier: Apache-2.0

n images, C channels, H W pixels. Notation of Lu et al. 2022: alpha = sqrt(ā), sigma = sqrt(1 - ā),
lambda = log(alpha / sigma).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.model.diffusion import NoiseSchedule
from common.study import GenerationConfig

Denoiser = Callable[[Tensor, int], Tensor]  # (x_t, t) -> predicted x_0, clamped to [-1, 1]


@torch.no_grad()
def sample(
    net: nn.Module, labels: Tensor, *, null_label: int, shape: tuple[int, int, int], schedule: NoiseSchedule,
    config: GenerationConfig, generator: torch.Generator, clip: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sample one image a label.

    Args:
        net: predictor of the velocity (`NoiseSchedule.velocity`) on (n, 1, C, H, W).
        labels: int64 (n,).
        null_label: the network's label for an image of unknown class, which guidance pushes away from.
        shape: (C, H, W).
        config: sampler, steps and guidance weight w: (1 + w)·conditional - w·unconditional (Ho and Salimans 2022).
        clip: predicted images are clamped to [-clip, clip].

    Returns:
        float32 (n, C, H, W), within [-clip, clip].
    """
    net.eval()
    spread = _even_in_lambda if config.sampler == "dpm-solver++" else _even_in_time
    times = spread(schedule, min(config.steps, schedule.timesteps))
    x = torch.randn(len(labels), *shape, generator=generator)

    def velocity(x: Tensor, t: int) -> Tensor:
        conditional = _velocity(net, x, t, labels)
        if config.guidance == 0:
            return conditional
        unconditional = _velocity(net, x, t, torch.full_like(labels, null_label))
        return (1 + config.guidance) * conditional - config.guidance * unconditional

    def denoise(x: Tensor, t: int) -> Tensor:
        a = schedule.alphas_bar[t]
        x0 = a.sqrt() * x.double() - (1 - a).sqrt() * velocity(x, t).double()
        return x0.clamp(-clip, clip).float()

    if config.sampler == "dpm-solver++":
        return _dpm_solver(x, times, schedule, denoise)
    return _ddpm_or_ddim(x, times, schedule, denoise, generator if config.sampler == "ancestral" else None)


def _even_in_time(schedule: NoiseSchedule, steps: int) -> list[int]:
    """`steps` time steps from the last to the first, evenly spread."""
    return [round(v) for v in torch.linspace(schedule.timesteps - 1, 0, steps, dtype=torch.float64).tolist()]


def _even_in_lambda(schedule: NoiseSchedule, steps: int) -> list[int]:
    """At most `steps` time steps, evenly spread in lambda, as a multistep solver wants them (Lu et al. 2022, 5).

    Spread evenly in time, the cosine schedule's last steps are so long in lambda that 20 of them gave a standard
    deviation a quarter too large on a known distribution. Below lambda = -5 nothing but noise is left to see.
    """
    lam = 0.5 * (schedule.alphas_bar.log() - (1 - schedule.alphas_bar).log())
    wanted = torch.linspace(max(-5.0, lam[-1].item()), lam[0].item(), steps, dtype=torch.float64)
    return sorted({int((lam - value).abs().argmin()) for value in wanted}, reverse=True)


def _velocity(net: nn.Module, x: Tensor, t: int, labels: Tensor) -> Tensor:
    times = torch.full((len(labels), 1), t, dtype=torch.int64)
    return net(x[:, None], times, labels[:, None])[:, 0]


def _ddpm_or_ddim(
    x: Tensor, times: list[int], schedule: NoiseSchedule, denoise: Denoiser, generator: torch.Generator | None
) -> Tensor:
    """Song et al. 2021, eq. 12 on the respaced steps: variance of DDPM with a generator, none (DDIM) without."""
    bars = schedule.alphas_bar
    for now, following in zip(times, [*times[1:], None], strict=True):
        x0 = denoise(x, now)
        if following is None:
            return x0
        a, b = bars[now], bars[following]
        noise = (x.double() - a.sqrt() * x0) / (1 - a).sqrt()
        variance = torch.zeros(()) if generator is None else (1 - b) / (1 - a) * (1 - a / b)
        x = b.sqrt() * x0 + (1 - b - variance).clamp(min=0).sqrt() * noise
        if generator is not None:
            x = x + variance.sqrt() * torch.randn(x.shape, generator=generator)
        x = x.float()
    return x


def _dpm_solver(x: Tensor, times: list[int], schedule: NoiseSchedule, denoise: Denoiser) -> Tensor:
    """DPM-Solver++(2M) in data prediction (Lu et al. 2022, algorithm 2); the last step returns the prediction."""
    alpha, sigma = schedule.alphas_bar.sqrt(), (1 - schedule.alphas_bar).sqrt()
    lam = alpha.log() - sigma.log()
    before: tuple[Tensor, Tensor] | None = None  # (prediction, step in lambda) of the step before
    for now, following in zip(times, [*times[1:], None], strict=True):
        x0 = denoise(x, now)
        if following is None:
            return x0
        h = lam[following] - lam[now]
        mixed = x0
        if before is not None:
            r = before[1] / h
            mixed = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[0]
        x = (sigma[following] / sigma[now] * x - alpha[following] * torch.expm1(-h) * mixed).float()
        before = (x0, h)
    return x
