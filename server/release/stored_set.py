"""The image set of a bundle that somebody else may have made, one image at a time: npz, table and PNGs have to agree.

SPDX-License-Identifier: Apache-2.0

Nothing is taken at its word: shapes are those that study and metrics give, so that no more is unpacked than they allow,
whatever the archive says of itself; and one image is in memory at a time.
"""

from __future__ import annotations

import struct
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from common.errors import CheckpointError
from common.files import SPOILT
from common.study import Study
from server.release.formats import TABLE_HEAD, file_names, table_line
from server.release.reading import ASK_ANEW, plain

_END, _END_BYTES, _END64 = b"PK\x05\x06", 22, b"PK\x06\x06"
_LARGEST_DIRECTORY = 4096  # bytes; six members need a tenth of it
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack without a bound
_UNREADABLE = (*SPOILT, struct.error, KeyError, TypeError, SyntaxError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Shape:
    """What the set has to be.

    Attributes:
        images: how many.
    """

    images: int
    side: int
    channels: int

    @classmethod
    def of(cls, study: Study) -> Shape:
        """What the study asks for."""
        return cls(study.generation.images, study.data.image_size, study.data.channels)

    @property
    def pixels(self) -> tuple[int, ...]:
        return (self.side, self.side) if self.channels == 1 else (self.side, self.side, self.channels)

    @property
    def bytes(self) -> int:
        return self.side * self.side * self.channels


def stored_images(path: Path, shape: Shape) -> Iterator[tuple[bytes, int]]:
    """(pixels, label) of each image in images.npz.

    Raises:
        CheckpointError: it is no archive of that many images of that shape, or is damaged.
    """
    try:
        with _archive(path) as archive:
            for part in ("val", "test"):
                _member(archive, f"{part}_images", (0, *shape.pixels)).close()
                _member(archive, f"{part}_labels", (0, 1)).close()
            with (
                _member(archive, "train_images", (shape.images, *shape.pixels)) as pixels,
                _member(archive, "train_labels", (shape.images, 1)) as labels,
            ):
                for _ in range(shape.images):
                    yield _exactly(pixels, shape.bytes), _exactly(labels, 1)[0]
                if pixels.read(1) or labels.read(1):  # also where the checksums of both are looked at
                    raise ValueError("longer than its shape")
    except _UNREADABLE as error:
        raise CheckpointError(
            f"not {shape.images} images of this study, or damaged ({error})", where=str(path), remedy=ASK_ANEW
        ) from error


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    with ExitStack() as stack:
        file = stack.enter_context(plain(path))
        _refuse_long_directory(file)
        archive = stack.enter_context(zipfile.ZipFile(file))
        names = [f"{part}_{what}.npy" for part in ("train", "val", "test") for what in ("images", "labels")]
        if sorted(archive.namelist()) != sorted(names):
            raise ValueError("other arrays than MedMNIST's six")
        if not all(member.compress_type in _PLAIN for member in archive.infolist()):
            raise ValueError("a way of packing that is none of ours")
        yield archive


def _refuse_long_directory(file: BinaryIO) -> None:
    """zipfile reads an archive's whole directory at once, whatever its length.

    Raises:
        ValueError: it is longer than ours, or not where ours is.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_BYTES - 76))
    tail = file.read()
    file.seek(0)
    end = tail[-_END_BYTES:]
    if not end.startswith(_END):
        raise ValueError("no end of an archive")
    length: int = struct.unpack_from("<L", end, 12)[0]
    if tail[:-_END_BYTES].startswith(_END64) and len(tail) == _END_BYTES + 76:  # of an archive over 4 GiB
        length = struct.unpack_from("<Q", tail, 40)[0]
    elif b"PK\x06\x07" in tail[:-_END_BYTES]:
        raise ValueError("an end that is none of ours")
    if length > _LARGEST_DIRECTORY:
        raise ValueError("a longer directory than six arrays need")


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> IO[bytes]:
    """An array's bytes, behind a header that says uint8 and this shape."""
    member = archive.open(f"{name}.npy")
    npy.read_magic(member)
    found, fortran, dtype = npy.read_array_header_1_0(member)
    if (found, fortran, dtype) != (shape, False, np.dtype(np.uint8)):
        member.close()
        raise ValueError(f"{name} is {dtype} {found}, not uint8 {shape}")
    return member


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("shorter than its shape")
    return data


def set_problems(folder: Path, shape: Shape, classes: Sequence[str], counts: Sequence[int]) -> list[str]:
    """What is wrong with the set, the first thing that is: npz, table and PNGs hold the same images in the same order.

    Args:
        counts: images of each class.
    """
    found = [0] * len(classes)
    try:
        with plain(folder / "images" / "metadata.csv") as table, warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow only warns of some bombs
            if table.read(len(TABLE_HEAD)) != TABLE_HEAD.encode():
                return ["images/metadata.csv is no table of these images"]
            for pixels, label, name in named_images(folder / "images.npz", shape, classes):
                line = table_line(name, label, classes).encode()
                if table.read(len(line)) != line:
                    return [f"images/metadata.csv does not say of {name} what images.npz does"]
                if _png(folder / "images" / name, shape) != pixels:
                    return [f"images/{name} is not the image that images.npz has in its place"]
                found[label] += 1
            if table.read(1):
                return ["images/metadata.csv has more lines than there are images"]
    except OSError as error:
        return [f"images/metadata.csv cannot be read ({error.strerror})"]
    except CheckpointError as error:
        return [error.what if not error.where else f"{Path(error.where).name}: {error.what}"]
    wrong = [f"{found[k]} images of class '{classes[k]}', metrics.json says {counts[k]}" for k in range(len(classes))
             if found[k] != counts[k]]  # fmt: skip
    return wrong[:1]


def named_images(path: Path, shape: Shape, classes: Sequence[str]) -> Iterator[tuple[bytes, int, str]]:
    """(pixels, label, file name) of each image."""
    labels = [0]  # the one that `file_names` asks for next
    names = file_names(iter(lambda: labels[0], None), classes)
    for pixels, label in stored_images(path, shape):
        if label >= len(classes):
            raise CheckpointError(f"label {label} of {len(classes)} classes", where=str(path), remedy=ASK_ANEW)
        labels[0] = label
        yield pixels, label, next(names)


def _png(path: Path, shape: Shape) -> bytes:
    """The pixels of a PNG; empty where it is none of this shape. Its size is looked at before it is unpacked."""
    try:
        with plain(path) as file, Image.open(file, formats=["PNG"]) as picture:
            fits = picture.size == (shape.side, shape.side) and picture.mode == ("L" if shape.channels == 1 else "RGB")
            return picture.tobytes() if fits else b""
    except (*_UNREADABLE, Image.DecompressionBombError, Warning):
        return b""
