"""Class moments in a low-frequency basis: a cheap private sketch of the images, and samples from it.

SPDX-License-Identifier: Apache-2.0

N images, U units, K classes, k components a side, d = channels × k² features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.images import ImageSet, Units

Floats = NDArray[np.float64]
REACH = 0.5  # norm at which a feature vector is clipped, as a share of the largest that an image can have; public


def basis(size: int, components: int) -> Floats:
    """Orthonormal DCT-II rows (k, size), lowest frequencies first."""
    k, n = np.arange(components)[:, None], np.arange(size)[None, :]
    rows = np.cos(np.pi * (n + 0.5) * k / size) * math.sqrt(2.0 / size)
    rows[0] /= math.sqrt(2.0)
    return rows


def features(images: NDArray[np.uint8], components: int) -> Floats:
    """Images (N, C, H, W) as vectors (N, d) of norm at most 1."""
    count, channels, size, _ = images.shape
    rows = basis(size, components)
    pixels = images.astype(np.float64) / 127.5 - 1.0
    flat = (rows @ pixels @ rows.T).reshape(count, channels * components**2) / (REACH * math.sqrt(channels) * size)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.maximum(norms, 1.0)


def class_sums(units: Units, classes: int, components: int) -> dict[str, Floats]:
    """Sums over units; a unit adds a vector of norm at most 1 and its square, of norm at most 1: sqrt(2) together.

    A unit of several images adds their mean, so that it moves the sums no more than one image would.

    Returns:
        "means" (K, d): by class; "squares" (d (d + 1) / 2,): of all classes together, off-diagonal entries times
        sqrt(2), so that the norm is that of the whole matrix.
    """
    vectors, weights = features(units.images.images, components), units.weights()
    means = np.zeros((classes, vectors.shape[1]))
    np.add.at(means, units.images.labels, vectors * weights[:, None])
    return {"means": means, "squares": _pack((vectors * weights[:, None]).T @ vectors)}


def _pack(matrix: Floats) -> Floats:
    upper = np.triu_indices(len(matrix))
    return matrix[upper] * np.where(upper[0] == upper[1], 1.0, math.sqrt(2.0))


def _unpack(packed: Floats, d: int) -> Floats:
    upper = np.triu_indices(d)
    matrix = np.zeros((d, d))
    matrix[upper] = packed / np.where(upper[0] == upper[1], 1.0, math.sqrt(2.0))
    return matrix + np.triu(matrix, 1).T


@dataclass(frozen=True)
class Prior:
    """A Gaussian a class, with a covariance that the classes share.

    Attributes:
        means: (K, d).
        scales: (r, d), a square root of the covariance.
    """

    means: Floats
    scales: Floats
    size: int
    channels: int

    @classmethod
    def fit(cls, sums: dict[str, Floats], counts: Floats, *, noise_std: float, size: int, channels: int) -> Prior:
        """From noisy sums over all sites and noisy counts; post-processing.

        Args:
            counts: (K,), at least 1 each.
            noise_std: of each number in `sums`. A class mean is drawn towards the mean of all by the share of noise in
                it (James and Stein 1961); eigenvalues that noise alone would make are dropped, the others shrunk by
                what it adds to them (Benaych-Georges and Nadakuditi 2011).
        """
        total, d = counts.sum(), sums["means"].shape[1]
        overall = sums["means"].sum(axis=0) / total
        apart = sums["means"] / counts[:, None] - overall
        noise = d * (noise_std / counts) ** 2  # a rare class is mostly noise: draw it towards the mean of all
        keep = np.maximum(0.0, 1.0 - noise / np.maximum(np.square(apart).sum(axis=1), 1e-12))
        means = overall + keep[:, None] * apart
        within = _unpack(sums["squares"], d) / total - (means.T * (counts / total)) @ means
        values, vectors = np.linalg.eigh((within + within.T) / 2)
        edge = 2.0 * noise_std / total / math.sqrt(2.0) * math.sqrt(d)
        kept = values > edge
        clean = (values[kept] + np.sqrt(values[kept] ** 2 - edge**2)) / 2
        return cls(means, np.sqrt(clean)[:, None] * vectors[:, kept].T, size, channels)

    def sample(self, labels: NDArray[np.int64], rng: np.random.Generator) -> ImageSet:
        """Images of the given classes."""
        drawn = self.means[labels] + rng.standard_normal((len(labels), len(self.scales))) @ self.scales
        k = round(math.sqrt(drawn.shape[1] / self.channels))
        rows = basis(self.size, k)
        flat = drawn.reshape(len(labels), self.channels, k, k) * (REACH * math.sqrt(self.channels) * self.size)
        pixels = rows.T @ flat @ rows
        return ImageSet(np.clip((pixels + 1.0) * 127.5, 0, 255).round().astype(np.uint8), labels)
