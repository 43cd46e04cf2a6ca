"""Images from one .npz file in the MedMNIST layout, read without pickle and checked before use.

SPDX-License-Identifier: Apache-2.0

Keys of the file, for a partition P (Yang et al. 2023, MedMNIST v2):

    P_images   uint8, N×H×W (grey) or N×H×W×3 (colour)
    P_labels   integers, N or N×1, 0 to classes - 1
    P_groups   integers, N: the patient of each image; optional, but for both of train and test or for neither

A site's images come through `client/data/npz.py`, the server's public ones through `server/synthesis/public_set.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from common.errors import DataError
from common.files import SPOILT
from common.images import ImageSet
from common.study import DataConfig

_COPY_AGAIN = "Copy the file again and compare its checksum."

_KEYS = {f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels", "groups")}


@contextmanager
def opened(path: Path) -> Iterator[NpzFile]:
    """The archive at `path`, open.

    Raises:
        DataError: missing, a folder, not readable, empty, not an .npz archive, or damaged.
    """
    where = str(path)
    if not path.exists():
        raise DataError("no such file", where=where, remedy="Give the path of an .npz file.")
    if path.is_dir():
        raise DataError("this is a folder", where=where, remedy="Give the path of an .npz file inside it.")
    with ExitStack() as stack:  # numpy leaves the file open where the archive is damaged, so it is opened here
        try:
            file = stack.enter_context(path.open("rb"))
            magic = file.read(2)
            file.seek(0)
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror})", where=where, remedy="Let the user that runs the site read it."
            ) from error
        if not magic:
            raise DataError("the file is empty", where=where, remedy=_COPY_AGAIN)
        if magic != b"PK":
            raise DataError("not an .npz archive", where=where, remedy="Write it with numpy.savez or savez_compressed.")
        try:
            archive = stack.enter_context(np.load(file, allow_pickle=False))
        except SPOILT as error:
            raise DataError("the archive is damaged or cut short", where=where, remedy=_COPY_AGAIN) from error
        yield archive


def read_partition(archive: NpzFile, part: str, path: Path, schema: DataConfig) -> ImageSet:
    """One partition, checked against what the study's images look like.

    Args:
        part: "train", "val" or "test".
        path: named in errors.

    Raises:
        DataError: with ``file: key`` as the place: pickled objects; a missing key; a wrong type, shape or size; labels
            outside the classes; arrays of different length; an empty partition.
    """
    images = _read_images(archive, f"{part}_images", path, schema)
    labels = _read_integers(archive, f"{part}_labels", path, expected=len(images))
    _check_range(labels, f"{path}: {part}_labels", len(schema.classes))
    patients = None
    if {"train_groups", "test_groups"} & set(archive.files):
        patients = _read_integers(archive, f"{part}_groups", path, expected=len(images))
        if patients.dtype == np.uint64 and int(patients.max()) >= 2**63:
            raise DataError(
                f"patient number {int(patients.max())} is too large",
                where=f"{path}: {part}_groups",
                remedy="Number patients below 2^63.",
            )
        patients = patients.astype(np.int64)
    return ImageSet(images, labels.astype(np.int64), patients)


def _read_array(archive: NpzFile, key: str, path: Path) -> NDArray[Any]:
    where = f"{path}: {key}"
    if key not in archive.files:
        found = ", ".join(archive.files[:12]) or "nothing"
        misspelt = [name for name in archive.files if name not in _KEYS]  # what is right is not to be renamed
        near = difflib.get_close_matches(key, misspelt, n=1, cutoff=0.6)
        remedy = f"Rename '{near[0]}' to '{key}'?" if near else f"Add an array of the name '{key}'."
        raise DataError(f"missing; the file has {found}", where=where, remedy=remedy)
    try:
        array = archive[key]
    except MemoryError as error:
        raise DataError(
            "the array does not fit in memory", where=where, remedy="Use a smaller file or a larger machine."
        ) from error
    except SPOILT as error:
        if "allow_pickle" in str(error):
            raise DataError(
                "holds pickled Python objects, which are never loaded since they can run code",
                where=where,
                remedy="Save it again as a plain uint8 or integer array.",
            ) from error
        raise DataError("the array is damaged or cut short", where=where, remedy=_COPY_AGAIN) from error
    if not isinstance(array, np.ndarray):
        raise DataError("not a numpy array", where=where, remedy="Write the file with numpy.savez.")
    return array


def read_pixels(archive: NpzFile, key: str, path: Path) -> NDArray[np.uint8]:
    """Images of any size (N, C, H, W), with C 1 or 3.

    Raises:
        DataError: as `read_partition`, but for the size.
    """
    where = f"{path}: {key}"
    array = _read_array(archive, key, path)
    if array.dtype != np.uint8:
        with_nan = array.dtype.kind == "f" and bool(np.isnan(array).any())
        raise DataError(
            f"pixels are {array.dtype}{' with NaN inside' if with_nan else ''}, uint8 0..255 needed",
            where=where,
            remedy="Find out where the NaN come from, then scale to 0..255 and save as uint8."
            if with_nan
            else "Scale to 0..255 and save as uint8.",
        )
    if array.ndim not in (3, 4):
        raise DataError(
            f"shape {array.shape}, N×H×W or N×H×W×3 needed",
            where=where,
            remedy="Stack the images along the first axis.",
        )
    if len(array) == 0:
        raise DataError("no images in this partition", where=where, remedy="Put images in it.")
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        raise DataError(
            f"shape {array.shape} has the channels first", where=where, remedy="Move the channels to the last axis."
        )
    if array.shape[3] not in (1, 3):
        raise DataError(
            f"images have {array.shape[3]} channels, 1 or 3 needed", where=where, remedy="Save them grey or in colour."
        )
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def _read_images(archive: NpzFile, key: str, path: Path, schema: DataConfig) -> NDArray[np.uint8]:
    where = f"{path}: {key}"
    array = read_pixels(archive, key, path)
    _, channels, height, width = array.shape
    side = schema.image_size
    if (height, width) != (side, side):
        raise DataError(
            f"images are {height}×{width} px, the study has {side}×{side}",
            where=where,
            remedy=f"Resize them to {side}×{side}.",
        )
    if channels != schema.channels:
        raise DataError(
            f"images have {channels} channel(s), the study has {schema.channels}",
            where=where,
            remedy="Convert them to grey." if schema.channels == 1 else "Save them as red, green, blue.",
        )
    return array


def _read_integers(archive: NpzFile, key: str, path: Path, *, expected: int) -> NDArray[Any]:
    where = f"{path}: {key}"
    array = _read_array(archive, key, path)
    if array.dtype.kind not in "iu":
        with_nan = array.dtype.kind == "f" and bool(np.isnan(array).any())
        raise DataError(
            f"values are {array.dtype}{' with NaN inside' if with_nan else ''}, integers needed",
            where=where,
            remedy="Save one whole number for each image.",
        )
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise DataError(
            f"shape {array.shape}, N or N×1 needed", where=where, remedy="Give one number for each image, not one-hot."
        )
    if len(array) != expected:
        raise DataError(
            f"{len(array)} values for {expected} images",
            where=where,
            remedy="Save the arrays again from the same list.",
        )
    return array


def _check_range(labels: NDArray[Any], where: str, classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"label {int(labels[first])} at index {first}, allowed are 0 to {classes - 1} ({len(outside)} outside)",
            where=where,
            remedy="Number the classes from 0 in the study's order.",
        )
