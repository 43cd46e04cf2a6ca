"""Where a site's privacy-relevant randomness comes from: noise and Poisson sampling.

SPDX-License-Identifier: Apache-2.0

Default is an AES-256 counter-mode stream keyed by the operating system: nobody who sees outputs can predict it. Only
tests and phantoms may give a seed; the source then says so in every claim.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

DRAWS = 4  # summed for one number, as in Opacus's secure mode


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
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` independent standard normal numbers, in float64; each the sum of four draws, halved.

        A single draw leaves gaps between the numbers that can occur, and which of them occurs after adding it to a
        secret tells something about the secret (Mironov 2012). A sum of draws has no such pattern that could be undone
        (Holohan and Braghin 2021; docs/adr/0010). The largest number that can occur is 17.3: beyond 8.6,
        where single draws end, the normal law has a mass of 1e-17, far below any delta.
        """
        return np.add.reduce(self._box_muller(DRAWS * count).reshape(DRAWS, count)) / np.sqrt(DRAWS)

    def _box_muller(self, count: int) -> NDArray[np.float64]:
        """Normal numbers from pairs of uniform ones (Box and Muller 1958); |x| < 8.66."""
        half = (count + 1) // 2
        draws = self.uniform(2 * half)
        radius = np.sqrt(-2.0 * np.log(draws[:half]))
        angle = 2.0 * np.pi * draws[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def normal_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers in float64, of the tensor's shape."""
        return torch.from_numpy(self.normal(tensor.numel())).reshape(tensor.shape)

    def poisson_mask(self, records: int, sample_rate: float) -> NDArray[np.bool_]:
        """Each of `records` records is chosen with probability `sample_rate`, independently."""
        if sample_rate >= 1.0:
            return np.ones(records, dtype=bool)
        return self.uniform(records) < sample_rate
