"""The synthetic set as files: MedMNIST-layout npz, PNGs by class with their table, a contact sheet.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from common.files import atomic_write, storage_error
from common.images import ImageSet

TABLE_HEAD = "file_name,label,class\n"
_LONGEST_FOLDER = 60  # bytes of a class's name in a path
_SPLITS = re.compile(  # what Hugging Face's `datasets` takes for one where no letter is beside it
    r"(?<![^\W\d_])(training|train|testing|test|evaluation|eval|validation|valid|val|dev)(?![^\W\d_])", re.IGNORECASE
)


def write_npz(path: Path, images: ImageSet) -> None:
    """MedMNIST layout: train_images uint8 N×H×W (or N×H×W×3), train_labels uint8 N×1.

    Its val and test parts are empty: readers ask for them, and synthetic images are nothing to test on. numpy gives
    the members no time, so the same images are the same bytes.
    """
    pixels, labels = channels_last(images.images), images.labels.astype(np.uint8)[:, None]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, train_images=pixels, train_labels=labels, val_images=pixels[:0], val_labels=labels[:0],
        test_images=pixels[:0], test_labels=labels[:0],
    )  # fmt: skip
    atomic_write(path, buffer.getvalue())


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder for each class, in any reader's eyes in the study's order and no split of the set.

    Readers number classes by their folders' names, sorted, so that the number in front has as many digits for all; and
    Hugging Face takes a folder with a word like "test" in it for a split, and drops the rest.
    """
    digits = len(str(len(classes) - 1))
    return [f"{number:0{digits}d}-{_plain(name)}" for number, name in enumerate(classes)]


def _plain(name: str) -> str:
    """Letters and digits of any script, with hyphens between; no word that is taken for a split; short."""
    words = "-".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", name))) or "class"
    words = words.encode()[:_LONGEST_FOLDER].decode(errors="ignore").strip("-")
    return _SPLITS.sub(r"class\1", words)


def write_pngs(folder: Path, images: ImageSet, classes: tuple[str, ...], *, note: str) -> None:
    """One PNG per image, in a folder per class, and metadata.csv, a table of them in the order of the npz; each says
    that it is synthetic. Hugging Face's `imagefolder` and pandas read the table, torchvision the folders.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    info = PngInfo()
    info.add_text("Description", note)
    path, labels = folder, images.labels.tolist()
    try:
        for pixels, name in zip(channels_last(images.images), file_names(labels, classes), strict=True):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, pnginfo=info)
    except OSError as error:
        raise storage_error(error, path) from error
    rows = zip(file_names(labels, classes), labels, strict=True)
    table = [table_line(name, label, classes) for name, label in rows]
    atomic_write(folder / "metadata.csv", "".join([TABLE_HEAD, *table]).encode())


def file_names(labels: Iterable[int], classes: Sequence[str]) -> Iterator[str]:
    """Where each image's PNG lies below images/: in its class's folder, numbered in the order of the set."""
    folders, counters = folder_names(classes), [0] * len(classes)
    for label in labels:
        yield f"{folders[label]}/{counters[label]:05d}.png"
        counters[label] += 1


def table_line(name: str, label: int, classes: Sequence[str]) -> str:
    """An image's line of metadata.csv."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([name, label, classes[label]])
    return line.getvalue()


def contact_sheet(images: ImageSet, label: int, *, columns: int = 16, side: int = 64) -> bytes:
    """PNG of the first `columns` images of a class, side by side, enlarged without smoothing."""
    index = np.flatnonzero(images.labels == label)[:columns]
    tiles = channels_last(images.images[index])
    gap = 2
    sheet = Image.new("RGB", (columns * (side + gap) - gap, side), "white")
    for place, pixels in enumerate(tiles):
        tile = Image.fromarray(pixels).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (place * (side + gap), 0))
    if not len(index):
        ImageDraw.Draw(sheet).text((4, 4), "no image of this class", fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def channels_last(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, C, H, W) -> (N, H, W) for one channel, (N, H, W, 3) for three."""
    return images[:, 0] if images.shape[1] == 1 else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
