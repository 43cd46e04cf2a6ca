"""FedAvg at a site: weights that noisy gradients alone have moved, so that their change may leave.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from client.privacy.mechanism import _KEY, Noisy
from common.optimizer import Adam


class LocalSteps:
    """Adam over parameters that came from the server; it sees `Noisy` gradients and nothing else.

    Args:
        parameters: as they came; moved in place.
        kept: file with Adam's moments of the last round, where there is one; they too are made of noisy numbers only.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, learning_rate: float, kept: Path) -> None:
        self._parameters = dict(parameters)
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._adam, self._kept = Adam(self._parameters, learning_rate=learning_rate), kept
        self._adam.restore(kept)
        self._loss = torch.zeros(1, dtype=torch.float64)

    def step(self, gradient: Noisy, *, expected_batch: float) -> None:
        """One step along a noisy sum, divided by a public estimate of the records in it."""
        tensors = gradient.tensors
        self._adam.step({name: tensors[name] / expected_batch for name in self._parameters})
        self._loss += tensors["loss"]

    def result(self) -> Noisy:
        """What the steps have changed, by parameter name, and "loss" (1,), the sum of the steps' noisy losses."""
        moved = {name: p.detach().double() - self._before[name].double() for name, p in self._parameters.items()}
        return Noisy({**moved, "loss": self._loss}, key=_KEY)

    def save(self) -> None:
        """Keep Adam's moments for the next round."""
        self._adam.save(self._kept)
