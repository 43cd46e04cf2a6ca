"""A site's images from one .npz file in the MedMNIST layout (`common/npz.py`).

SPDX-License-Identifier: Apache-2.0

The train partition trains and the test partition is the holdout. The val partition, where there is one, is never
read: it is kept for choosing settings outside a study, so that neither training nor judging has seen it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from client.data.splits import ShardSettings, Splits, take_shard
from common.errors import DataError
from common.images import ImageSet
from common.npz import opened, read_partition
from common.study import DataConfig


class NpzConfig(ShardSettings):
    """One .npz file; with `shard_count` above 1, one simulated hospital's part of it."""

    source: Literal["npz"]
    path: Path


def read_npz(config: NpzConfig, schema: DataConfig) -> Splits:
    """Read the file, check every array, and return this site's shard of both partitions.

    Raises:
        DataError: with ``file: key`` as the place, for a file that is missing, spoilt or not an .npz; pickled
            objects; a missing key; a wrong type, shape or size; labels outside the classes; arrays of different
            length; an empty partition; a patient in both partitions.
    """
    path = config.path.expanduser()
    with opened(path) as archive:
        train, holdout = (read_partition(archive, part, path, schema) for part in ("train", "test"))
    _refuse_shared_patients(train, holdout, path)
    splits = take_shard(train, holdout, config, classes=len(schema.classes))
    for part, images in (("train", splits.train), ("test", splits.holdout)):
        if not len(images):
            raise DataError(
                f"no record is left for shard {config.shard_index} of {config.shard_count}",
                where=f"{path}: {part}_images",
                remedy="Use fewer shards or a larger file.",
            )
    return splits


def _refuse_shared_patients(train: ImageSet, holdout: ImageSet, path: Path) -> None:
    if train.patients is None or holdout.patients is None:
        return
    shared = np.intersect1d(train.patients, holdout.patients)
    if len(shared):
        raise DataError(
            f"patient {int(shared[0])} is in both train and test ({len(shared)} patient(s) in all)",
            where=f"{path}: test_groups",
            remedy="Split by patient, so that the holdout is new to the model.",
        )
