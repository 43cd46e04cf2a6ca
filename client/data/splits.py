"""A site's two partitions, and how one file is dealt out to simulated hospitals.

SPDX-License-Identifier: Apache-2.0

Shapes: N records, U units (a patient, or a record where patients are unknown), C classes, S shards (sites).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.images import ImageSet
from common.settings import Settings

_SKEW_SHARPNESS = 2.0  # at 2 the smallest share stays above 0.03 / S, so no class vanishes by design
_TRAIN, _HOLDOUT = 1, 2


class ShardSettings(Settings):
    """Which simulated hospital this is; the defaults are one real hospital that owns the whole source."""

    shard_index: int = Field(default=0, ge=0, le=63)
    shard_count: int = Field(default=1, ge=1, le=64)
    label_skew: float = Field(
        default=0.0, ge=0, le=1, description="0 = same class mix at every site, 1 = strongly different"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_of_them(self) -> ShardSettings:
        if self.shard_index >= self.shard_count:
            raise ValueError(f"shard_index: {self.shard_index} is not below shard_count {self.shard_count}")
        return self


@dataclass(frozen=True)
class Splits:
    """What a site holds: images to train on, and images that only ever judge.

    Attributes:
        train: the train partition.
        holdout: the holdout partition; no patient of it is in `train`.
        phantom: True where no image shows a real person.
    """

    train: ImageSet
    holdout: ImageSet
    phantom: bool


def class_shares(classes: int, shard_count: int, label_skew: float) -> NDArray[np.float64]:
    """Share of each class that each shard gets: shape (C, S), rows sum to 1, all entries > 0.

    Classes and shards stand on one circle; a class falls to the shards near it (a von Mises curve), mixed with an
    even deal by `label_skew`. Fixed rather than drawn: shards stay of similar size, and the skew is what it says.
    """
    around = np.arange(classes)[:, None] / classes - np.arange(shard_count)[None, :] / shard_count
    peaked = np.exp(_SKEW_SHARPNESS * np.cos(2 * np.pi * around))
    peaked /= peaked.sum(axis=1, keepdims=True)
    return (1 - label_skew) / shard_count + label_skew * peaked


def take_shard(train: ImageSet, holdout: ImageSet, settings: ShardSettings, *, classes: int) -> Splits:
    """The part of both partitions that belongs to one shard, dealt in the same class proportions."""
    parts = []
    for stream, images in ((_TRAIN, train), (_HOLDOUT, holdout)):
        owner = assign_shards(images, settings, classes=classes, stream=stream)
        parts.append(images.select(owner == settings.shard_index))
    return Splits(parts[0], parts[1], phantom=False)


def assign_shards(images: ImageSet, settings: ShardSettings, *, classes: int, stream: int) -> NDArray[np.int64]:
    """Shard of every record: int64, shape (N,), values 0 to S - 1.

    Every record is in exactly one shard and a patient's records share one; a patient counts under the class that
    most of its images have. Within a class, units stand in the order of a keyed hash of their own id, and that line
    is cut by `class_shares`; so where a unit stands does not depend on the others, and taking one away moves at most
    one unit over each cut. Each shard gets a unit of a class wherever the class has S of them.
    """
    shards = settings.shard_count
    if images.patients is None:
        ids, unit_of = np.arange(len(images)), np.arange(len(images))
        unit_class = images.labels
    else:
        ids, unit_of = np.unique(images.patients, return_inverse=True)
        votes = np.zeros((len(ids), classes), dtype=np.int64)
        np.add.at(votes, (unit_of, images.labels), 1)
        unit_class = votes.argmax(axis=1)
    place = keyed_hash(ids, settings.seed, shards, stream)
    owner = np.zeros(len(ids), dtype=np.int64)
    shares = class_shares(classes, shards, settings.label_skew)
    for label in range(classes):
        line = np.flatnonzero(unit_class == label)
        line = line[np.argsort(place[line], kind="stable")]
        owner[line] = np.repeat(np.arange(shards), quotas(len(line), shares[label]))
    return owner[unit_of]


def quotas(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Split `total` by `shares` (sum 1) in whole numbers; nobody gets 0 where there is enough for all."""
    exact = total * shares
    counts = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - int(counts.sum())]] += 1
    while total >= len(counts) and (counts == 0).any():
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    return counts


def keyed_hash(ids: NDArray[np.int64], *keys: int) -> NDArray[np.uint64]:
    """Hash of each id under `keys` (SplitMix64 finaliser): uint64, shape of `ids`. For dealing out, not for secrets."""
    value = ids.astype(np.uint64)
    for key in keys:
        value = value + np.uint64((key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value
