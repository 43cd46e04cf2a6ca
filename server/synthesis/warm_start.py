"""From private class moments to the weights that the first round starts from; post-processing, costs no privacy.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from common.images import to_unit
from common.messages import Arrays
from common.model.diffusion import DiffusionLoss, NoiseSchedule
from common.model.swin_unet import SwinUNet
from common.moments import Prior
from common.study import Study

_REPORT_EVERY = 20


def initial_weights(study: Study) -> Arrays:
    """Public initial weights, drawn from the study's seed."""
    torch.manual_seed(study.study.seed)
    return {name: p.detach().numpy().copy() for name, p in SwinUNet(study.network, study.data).named_parameters()}


def warm_start(
    study: Study, prior: Prior, shares: np.ndarray, *, on_step: Callable[[int, int], None] | None = None
) -> Arrays:
    """Train the network on samples of the prior: AdamW with a cosine rate, fresh samples each step.

    Args:
        shares: (K,), share of each class among the samples.
        on_step: called with (steps done, steps in all) now and then.

    Returns:
        float32 weights by parameter name.
    """
    config, seed = study.warm_start, study.study.seed
    net = SwinUNet(study.network, study.data)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in initial_weights(study).items()})
    loss = DiffusionLoss(
        NoiseSchedule(study.diffusion.timesteps), 1, study.diffusion.label_dropout, len(study.data.classes)
    )
    draws, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, config.learning_rate / 20)
    for step in range(1, config.steps + 1):
        batch = prior.sample(draws.choice(len(shares), config.batch_size, p=shares), draws)
        optimizer.zero_grad()
        loss(net, to_unit(batch.images), torch.from_numpy(batch.labels), generator=noise).mean().backward()
        optimizer.step()
        schedule.step()
        if on_step is not None and (step % _REPORT_EVERY == 0 or step == config.steps):
            on_step(step, config.steps)
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}
