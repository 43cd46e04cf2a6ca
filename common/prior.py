"""A Gaussian per class, from private moments or from public knowledge alone: what the diffusion model starts from.

SPDX-License-Identifier: Apache-2.0

K classes, C channels, S pixels per side, d low coordinates (`common/moments.py`).
Everything here is post-processing: it reads noisy sums and no image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.moments import (
    BAND_POWER_PART,
    NORM_CLIP,
    NORM_PART,
    SECOND_MOMENTS_PART,
    SPREAD_CLIP_NORM,
    Coordinates,
    Floats,
    class_means,
    unpack,
)

_SMALLEST = 0.05  # of the median variance: noise may leave no variance at all
_TYPICAL = 0.05  # squared, how far a class's mean factor is from 1 as a rule, and its factors from that mean
_LEAST, _MOST = 0.2, 5.0  # of a class's factor in a band
_LARGEST_BACK = 16.0  # of a squared length: clipping at a quarter
_STEEPEST = 0.95  # a direction keeps at least 5 % of the variance that its coordinates would have if independent


@dataclass(frozen=True)
class Prior:
    """Gaussian images per class: its mean, and a covariance that is one for all classes but for the scale of each band.

    Attributes:
        means: (K + 1, d); the last is the mean of all, for an image of unknown class.
        covariances: (K + 1, d, d), of low coordinates; the last is that of all images.
        high: (K + 1, C, S, S), variance of each coordinate; 0 at the low ones.
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
            np.repeat(np.where(space.low, 0.0, variances)[None], classes + 1, axis=0),
        )  # fmt: skip

    @classmethod
    def fit(
        cls, space: Coordinates, sums: Floats, second_moments: Floats, band_power: Floats, norm: Floats, counts: Floats,
        *, noise_std: float,
    ) -> Prior:  # fmt: skip
        """From noisy sums over all sites.

        Args:
            sums, second_moments, band_power, norm: of `class_sums` and `spread_sums`.
            counts: (K,), noisy.
            noise_std: of each number in the sums.
        """
        counts = np.maximum(counts, 1.0)
        shares, total = counts / counts.sum(), counts.sum()
        means = class_means(sums, counts, space, noise_std=noise_std)
        back = taken_by_clipping(band_power, norm, noise_std=noise_std)
        scale = back * SPREAD_CLIP_NORM**2 / total / SECOND_MOMENTS_PART
        within = _symmetric(space, unpack(second_moments, space.dimension) * scale, noise_std * scale)
        overall = shares @ means
        apart = means - overall
        everything = within + (apart.T * shares) @ apart
        power = np.maximum(band_power.sum(axis=0) * back * SPREAD_CLIP_NORM**2 / total / BAND_POWER_PART, 0.0)
        high = _spread(space, power)
        factors = band_factors(band_power, counts, noise_std=noise_std)
        stretch = np.sqrt(factors[:, space.bands[space.low]])
        covariances = np.concatenate([stretch[:, :, None] * within * stretch[:, None, :], everything[None]])
        return cls(
            space, np.vstack([means, overall]), covariances,
            np.concatenate([high * factors[:, space.bands], high[None]]),
        )  # fmt: skip


def taken_by_clipping(band_power: Floats, norm: Floats, *, noise_std: float) -> float:
    """By what to multiply clipped squares to undo what clipping took from them on average, 1 to 16.

    Clipping shortens an image's vector and leaves its direction, so what it takes from a covariance is a factor, but
    for how direction and length go together.

    Args:
        band_power: (K, bands), norm: (1,), noisy, of `spread_sums`.
        noise_std: of each number.
    """
    left = max(float(band_power.sum()), noise_std * math.sqrt(band_power.size), 1e-9) / BAND_POWER_PART
    before = norm[0] / NORM_PART
    return float(np.clip(before * NORM_CLIP**2 / (left * SPREAD_CLIP_NORM**2), 1.0, _LARGEST_BACK))


def band_factors(band_power: Floats, counts: Floats, *, noise_std: float) -> Floats:
    """How much more a class varies in a band than all classes do together, (K, bands), around 1.

    A factor is drawn towards the class's own mean over the bands, and that towards 1, by the share of noise in each
    (Efron and Morris 1973), so that a rare class, or a band with next to no power, has no factor of its own.

    Args:
        band_power: (K, bands), noisy, of `spread_sums`.
        counts: (K,), at least 1 each.
        noise_std: of each number in `band_power`.
    """
    whole = np.maximum(band_power.sum(axis=0) / counts.sum(), 1e-9)
    apart = band_power / counts[:, None] / whole - 1.0
    noise = np.square(noise_std / counts[:, None] / whole)
    weights = 1.0 / (noise + _TYPICAL)
    own = (apart * weights).sum(axis=1, keepdims=True) / (weights.sum(axis=1, keepdims=True) + 1.0 / _TYPICAL)
    drawn: Floats = np.clip(1.0 + own + (apart - own) * _TYPICAL / (_TYPICAL + noise), _LEAST, _MOST)
    return drawn


def _symmetric(space: Coordinates, noisy: Floats, noise_std: float) -> Floats:
    """`cleaned`, block by block of the space's symmetry: what it forbids is noise, what it repeats is averaged.

    Noise on a packed matrix is the same in every orthonormal basis, so each block is cleaned as a matrix of its own.
    """
    whole = np.zeros_like(noisy)
    for bases in space.blocks:
        mean = np.mean([basis.T @ noisy @ basis for basis in bases], axis=0)
        clean = cleaned(mean, noise_std / math.sqrt(len(bases)))
        for basis in bases:
            whole += basis @ clean @ basis.T
    return whole


def cleaned(noisy: Floats, noise_std: float) -> Floats:
    """A covariance (d, d) from a noisy one: positive definite, and without most of what noise alone puts into it.

    Variances are taken as they are. Each correlation is drawn towards none by the share of noise in it, which is large
    where the variances are small; how large real correlations are is estimated from all of them together (Wiener's
    filter; Efron and Morris 1973). Eigenvalues of what comes out are at least 1 - _STEEPEST.

    Args:
        noise_std: of a diagonal entry; 1/sqrt(2) of it off the diagonal.
    """
    diagonal = np.diag(noisy)
    floor = max(float(np.median(np.abs(diagonal))) * _SMALLEST, 1e-9)
    variances = np.maximum(diagonal, floor)
    std = np.sqrt(variances)
    correlation = noisy / np.outer(std, std)
    noise = np.maximum(noise_std**2 / 2.0 / np.outer(variances, variances), 1e-12)
    weights = np.where(np.eye(len(noisy)) > 0, 0.0, 1.0 / noise)
    real = max(float((weights * (np.square(correlation) - noise)).sum() / max(weights.sum(), 1e-300)), 1e-9)
    drawn = np.where(weights > 0, correlation * real / (real + noise), 1.0)
    values, vectors = np.linalg.eigh(drawn)
    drawn = (vectors * np.maximum(values, 1.0 - _STEEPEST)) @ vectors.T
    rescale = std / np.sqrt(np.diag(drawn))
    whole: Floats = drawn * np.outer(rescale, rescale)
    return whole


def _spread(space: Coordinates, power: Floats) -> Floats:
    """Power by band (bands,) as variances (C, S, S) of high coordinates, in the public spectrum's proportions."""
    guess = np.where(space.low, 0.0, np.square(space.spectrum * space.weights))
    whole = np.bincount(space.bands.ravel(), guess.ravel(), space.band_count)
    variances: Floats = guess * (power / np.maximum(whole, 1e-300))[space.bands]
    return np.where(space.low, 0.0, variances)
