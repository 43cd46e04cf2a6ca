"""From weights to a labelled synthetic image set, in batches that survive a stop.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.files import SPOILT, atomic_write
from common.images import ImageSet, to_uint8
from common.model.diffusion_model import load_model
from common.model.samplers import sample
from common.protocol import Arrays
from common.study import Study


def planned_labels(counts: Sequence[float], images: int, *, seed: int) -> NDArray[np.int64]:
    """Labels of the set, in proportion to the private class counts, at least one of each class, shuffled.

    Args:
        counts: noisy count of each class over all sites; negative ones count as zero.
        images: how many labels; at least the number of classes.
    """
    shares = np.maximum(np.asarray(counts, dtype=np.float64), 0.0)
    shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(shares), 1 / len(shares))
    numbers = np.maximum(1, np.floor(shares * images)).astype(np.int64)
    while numbers.sum() > images:
        numbers[int(numbers.argmax())] -= 1
    while numbers.sum() < images:
        numbers[int((shares * images - numbers).argmax())] += 1
    labels = np.repeat(np.arange(len(shares), dtype=np.int64), numbers)
    np.random.default_rng(seed).shuffle(labels)
    return labels


def generate(
    study: Study, weights: Arrays, labels: NDArray[np.int64], folder: Path, *,
    on_batch: Callable[[int, int], None] | None = None,
) -> ImageSet:  # fmt: skip
    """Sample one image for each label.

    Each image has its own seed, and each batch its own file in `folder`, so a stop loses at most one batch, and a
    resumed run gives the same set as an unbroken one of the same weights.

    Args:
        weights: the moving average, float32 by parameter name.
        labels: int64 (N,).
        on_batch: called with (images done, images in all) after each batch.

    Returns:
        uint8 images (N, C, H, W) with their labels; no patients, for there are none.
    """
    model = load_model(study, weights)
    shape = (study.data.channels, study.data.image_size, study.data.image_size)
    size = study.generation.batch_size
    parts: list[NDArray[np.uint8]] = []
    for number, start in enumerate(range(0, len(labels), size)):
        wanted = labels[start : start + size]
        file = folder / f"batch-{number:05d}.npz"
        part = _kept(file, wanted, shape)
        if part is None:
            seeds = [study.study.seed * 1_000_003 + position for position in range(start, start + len(wanted))]
            drawn = sample(
                model, torch.from_numpy(wanted), null_label=len(study.data.classes), shape=shape,
                config=study.generation, seeds=seeds,
            )  # fmt: skip
            part = to_uint8(drawn)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, images=part, labels=wanted)
            atomic_write(file, buffer.getvalue())
        parts.append(part)
        if on_batch is not None:
            on_batch(min(start + size, len(labels)), len(labels))
    return ImageSet(np.concatenate(parts), labels)


def _kept(file: Path, labels: NDArray[np.int64], shape: tuple[int, int, int]) -> NDArray[np.uint8] | None:
    """A finished batch, when it is whole and was made for these labels."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            images, stored = kept["images"], kept["labels"]
    except (*SPOILT, KeyError):
        return None
    whole = images.dtype == np.uint8 and images.shape == (len(labels), *shape) and np.array_equal(stored, labels)
    return images if whole else None
