"""Class moments: what a site sums about its images, in public coordinates, and how far one unit can move the sums.

SPDX-License-Identifier: Apache-2.0

N images, U units, K classes, C channels, S pixels per side, d low and h high coordinates.

An image is turned into DCT coefficients of its (opponent) colours, each multiplied by a public weight that grows with
frequency as natural images fade with it (Field 1987), so that a clip norm and noise fall on all frequencies alike.
The lowest frequencies are the *low* coordinates, with means per class and one covariance of all classes; what sets the
classes' covariances apart is their *band power* (a band is a third of an octave of one colour), over low and high ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from common.bounded import BoundedSum, Rows, sum_over_units
from common.images import Units
from common.study import Symmetry

Floats = NDArray[np.float64]
MEAN_CLIP_NORM, SPREAD_CLIP_NORM = 2.5, 1.5  # in units of a typical image's norm (1 by the public spectrum)
NORM_CLIP = 3.0  # where an image's norm itself is clipped: hardly any image is so far from its class's mean
_AMPLITUDE, _FADING = 0.2, 1.5  # public spectrum: std of coefficient (i, j) as a share of white, 0.2 (1 + i + j)^-1.5
_CHROMA = 0.5  # of that, for the colour differences
_WEIGHTING = 1.0  # weight (1 + i + j)^1: below the fading, so that low frequencies still count for more
_HIGH_NORM = 0.5  # typical norm of an image's high coordinates
_BANDS_PER_OCTAVE = 3
# The two sums are two parts of one release of sensitivity 1: the squares of their bounds add up to less than 1.
MEANS_PART, SECOND_MOMENTS_PART, BAND_POWER_PART, NORM_PART = 0.40, 0.84, 0.35, 0.10
SPREAD_PART = math.hypot(SECOND_MOMENTS_PART, BAND_POWER_PART, NORM_PART)
_BLOCK_BYTES = 24 << 20  # of the rows in memory together; clipping and summing them takes two to three times as much
OPPONENT = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]) / np.sqrt(np.array([[3.0], [2.0], [6.0]]))


def dct_basis(size: int) -> Floats:
    """Orthonormal DCT-II rows (size, size), lowest frequency first."""
    rows: Any = fft.dct(np.eye(size), axis=0, norm="ortho")  # scipy's own type says something else
    return rows


@dataclass(frozen=True)
class Coordinates:
    """The public coordinates of a study's images.

    Args:
        size: S.
        channels: C, 1 or 3.
        components: lowest frequencies per side among the low coordinates; colour differences have half as many.
        symmetry: changes of an image under which their distribution is the same, as far as the study knows.
    """

    size: int
    channels: int
    components: int
    symmetry: Symmetry = "none"

    @cached_property
    def colours(self) -> NDArray[Any]:
        """Orthonormal (C, C): brightness first, then colour differences."""
        return OPPONENT if self.channels == 3 else np.ones((1, 1))

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
        A horizontal flip changes the sign of odd columns; a quarter turn also exchanges rows and columns.
        """
        if self.symmetry == "none":
            return ((np.eye(self.dimension),),)
        colour, row, column = np.nonzero(self.low)
        if self.symmetry == "hflip":
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

    @cached_property
    def _by_band(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(order of low then high coordinates by band, where in that order each band begins)."""
        bands = np.concatenate([self.bands[self.low], self.bands[~self.low]])
        order = np.argsort(bands, kind="stable")
        return order, np.searchsorted(bands[order], np.arange(self.band_count))

    def by_band(self, numbers: Floats) -> Floats:
        """Sums over each band, (N, bands), of numbers of low and then high coordinates (N, d + h)."""
        order, starts = self._by_band
        sums: Floats = np.add.reduceat(numbers[:, order], starts, axis=1)
        return sums

    def of(self, images: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Images (N, C, S, S) -> low (N, d) and high (N, h) coordinates."""
        coefficients: Any = fft.dctn(images / 127.5 - 1.0, axes=(2, 3), norm="ortho", overwrite_x=True)
        weighted = np.einsum("ec,ncij->neij", self.colours, coefficients) * self.weights
        return weighted[:, self.low], weighted[:, ~self.low]


def _some(groups: Iterable[tuple[Floats, ...]]) -> tuple[tuple[Floats, ...], ...]:
    return tuple(group for group in groups if group[0].shape[1])


@lru_cache(maxsize=16)
def coordinates(size: int, channels: int, components: int, symmetry: Symmetry = "none") -> Coordinates:
    """The same object for the same study, since its arrays are made once."""
    return Coordinates(size, channels, components, symmetry)


def class_counts(units: Units, classes: int) -> BoundedSum:
    """Part "counts" (K,): units by class; a unit of images of several classes adds their shares, 1 in all."""
    each = np.eye(classes)
    return sum_over_units(
        units, {"counts": (classes,)}, 1.0, lambda these: {"counts": each[units.images.labels[these]]}
    )


def class_sums(units: Units, classes: int, space: Coordinates) -> BoundedSum:
    """Part "means" (K, d): low coordinates summed by class, clipped to MEAN_CLIP_NORM, which counts as MEANS_PART."""
    shapes = {"means": (classes, space.dimension)}

    def rows_of(these: slice) -> Rows:
        labels = units.images.labels[these]
        low, _ = space.of(units.images.images[these])
        means = np.zeros((len(labels), *shapes["means"]))
        means[np.arange(len(labels)), labels] = low * (MEANS_PART / MEAN_CLIP_NORM)
        return {"means": means}

    return sum_over_units(units, shapes, MEANS_PART, rows_of, at_once=_at_once(shapes, space))


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
    return (overall + keep[:, None] * apart) * MEAN_CLIP_NORM


def spread_sums(units: Units, centres: Floats, space: Coordinates) -> BoundedSum:
    """Sums of squares about given centres; all parts together have the bound SPREAD_PART.

    Args:
        centres: (K, d), public or already private.

    Returns:
        "second_moments" (d (d + 1) / 2,): products of low coordinates, packed; "band_power" (K, bands): squares of all
        coordinates by class and band; "norm" (1,): the squared norms that images had before clipping, so that what
        clipping took can be given back. With p, q, r for the three parts' sizes, an image's clipped vector (u, v) of
        norm 1 at most gives p u uᵀ, q times parts of u² and v², and at most r: a row of norm at most
        sqrt(p² |u|⁴ + q² (|u|² + |v|²)² + r²) ≤ SPREAD_PART, which is what rows are clipped to. So that clipping
        shortens none, and the bound does not rest on this.
    """
    d, classes, bands = space.dimension, len(centres), space.band_count
    shapes = {"second_moments": (space.packed,), "band_power": (classes, bands), "norm": (1,)}
    i, j = np.triu_indices(d)
    factor = SECOND_MOMENTS_PART * packing(d)

    def rows_of(these: slice) -> Rows:
        labels = units.images.labels[these]
        low, high = space.of(units.images.images[these])
        whole = np.concatenate([low - centres[labels], high], axis=1)
        norms = np.sqrt(np.square(whole).sum(axis=1, keepdims=True))
        whole /= np.maximum(norms, SPREAD_CLIP_NORM)
        products = np.take(whole, i, axis=1)
        products *= np.take(whole, j, axis=1)
        products *= factor
        power = np.zeros((len(labels), classes, bands))
        power[np.arange(len(labels)), labels] = BAND_POWER_PART * space.by_band(np.square(whole))
        return {
            "second_moments": products, "band_power": power,
            "norm": NORM_PART * np.minimum(norms / NORM_CLIP, 1.0) ** 2,
        }  # fmt: skip

    return sum_over_units(units, shapes, SPREAD_PART, rows_of, at_once=_at_once(shapes, space))


def _at_once(shapes: Mapping[str, tuple[int, ...]], space: Coordinates) -> int:
    """How many images' rows, with what is computed on the way to them, fit a block; at least 1."""
    numbers = sum(math.prod(shape) for shape in shapes.values()) + 4 * space.low.size
    return max(1, min(256, _BLOCK_BYTES // (8 * numbers)))


def packing(d: int) -> Floats:
    """What `pack` multiplies a matrix's upper entries with: 1 on the diagonal, else sqrt(2)."""
    i, j = np.triu_indices(d)
    return np.where(i == j, 1.0, math.sqrt(2.0))


def pack(matrix: Floats) -> Floats:
    """Symmetric (d, d) as (d (d + 1) / 2,) of the same norm."""
    return matrix[np.triu_indices(len(matrix))] * packing(len(matrix))


def unpack(packed: Floats, d: int) -> Floats:
    """The inverse of `pack`."""
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d)] = packed / packing(d)
    return matrix + np.triu(matrix, 1).T
