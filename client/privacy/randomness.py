"""Where a site's privacy-relevant randomness comes from: noise and Poisson sampling.

SPDX-License-Identifier: Apache-2.0

Default is an AES-256 counter-mode stream keyed by the operating system: nobody who sees outputs can predict it. Only
tests and phantoms may give a seed; the source then says so in every claim.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

DRAWS = 4  # summed for one normal number, as in Opacus's secure mode


class NoiseSource:
    """A stream of uniform and Gaussian numbers.

    Args:
        seed: None for the cryptographic source; an integer only for tests and phantoms.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.name = "aes-256-ctr, keyed by the operating system" if seed is None else "SEEDED: for tests only"
        key = os.urandom(32) if seed is None else hashlib.sha256(f"synthward test seed {seed}".encode()).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` numbers in the open interval (0, 1), 53 random bits each."""
        return ((self._words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` independent standard normal numbers, in float64; each the sum of four draws, halved.

        A single draw leaves gaps between the numbers that can occur, and which of them occurs after adding it to a
        secret tells something about the secret (Mironov 2012). A sum of draws has no such pattern that could be undone
        with less than an exhaustive search (Holohan and Braghin 2021; docs/adr/0010). The four draws of a number come
        from four different pairs of uniform ones, and two numbers have at most one pair in common.

        The largest number that can occur is 26.7. A pair ends where the normal law has a mass of 2^-128 = 3e-39 left:
        N numbers differ from ideal ones with probability N · 6e-39, which adds less than (1 + e^epsilon) · N · 6e-39
        to delta: 2e-27 for 1e8 numbers at epsilon 8.
        """
        half = (count + 1) // 2
        cosines, sines = self._box_muller(DRAWS * half)
        out = np.empty((2, half))
        np.sum(cosines.reshape(DRAWS, half), axis=0, out=out[0])
        out[1] = sum(sines[k::DRAWS] for k in range(DRAWS))  # other pairs meet here than in out[0]
        out /= math.sqrt(DRAWS)
        return out.reshape(-1)[:count]

    def _box_muller(self, pairs: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Two independent standard normal numbers of each pair (radius, angle) (Box and Muller 1958); |x| < 13.4."""
        coarse, fine, turn = self._words(3 * pairs).reshape(3, pairs)
        radius = (fine + 0.5) * 2.0**-64  # a uniform number of 128 bits: with 53 the tails would end at 8.6
        radius += coarse
        radius *= 2.0**-64
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle = turn * (2.0 * np.pi * 2.0**-64)
        cosine = np.cos(angle)
        cosine *= radius
        sine = np.sin(angle, out=angle)
        sine *= radius
        return cosine, sine

    def _words(self, count: int) -> NDArray[np.uint64]:
        """`count` words of 64 random bits."""
        words = np.zeros(count, dtype=np.uint64)
        self._stream.update_into(words.data.cast("B"), words.data.cast("B"))  # in place: quicker than a new buffer
        return words

    def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers in float64, of the tensor's shape."""
        return torch.from_numpy(self.normal(tensor.numel())).reshape(tensor.shape)

    def poisson_mask(self, records: int, sample_rate: float) -> NDArray[np.bool_]:
        """Each of `records` records is chosen with probability `sample_rate`, independently."""
        if sample_rate >= 1.0:
            return np.ones(records, dtype=bool)
        return self.uniform(records) < sample_rate
