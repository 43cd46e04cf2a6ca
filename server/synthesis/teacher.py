"""The teacher: a linear classifier made of the sites' noisy class features, and the images that it chooses.

SPDX-License-Identifier: Apache-2.0

An image that is carried to a class's moments has that class's brightness and large shapes, but often the edges and
textures of another one. Whoever trains on such images learns the wrong thing. The teacher, which has learnt from the
real images of all sites, leaves those out that are least of their class. All of it is post-processing of noisy sums.
N images, K classes, F features, m of their directions (`common/features.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.features import MEANS_PART, SECOND_MOMENTS_PART, View, clipped, means_and_products
from common.images import ImageSet
from common.moments import Floats
from common.scattering import Scattering

_SEEN = 3000  # public images that directions are found in
_WHITENING = 0.125  # power of the variances that directions are divided by: 0.5 would make all of them alike
_LEAST_STD = 0.05  # of the middle one: a feature in which public images hardly vary is not stretched without end
_NOTHING = 1e-6  # of the largest variance: a direction in which public images do not vary is none
_LEAST_VARIANCE = 3e-3  # of the largest
_NOISE_FLOOR = 0.5  # of the largest eigenvalue that noise alone gives: below it a direction tells nothing
_AT_ONCE = 512  # images whose features are in memory together
_FEWEST = 500  # images of a class that are kept, where there are as many


def view_of(public: NDArray[np.uint8], features: Scattering, *, many: int, seed: int) -> View:
    """Principal directions (F, many) of public images' features, each feature divided by its standard deviation."""
    rows = np.random.default_rng(seed).permutation(len(public))[:_SEEN]
    found = features.of(public[rows]).astype(np.float64)
    centre, std = found.mean(axis=0), found.std(axis=0)
    std = np.maximum(std, max(_LEAST_STD * float(np.median(std)), 1e-6))
    apart = (found - centre) / std
    _, sizes, axes = np.linalg.svd(apart, full_matrices=False)
    shares = np.maximum(np.square(sizes / max(float(sizes[0]), 1e-12))[:many], 1e-12)
    directions = axes[:many].T / std[:, None] * np.where(shares > _NOTHING, shares**-_WHITENING, 0.0)
    directions = np.pad(directions, ((0, 0), (0, many - directions.shape[1])))
    lengths = np.linalg.norm((found - centre) @ directions, axis=1)
    directions /= max(float(np.median(lengths)), 1e-12)
    return View(centre.astype(np.float32), directions.astype(np.float32))


@dataclass(frozen=True)
class Teacher:
    """Fisher's linear discriminant of class features, every class as likely as any other.

    Attributes:
        weights: (m, K).
        offset: (K,).
    """

    features: Scattering
    view: View
    weights: Floats
    offset: Floats

    @classmethod
    def fit(
        cls, features: Scattering, view: View, means: Floats, second_moments: Floats, counts: Floats, *,
        noise_std: float,
    ) -> Teacher:  # fmt: skip
        """From noisy sums over all sites.

        Args:
            means, second_moments: of `feature_sums`.
            counts: (K,), noisy.
            noise_std: of each number in the sums.
        """
        counts, live = np.maximum(counts, 1.0), np.abs(view.directions).max(axis=0) > 0
        each, products = means_and_products(means, second_moments, counts)
        each, products = each[:, live], products[np.ix_(live, live)]
        within = products - (each.T * (counts / counts.sum())) @ each
        values, vectors = np.linalg.eigh(within)
        of_noise = noise_std / SECOND_MOMENTS_PART / counts.sum() * math.sqrt(2.0 * len(within))  # Wigner's semicircle
        values = np.maximum(values, max(_NOISE_FLOOR * of_noise, _LEAST_VARIANCE * values[-1], 1e-12))
        weights = np.zeros((len(live), len(counts)))
        weights[live] = (vectors / values) @ vectors.T @ each.T
        lengths = np.einsum("kd,dk->k", each, weights[live])
        # A noisy mean is longer than the true one, most of all that of a rare class, which would never be likeliest.
        lengths -= np.square(noise_std / MEANS_PART / counts) * (1.0 / values).sum()
        return cls(features, view, weights, -0.5 * lengths)

    def scores(self, images: NDArray[np.uint8]) -> Floats:
        """Log-likelihood of each class but for what all classes share, (N, K)."""
        parts = [images[at : at + _AT_ONCE] for at in range(0, len(images), _AT_ONCE)]
        vectors = [clipped(self.view.of(self.features.of(part))) for part in parts]
        return np.concatenate(vectors) @ self.weights + self.offset

    def margins(self, images: ImageSet) -> Floats:
        """By how much an image's own class is likelier than the likeliest other, (N,): over 0 where it agrees."""
        scores, rows = self.scores(images.images), np.arange(len(images))
        own = scores[rows, images.labels]
        scores[rows, images.labels] = -np.inf
        margins: Floats = own - scores.max(axis=1)
        return margins

    def kept(self, corpus: ImageSet, share: float) -> ImageSet:
        """Of each class this share, those that speak most for it and against the likeliest other; never too few.

        A share and no threshold: an image that was carried to one class's moments is a stranger to the teacher, which
        may take most of a class for another one, and still tells well which of them are more of it than the rest.
        """
        margins, rows = self.margins(corpus), list[NDArray[np.int64]]()
        for kind in np.unique(corpus.labels):
            mine = np.flatnonzero(corpus.labels == kind)
            rows.append(_most(margins, mine, max(round(share * len(mine)), _FEWEST)))
        return corpus.select(np.concatenate(rows))

    def chosen(self, candidates: ImageSet, labels: NDArray[np.int64]) -> ImageSet:
        """One image for each label (N,), in their order: of its class those that are most of it, as they come.

        Args:
            candidates: at least as many of each class as labels.
        """
        margins, picked = self.margins(candidates), np.zeros(len(labels), dtype=np.int64)
        for kind in np.unique(labels):
            places = np.flatnonzero(labels == kind)
            picked[places] = _most(margins, np.flatnonzero(candidates.labels == kind), len(places))
        return candidates.select(picked)


def _most(margins: Floats, mine: NDArray[np.int64], many: int) -> NDArray[np.int64]:
    """Of some rows as many as are asked for, those of the largest margins, in their order."""
    return np.sort(mine[np.argsort(-margins[mine], kind="stable")[:many]])
