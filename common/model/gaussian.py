"""The part of the diffusion model that is known in closed form: the velocity of Gaussian images.

SPDX-License-Identifier: Apache-2.0

B records, K draws a record, C channels, S pixels a side, L classes, d low coordinates (`common/moments.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from common.model.diffusion import NoiseSchedule
from common.moments import dct_basis
from common.prior import Prior

_SMALLEST = 1e-6  # variance of a coefficient, in pixels² of [-1, 1]


class GaussianVelocity(nn.Module):
    """E[v | x_t] where x_0 of class y is Gaussian: linear in x_t, exact, nothing to train.

    With x_t = sqrt(ā) x_0 + sqrt(1 - ā) n, mean m and variance s along an eigenvector, the part along it of the best
    guess of the noise is sqrt(1 - ā) r and that of x_0 is m + sqrt(ā) s r, with r = (x_t - sqrt(ā) m) / (ā s + 1 - ā).

    Buffers (floats, part of what the server sends with the weights):
        means: (L + 1, d) low coefficients; the last row is the null class.
        vectors: (L + 1, d, d) eigenvectors, one a column; values: (L + 1, d) their variances.
        high: (L + 1, C, S, S) variances of the other coefficients; of no account at low ones.
    """

    means: Tensor
    vectors: Tensor
    values: Tensor
    high: Tensor

    def __init__(self, prior: Prior, schedule: NoiseSchedule) -> None:
        super().__init__()
        for name, array in buffers(prior).items():
            self.register_buffer(name, torch.from_numpy(array))
        space = prior.space
        self._alphas = schedule.alphas_bar.float()
        self._rows = torch.from_numpy(dct_basis(space.size)).float()
        self._colours = torch.from_numpy(space.colours).float()
        self._low = torch.from_numpy(np.flatnonzero(space.low))  # plain attributes: all of this is public and fixed

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, K, C, S, S), t (B, K), y (B, K) in 0 … L -> (B, K, C, S, S)."""
        a = self._alphas[t][..., None].to(x.dtype)  # (B, K, 1)
        coefficients = self._to_coefficients(x).flatten(2)
        noise, clean = self._high_guess(coefficients, a, y)
        low_noise, low_clean = self._low_guess(coefficients[..., self._low], a, y)
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
        velocity = velocity.index_copy(2, self._low, a.sqrt() * low_noise - (1 - a).sqrt() * low_clean)
        return self._to_pixels(velocity.view_as(x))

    def _high_guess(self, x: Tensor, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        s = self.high.flatten(1).to(x.dtype)[y]
        r = x / (a * s + 1 - a)
        return (1 - a).sqrt() * r, a.sqrt() * s * r

    def _low_guess(self, x: Tensor, a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Every class's answer is worked out, then the right one taken: no matrix a record stands in memory."""
        dtype = x.dtype
        mean, s = self.means[y].to(dtype), self.values[y].to(dtype)
        mine = nn.functional.one_hot(y, len(self.means)).to(dtype)  # (B, K, L + 1)
        along = torch.einsum("bkd,lde->bkle", x - a.sqrt() * mean, self.vectors.to(dtype))
        r = torch.einsum("bkle,bkl->bke", along, mine) / (a * s + 1 - a)
        both = torch.stack([(1 - a).sqrt() * r, a.sqrt() * s * r])
        noise, clean = torch.einsum("obke,bkl,lde->obkd", both, mine, self.vectors.to(dtype))
        return noise, mean + clean

    def _to_coefficients(self, x: Tensor) -> Tensor:
        rows, colours = self._rows.to(x.dtype), self._colours.to(x.dtype)
        return torch.einsum("ec,bkcij->bkeij", colours, rows @ x @ rows.T)

    def _to_pixels(self, x: Tensor) -> Tensor:
        rows, colours = self._rows.to(x.dtype), self._colours.to(x.dtype)
        return torch.einsum("ec,bkeij->bkcij", colours, rows.T @ x @ rows)


def buffers(prior: Prior) -> dict[str, np.ndarray]:
    """The buffers of `GaussianVelocity` for a prior, float32."""
    weights = prior.space.weights
    low = weights[prior.space.low]
    covariances = prior.covariances / (low[:, None] * low[None, :])
    values, vectors = np.linalg.eigh((covariances + covariances.transpose(0, 2, 1)) / 2)
    arrays = {
        "means": prior.means / low, "vectors": vectors, "values": np.maximum(values, _SMALLEST),
        "high": np.maximum(prior.high / np.square(weights), _SMALLEST),
    }  # fmt: skip
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
