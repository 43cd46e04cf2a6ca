"""The synthetic set as files: MedMNIST-layout npz, PNGs by class, a contact sheet.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from common.files import atomic_write
from common.images import ImageSet


def write_npz(path: Path, images: ImageSet) -> None:
    """MedMNIST layout: train_images uint8 N×H×W (or N×H×W×3), train_labels uint8 N×1."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, train_images=_channels_last(images.images), train_labels=images.labels.astype(np.uint8)[:, None]
    )
    atomic_write(path, buffer.getvalue())


def write_pngs(folder: Path, images: ImageSet, classes: tuple[str, ...], *, note: str) -> None:
    """One PNG per image, in a folder per class; each says in its metadata that it is synthetic."""
    info = PngInfo()
    info.add_text("Description", note)
    counters = [0] * len(classes)
    for pixels, label in zip(_channels_last(images.images), images.labels, strict=True):
        name = re.sub(r"[^A-Za-z0-9]+", "-", classes[label]).strip("-") or "class"
        path = folder / f"{label}-{name}" / f"{counters[label]:05d}.png"
        counters[label] += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, pnginfo=info)


def contact_sheet(images: ImageSet, label: int, *, columns: int = 16, side: int = 64) -> bytes:
    """PNG of the first `columns` images of a class, side by side, enlarged without smoothing."""
    index = np.flatnonzero(images.labels == label)[:columns]
    tiles = _channels_last(images.images[index])
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


def _channels_last(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, C, H, W) -> (N, H, W) for one channel, (N, H, W, 3) for three."""
    return images[:, 0] if images.shape[1] == 1 else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
