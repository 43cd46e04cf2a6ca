"""A Gaussian a class, from private moments or from public knowledge alone: what the diffusion model starts from.

SPDX-License-Identifier: Apache-2.0

K classes, C channels, S pixels a side, d low coordinates (`common/moments.py`).
Everything here is post-processing: it reads noisy sums and no image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.moments import SPREAD_REACH, Coordinates, Floats, class_means, unpack

_SMALLEST = 0.05  # of the median variance: noise may leave no variance at all
_STEEPEST = 0.95  # a direction keeps at least 5 % of the variance that its coordinates would have if independent


@dataclass(frozen=True)
class Prior:
    """Gaussian images: means a class, one covariance within classes.

    Attributes:
        means: (K + 1, d); the last is the mean of all, for an image of unknown class.
        covariances: (K + 1, d, d), of low coordinates; the last is that of all images.
        high: (C, S, S), variance of each coordinate; 0 at the low ones.
    """

    space: Coordinates
    means: Floats
    covariances: Floats
    high: Floats

    @classmethod
    def public(cls, space: Coordinates, classes: int) -> Prior:
        """What is known before any data: mid-grey on average, with the spectrum of natural images."""
        variances = np.square(space.spectrum * space.weights)
        covariance = np.diag(variances[space.low])
        return cls(
            space, np.zeros((classes + 1, space.dimension)), np.repeat(covariance[None], classes + 1, axis=0),
            np.where(space.low, 0.0, variances),
        )  # fmt: skip

    @classmethod
    def fit(
        cls, space: Coordinates, sums: Floats, squares: Floats, energies: Floats, counts: Floats, *, noise_std: float
    ) -> Prior:
        """From noisy sums over all sites.

        Args:
            sums, squares, energies: of `class_sums` and `spread_sums`.
            counts: (K,), noisy.
            noise_std: of each number in the sums.
        """
        counts = np.maximum(counts, 1.0)
        shares, total = counts / counts.sum(), counts.sum()
        means = class_means(sums, counts, noise_std=noise_std)
        scale = SPREAD_REACH**2 / total
        within = cleaned(unpack(squares, space.dimension) * scale, noise_std * scale)
        overall = shares @ means
        apart = means - overall
        everything = within + (apart.T * shares) @ apart
        covariances = np.concatenate([np.repeat(within[None], len(means), axis=0), everything[None]])
        return cls(space, np.vstack([means, overall]), covariances, _spread(space, energies * scale))


def cleaned(noisy: Floats, noise_std: float) -> Floats:
    """A covariance (d, d) from a noisy one: positive definite, and without what noise alone would put into it.

    Variances are taken as they are; of the correlations, eigenvalues within the noise's own are set to 1, the others
    drawn towards 1 by what noise adds to them (Benaych-Georges and Nadakuditi 2011, for additive noise).

    Args:
        noise_std: of a diagonal entry; 1/sqrt(2) of it off the diagonal.
    """
    diagonal = np.diag(noisy)
    floor = max(float(np.median(np.abs(diagonal))) * _SMALLEST, 1e-9)
    std = np.sqrt(np.maximum(diagonal, floor))
    values, vectors = np.linalg.eigh(noisy / np.outer(std, std))
    edge = 2.0 * noise_std / math.sqrt(2.0) * float(np.mean(std**-2.0)) * math.sqrt(len(noisy))
    above = values - 1.0
    shrunk = np.where(
        np.abs(above) > edge, (above + np.sign(above) * np.sqrt(np.maximum(above**2 - edge**2, 0.0))) / 2, 0.0
    )
    correlation = (vectors * (1.0 + np.maximum(shrunk, -_STEEPEST))) @ vectors.T
    rescale = std / np.sqrt(np.diag(correlation))
    return correlation * np.outer(rescale, rescale)


def _spread(space: Coordinates, energies: Floats) -> Floats:
    """Energies by band (bands,) as variances (C, S, S), within a band in the public spectrum's proportions."""
    high = np.square(space.spectrum * space.weights)[~space.low]
    whole = np.bincount(space.bands, high, space.band_count)
    variances = np.zeros(space.low.shape)
    variances[~space.low] = high * (np.maximum(energies, 0.0) / np.maximum(whole, 1e-300))[space.bands]
    return variances
