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
from common.protocol import Arrays

BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8
_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}  # ours, torch's


class Adam:
    """`torch.optim.Adam` over named parameters, for gradients that come from elsewhere; its state is plain arrays."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], *, learning_rate: float) -> None:
        self._parameters = dict(parameters)
        self._adam = torch.optim.Adam(self._parameters.values(), lr=learning_rate, betas=(BETA1, BETA2), eps=EPSILON)
        self._take({f"{ours}/{n}": torch.zeros_like(p) for ours in _MOMENTS for n, p in self._parameters.items()}, 0)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Move every parameter by one step; `gradients` has the parameters' names and shapes."""
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name].to(parameter.dtype)
        self._adam.step()
        self._adam.zero_grad()

    def state(self) -> Arrays:
        """The moments and the number of steps, by name."""
        states = {name: self._adam.state[parameter] for name, parameter in self._parameters.items()}
        arrays = {
            f"{ours}/{n}": state[its].numpy().copy() for ours, its in _MOMENTS.items() for n, state in states.items()
        }
        return arrays | {"steps": torch.tensor([int(next(iter(states.values()))["step"])]).numpy()}

    def load(self, arrays: Arrays) -> None:
        """Take up a `state`; one of another network is passed over.

        Raises:
            KeyError: a part is missing.
        """
        moments = {
            f"{ours}/{n}": torch.from_numpy(arrays[f"{ours}/{n}"].copy()) for ours in _MOMENTS for n in self._parameters
        }
        steps = int(arrays["steps"][0])
        if all(tensor.shape == self._parameters[name.partition("/")[2]].shape for name, tensor in moments.items()):
            self._take(moments, steps)

    def _take(self, moments: Mapping[str, torch.Tensor], steps: int) -> None:
        for name, parameter in self._parameters.items():
            state = {its: moments[f"{ours}/{name}"] for ours, its in _MOMENTS.items()}
            self._adam.state[parameter] = {"step": torch.tensor(float(steps)), **state}

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

    A coordinate moves at most learning_rate × (1 - BETA1) / sqrt(1 - BETA2) in a step when that exceeds learning_rate.
    """
    return learning_rate * max(1.0, (1 - BETA1) / math.sqrt(1 - BETA2)) * steps * math.sqrt(parameters)
