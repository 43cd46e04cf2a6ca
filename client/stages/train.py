"""Train: one round of DP-SGD steps on the site's train partition, from the server's weights.

SPDX-License-Identifier: Apache-2.0

B records (the study's privacy unit: images or patients) of a Poisson batch, C the clipping norm (max_grad_norm).
A record gives one vector: its gradient clipped to C·sqrt(1 - s²), and its loss, clipped and scaled to at most s·C
(s = LOSS_SHARE). Together they have norm at most C, so the loss curve costs nothing beside the gradient.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from client.privacy.gate import Gate, Permit, Released
from client.privacy.grad_sample import ClippedSum, bytes_per_record, clipped_gradient_sum, filled, physical_batch_for
from client.site import Site
from common.accounting import LOSS_SHARE
from common.errors import ReplyError
from common.files import append_line
from common.images import to_unit
from common.messages import Arrays, Spent, TrainReply, TrainRequest
from common.model.diffusion import DiffusionLoss, NoiseSchedule
from common.model.swin_unet import SwinUNet
from common.optimizer import Adam
from common.study import Study

LARGEST_LOSS = 2.0  # a network that predicts nothing has loss 1 at most


def train(site: Site, gate: Gate, request: TrainRequest) -> Released[TrainReply]:
    """Run the plan's steps and release the change of the weights.

    Raises:
        PolicyRefusal, BudgetError: refused; no record was touched.
        ReplyError: the server's weights do not fit the study's network, or its expected batch is no positive number.
    """
    study, plan = request.agreement.study, request.agreement.plan.train
    torch.set_num_threads(site.config.performance.threads)
    net = load_network(study, request.arrays)
    if not 0 < request.expected_batch < math.inf:
        raise ReplyError(f"an expected batch of {request.expected_batch} records", where="request")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = Adam(dict(net.named_parameters()), learning_rate=study.training.learning_rate)
    moments = site.state / f"adam-{study.sha256[:16]}.safetensors"
    optimizer.restore(moments)
    with gate.spend(plan) as permit:
        total_loss = 0.0
        step = _Step(site, study, net, permit, request.expected_batch)
        for _ in range(plan.steps):
            noisy = step.noisy_sum()
            total_loss += float(noisy.pop("loss")) * LARGEST_LOSS / (LOSS_SHARE * plan.sensitivity)
            optimizer.step({name: part / request.expected_batch for name, part in noisy.items()})
        update = {name: (p.detach() - before[name]).numpy() for name, p in net.named_parameters()}
        reply = TrainReply(
            site=site.config.name,
            round=request.round,
            loss=total_loss / (request.expected_batch * plan.steps),
            spent=Spent(0.0, 0.0, 0, 0),
            arrays=update,
        )
        released = permit.seal(reply)
    optimizer.save(moments)
    if step.nonfinite:  # for the site's eyes: a record that cannot be trained on is the site's to look at
        text = f"round {request.round}: {step.nonfinite} draws of a {study.privacy.unit} had no finite gradient"
        append_line(site.state / "site.log", f"{text} and counted as zero")
    return released


class _Step:
    """One DP-SGD step after another on the same data and network."""

    def __init__(self, site: Site, study: Study, net: SwinUNet, permit: Permit, expected_batch: float) -> None:
        self._units, self._draws = site.train, study.diffusion.noise_multiplicity
        self._net, self._permit = net, permit
        self._norm = study.training.max_grad_norm
        self.nonfinite = 0
        diffusion = study.diffusion
        self._loss = DiffusionLoss(
            NoiseSchedule(diffusion.timesteps), diffusion.noise_multiplicity, diffusion.label_dropout,
            len(study.data.classes),
        )  # fmt: skip
        self._generator = torch.Generator()
        self._choice = np.random.default_rng(self._generator.seed() % 2**63)  # which image of a patient: no secret
        shape = (study.data.channels, study.data.image_size, study.data.image_size)
        probe = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)
        self._physical = physical_batch_for(
            site.config.performance.memory_mb, bytes_per_record(net, self._per_record, *probe), expected_batch
        )

    def _per_record(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._loss(self._net, x, y, generator=self._generator)

    def noisy_sum(self) -> dict[str, torch.Tensor]:
        """Sample a batch, clip, sum, add noise once: the parameters' noisy sums and "loss"."""
        mask = self._permit.sample("train", len(self._units))
        images, labels = self._units.draw(mask, self._draws, self._choice)
        clipped = clipped_gradient_sum(
            self._net, self._per_record, to_unit(filled(images, self._physical)),
            torch.from_numpy(filled(labels, self._physical)), records=len(labels),
            max_grad_norm=self._norm * math.sqrt(1 - LOSS_SHARE**2), physical_batch=self._physical,
        )  # fmt: skip
        self.nonfinite += clipped.nonfinite
        return self._permit.noisy("train", {**clipped.gradients, "loss": clipped_loss(clipped, self._norm)})


def clipped_loss(clipped: ClippedSum, max_grad_norm: float) -> torch.Tensor:
    """Sum over records of the loss, scaled so that one record adds at most LOSS_SHARE × max_grad_norm; shape ()."""
    losses = torch.nan_to_num(clipped.losses.double(), nan=0.0, posinf=0.0, neginf=0.0).clamp(0.0, LARGEST_LOSS)
    return losses.sum() * (LOSS_SHARE * max_grad_norm / LARGEST_LOSS)


def load_network(study: Study, weights: Arrays) -> SwinUNet:
    """The study's network with these weights.

    Raises:
        ReplyError: names or shapes differ from the study's network, or a value is not finite.
    """
    net = SwinUNet(study.network, study.data)
    parameters = dict(net.named_parameters())
    if set(parameters) != set(weights):
        raise ReplyError("the weights have other names than the study's network", where="request")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = torch.from_numpy(weights[name].copy())
            if value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
                raise ReplyError(f"the weight '{name}' does not fit the study's network", where="request")
            parameter.copy_(value)
    return net
