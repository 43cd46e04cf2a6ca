"""Whether a site's images can take part in the study, told so that the hospital can act on it.

SPDX-License-Identifier: Apache-2.0

Everything here stays at the site: exact counts are not released, only read by the people who own the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.data.splits import Splits
from common.errors import DataError
from common.images import ImageSet
from common.study import DataConfig

_IMBALANCE = 10  # largest over smallest class; beyond it a noisy class count says little about the smallest


@dataclass(frozen=True)
class SiteReport:
    """What `check_splits` found; exact numbers, so for the site's own eyes.

    Attributes:
        train_counts: images of each class in the train partition, in class order.
        holdout_counts: the same for the holdout.
        patients_train: number of patients in train, or None where patients are unknown.
        duplicates: holdout images of which an exact copy is in train.
        warnings: one line each; the study can go on.
    """

    train_counts: tuple[int, ...]
    holdout_counts: tuple[int, ...]
    patients_train: int | None
    duplicates: int
    warnings: tuple[str, ...]


def check_splits(splits: Splits, schema: DataConfig, *, where: str, min_per_class: int = 2) -> SiteReport:
    """Count classes, patients, copies and blank images; refuse what cannot train or be judged.

    Args:
        splits: the site's partitions.
        schema: image size, channels and classes of the study.
        where: name of the source, for messages.
        min_per_class: fewest train images of each class.

    Raises:
        DataError: images or labels do not fit `schema`; fewer train images than `min_per_class` for each class
            together; a class with fewer than `min_per_class` train images; a class that the holdout lacks.
    """
    for part, images in (("train", splits.train), ("holdout", splits.holdout)):
        _check_schema(images, schema, f"{where}: {part}")
    classes = len(schema.classes)
    train = np.bincount(splits.train.labels, minlength=classes)
    holdout = np.bincount(splits.holdout.labels, minlength=classes)
    _check_train(train, schema, f"{where}: train", min_per_class)
    if (holdout == 0).any():
        name = schema.classes[int(np.flatnonzero(holdout == 0)[0])]
        raise DataError(
            f"no image of class '{name}'",
            where=f"{where}: holdout",
            remedy=f"Put at least one patient with '{name}' in the holdout.",
        )
    duplicates = _count_duplicates(splits)
    patients = splits.train.patients
    return SiteReport(
        train_counts=tuple(int(n) for n in train),
        holdout_counts=tuple(int(n) for n in holdout),
        patients_train=None if patients is None else len(np.unique(patients)),
        duplicates=duplicates,
        warnings=_warnings(train, schema, duplicates),
    )


def _check_schema(images: ImageSet, schema: DataConfig, where: str) -> None:
    expected = (schema.channels, schema.image_size, schema.image_size)
    if images.images.dtype != np.uint8 or images.images.shape[1:] != expected:
        raise DataError(
            f"images are {images.images.dtype} {images.images.shape[1:]}, the study has uint8 {expected}",
            where=where,
            remedy="Convert the images.",
        )
    if len(images) and not 0 <= int(images.labels.min()) <= int(images.labels.max()) < len(schema.classes):
        raise DataError(
            f"a label is outside 0 to {len(schema.classes) - 1}",
            where=where,
            remedy="Number the classes from 0 in the study's order.",
        )


def _check_train(counts: NDArray[np.int64], schema: DataConfig, where: str, least: int) -> None:
    for name, count in zip(schema.classes, counts.tolist(), strict=True):
        if count == 0 and counts.sum():
            raise DataError(
                f"no image of class '{name}'",
                where=where,
                remedy=f"Add images of '{name}', or leave this site out of the study.",
            )
    total, needed = int(counts.sum()), least * len(schema.classes)
    if total < needed:
        raise DataError(
            f"{total} images are too few for {len(schema.classes)} classes (at least {needed})",
            where=where,
            remedy="Add images, or leave this site out of the study.",
        )
    for name, count in zip(schema.classes, counts.tolist(), strict=True):
        if count < least:
            raise DataError(
                f"class '{name}' has only {count} image{'' if count == 1 else 's'} (at least {least})",
                where=where,
                remedy=f"Add images of '{name}', or leave this site out of the study.",
            )


def _count_duplicates(splits: Splits) -> int:
    seen = {image.tobytes() for image in splits.train.images}
    return sum(image.tobytes() in seen for image in splits.holdout.images)


def _warnings(train: NDArray[np.int64], schema: DataConfig, duplicates: int) -> tuple[str, ...]:
    lines: list[str] = []
    if duplicates:
        lines.append(
            f"{duplicates} holdout image(s) are also in train: `approve` refuses that; leave each out of one of the two"
        )
    most, fewest = int(train.argmax()), int(train.argmin())
    if train[most] > _IMBALANCE * train[fewest]:
        lines.append(
            f"class '{schema.classes[most]}' has {train[most] / train[fewest]:.0f} times as many images as "
            f"'{schema.classes[fewest]}': the rare class will be learned worst"
        )
    return tuple(lines)
