"""What the pixels look like: brightness, contrast, range, copies, and images that an export has spoilt.

SPDX-License-Identifier: Apache-2.0

The type of an array says nothing of what is in it. Pixels of 0 to 15, images that are white where they should be black,
or the same patient in both parts cost a study its budget and give nothing. Exact numbers, so for the site's own eyes.
N images, C channels, S pixels a side, T numbers of a thumbnail.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from client.data.splits import Splits
from common.images import ImageSet
from common.study import DataConfig

Floats = NDArray[np.float64]
_SIDE = 8  # pixels a side of a thumbnail
_DARKEST_WHITE = 31  # a set whose brightest pixel is no brighter was written with too few bits
_DIM, _FLAT = 100, 8.0  # brightest pixel and mean contrast, below which a set is looked at twice
_EMPTY = 2.0  # grey levels of contrast, below which an image is one flat colour
_MOST_EMPTY = 0.5  # share of such images that cannot be meant
_SHARED_SHAPE = 0.35  # share of the thumbnails' energy in one pattern, from which on images of the other sign stand out
_OPPOSITE = -0.35  # correlation with that pattern: below it an image is the negative of the others
_NEARLY_ALL, _FEW = 0.9, 0.2
_ALIKE = 0.999  # correlation of thumbnails that makes two images near copies
_MOST_PAIRS = 200_000_000
_AT_ONCE_BYTES = 4 << 20  # of the pixels that are looked at together
_SHIFT = 40.0  # grey levels between the parts' mean brightness


@dataclass(frozen=True)
class Looks:
    """One class in one part.

    Attributes:
        brightness, contrast: mean over images of the pixels' mean, and of their standard deviation within a channel,
            0 to 255.
        darkest, brightest: over all pixels.
    """

    part: str
    name: str
    images: int
    brightness: float
    contrast: float
    darkest: int
    brightest: int


@dataclass(frozen=True)
class Content:
    """What was seen.

    Attributes:
        refusals: what cannot be meant; a study on these images is not approved.
        warnings: what should be looked at, one line each.
        unusual: positions of the train images that are least like the others, the most unusual first.
    """

    looks: tuple[Looks, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    unusual: tuple[int, ...]


def look_at(splits: Splits, schema: DataConfig) -> Content:
    """Look at every image of both parts, a block at a time; nothing is changed."""
    parts = {"train": splits.train, "holdout": splits.holdout}
    seen = {part: _Seen.of(images.images) for part, images in parts.items()}
    looks = tuple(_looks(part, name, seen[part], images.labels == kind) for part, images in parts.items()
                  for kind, name in enumerate(schema.classes))  # fmt: skip
    refusals, warnings = list[str](), list[str]()
    for part, found in seen.items():
        refused, warned = _spoilt(part, found, parts[part].labels, schema.classes)
        refusals += refused
        warnings += warned
        _repeated(part, found, warnings)
    _inverted(seen, {part: images.labels for part, images in parts.items()}, schema.classes, warnings)
    near = int(_like(seen["holdout"].small, seen["train"].small).sum())
    if near:
        warnings.append(f"{near} holdout image(s) look like copies of train ones: are patients in both parts?")
    apart = abs(float(seen["train"].brightness.mean() - seen["holdout"].brightness.mean()))
    if apart > _SHIFT:
        warnings.append(f"train and holdout differ by {apart:.0f} grey levels in mean brightness: another export?")
    return Content(looks, tuple(refusals), tuple(warnings), _unusual(seen["train"]))


@dataclass(frozen=True)
class _Seen:
    """A part's images, image by image.

    Attributes:
        brightness, contrast, darkest, brightest: (N,), over all pixels and channels.
        used: (N, 32), which of 256 values its pixels have, a bit each.
        small: thumbnails (N, T).
        repeated: (N,), whether it is an exact copy of an earlier one.
    """

    brightness: Floats
    contrast: Floats
    darkest: NDArray[np.uint8]
    brightest: NDArray[np.uint8]
    used: NDArray[np.uint8]
    small: Floats
    repeated: NDArray[np.bool_]

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> _Seen:
        """Of images (N, C, S, S)."""
        digests, repeated, blocks = set[bytes](), list[bool](), list[tuple[NDArray[Any], ...]]()
        many = max(1, _AT_ONCE_BYTES // max(1, images[:1].nbytes))
        for start in range(0, len(images), many):
            block = images[start : start + many]
            flat = block.reshape(len(block), -1)
            used = np.zeros((len(block), 256), bool)
            used[np.arange(len(block))[:, None], flat] = True
            for image in block:
                digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
                repeated.append(digest in digests)
                digests.add(digest)
            blocks.append((flat.mean(axis=1), _contrast(block), flat.min(axis=1), flat.max(axis=1),
                           np.packbits(used, axis=1), _thumbnails(block)))  # fmt: skip
        columns = (np.concatenate(column) for column in zip(*blocks, strict=True))
        return cls(*columns, repeated=np.array(repeated, bool))

    def of_class(self, mine: NDArray[np.bool_]) -> _Seen:
        """The same of some images alone."""
        return _Seen(self.brightness[mine], self.contrast[mine], self.darkest[mine], self.brightest[mine],
                     self.used[mine], self.small[mine], self.repeated[mine])  # fmt: skip


def sheet(images: ImageSet, rows: Sequence[int], *, columns: int = 16, side: int = 64) -> bytes:
    """PNG of some images side by side, each with its row, from 0, and its label, for the site's own eyes."""
    lines = -(-len(rows) // columns)
    page = Image.new("RGB", (columns * side, max(1, lines) * side), "white")
    write = ImageDraw.Draw(page)
    for place, row in enumerate(rows):
        corner = (place % columns * side, place // columns * side)
        pixels = images.images[row].transpose(1, 2, 0)
        tile = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else np.ascontiguousarray(pixels))
        page.paste(tile.convert("RGB").resize((side, side)), corner)
        write.text(corner, f"{row}: {images.labels[row]}", "white", stroke_width=1, stroke_fill="black")
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _looks(part: str, name: str, seen: _Seen, mine: NDArray[np.bool_]) -> Looks:
    if not mine.any():
        return Looks(part, name, 0, float("nan"), float("nan"), 0, 0)
    return Looks(part, name, int(mine.sum()), float(seen.brightness[mine].mean()), float(seen.contrast[mine].mean()),
                 int(seen.darkest[mine].min()), int(seen.brightest[mine].max()))  # fmt: skip


def _spoilt(part: str, seen: _Seen, labels: NDArray[np.int64], classes: Sequence[str]) -> tuple[list[str], list[str]]:
    """(refusals, warnings): what an export has lost, in a part, or in a class of it, since that may have come another
    way. What is said of the part is not said again of its classes."""
    by_class = [(f"{part}, class '{name}'", seen.of_class(labels == kind))
                for kind, name in enumerate(classes) if (labels == kind).any()]  # fmt: skip
    warnings = list[str]()
    for look in (_range, _flat):
        refused, warned = list[str](), list[str]()
        look(part, seen, refused, warned)
        if not refused:
            of_classes = list[str]()
            for which, images in by_class:
                look(which, images, refused, of_classes)
            warned = warned or of_classes
        warnings += warned
        if refused:
            return refused, warnings
    return [], warnings


def _flat(part: str, seen: _Seen, refusals: list[str], warnings: list[str]) -> None:
    """Images of one colour, or almost: nothing can be learnt from them, and each costs what a whole one does."""
    many = int((seen.contrast < _EMPTY).sum())
    if many > _MOST_EMPTY * len(seen.contrast):
        refusals.append(f"{part}: {many / len(seen.contrast):.0%} of the images are one flat colour")
    elif many:
        warnings.append(f"{part}: {many} image(s) are one flat colour, or almost")


def _range(part: str, seen: _Seen, refusals: list[str], warnings: list[str]) -> None:
    """Bits: a mask or a 4-bit export is valid uint8, and black to whoever looks at it."""
    low, high, values = int(seen.darkest.min()), int(seen.brightest.max()), _values(seen.used)
    between = f"{part}: all pixels lie between {low} and {high} of 255"
    if high <= _DARKEST_WHITE:
        refusals.append(f"{between}: black to the eye, so the export lost bits")
    elif low >= 255 - _DARKEST_WHITE:
        refusals.append(f"{between}: white to the eye")
    elif values <= 2:
        refusals.append(f"{part}: pixels have {values} values, {low} and {high}: masks, and no images")
    elif high < _DIM or values <= 16:
        warnings.append(f"{between} and have {values} values: look at the export's bits")
    elif float(seen.contrast.mean()) < _FLAT:
        warnings.append(f"{part}: images hardly vary (mean contrast below {_FLAT:.0f} grey levels)")


def _inverted(
    seen: dict[str, _Seen], labels: dict[str, NDArray[np.int64]], classes: Sequence[str], warnings: list[str]
) -> None:
    """Images that are the negative of most train ones, where all share a pattern: of chests or eyes they do, of cells
    not. Of two halves that are each other's negatives nobody can say which one is wrong."""
    small = seen["train"].small
    if len(small) < 8:
        return
    values, vectors = np.linalg.eigh(small.T @ small / len(small))
    if values[-1] / max(float(values.sum()), 1e-12) < _SHARED_SHAPE:
        return
    clear = False  # which way round the train images are
    for part, found in seen.items():
        along, by_train = found.small @ vectors[:, -1], clear
        if not clear:
            vectors *= 1.0 if (along > 0).sum() * 2 >= len(along) else -1.0
        opposite = found.small @ vectors[:, -1] < _OPPOSITE
        clear = clear or float(opposite.mean()) < _FEW
        whole = [name for kind, name in enumerate(classes) if _is_whole(opposite, labels[part] == kind)]
        if len(whole) == 1:
            warnings.append(
                f"{part}: class '{whole[0]}' and the others look like each other's negatives (MONOCHROME1?)"
            )
        elif opposite.any():
            many, others = int(opposite.sum()), "the train ones" if by_train else "the others"
            warnings.append(f"{part}: {many} image(s) look like negatives of {others} (MONOCHROME1 not inverted?)")


def _is_whole(some: NDArray[np.bool_], mine: NDArray[np.bool_]) -> bool:
    """Whether some images are, but for a few, one class."""
    both = int((some & mine).sum())
    return both > _NEARLY_ALL * max(1, int(mine.sum())) and both > _NEARLY_ALL * int(some.sum())


def _contrast(images: NDArray[np.uint8]) -> Floats:
    """(N,): standard deviation of a channel's pixels, mean over channels: one colour has none."""
    channels = images.reshape(*images.shape[:2], -1)
    return channels.std(axis=2, dtype=np.float32).mean(axis=1)


def _values(used: NDArray[np.uint8]) -> int:
    """How many values the pixels of some images have together."""
    return int(np.unpackbits(np.bitwise_or.reduce(used, axis=0)).sum())


def _repeated(part: str, seen: _Seen, warnings: list[str]) -> None:
    """One picture several times: it counts each time, and a patient with many is protected less."""
    if seen.repeated.any():
        warnings.append(f"{part}: {seen.repeated.sum()} image(s) are exact copies of others in it")
    near = int((_like(seen.small, seen.small, same=True) & ~seen.repeated[: _most(seen.small)]).sum())
    if near:
        warnings.append(f"{part}: {near} more image(s) look like copies in it: one patient's? Then give *_groups")


def _most(images: Floats) -> int:
    """How many images are held against so many in seconds."""
    return max(1, _MOST_PAIRS // max(1, len(images)))


def _like(images: Floats, others: Floats, *, same: bool = False) -> NDArray[np.bool_]:
    """Of the first `_most` of these images, (M,): whether one of the others has the same thumbnail.

    Args:
        same: the two are one set, and an image is held against those before it.
    """
    few, found = images[: _most(others)], list[NDArray[np.bool_]]()
    for start in range(0, len(few), 512):
        block = few[start : start + 512] @ others.T  # a flat image's thumbnail is 0, and like no other
        if same:
            block *= np.arange(len(others)) < np.arange(start, start + len(block))[:, None]
        found.append(block.max(axis=1, initial=0.0) > _ALIKE)
    return np.concatenate(found) if found else np.zeros(0, bool)


def _unusual(seen: _Seen) -> tuple[int, ...]:
    """By how far brightness, contrast and likeness to the mean image are from their medians, in robust units."""
    numbers = np.stack([seen.brightness, seen.contrast, seen.small @ seen.small.mean(axis=0)], axis=1)
    middle = np.median(numbers, axis=0)
    spread = np.median(np.abs(numbers - middle), axis=0) + 1e-6
    far: Floats = (np.abs(numbers - middle) / spread).max(axis=1)
    return tuple(int(row) for row in np.argsort(-far, kind="stable"))


def _thumbnails(images: NDArray[np.uint8]) -> Floats:
    """(N, T): brightness averaged to a few pixels a side, of mean 0 and norm 1; 0 where an image is flat."""
    side = min(_SIDE, images.shape[-1])
    edges = np.linspace(0, images.shape[-1], side + 1).astype(int)[:-1]
    grey = images.mean(axis=1, dtype=np.float32)
    sizes = np.diff([*edges, images.shape[-1]])
    cells = np.add.reduceat(np.add.reduceat(grey, edges, axis=1), edges, axis=2) / np.outer(sizes, sizes)
    rows = cells.reshape(len(images), -1).astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > 1e-6 * side, rows / np.maximum(norms, 1e-12), 0.0)
