"""A Gaussian per class, from private moments: where public images are carried to.

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
    MEAN_CLIP_NORM,
    MEANS_PART,
    NORM_CLIP,
    NORM_PART,
    SECOND_MOMENTS_PART,
    SPREAD_CLIP_NORM,
    Coordinates,
    Floats,
    class_means,
    unpack,
)

_SMALLEST = 0.05  # of the guess's variance, at the private scale: noise may leave no variance at all
_TYPICAL = 0.05  # squared, how far a class's mean factor is from 1 as a rule, and its factors from that mean
_LEAST, _MOST = 0.2, 5.0  # of a class's factor in a band
_LARGEST_BACK = 16.0  # of a squared length: clipping at a quarter
_STEEPEST = 0.95  # a direction keeps at least 5 % of the variance that its coordinates would have if independent


@dataclass(frozen=True)
class Prior:
    """Gaussian images per class: its mean, and a covariance that is one for all classes but for the scale of each band.

    Attributes:
        means: (K, d).
        covariances: (K, d, d), of low coordinates.
        high: (K, C, S, S), variance of each coordinate; 0 at the low ones.
        shares: (K,), of the images, by noisy counts; their sum is 1.
    """

    space: Coordinates
    means: Floats
    covariances: Floats
    high: Floats
    shares: Floats

    @classmethod
    def fit(
        cls, space: Coordinates, sums: Floats, second_moments: Floats, band_power: Floats, norm: Floats, counts: Floats,
        *, noise_std: float, public: Floats, public_mean: Floats,
    ) -> Prior:  # fmt: skip
        """From noisy sums over all sites.

        Args:
            sums, second_moments, band_power, norm: of `class_sums` and `spread_sums`.
            counts: (K,), noisy.
            noise_std: of each number in the sums.
            public: (d, d), covariance of public images: what stands where noise leaves nothing of the sums.
            public_mean: (d,), the same for the mean of all classes.
        """
        counts = np.maximum(counts, 1.0)
        total = counts.sum()
        means = class_means(sums, counts, space, noise_std=noise_std)
        means = means + _pulled(counts @ means / total, public_mean, space, noise_std / total)
        back = taken_by_clipping(band_power, norm, noise_std=noise_std)
        scale = back * SPREAD_CLIP_NORM**2 / total / SECOND_MOMENTS_PART
        within = _symmetric(space, unpack(second_moments, space.dimension) * scale, noise_std * scale, public)
        power = np.maximum(band_power.sum(axis=0) * back * SPREAD_CLIP_NORM**2 / total / BAND_POWER_PART, 0.0)
        high = _spread(space, power)
        factors = band_factors(band_power, counts, noise_std=noise_std)
        stretch = np.sqrt(factors[:, space.bands[space.low]])
        covariances = stretch[:, :, None] * within * stretch[:, None, :]
        return cls(space, means, covariances, high * factors[:, space.bands], counts / total)


def _pulled(mean: Floats, public: Floats, space: Coordinates, noise_std: float) -> Floats:
    """What draws the mean of all images (d,) to the public one, by the share of noise in their distance.

    Args:
        noise_std: of each number in the noisy sum of means over the number of images.
    """
    still = space.blocks[0][0]
    apart = (mean - public) @ still @ still.T
    noise = still.shape[1] * (noise_std * MEAN_CLIP_NORM / MEANS_PART) ** 2
    return -apart * min(1.0, noise / max(float(np.square(apart).sum()), 1e-12))


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


def _symmetric(space: Coordinates, noisy: Floats, noise_std: float, public: Floats) -> Floats:
    """`cleaned`, block by block of the space's symmetry: what it forbids is noise, what it repeats is averaged.

    Noise on a packed matrix is the same in every orthonormal basis, so each block is cleaned as a matrix of its own.
    """
    whole = np.zeros_like(noisy)
    for bases in space.blocks:
        mean, guess = (np.mean([basis.T @ m @ basis for basis in bases], axis=0) for m in (noisy, public))
        clean = cleaned(mean, noise_std / math.sqrt(len(bases)), guess)
        for basis in bases:
            whole += basis @ clean @ basis.T
    return whole


def cleaned(noisy: Floats, noise_std: float, guess: Floats) -> Floats:
    """A covariance (d, d) from a noisy one: positive definite, and without most of what noise alone puts into it.

    All is done along the guess's own directions, for noise is alike in every basis, and it must not show where images
    hardly vary at all. Variances there, as multiples of the guess's, and correlations are drawn towards the guess by
    the share of noise in each; how far real ones are from it is estimated from all of them together (Wiener's filter;
    Efron and Morris 1973). Eigenvalues of the correlations that come out are at least 1 - _STEEPEST.

    Args:
        noise_std: of a diagonal entry; 1/sqrt(2) of it off the diagonal.
        guess: (d, d), positive definite, of any scale.
    """
    own, basis = np.linalg.eigh(guess)
    noisy = basis.T @ noisy @ basis
    ratio, noise = np.diag(noisy) / own, np.square(noise_std / own)
    scale = max(_mean(ratio, noise), _SMALLEST * abs(float(np.trace(noisy))) / float(own.sum()), 1e-9)
    variances = own * np.maximum(scale + _drawn(ratio - scale, noise), _SMALLEST * scale)
    std, off = np.sqrt(variances), ~np.eye(len(noisy), dtype=bool)
    correlation = np.eye(len(noisy))
    noise = noise_std**2 / 2.0 / np.outer(variances, variances)
    correlation[off] = _drawn((noisy / np.outer(std, std))[off], noise[off])
    values, vectors = np.linalg.eigh(correlation)
    correlation = (vectors * np.maximum(values, 1.0 - _STEEPEST)) @ vectors.T
    std = std / np.sqrt(np.diag(correlation))
    whole: Floats = basis @ (correlation * np.outer(std, std)) @ basis.T
    return whole


def _mean(values: Floats, noise: Floats) -> float:
    """Mean by inverse variance."""
    noise = np.maximum(noise, 1e-12)
    return float((values / noise).sum() / (1.0 / noise).sum()) if len(values) else 0.0


def _drawn(apart: Floats, noise: Floats) -> Floats:
    """Noisy differences drawn towards none; `noise` is the variance of each.

    Real ones are taken to be of one size, that which is left of all of them, each counting by how sure it is.
    """
    noise = np.maximum(noise, 1e-12)
    real = max(_mean(np.square(apart) - noise, np.square(noise)), 1e-9)
    drawn: Floats = apart * real / (real + noise)
    return drawn


def _spread(space: Coordinates, power: Floats) -> Floats:
    """Power by band (bands,) as variances (C, S, S) of high coordinates, in the public spectrum's proportions."""
    guess = np.where(space.low, 0.0, np.square(space.spectrum * space.weights))
    whole = np.bincount(space.bands.ravel(), guess.ravel(), space.band_count)
    variances: Floats = guess * (power / np.maximum(whole, 1e-300))[space.bands]
    return np.where(space.low, 0.0, variances)
