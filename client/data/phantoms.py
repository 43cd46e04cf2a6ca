"""A site's phantoms (`common/phantoms.py`), for trying the software where no real image may go.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, P patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from client.data.splits import ShardSettings, Splits, class_shares, quotas
from common.errors import DataError
from common.images import ImageSet
from common.phantoms import MODALITIES, draw_biomarkers, paint
from common.study import DataConfig, Modality


class PhantomConfig(ShardSettings):
    """Drawn images instead of real ones; each `shard_index` is another hospital with its own scanner and patients."""

    source: Literal["phantoms"]
    modality: Modality
    records: int = Field(default=600, ge=20, le=100_000)


@dataclass(frozen=True)
class Biomarkers:
    """The truth about each phantom; row i is image i of train, then of the holdout.

    Attributes:
        count: int64, shape (N,), marks in the picture (opacities, lesions, or nuclei).
        size: float64, shape (N,), radius of a mark, px (0 where there are none).
        presence: bool, shape (N,), whether the class is any but the first.
    """

    count: NDArray[np.int64]
    size: NDArray[np.float64]
    presence: NDArray[np.bool_]


def draw_phantoms(config: PhantomConfig, schema: DataConfig) -> tuple[Splits, Biomarkers]:
    """Draw one site's phantoms: the same `config` gives the same bytes.

    About a quarter of each class's patients are the holdout. A patient has one to three images: the same anatomy and
    biomarker, another pose and other noise. Sites differ in gain, noise and, by `label_skew`, class mix.

    Raises:
        DataError: a size outside 16 to 128 px, or fewer than four records a class.
    """
    classes, size = len(schema.classes), schema.image_size
    if not 16 <= size <= 128:
        raise DataError(
            f"phantoms of {size} px cannot be drawn", where="data: image_size", remedy="Choose 16 to 128 px."
        )
    if config.records < 4 * classes:
        raise DataError(
            f"{config.records} phantoms are too few for {classes} classes",
            where="data: records",
            remedy=f"Ask for at least {4 * classes}.",
        )
    rng = np.random.default_rng([config.seed, config.shard_index, MODALITIES.index(config.modality)])
    patient_class, patient_of, in_holdout = _draw_cohort(config, classes, rng)
    count, radius = draw_biomarkers(config.modality, patient_class, classes, rng)
    labels = patient_class[patient_of]
    images = paint(config.modality, schema, count[patient_of], radius[patient_of], patient_of, rng)

    order = rng.permutation(len(labels))
    train, holdout = order[~in_holdout[patient_of[order]]], order[in_holdout[patient_of[order]]]
    everything = ImageSet(images, labels, patient_of + 1_000_000 * config.shard_index)
    both = np.concatenate([train, holdout])
    shown = count[patient_of[both]]
    truth = Biomarkers(
        count=shown,
        size=np.where(shown > 0, radius[patient_of[both]] * size / 2, 0.0),
        presence=labels[both] > 0,
    )
    return Splits(everything.select(train), everything.select(holdout), phantom=True), truth


def _draw_cohort(
    config: PhantomConfig, classes: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Class of each patient (P,), patient of each image (N,), and whether a patient is in the holdout (P,)."""
    mix = class_shares(classes, config.shard_count, config.label_skew)[:, config.shard_index]
    total = max(3 * classes, config.records // 2)
    per_class = 3 + quotas(total - 3 * classes, mix / mix.sum())
    patient_class = np.repeat(np.arange(classes), per_class)
    rank = np.concatenate([np.arange(n) for n in per_class])
    in_holdout = rank % 4 == 1
    extra = np.repeat(np.arange(total), 2)  # two more images each at most: three in all
    more = rng.choice(extra, size=config.records - total, replace=False)
    return patient_class, np.sort(np.concatenate([np.arange(total), more])), in_holdout
