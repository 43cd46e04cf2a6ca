"""Class moments: what a site sums about its images, in public coordinates, and how far one unit can move the sums.

SPDX-License-Identifier: Apache-2.0

N images, U units, K classes, C channels, S pixels a side, d low and h high coordinates.

An image is turned into DCT coefficients of its (opponent) colours, each multiplied by a public weight that grows with
frequency as natural images fade with it (Field 1987), so that a clipping norm and noise fall on all frequencies alike.
The lowest frequencies are the *low* coordinates, with means a class and one covariance of all classes; what sets the
classes' covariances apart is their energy by *band* (a third of an octave of one colour), over low and high ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.images import Units
from common.study import Symmetry

Floats = NDArray[np.float64]
MEAN_REACH, SPREAD_REACH = 2.5, 1.5  # clipping norms, in units of a typical image's norm (1 by the public spectrum)
NORM_REACH = 3.0  # where an image's norm itself is clipped: hardly any image is so far from its class's mean
_AMPLITUDE, _FADING = 0.2, 1.5  # public spectrum: std of coefficient (i, j) as a share of white, 0.2 (1 + i + j)^-1.5
_CHROMA = 0.5  # of that, for the colour differences
_WEIGHTING = 1.0  # weight (1 + i + j)^1: below the fading, so that low frequencies still count for more
_HIGH_NORM = 0.5  # typical norm of an image's high coordinates
_BANDS_PER_OCTAVE = 3
MEANS_PART, SQUARES_PART, ENERGIES_PART, NORM_PART = 0.40, 0.84, 0.35, 0.10  # of one unit's norm; squares sum to < 1
SPREAD_PART = math.hypot(SQUARES_PART, ENERGIES_PART, NORM_PART)
_AT_ONCE = 256  # images whose coefficients are in memory together
_OPPONENT = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]) / np.sqrt(np.array([[3.0], [2.0], [6.0]]))


def dct_basis(size: int) -> Floats:
    """Orthonormal DCT-II rows (size, size), lowest frequency first."""
    k, n = np.arange(size)[:, None], np.arange(size)[None, :]
    rows: Floats = np.cos(np.pi * (n + 0.5) * k / size) * math.sqrt(2.0 / size)
    rows[0] /= math.sqrt(2.0)
    return rows


@dataclass(frozen=True)
class Coordinates:
    """The public coordinates of a study's images.

    Args:
        size: S.
        channels: C, 1 or 3.
        components: lowest frequencies a side among the low coordinates; colour differences have half as many.
        symmetry: changes of an image under which their distribution is the same, as far as the study knows.
    """

    size: int
    channels: int
    components: int
    symmetry: Symmetry = "none"

    @cached_property
    def colours(self) -> NDArray[Any]:
        """Orthonormal (C, C): brightness first, then colour differences."""
        return _OPPONENT if self.channels == 3 else np.ones((1, 1))

    @cached_property
    def low(self) -> NDArray[np.bool_]:
        """(C, S, S): which coefficients are low coordinates."""
        i = np.arange(self.size)
        sides = [self.components, *[max(1, self.components // 2)] * (self.channels - 1)]
        return np.stack([(i[:, None] < side) & (i[None, :] < side) for side in sides])

    @cached_property
    def _radius(self) -> Floats:
        i = np.arange(self.size)
        return np.broadcast_to(1.0 + i[:, None] + i[None, :], self.low.shape).astype(np.float64)

    @cached_property
    def _white(self) -> float:
        return self.size * math.sqrt(self.channels)  # norm of an all-white image

    @cached_property
    def spectrum(self) -> Floats:
        """(C, S, S): the public guess of each coefficient's standard deviation, in pixels of [-1, 1]."""
        amplitude = np.array([1.0, *[_CHROMA] * (self.channels - 1)])[:, None, None]
        return _AMPLITUDE * amplitude * self._radius**-_FADING * self._white

    @cached_property
    def weights(self) -> Floats:
        """(C, S, S): coordinate = weight × coefficient; by the public spectrum, low coordinates have norm 1."""
        weights = self._radius**_WEIGHTING / self._white
        typical = np.square(weights * self.spectrum)
        norm_low, norm_high = np.sqrt(typical[self.low].sum()), np.sqrt(typical[~self.low].sum())
        return weights * np.where(self.low, 1.0 / norm_low, _HIGH_NORM / max(norm_high, 1e-12))

    @cached_property
    def bands(self) -> NDArray[np.int64]:
        """(C, S, S): the band, from 0, of each coordinate: by colour, thirds of octaves of frequency, low or high."""
        octave = (np.log2(self._radius) * _BANDS_PER_OCTAVE).astype(np.int64)
        colour = np.arange(self.channels)[:, None, None] * 1000
        keys = octave + colour + 500 * self.low
        return np.unique(keys, return_inverse=True)[1].reshape(self.low.shape).astype(np.int64)

    @cached_property
    def blocks(self) -> tuple[tuple[Floats, ...], ...]:
        """Parts of the low coordinates that images of this symmetry do not correlate: groups of bases, (d, m) each.

        All bases together are orthonormal, and those of a group have the same covariance (Schur's lemma; Shah and
        Chandrasekaran 2012). The first group is one basis, of the patterns that no change changes: a mean lies in it.
        A mirror flips the sign of odd columns; a quarter turn also exchanges rows and columns.
        """
        if self.symmetry == "none":
            return ((np.eye(self.dimension),),)
        colour, row, column = np.nonzero(self.low)
        if self.symmetry == "mirror":
            return _some((np.eye(self.dimension)[:, column % 2 == odd],) for odd in (0, 1))
        index = np.full(self.low.shape, -1)
        index[colour, row, column] = np.arange(self.dimension)
        swapped = np.eye(self.dimension)[:, index[colour, column, row]]
        even, unit = np.stack([row, column]) % 2 == 0, np.eye(self.dimension)
        alike, above = even[0] == even[1], row < column
        sums = np.where(row == column, unit, (unit + swapped) / math.sqrt(2.0))
        differences = (unit - swapped) / math.sqrt(2.0)
        return _some(
            [(sums[:, alike & (even[0] == kind) & (row <= column)],) for kind in (True, False)]
            + [(differences[:, alike & (even[0] == kind) & above],) for kind in (True, False)]
            + [(unit[:, even[0] & ~even[1]], swapped[:, even[0] & ~even[1]])]
        )

    @property
    def dimension(self) -> int:
        """d."""
        return int(self.low.sum())

    @property
    def packed(self) -> int:
        """Numbers in a packed symmetric matrix of the low coordinates."""
        return self.dimension * (self.dimension + 1) // 2

    @property
    def band_count(self) -> int:
        return int(self.bands.max()) + 1

    def by_band(self, low: Floats, high: Floats) -> Floats:
        """Sums over each band, (N, bands), of numbers of low (N, d) and high (N, h) coordinates."""
        member = np.eye(self.band_count)[np.concatenate([self.bands[self.low], self.bands[~self.low]])]
        sums: Floats = np.concatenate([low, high], axis=1) @ member
        return sums

    def of(self, images: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Images (N, C, S, S) -> low (N, d) and high (N, h) coordinates."""
        rows = dct_basis(self.size)
        pixels = images.astype(np.float64) / 127.5 - 1.0
        weighted = np.einsum("ec,ncij->neij", self.colours, rows @ pixels @ rows.T) * self.weights
        return weighted[:, self.low], weighted[:, ~self.low]


def _some(groups: Iterable[tuple[Floats, ...]]) -> tuple[tuple[Floats, ...], ...]:
    return tuple(group for group in groups if group[0].shape[1])


@lru_cache(maxsize=16)
def coordinates(size: int, channels: int, components: int, symmetry: Symmetry = "none") -> Coordinates:
    """The same object for the same study, since its arrays are made once."""
    return Coordinates(size, channels, components, symmetry)


def _portions(count: int) -> Iterator[slice]:
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))


def _clip(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1.0)


def class_sums(units: Units, classes: int, space: Coordinates) -> Floats:
    """Sums (K, d) over units of clipped low coordinates; a unit moves them by at most MEANS_PART in L2.

    A unit of several images adds their mean, so that it moves the sums no more than one image would.
    """
    sums, weights = np.zeros((classes, space.dimension)), units.weights()[:, None]
    for these in _portions(len(weights)):
        low, _ = space.of(units.images.images[these])
        np.add.at(sums, units.images.labels[these], _clip(low / MEAN_REACH) * weights[these])
    return MEANS_PART * sums


def class_means(sums: Floats, counts: Floats, space: Coordinates, *, noise_std: float) -> Floats:
    """Class means (K, d) from noisy sums and noisy counts (K,), at least 1 each; post-processing.

    What the mean of a symmetric distribution cannot have is left out. The rest of each mean is drawn towards the mean
    of all by the share of noise in it (James and Stein 1961): a rare class is mostly noise.
    """
    counts, still = np.maximum(counts, 1.0), space.blocks[0][0]
    sums, noise_std = sums @ still @ still.T / MEANS_PART, noise_std / MEANS_PART
    overall = sums.sum(axis=0) / counts.sum()
    apart = sums / counts[:, None] - overall
    noise = still.shape[1] * (noise_std / counts) ** 2
    keep = np.maximum(0.0, 1.0 - noise / np.maximum(np.square(apart).sum(axis=1), 1e-12))
    return (overall + keep[:, None] * apart) * MEAN_REACH


def spread_sums(units: Units, centres: Floats, space: Coordinates) -> dict[str, Floats]:
    """Sums over units of squares about given centres; a unit moves all of them together by at most SPREAD_PART in L2.

    Args:
        centres: (K, d), public or already private.

    Returns:
        "squares" (d (d + 1) / 2,): products of low coordinates, off-diagonal entries times sqrt(2), so that the norm
        is that of the whole matrix; "energies" (K, bands): squares of all coordinates by class and band; "norm" (1,):
        the squared norms that images had before clipping, so that what clipping took can be given back. With p, q, r
        for the three parts, an image's clipped vector (u, v) adds p u uᵀ, q times parts of u² and v², and at most r:
        of norm at most sqrt(p² |u|⁴ + q² (|u|² + |v|²)² + r²) ≤ sqrt(p² + q² + r²); a unit adds its images' mean.
    """
    d, weights = space.dimension, units.weights()[:, None]
    squares, energies = np.zeros((d, d)), np.zeros((len(centres), space.band_count))
    norm = np.zeros(1)
    for these in _portions(len(weights)):
        low, high = space.of(units.images.images[these])
        labels = units.images.labels[these]
        whole = np.concatenate([low - centres[labels], high], axis=1)
        norm += weights[these, 0] @ np.minimum(np.square(whole).sum(axis=1) / NORM_REACH**2, 1.0)
        clipped = _clip(whole / SPREAD_REACH)
        low, high = clipped[:, :d], clipped[:, d:]
        squares += (low * weights[these]).T @ low
        np.add.at(energies, labels, weights[these] * space.by_band(np.square(low), np.square(high)))
    return {
        "squares": SQUARES_PART * pack(squares), "energies": ENERGIES_PART * energies, "norm": NORM_PART * norm
    }  # fmt: skip


def pack(matrix: Floats) -> Floats:
    """Symmetric (d, d) as (d (d + 1) / 2,) of the same norm."""
    upper = np.triu_indices(len(matrix))
    return matrix[upper] * np.where(upper[0] == upper[1], 1.0, math.sqrt(2.0))


def unpack(packed: Floats, d: int) -> Floats:
    """The inverse of `pack`."""
    upper = np.triu_indices(d)
    matrix = np.zeros((d, d))
    matrix[upper] = packed / np.where(upper[0] == upper[1], 1.0, math.sqrt(2.0))
    return matrix + np.triu(matrix, 1).T
