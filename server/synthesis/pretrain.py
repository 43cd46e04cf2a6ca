"""The network's public start: trained on public images of the study's kind; reads nothing of any site.

SPDX-License-Identifier: Apache-2.0

What it learns is to see in what images of this kind differ from the Gaussian of the same moments: edges, flat areas,
saturation. So it is trained beside the public images' own Gaussian, and later stands beside that of private moments.
How real images differ from theirs is not for public ones to say: the last layer, which draws the differences, is set
to zero again, so that training at the sites begins at their own Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.errors import SynthwardError
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.images import ImageSet, Units, to_unit
from common.model.diffusion import DiffusionLoss, NoiseSchedule
from common.model.diffusion_model import initial_weights, load_model, space_of, with_prior
from common.moments import class_means, class_sums, spread_sums
from common.prior import Prior
from common.protocol import Arrays
from common.study import Study
from server.synthesis.public_set import public_images

_REPORT_EVERY = 20


def pretrained(study: Study, file: Path, *, on_step: Callable[[int, int], None] | None = None) -> Arrays:
    """Weights after `pretrain.steps` steps of AdamW with a cosine rate; kept in `file`, and taken from there.

    Args:
        on_step: called with (steps done, steps in all) now and then.

    Raises:
        DataError: as `public_images` does.
    """
    try:
        weights = unpack_arrays(file.read_bytes(), where=str(file))
        load_model(study, weights)
        return weights
    except (OSError, SynthwardError):
        pass  # not there, or cut off: made anew
    config, seed = study.pretrain, study.study.seed
    images = public_images(study)
    model = load_model(study, with_prior(initial_weights(study), exact_prior(study, images)))
    net, x, y = model, to_unit(images.images), torch.from_numpy(images.labels)
    loss = DiffusionLoss(
        NoiseSchedule(study.diffusion.timesteps), 1, study.diffusion.label_dropout, len(study.data.classes),
        weighting=study.diffusion.weighting, steps=study.network_steps,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.swin.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, config.learning_rate / 20)
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(y), (config.batch_size,), generator=noise)
        optimizer.zero_grad()
        loss(net, x[rows], y[rows], generator=noise).mean().backward()
        optimizer.step()
        schedule.step()
        if on_step is not None and (step % _REPORT_EVERY == 0 or step == config.steps):
            on_step(step, config.steps)
    weights = {
        name: np.zeros_like(array) if name.startswith("swin.head.") else array
        for name, array in model.weights().items()
    }
    atomic_write(file, pack_arrays(weights))
    return weights


def exact_prior(study: Study, images: ImageSet) -> Prior:
    """The Gaussian of public images, without noise."""
    space, units, classes = space_of(study), Units.of(images, "image"), len(study.data.classes)
    sums = class_sums(units, classes, space).parts["means"].numpy()
    counts = np.bincount(images.labels, minlength=classes).astype(np.float64)
    spread = spread_sums(units, class_means(sums, counts, space, noise_std=0.0), space).parts
    second_moments, power, norm = (spread[name].numpy() for name in ("second_moments", "band_power", "norm"))
    return Prior.fit(space, sums, second_moments, power, norm, counts, noise_std=0.0)
