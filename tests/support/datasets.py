"""Small .npz files for tests: one that is right, and one for each way to be wrong.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.splits import Splits
from common.images import ImageSet
from common.study import DataConfig


def schema_of(*, size: int = 8, channels: int = 1, classes: int = 2) -> DataConfig:
    """A study's data schema with classes c0, c1, ..."""
    names = tuple(f"c{i}" for i in range(classes))
    return DataConfig.model_validate({"image_size": size, "channels": channels, "classes": names})


def good_arrays(
    *,
    train: int = 40,
    test: int = 16,
    size: int = 8,
    channels: int = 1,
    classes: int = 2,
    patients: bool = False,
    seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Arrays of a file that is right: random pixels, labels in turn, two images a patient where asked for."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for part, count, first in (("train", train, 0), ("test", test, 10_000)):
        shape = (count, size, size) if channels == 1 else (count, size, size, channels)
        arrays[f"{part}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        owner = np.arange(count) // 2 if patients else np.arange(count)
        arrays[f"{part}_labels"] = (owner % classes).astype(np.uint8)[:, None]
        if patients:
            arrays[f"{part}_groups"] = (first + owner).astype(np.int32)
    return arrays


def write_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> Path:
    """Save `arrays` under their names; object arrays are pickled, as a careless export would do."""
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def broken_arrays(kind: str) -> dict[str, NDArray[Any]]:
    """`good_arrays` with patients, spoilt in the way that `kind` names."""
    arrays = good_arrays(patients=True)
    images, labels = arrays["train_images"], arrays["train_labels"]
    changes: dict[str, dict[str, NDArray[Any]]] = {
        "float pixels": {"train_images": images.astype(np.float32)},
        "nan pixels": {"train_images": np.where(images == images[0, 0, 0], np.nan, images / 255.0)},
        "pickled labels": {"train_labels": np.array([{"label": 1}] * len(images), dtype=object)},
        "wrong size": {"test_images": np.zeros((16, 9, 8), np.uint8)},
        "wrong channels": {"train_images": np.zeros((40, 8, 8, 3), np.uint8)},
        "channels first": {"train_images": np.zeros((40, 3, 8, 8), np.uint8)},
        "flat images": {"train_images": images.reshape(40, 64)},
        "too few labels": {"train_labels": labels[:-3]},
        "too few groups": {"test_groups": arrays["test_groups"][:-1]},
        "empty partition": {"test_images": arrays["test_images"][:0], "test_labels": arrays["test_labels"][:0]},
        "label too large": {"test_labels": np.where(np.arange(16) == 5, 7, 0)},
        "negative label": {"train_labels": np.where(np.arange(40) == 9, -1, 0)},
        "float labels": {"train_labels": labels.astype(np.float64)},
        "nan labels": {"train_labels": np.full(40, np.nan)},
        "one-hot labels": {"train_labels": np.eye(2, dtype=np.int64)[labels[:, 0]]},
        "patient in both": {"test_groups": np.where(np.arange(16) < 3, 4, arrays["test_groups"])},
        "huge patient number": {"train_groups": np.full(40, 2**63 + 5, np.uint64)},
    }
    if kind == "missing key":
        arrays["train_label"] = arrays.pop("train_labels")
    elif kind == "groups for train only":
        del arrays["test_groups"]
    else:
        arrays.update(changes[kind])
    return arrays


def splits_of(train_labels: list[int], holdout_labels: list[int], *, size: int = 8) -> Splits:
    """Splits with these labels, every image different."""
    rng = np.random.default_rng(1)
    parts = []
    for labels in (train_labels, holdout_labels):
        images = rng.integers(0, 256, (len(labels), 1, size, size), dtype=np.uint8)
        parts.append(ImageSet(images, np.array(labels, dtype=np.int64)))
    return Splits(parts[0], parts[1], phantom=False)
