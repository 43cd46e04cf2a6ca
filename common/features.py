"""Class features: what a site sums about its images' edges and textures, and how far one unit can move the sums.

SPDX-License-Identifier: Apache-2.0

N images, K classes, F scattering features (`common/scattering.py`), m of their directions.

The coordinator finds in public images a few directions in which features vary; the sites sum, by class, where their
images lie along them, and the products of that. It is a request's array, so it may be anything: an image's vector is
clipped to norm 1 whatever the directions are, and the sum bounds each row once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.bounded import BoundedSum, Rows, sum_over_units
from common.images import Units
from common.model.weights import fitting
from common.moments import Floats, packing, unpack
from common.protocol import Arrays
from common.scattering import Scattering, scattering
from common.study import Study

_MOST_DIRECTIONS = 128
# The two sums are two parts of one release of sensitivity 1.
MEANS_PART, SECOND_MOMENTS_PART = 0.5, math.sqrt(0.75)
_AT_ONCE = 128  # rows in memory together


def features_of(study: Study) -> Scattering:
    """The scattering features of the study's images."""
    return scattering(study.data.image_size, study.data.channels, study.symmetry)


def directions_of(study: Study) -> int:
    """m."""
    return min(_MOST_DIRECTIONS, features_of(study).dimension)


@dataclass(frozen=True)
class View:
    """Directions of features, float32.

    Attributes:
        centre: (F,).
        directions: (F, m), scaled so that the vectors of half of the public images have norm 1 at most.
    """

    centre: NDArray[np.float32]
    directions: NDArray[np.float32]

    @classmethod
    def read(cls, study: Study, arrays: Arrays) -> View:
        """From a message.

        Raises:
            ReplyError: other arrays than "centre" and "directions" of the study's shapes, or no numbers of up to 1e6.
        """
        features, many = features_of(study).dimension, directions_of(study)
        wanted = {"centre": torch.zeros(features), "directions": torch.zeros(features, many)}
        return cls(**{name: tensor.numpy() for name, tensor in fitting(arrays, wanted, where="features").items()})

    def arrays(self) -> Arrays:
        """For a message."""
        return {"centre": self.centre, "directions": self.directions}

    def of(self, features: NDArray[np.float32]) -> Floats:
        """Features (N, F) -> vectors (N, m), float64, of any norm."""
        apart = features.astype(np.float64) - self.centre
        return apart @ self.directions.astype(np.float64)


def clipped(vectors: Floats) -> Floats:
    """Vectors (N, m) of norm 1 at most."""
    norms = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    shorter: Floats = vectors / np.maximum(norms, 1.0)
    return shorter


def feature_sums(units: Units, vectors: Floats, classes: int) -> BoundedSum:
    """Parts "means" (K, m), sums by class of clipped vectors, and "second_moments" (m (m + 1) / 2,), of their products.

    With p and q for the parts' sizes, p² + q² = 1, a vector v of norm 1 at most gives a row of norm
    sqrt(p² |v|² + q² |v|⁴) ≤ 1, which is what rows are clipped to.

    Args:
        vectors: (N, m), of the units' images in their order; each depends on its own image alone.
    """
    many = vectors.shape[1]
    shapes = {"means": (classes, many), "second_moments": (many * (many + 1) // 2,)}
    short, labels, (i, j) = clipped(vectors), units.images.labels, np.triu_indices(many)
    factor = SECOND_MOMENTS_PART * packing(many)

    def rows_of(these: slice) -> Rows:
        mine, kinds = short[these], labels[these]
        means = np.zeros((len(mine), classes, many))
        means[np.arange(len(mine)), kinds] = MEANS_PART * mine
        return {"means": means, "second_moments": mine[:, i] * mine[:, j] * factor}

    return sum_over_units(units, shapes, math.hypot(MEANS_PART, SECOND_MOMENTS_PART), rows_of, at_once=_AT_ONCE)


def means_and_products(means: Floats, second_moments: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Noisy sums as class means (K, m) and the mean product (m, m) of all images; counts (K,) of at least 1 each."""
    each = means / MEANS_PART / counts[:, None]
    return each, unpack(second_moments, means.shape[1]) / SECOND_MOMENTS_PART / counts.sum()
