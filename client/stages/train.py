"""Train: one round of DP-SGD on the site's train partition, from the server's weights.

SPDX-License-Identifier: Apache-2.0

B units (images or patients) of a Poisson batch, K noise draws per unit. What leaves is, with FedSGD, the one noisy sum
of clipped gradients; with FedAvg, what local steps along such sums have changed. The loss curve is part of both.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from client.log import write_note
from client.privacy.gate import Gate, Permit, Released
from client.privacy.gradients import PrivateGradients, physical_batch_for
from client.privacy.local_steps import LocalSteps
from client.privacy.mechanism import Noisy
from client.site import Site
from common.model.diffusion import record_loss
from common.model.diffusion_model import DiffusionModel, load_model
from common.protocol import Arrays, TrainReply, TrainRequest
from common.study import Study


def train(site: Site, gate: Gate, request: TrainRequest, arrays: Arrays) -> Released:
    """Run the plan's steps and release what they give.

    Raises:
        NotApproved, PolicyRefusal, BudgetError: refused; nothing leaves.
        ReplyError: the server's weights do not fit the study's model.
        StudyError: the network has no exact gradient per record on this machine.
    """
    study = request.agreement.study
    gate.require_room("train")
    torch.set_num_threads(site.config.performance.threads)
    model = load_model(study, arrays)
    model.set_trainable(study.training.parameters)
    step = _Step(site, study, model, request.expected_batch)
    with gate.spend("train") as permit:
        if study.training.algorithm == "fedsgd":
            noisy, local = step.noisy_sum(permit), None
        else:
            noisy, local = _local_steps(gate.store.made_of(gate.admitted, "adam"), study, model, step, permit)
        released = permit.seal(TrainReply(round=request.round), noisy.float32())
    with site.logged("keeping the optimizer"):  # the answer is sealed: it leaves, whatever happens here
        if local is not None:
            local.save()
        if step.left_out:  # for the site's eyes: a record that cannot be trained on is the site's to look at
            text = f"round {request.round}: {step.left_out} {study.privacy.unit}s had no finite gradient"
            write_note(site.state, f"{text} and counted as zero")
    return released


def _local_steps(
    kept: Path, study: Study, model: DiffusionModel, step: _Step, permit: Permit
) -> tuple[Noisy, LocalSteps]:
    """(change of the weights with the sum of the noisy losses, the steps' optimizer)."""
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    local = LocalSteps(trained, learning_rate=study.training.learning_rate, kept=kept)
    for _ in range(permit.plan("train").steps):
        local.step(step.noisy_sum(permit), expected_batch=step.expected_batch)
    return local.result(), local


class _Step:
    """One DP-SGD step after another on the same data and network."""

    def __init__(self, site: Site, study: Study, net: DiffusionModel, expected_batch: float) -> None:
        self.expected_batch = expected_batch
        self._units, self._draws = site.train, study.diffusion.noise_multiplicity
        self._generator = torch.Generator()
        self._generator.seed()
        self._choice = np.random.default_rng()  # which image of a patient, like the draws of a loss: no secret
        loss, draw = record_loss(study, self._generator)
        performance = site.config.performance
        physical = _physical_batch(study, performance.memory_mb)
        self._gradients = PrivateGradients(
            net, loss, draw, max_grad_norm=study.training.max_grad_norm, physical_batch=physical, loss_part=True
        )

    @property
    def left_out(self) -> int:
        """Draws of a unit whose gradient was not finite, over all steps."""
        return self._gradients.left_out

    def noisy_sum(self, permit: Permit) -> Noisy:
        """Sample a batch, clip, sum, add noise once: the parameters' noisy sums and "loss"."""
        mask = permit.sample("train", len(self._units))
        images, labels = self._units.draw(mask, self._draws, self._choice)
        return permit.noisy("train", self._gradients.clipped_sum(images, labels))


@lru_cache(maxsize=32)
def _physical_batch(study: Study, memory_mb: int) -> int:
    """Of the study's network with public weights: those of a request may be anything, and must not decide this."""
    data = study.data
    model = DiffusionModel(study)
    model.set_trainable(study.training.parameters)
    images = (study.diffusion.noise_multiplicity if study.privacy.unit == "patient" else 1,)
    loss, draw = record_loss(study, torch.Generator().manual_seed(0))
    return physical_batch_for(
        model, loss, draw, record=(*images, data.channels, data.image_size, data.image_size), label=images,
        memory_mb=memory_mb, name="the study's network", where="network", draws=study.diffusion.noise_multiplicity,
    )  # fmt: skip
