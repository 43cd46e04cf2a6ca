"""The diffusion model that is trained and sampled: a Gaussian in closed form, and a Swin U-Net for what it lacks.

SPDX-License-Identifier: Apache-2.0

The U-Net's last layer begins at zero, so that before any training the model draws exactly what the private moments
describe; noisy gradients are spent on the rest alone (docs/adr/0011). The U-Net is not told the class where the
Gaussian is: noise in what it would learn of classes is a mark that every image of a class bears, and a classifier finds
it. Nor does it act at the noisier time steps, where classes are decided (docs/adr/0013).
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from common.model.diffusion import NoiseSchedule
from common.model.gaussian import GaussianVelocity, buffers
from common.model.swin_unet import SwinUNet
from common.model.weights import fitting
from common.moments import Coordinates, coordinates
from common.prior import Prior
from common.protocol import Arrays
from common.study import Study

_TRAINED = {  # patterns of parameter names
    "all": r"",
    "modulation": r"^swin\.(head|last_condition|label)\.|\.bias$",
    "head": r"^swin\.head\.|^swin\.last_condition\.bias$",
}


class DiffusionModel(nn.Module):
    """Velocity of a noisy image, given its time step and class.

    Args:
        prior: whose closed form is the first summand; by default what is known of any image.
    """

    def __init__(self, study: Study, prior: Prior | None = None) -> None:
        super().__init__()
        prior = prior or Prior.public(space_of(study), len(study.data.classes))
        self.prior = GaussianVelocity(prior, NoiseSchedule(study.diffusion.timesteps))
        self.swin = SwinUNet(study.network, study.data)
        self._told, self._null_class = study.class_conditional, len(study.data.classes)
        self._acts_below = study.network_steps

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, K, C, H, W), t (B, K), y (B, K) -> (B, K, C, H, W)."""
        acts = t < self._acts_below
        if not self.training and not bool(acts.any()):
            return self.prior(x, t, y)
        rest = self.swin(x, t, y if self._told else torch.full_like(y, self._null_class))
        return self.prior(x, t, y) + rest * acts[..., None, None, None]

    def set_trainable(self, which: str) -> list[str]:
        """Let only these parameters require a gradient, and name them.

        Args:
            which: "all"; "modulation": biases, labels and the last layers; "head": the last layer. Labels that the
                network is not told are never among them.
        """
        for name, parameter in self.named_parameters():
            told = self._told or not name.startswith("swin.label.")
            parameter.requires_grad_(told and re.search(_TRAINED[which], name) is not None)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def weights(self) -> Arrays:
        """Parameters and the prior's buffers, float32, by name."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self.state_dict().items()}


def space_of(study: Study) -> Coordinates:
    """The coordinates of the study's moments."""
    return coordinates(study.data.image_size, study.data.channels, study.moments.components, study.symmetry)


def initial_weights(study: Study) -> Arrays:
    """Public initial weights, drawn from the study's seed, with the public prior."""
    torch.manual_seed(study.study.seed)
    return DiffusionModel(study).weights()


def with_prior(weights: Arrays, prior: Prior) -> Arrays:
    """The weights with another prior."""
    return {**weights, **{f"prior.{name}": array for name, array in buffers(prior).items()}}


def cooled(weights: Arrays, temperature: float) -> Arrays:
    """The weights with the prior's variances times `temperature`, in (0, 1] (docs/adr/0014)."""
    variances = ("prior.values", "prior.high")
    return {**weights, **{name: weights[name] * np.float32(temperature) for name in variances}}


def load_model(study: Study, weights: Arrays) -> DiffusionModel:
    """The study's model with these weights.

    Raises:
        ReplyError: they are not this model's (`common/model/weights.py: fitting`).
    """
    model = DiffusionModel(study)
    model.load_state_dict(fitting(weights, model.state_dict(), where="weights"))
    return model
