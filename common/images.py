"""Image sets, and the one scaling between stored pixels and what a network sees.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, C channels, H×W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

if TYPE_CHECKING:  # late below: what only reads a ledger comes through here, too
    import torch


@dataclass(frozen=True)
class ImageSet:
    """Labelled images held in memory.

    Attributes:
        images: uint8, shape (N, C, H, W), values 0 to 255.
        labels: int64, shape (N,), values 0 to classes - 1.
        patients: int64, shape (N,), the patient of each image, or None where unknown.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    patients: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> ImageSet:
        """Return the images at `index` (integers or a mask), in that order."""
        patients = None if self.patients is None else self.patients[index]
        return ImageSet(self.images[index], self.labels[index], patients)


@dataclass(frozen=True)
class Units:
    """The privacy units of an image set: patients, or the images themselves. U units, B chosen ones, J images of each.

    Attributes:
        images: all images.
        members: for each unit, the positions of its images; every image is in exactly one unit.
        unit: what a unit is.
    """

    images: ImageSet
    members: tuple[NDArray[np.int64], ...]
    unit: Literal["image", "patient"]

    @classmethod
    def of(cls, images: ImageSet, unit: Literal["image", "patient"]) -> Units:
        """Group images by unit.

        Raises:
            DataError: the unit is the patient, and the patients are not known.
        """
        if unit == "image":
            return cls(images, tuple(np.arange(len(images)).reshape(-1, 1)), unit)
        if images.patients is None:
            raise DataError(
                "the study protects patients, and the patient of each image is not known here", where="privacy.unit",
                remedy="Add train_groups and test_groups, or agree on unit = \"image\".",
            )  # fmt: skip
        order = np.argsort(images.patients, kind="stable")
        cuts = np.flatnonzero(np.diff(images.patients[order])) + 1
        return cls(images, tuple(np.split(order, cuts)) if len(order) else (), unit)

    def __len__(self) -> int:
        return len(self.members)

    def weights(self) -> NDArray[np.float64]:
        """Share of its unit that each image has, float64 (N,); a unit's images sum to 1."""
        out = np.zeros(len(self.images))
        for member in self.members:
            out[member] = 1.0 / len(member)
        return out

    def with_class(self, classes: int) -> NDArray[np.int64]:
        """How many units have an image of each class, (classes,)."""
        return np.bincount(
            [label for member in self.members for label in np.unique(self.images.labels[member])], minlength=classes
        )

    def draw(
        self, chosen: NDArray[np.bool_], most: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (B, J, C, H, W) and labels (B, J) of the units in the mask `chosen` (U,).

        J = 1 where the unit is the image, else `most`: a unit's images in random order, begun again when they end.
        """
        picked = [self.members[unit] for unit in np.flatnonzero(chosen)]
        each = 1 if self.unit == "image" else most
        index = np.array([np.resize(rng.permutation(member), each) for member in picked], dtype=np.int64)
        index = index.reshape(len(picked), each)
        return self.images.images[index], self.images.labels[index]


def to_unit(images: NDArray[np.uint8]) -> torch.Tensor:
    """Scale uint8 pixels (..., C, H, W) to float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """Scale floats (N, C, H, W) from [-1, 1] to uint8; values outside are clamped, NaN becomes mid-grey."""
    import torch

    clean = torch.nan_to_num(images.detach().float(), nan=0.0).clamp(-1.0, 1.0)
    return ((clean + 1.0) * 127.5).round().to(torch.uint8).cpu().numpy()
