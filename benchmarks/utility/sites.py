"""The real images of the simulated sites, dealt exactly as the run dealt them; and the split that no run reads.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

from client.data.npz import NpzConfig, read_npz
from client.data.splits import Splits
from common.images import ImageSet
from common.npz import opened, read_partition
from common.study import DataConfig, Study


def site_config(study: Study, data: Path, index: int) -> NpzConfig:
    """What `synthward run` writes into the file of site `index` (from 0); a unit test holds the two together."""
    return NpzConfig(
        source="npz", path=data.resolve(), shard_index=index, shard_count=study.simulation.sites,
        label_skew=study.simulation.label_skew, seed=study.study.seed,
    )  # fmt: skip


def site_splits(study: Study, data: Path) -> list[Splits]:
    """Training and held-out images of every simulated site.

    Raises:
        DataError: as `read_npz` does.
    """
    return [read_npz(site_config(study, data, index), study.data) for index in range(study.simulation.sites)]


def whole(data: Path, schema: DataConfig) -> Splits:
    """All training and all held-out images of the file."""
    return read_npz(NpzConfig(source="npz", path=data), schema)


def validation_split(data: Path, schema: DataConfig) -> ImageSet:
    """The file's val partition: what settings are chosen on, since the test partition is for the report alone.

    Raises:
        DataError: it is missing or does not fit the study.
    """
    return _read(data, "val", schema)


def synthetic_set(file: Path, schema: DataConfig) -> ImageSet:
    """The released images of a run.

    Raises:
        DataError: missing, damaged, or of another study.
    """
    return _read(file, "train", schema)


def _read(file: Path, part: str, schema: DataConfig) -> ImageSet:
    with opened(file) as archive:
        return read_partition(archive, part, file, schema)
