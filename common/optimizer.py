"""Adam on noisy gradients, with its moments kept between rounds.

SPDX-License-Identifier: Apache-2.0

Everything here is post-processing of what the gate has released: it touches no record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from common.errors import CheckpointError
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.messages import Arrays

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8
FLOOR = 0.3  # of the noise: a coordinate that is noise alone would move without bound


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) over named parameters.

    Args:
        noise_std: of the noise in each gradient number, public. Its square is taken off the second moment (Tang,
            Shpilevskiy and Lecuyer 2024, "DP-AdamBC"), down to FLOOR² of it; 0 = plain Adam.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], *, learning_rate: float, noise_std: float = 0.0) -> None:
        self._noise_std = noise_std
        self._parameters = dict(parameters)
        self._rate = learning_rate
        self._steps = 0
        self._first = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Move every parameter by one step; `gradients` has the parameters' names and shapes."""
        self._steps += 1
        correct1, correct2 = 1 - BETA1**self._steps, 1 - BETA2**self._steps
        for name, parameter in self._parameters.items():
            gradient = gradients[name].to(parameter.dtype)
            self._first[name].lerp_(gradient, 1 - BETA1)
            self._second[name].mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            signal = (self._second[name] / correct2 - self._noise_std**2).clamp_(min=(FLOOR * self._noise_std) ** 2)
            scale = signal.sqrt_().add_(EPSILON)
            parameter.addcdiv_(self._first[name], scale, value=-self._rate / correct1)

    def state(self) -> Arrays:
        """The moments and the number of steps, by name."""
        arrays = {f"first/{n}": t.numpy() for n, t in self._first.items()}
        arrays |= {f"second/{n}": t.numpy() for n, t in self._second.items()}
        return arrays | {"steps": torch.tensor([self._steps]).numpy()}

    def load(self, arrays: Arrays) -> None:
        """Take up a `state`; one of another network is passed over.

        Raises:
            KeyError: a part is missing.
        """
        first = {n: torch.from_numpy(arrays[f"first/{n}"].copy()) for n in self._parameters}
        second = {n: torch.from_numpy(arrays[f"second/{n}"].copy()) for n in self._parameters}
        if all(first[n].shape == p.shape == second[n].shape for n, p in self._parameters.items()):
            self._first, self._second, self._steps = first, second, int(arrays["steps"][0])

    def save(self, path: Path) -> None:
        """Keep the moments for the next round."""
        atomic_write(path, pack_arrays(self.state()))

    def restore(self, path: Path) -> None:
        """Take up the moments of the last round, where there are whole ones of this network; else begin anew."""
        try:
            self.load(unpack_arrays(path.read_bytes(), where=str(path)))
        except (OSError, CheckpointError, KeyError):
            return


def largest_update_norm(*, parameters: int, steps: int, learning_rate: float) -> float:
    """L2 bound of what `steps` Adam steps can move `parameters` numbers (Kingma and Ba 2015, section 2.1).

    A coordinate moves at most learning_rate × (1 - BETA1) / sqrt(1 - BETA2) a step when that exceeds learning_rate.
    """
    return learning_rate * max(1.0, (1 - BETA1) / math.sqrt(1 - BETA2)) * steps * math.sqrt(parameters)
