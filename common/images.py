"""Image sets, and the one scaling between stored pixels and what a network sees.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, C channels, H×W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


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


def to_unit(images: NDArray[np.uint8]) -> torch.Tensor:
    """Scale uint8 pixels (N, C, H, W) to float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """Scale floats (N, C, H, W) from [-1, 1] to uint8; values outside are clamped, NaN becomes mid-grey."""
    clean = torch.nan_to_num(images.detach().float(), nan=0.0).clamp(-1.0, 1.0)
    return ((clean + 1.0) * 127.5).round().to(torch.uint8).cpu().numpy()
