"""The corpus: public images carried, class by class, to the private moments. The network learns from it.

SPDX-License-Identifier: Apache-2.0

Shapes come from public images, statistics from the sites: in the low coordinates by the optimal map between two
Gaussians (Peyré and Cuturi 2019, remark 2.31), above them by one gain for each band. A class can get its shapes from
those public images alone that look most like it by its moments. All of it is post-processing of noisy sums.
N images, C channels, S pixels a side, K classes, d low and h high coordinates (`common/moments.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from common.images import ImageSet
from common.moments import Coordinates, Floats
from common.prior import Prior

_AT_ONCE = 256
_SMALLEST = 1e-3  # of the largest public standard deviation: below it a direction is not stretched
_NOTHING = 1e-9  # variance or power that no image has
_MOST = 2.5  # gain of a direction or a band; there is no least one
_FEWEST = 500  # images of a class, where there are as many: fewer say little of a covariance


def carried(public: ImageSet, prior: Prior, *, likely: Floats | None = None, class_share: float = 1.0) -> ImageSet:
    """For each class, public images carried to its moments: those of that class, or where none is known to be, a share.

    Args:
        public: images (N, C, S, S).
        prior: of the sites' noisy moments.
        likely: (N, K), how likely each class is for a public image, in logarithms but for what classes share.
        class_share: of the images, those that `likely` speaks most for; without it every class has all.

    Returns:
        At most K·N images, class by class.
    """
    low, power = _measured(public.images, prior.space)
    images = list[NDArray[np.uint8]]()
    for kind in range(len(prior.means)):
        mine = of_class(public, kind)
        if mine.all() and likely is not None:
            mine = _share(likely, kind, class_share)
        turn = _map(_covariance(low[mine]), prior.covariances[kind])
        gains = _gains(power[mine].mean(axis=0), prior.high[kind], prior.space)
        move = _Move(prior.space, low[mine].mean(axis=0), turn, prior.means[kind], gains)
        images.append(move.done(public.images[mine]))
    return _labelled(images)


def carried_together(public: NDArray[np.uint8], prior: Prior) -> NDArray[np.uint8]:
    """Public images (N, C, S, S) carried to the moments of all classes as one."""
    low, power = _measured(public, prior.space)
    mean = prior.shares @ prior.means
    apart = prior.means - mean
    whole = np.einsum("k,kde->de", prior.shares, prior.covariances + apart[:, :, None] * apart[:, None, :])
    gains = _gains(power.mean(axis=0), np.einsum("k,kcij->cij", prior.shares, prior.high), prior.space)
    return _Move(prior.space, low.mean(axis=0), _map(_covariance(low), whole), mean, gains).done(public)


def uncarried(public: ImageSet, classes: int) -> ImageSet:
    """The same where there are no private moments: each class has the public images as they are."""
    return _labelled([public.images[of_class(public, kind)] for kind in range(classes)])


def _labelled(parts: list[NDArray[np.uint8]]) -> ImageSet:
    """The images of each class, one class after another."""
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return ImageSet(np.concatenate(parts), labels.astype(np.int64))


def of_class(public: ImageSet, kind: int) -> NDArray[np.bool_]:
    """Which public images are of one class, (N,); all where not even two have that label."""
    mine = public.labels == kind
    return mine if mine.sum() > 1 else np.ones_like(mine)


def _share(likely: Floats, kind: int, share: float) -> NDArray[np.bool_]:
    """Which images (N,) speak most for one class and against the likeliest other; not too few."""
    images = len(likely)
    against = np.delete(likely, kind, axis=1).max(axis=1)
    many = min(images, max(round(share * images), _FEWEST))
    mine = np.zeros(images, dtype=bool)
    mine[np.argsort(against - likely[:, kind], kind="stable")[:many]] = True
    return mine


def low_moments(public: NDArray[np.uint8], space: Coordinates) -> tuple[Floats, Floats]:
    """Mean (d,) and covariance (d, d), positive definite, of images' low coordinates."""
    low, _ = _measured(public, space)
    return low.mean(axis=0), _covariance(low)


def _covariance(low: Floats) -> Floats:
    covariance: Floats = np.atleast_2d(np.cov(low.T))
    return covariance + np.eye(len(covariance)) * (_SMALLEST**2 * np.trace(covariance) + _NOTHING)


def _measured(images: NDArray[np.uint8], space: Coordinates) -> tuple[Floats, Floats]:
    """(low coordinates (N, d), power by band (N, bands)); in blocks: all high coordinates would fill memory."""
    lows, powers = [], []
    for start in range(0, len(images), _AT_ONCE):
        low, high = space.of(images[start : start + _AT_ONCE])
        lows.append(low)
        powers.append(space.by_band(np.square(np.concatenate([low, high], axis=1))))
    return np.concatenate(lows), np.concatenate(powers)


def _map(public: Floats, private: Floats) -> Floats:
    """A with A public Aᵀ = private, the least change of all, (d, d); no gain is larger than _MOST.

    Where public images hardly vary, a large gain would not make private shapes of theirs, but coloured rings.
    """
    root, back = _roots(public)
    middle, _ = _roots(root @ private @ root)
    gains, vectors = np.linalg.eigh(back @ middle @ back)
    found: Floats = (vectors * np.clip(gains, 0.0, _MOST)) @ vectors.T
    return found


def _roots(matrix: Floats) -> tuple[Floats, Floats]:
    """Square root of a symmetric matrix, and the root's inverse."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values, values.max() * _SMALLEST**2))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _gains(have: Floats, private: Floats, space: Coordinates) -> Floats:
    """By high coordinate (h,): square root of private over public power (bands,) in its band, at most _MOST."""
    bands = space.bands[~space.low]
    want = np.bincount(bands, private[~space.low], space.band_count)
    gains: Floats = np.minimum(np.sqrt(want / np.maximum(have, _NOTHING)), _MOST)[bands]
    return gains


@dataclass(frozen=True)
class _Move:
    """What happens to an image: low coordinates x to turn (x - mean) + target, high ones times gains."""

    space: Coordinates
    mean: Floats
    turn: Floats
    target: Floats
    gains: Floats

    def done(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Images (N, C, S, S), moved."""
        return np.concatenate([self._block(images[at : at + _AT_ONCE]) for at in range(0, len(images), _AT_ONCE)])

    def _block(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        space = self.space
        low, high = space.of(images)
        weighted = np.zeros((len(images), *space.low.shape))
        weighted[:, space.low] = (low - self.mean) @ self.turn.T + self.target
        weighted[:, ~space.low] = high * self.gains
        coefficients = np.einsum("ec,neij->ncij", space.colours, weighted / space.weights)
        pixels: Any = fft.idctn(coefficients, axes=(2, 3), norm="ortho")
        return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
