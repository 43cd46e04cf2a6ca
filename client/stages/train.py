"""Train: one round of DP-SGD on the site's train partition, from the server's weights.

SPDX-License-Identifier: Apache-2.0

B records (the study's privacy unit: images or patients) of a Poisson batch, C the clipping norm (max_grad_norm).
A record gives one vector: its gradient clipped to C·sqrt(1 - s²), and its loss, clipped and scaled to at most s·C
(s = LOSS_SHARE). Together they have norm at most C, so the loss curve costs nothing beside the gradient.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from client.privacy.gate import Gate, Permit, Released
from client.privacy.grad_sample import ClippedSum, bytes_per_record, clipped_gradient_sum, filled, physical_batch_for
from client.site import Site
from common.accounting import LOSS_SHARE
from common.errors import BudgetError, ReplyError
from common.files import append_line
from common.images import to_unit
from common.messages import Arrays, Spent, TrainReply, TrainRequest
from common.model.diffusion import DiffusionLoss, NoiseSchedule
from common.model.diffusion_model import DiffusionModel, load_model
from common.optimizer import Adam
from common.study import Study

LARGEST_LOSS = 2.0  # a network that predicts nothing has loss 1 at most


def train(site: Site, gate: Gate, request: TrainRequest) -> Released[TrainReply]:
    """Run the plan's steps and release the change of the weights, or the one noisy sum of a summed step.

    Raises:
        PolicyRefusal, BudgetError: refused; no record was touched.
        ReplyError: the server's weights do not fit the study's model, or its expected batch is no positive number.
    """
    study, plan = request.agreement.study, request.agreement.plan.train
    if plan is None:
        raise BudgetError("the study plans no training", where="plan")
    torch.set_num_threads(site.config.performance.threads)
    model = load_model(study, request.arrays)
    model.train_only(study.training.parameters)
    if not 0 < request.expected_batch < math.inf:
        raise ReplyError(f"an expected batch of {request.expected_batch} records", where="request")
    with gate.spend(plan) as permit:
        step = _Step(site, study, model, permit, request.expected_batch)
        if study.training.step == "summed":
            noisy = step.noisy_sum()
            total_loss, adam = float(noisy.pop("loss")), None
            arrays = {name: part.float().numpy() for name, part in noisy.items()}
        else:
            arrays, total_loss, adam = _local_steps(site, study, model, step, plan.steps, request.expected_batch)
        reply = TrainReply(
            site=site.config.name,
            round=request.round,
            loss=total_loss * LARGEST_LOSS / (LOSS_SHARE * plan.sensitivity * request.expected_batch * plan.steps),
            spent=Spent(0.0, 0.0, 0, 0),
            arrays=arrays,
        )
        released = permit.seal(reply)
    if adam is not None:
        adam.save(_moments_file(site, study))
    if step.nonfinite:  # for the site's eyes: a record that cannot be trained on is the site's to look at
        text = f"round {request.round}: {step.nonfinite} draws of a {study.privacy.unit} had no finite gradient"
        append_line(site.state / "site.log", f"{text} and counted as zero")
    return released


def _local_steps(
    site: Site, study: Study, model: DiffusionModel, step: _Step, steps: int, expected_batch: float
) -> tuple[Arrays, float, Adam]:
    """(change of the weights, sum of the noisy losses, optimizer) after `steps` steps at the site."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    adam = Adam(trained, learning_rate=study.training.learning_rate)
    adam.restore(_moments_file(site, study))
    total_loss = 0.0
    for _ in range(steps):
        noisy = step.noisy_sum()
        total_loss += float(noisy.pop("loss"))
        adam.step({name: part / expected_batch for name, part in noisy.items()})
    return {name: (p.detach() - before[name]).numpy() for name, p in trained.items()}, total_loss, adam


def _moments_file(site: Site, study: Study) -> Path:
    return site.state / f"adam-{study.sha256[:16]}.safetensors"


class _Step:
    """One DP-SGD step after another on the same data and network."""

    def __init__(self, site: Site, study: Study, net: DiffusionModel, permit: Permit, expected_batch: float) -> None:
        self._units, self._draws = site.train, study.diffusion.noise_multiplicity
        self._net, self._permit = net, permit
        self._norm = study.training.max_grad_norm
        self.nonfinite = 0
        diffusion = study.diffusion
        self._loss = DiffusionLoss(
            NoiseSchedule(diffusion.timesteps), diffusion.noise_multiplicity, diffusion.label_dropout,
            len(study.data.classes), weighting=diffusion.weighting, steps=study.network_steps,
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
