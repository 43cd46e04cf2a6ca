"""The diffusion model that is trained and sampled: the Swin U-Net, and what makes a clean image of its answer.

SPDX-License-Identifier: Apache-2.0

R rows, C channels, S pixels a side.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from common.model.diffusion import Preconditioning
from common.model.swin_unet import SwinUNet
from common.model.weights import fitting
from common.moments import Coordinates, coordinates
from common.protocol import Arrays
from common.study import Study

_TRAINED = {  # patterns of parameter names
    "all": r"",
    "bias": r"\.bias$|\.norm\d?\.weight$|\.label\.|^net\.head\.",  # DP-BiTFiT (Bu et al. 2024), class and last layer
    "head": r"^net\.(head|norm)\.",
}


class DiffusionModel(nn.Module):
    """The network's answer to a noisy image, which is scaled to about unit variance before it."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        self.net = SwinUNet(study.network, study.data)

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """x (R, C, S, S), sigma (R,) over 0, y (R,), where len(classes) is the null class -> (R, C, S, S)."""
        return self.net(x * Preconditioning.at(sigma).into, sigma.log() / 4, y)

    def denoised(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """The clean image that the model sees in a noisy one; shapes as `forward`."""
        by = Preconditioning.at(sigma)
        return by.skip * x + by.out * self(x, sigma, y)

    def set_trainable(self, which: str) -> list[str]:
        """Let only these parameters require a gradient, and name them.

        Args:
            which: `training.parameters`.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(re.search(_TRAINED[which], name) is not None)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def weights(self) -> Arrays:
        """Parameters, float32, by name."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self.state_dict().items()}


def space_of(study: Study) -> Coordinates:
    """The coordinates of the study's moments."""
    return coordinates(study.data.image_size, study.data.channels, study.moments.components, study.symmetry)


def initial_weights(study: Study) -> Arrays:
    """Public initial weights, drawn from the study's seed."""
    torch.manual_seed(study.study.seed)
    return DiffusionModel(study).weights()


def load_model(study: Study, weights: Arrays) -> DiffusionModel:
    """The study's model with these weights.

    Raises:
        ReplyError: they are not this model's (`common/model/weights.py: fitting`).
    """
    model = DiffusionModel(study)
    model.load_state_dict(fitting(weights, model.state_dict(), where="weights"))
    return model
