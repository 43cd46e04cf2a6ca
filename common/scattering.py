"""Scattering features: what an image's edges and textures are, by fixed wavelets; nothing in them is learnt.

SPDX-License-Identifier: Apache-2.0

Two layers of wavelets and absolute values, each averaged over squares of pixels (Bruna and Mallat 2013). With such
features private learning needs few numbers and no network (Tramèr and Boneh 2021). Where images may be turned without
meaning anything else, features are averaged over all ways to turn them.

N images, C channels, S pixels per side, P paths, Q squares per side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.images import to_unit
from common.moments import OPPONENT
from common.study import Symmetry

_LARGEST = 64  # pixels per side: larger images are averaged down first
_PADDING = 4  # pixels, mirrored
_WIDTH, _FREQUENCY = 0.8, 0.75 * math.pi  # of the finest wavelet: pixels; radians per pixel
_ANGLES = 4  # of half a turn: a quarter turn is two of them
_AT_ONCE = 128

Path = tuple[tuple[int, int], ...]  # (scale, angle) of each layer


@dataclass(frozen=True)
class Scattering:
    """The features of a study's images.

    Args:
        size: S, from 8.
        channels: C, 1 or 3.
        symmetry: changes of an image that change no feature.
    """

    size: int
    channels: int
    symmetry: Symmetry

    @property
    def dimension(self) -> int:
        """Features of an image: P·C·Q²."""
        return len(self._paths) * self.channels * self._squares**2

    def of(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images (N, C, S, S) -> features (N, P·C·Q²); each row depends on its own image alone."""
        parts = [self._block(images[at : at + _AT_ONCE]) for at in range(0, len(images), _AT_ONCE)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dimension), np.float32)

    @cached_property
    def _scales(self) -> int:
        return 2 if self._side < 48 else 3

    @cached_property
    def _side(self) -> int:
        """Pixels per side of what the wavelets see: a multiple of a square's."""
        side = min(self.size, _LARGEST)
        return side - side % (4 if side < 48 else 8)

    @cached_property
    def _squares(self) -> int:
        return self._side // 2**self._scales

    @cached_property
    def _paths(self) -> tuple[Path, ...]:
        angles = range(_ANGLES)
        first = [(scale, angle) for scale in range(self._scales) for angle in angles]
        second = [((scale, angle), (scale + more, other))
                  for scale, angle in first for more in range(1, self._scales - scale) for other in angles]  # fmt: skip
        return ((), *((one,) for one in first), *second)

    @cached_property
    def _filters(self) -> tuple[Tensor, Tensor]:
        """(wavelets (scales, angles, M, M), average (M, M)), in the frequency domain."""
        side = self._side + 2 * _PADDING
        wavelets = [
            [_wavelet(side, _WIDTH * 2**scale, _FREQUENCY / 2**scale, math.pi * angle / _ANGLES, slant=4 / _ANGLES)
             for angle in range(_ANGLES)]
            for scale in range(self._scales)
        ]  # fmt: skip
        wide = _WIDTH * 2 ** (self._scales - 1)
        average = _bump(side, wide, (0.0, 0.0), 0.0, slant=1.0)
        return torch.from_numpy(np.array(wavelets)).float(), torch.from_numpy(average).float()

    def _block(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        x = to_unit(images)
        if self.size != self._side:
            x = F.interpolate(x, size=(self._side, self._side), mode="area")
        if self.channels == 3:
            x = torch.einsum("ec,nchw->nehw", torch.from_numpy(OPPONENT).float(), x)
        found = self._scattered(F.pad(x, (_PADDING,) * 4, mode="reflect"))
        return self._alike(found).flatten(1).numpy()

    def _scattered(self, x: Tensor) -> Tensor:
        """Padded images (N, C, M, M) -> averages (N, P, C, Q, Q), in the order of the paths."""
        wavelets, _ = self._filters
        known: dict[Path, Tensor] = {(): torch.fft.fft2(x)}
        found = [self._averaged(known[()])]
        for path in self._paths[1:]:
            scale, angle = path[-1]
            size = torch.fft.ifft2(known[path[:-1]] * wavelets[scale, angle]).abs()
            seen = torch.fft.fft2(size)
            if len(path) == 1 and scale + 1 < self._scales:
                known[path] = seen
            found.append(self._averaged(seen))
        return torch.stack(found, dim=1)

    def _averaged(self, seen: Tensor) -> Tensor:
        """Means over squares, (N, C, Q, Q), of what is smoothed first."""
        smooth = torch.fft.ifft2(seen * self._filters[1]).real
        inner = smooth[..., _PADDING : _PADDING + self._side, _PADDING : _PADDING + self._side]
        return F.avg_pool2d(inner, 2**self._scales)

    def _alike(self, found: Tensor) -> Tensor:
        """Averages over all changes of the symmetry: a turned image has its squares, and its angles, turned."""
        flips = (False,) if self.symmetry == "none" else (False, True)
        changes = [(flip, turns) for flip in flips for turns in range(4 if self.symmetry == "dihedral" else 1)]
        whole = torch.zeros_like(found)
        for flip, turns in changes:
            part = found[:, self._places(flip=flip, turns=turns)]
            whole += torch.rot90(part.flip(-1) if flip else part, turns, dims=(-2, -1))
        return whole / len(changes)

    def _places(self, *, flip: bool, turns: int) -> list[int]:
        """For each path, the path that becomes it when images are flipped and then turned."""
        place = {path: at for at, path in enumerate(self._paths)}

        def before(angle: int) -> int:
            angle = (angle + turns * (_ANGLES // 2)) % _ANGLES
            return -angle % _ANGLES if flip else angle

        return [place[tuple((scale, before(angle)) for scale, angle in path)] for path in self._paths]


def _bump(side: int, width: float, centre: tuple[float, float], angle: float, *, slant: float) -> NDArray[np.float64]:
    """A Gaussian over the frequencies (side, side), that repeats with them."""
    frequency = 2 * np.pi * np.fft.fftfreq(side)
    turns: Sequence[int] = (-1, 0, 1)
    whole = np.zeros((side, side))
    for down in turns:
        for right in turns:
            y = frequency[:, None] - centre[1] + 2 * np.pi * down
            x = frequency[None, :] - centre[0] + 2 * np.pi * right
            along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
            whole += np.exp(-0.5 * width**2 * (along**2 + (across / slant) ** 2))
    return whole


def _wavelet(side: int, width: float, frequency: float, angle: float, *, slant: float) -> NDArray[np.float64]:
    """Morlet's: a bump about a frequency, less what makes its mean zero."""
    centre = (frequency * math.cos(angle), frequency * math.sin(angle))
    bump, still = (_bump(side, width, at, angle, slant=slant) for at in (centre, (0.0, 0.0)))
    wavelet: NDArray[np.float64] = bump - still * (bump[0, 0] / still[0, 0])
    return wavelet


@lru_cache(maxsize=8)
def scattering(size: int, channels: int, symmetry: Symmetry) -> Scattering:
    """The same object for the same study, since its wavelets are made once."""
    return Scattering(size, channels, symmetry)
