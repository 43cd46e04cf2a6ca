"""From noise to images: DPM-Solver++, Heun and ancestral sampling over EDM's noise levels.

SPDX-License-Identifier: Apache-2.0

n images, C channels, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.model.diffusion_model import DiffusionModel
from common.study import GenerationConfig

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
_RHO = 7.0  # Karras et al. 2022, eq. 5
_Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> clean image within [-1, 1]


@torch.no_grad()
def sample(
    model: DiffusionModel, labels: Tensor, *, null_label: int, shape: tuple[int, int, int], config: GenerationConfig,
    seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    """Sample one image for each label.

    Args:
        labels: int64 (n,).
        null_label: the label of an image of unknown class, which guidance pushes away from.
        shape: (C, S, S).
        config: sampler, steps and guidance weight w: (1 + w)·conditional - w·unconditional (Ho and Salimans 2022).
        seeds: of each image, whose noise does not depend on the batch that it is drawn in.

    Returns:
        float32 (n, C, S, S), within [-1, 1].
    """
    model.eval()
    chances = [torch.Generator().manual_seed(seed) for seed in seeds]
    levels = noise_levels(config.steps)
    x = levels[0] * _noise(chances, shape)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(labels),), sigma)
        clean = model.denoised(x, level, labels)
        if config.guidance > 0:
            blind = model.denoised(x, level, torch.full_like(labels, null_label))
            clean = (1 + config.guidance) * clean - config.guidance * blind
        return clean.clamp(-1.0, 1.0)

    if config.sampler == "dpm-solver++":
        return _dpm_solver(x, levels, denoise)
    if config.sampler == "heun":
        return _heun(x, levels, denoise)
    return _ancestral(x, levels, denoise, lambda: _noise(chances, shape))


def noise_levels(steps: int) -> list[float]:
    """`steps` noise levels from SIGMA_MAX down to SIGMA_MIN (Karras et al. 2022, eq. 5)."""
    ends = np.array([SIGMA_MAX, SIGMA_MIN]) ** (1 / _RHO)
    levels: list[float] = (np.linspace(ends[0], ends[1], steps) ** _RHO).tolist()
    return levels


def _noise(chances: list[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    return torch.stack([torch.randn(*shape, generator=chance) for chance in chances])


def _dpm_solver(x: Tensor, levels: list[float], denoise: _Denoise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) for x_0 + sigma n; the last step returns the prediction."""
    before: tuple[Tensor, float] | None = None  # (prediction, step in log(1 / sigma)) of the step before
    for now, following in zip(levels, levels[1:], strict=False):
        clean, h = denoise(x, now), float(np.log(now / following))
        mixed = clean
        if before is not None:
            r = before[1] / h
            mixed = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * before[0]
        x = following / now * x + (1 - following / now) * mixed
        before = (clean, h)
    return denoise(x, levels[-1])


def _heun(x: Tensor, levels: list[float], denoise: _Denoise) -> Tensor:
    """Heun's second order (Karras et al. 2022, algorithm 1), two evaluations a step."""
    for now, following in zip(levels, levels[1:], strict=False):
        slope = (x - denoise(x, now)) / now
        guess = x + (following - now) * slope
        x = x + (following - now) * (slope + (guess - denoise(guess, following)) / following) / 2
    return denoise(x, levels[-1])


def _ancestral(x: Tensor, levels: list[float], denoise: _Denoise, noise: Callable[[], Tensor]) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020, algorithm 2), in these units: the posterior of the next level."""
    for now, following in zip(levels, levels[1:], strict=False):
        share = (following / now) ** 2
        x = share * x + (1 - share) * denoise(x, now) + following * (1 - share) ** 0.5 * noise()
    return denoise(x, levels[-1])
