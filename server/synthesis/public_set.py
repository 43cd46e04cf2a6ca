"""The public images that lend their shapes: drawn phantoms, or a file that the study names by its hash.

SPDX-License-Identifier: Apache-2.0

Nothing here has anything to do with a site. Whether a file's images are public indeed, and none of them is also at a
site, no program can tell; so the study, the claim and the report name the file, and every site sees it before approval.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from common.errors import DataError
from common.files import sha256_file
from common.images import ImageSet
from common.npz import opened, read_pixels
from common.phantoms import public_phantoms
from common.study import DataConfig, Study

ANY_CLASS = -1  # label of a public image: what it is called elsewhere is not what it is here
_FEWEST = 64  # images: fewer say nothing of a covariance
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def check_public_set(study: Study) -> None:
    """See that the public set of a study that will read one can be had; hours later is too late.

    Raises:
        DataError: as `public_images` does.
    """
    if study.pretrain.source == "npz":
        public_images(study)


def with_absolute_path(study: Study) -> Study:
    """The same study; its run may go on from another folder, and in another process."""
    if study.pretrain.path is None:
        return study
    path = str(Path(study.pretrain.path).expanduser().resolve())
    return study.model_copy(update={"pretrain": study.pretrain.model_copy(update={"path": path})})


def public_images(study: Study) -> ImageSet:
    """What `pretrain.source` says: phantoms of the study's modality and classes, or the images of `pretrain.path`.

    Returns:
        Images of the study's size and channels; those of a file have the label ANY_CLASS.

    Raises:
        DataError: the file is missing, spoilt, another one than the study names, or its images are too small or few.
    """
    config = study.pretrain
    if config.source == "phantoms":
        return public_phantoms(study.study.modality, study.data, config.images, seed=study.study.seed)
    if config.path is None:  # no part of what is agreed: only the coordinator has one
        raise DataError("missing", where="pretrain.path", remedy="Give the path of the public set on this machine.")
    path = Path(config.path).expanduser()
    with opened(path) as archive:
        found = sha256_file(path)
        if found != config.sha256:
            raise DataError(
                f"not the file that the study names: its SHA-256 is {found}", where=f"pretrain.path: {path}",
                remedy="Give the file that all sites agreed on, or set pretrain.sha256 before they approve.",
            )  # fmt: skip
        return read_public(archive, path, study.data)


def read_public(archive: NpzFile, path: Path, schema: DataConfig) -> ImageSet:
    """Images from key "images", or "train_images" as MedMNIST has it, made to fit the study; no labels are read.

    Raises:
        DataError: the images are too small, too few or all the same.
    """
    key = "images" if "images" in archive.files else "train_images"
    pixels, side, where = read_pixels(archive, key, path), schema.image_size, f"{path}: {key}"
    height, width = pixels.shape[2:]
    if min(height, width) < side:
        raise DataError(f"images are {height}×{width} px, the study has {side}×{side}", where=where,
                        remedy="Give images at least as large as the study's.")  # fmt: skip
    if len(pixels) < _FEWEST:
        raise DataError(f"{len(pixels)} images, {_FEWEST} needed", where=where, remedy="Give more public images.")
    if (pixels == pixels[:1]).all():
        raise DataError("all images are the same", where=where, remedy="Give images that differ.")
    return ImageSet(fitted(pixels, schema), np.full(len(pixels), ANY_CLASS, dtype=np.int64))


def fitted(pixels: NDArray[np.uint8], schema: DataConfig) -> NDArray[np.uint8]:
    """Images (N, C', H, W) as (N, C, S, S): the middle square, averaged down; colour to grey by brightness, or back."""
    side = min(pixels.shape[2:])
    top, left = ((length - side) // 2 for length in pixels.shape[2:])
    pixels, parts = pixels[:, :, top : top + side, left : left + side], []
    for start in range(0, len(pixels), 256):
        part = pixels[start : start + 256].astype(np.float32)
        if part.shape[1] == 3 and schema.channels == 1:
            part = np.einsum("c,nchw->nhw", _GREY, part)[:, None]
        elif part.shape[1] == 1 and schema.channels == 3:
            part = np.repeat(part, 3, axis=1)
        sized = F.interpolate(torch.from_numpy(part), size=(schema.image_size, schema.image_size), mode="area")
        parts.append(sized.round().clamp(0, 255).to(torch.uint8).numpy())
    return np.concatenate(parts)
