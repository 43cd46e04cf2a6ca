"""The reference: a classifier trained on the site's own records by DP-SGD. It stays here; its test figures leave.

SPDX-License-Identifier: Apache-2.0

B units (images or patients) of a Poisson batch; of a patient one image is drawn for each step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.privacy.gate import Gate
from client.privacy.gradients import PrivateGradients, physical_batch_for
from common.errors import BudgetError
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.images import Units
from common.model.classifier import BiomarkerClassifier, cross_entropy, warm_up_and_cosine
from common.model.weights import LARGEST_WEIGHT
from common.protocol import bounded_arrays
from common.study import Study


def private_reference(
    gate: Gate, study: Study, units: Units, *, expected_batch: float, memory_mb: int
) -> BiomarkerClassifier | None:
    """From the site's store when it was trained on these images before, else trained and paid for now ("reference").

    None when its budget went in a run that was killed, or on images that are others by now: the synthetic figures do
    not depend on it.

    Args:
        expected_batch: public estimate of the units per step.

    Raises:
        NotApproved, PolicyRefusal: refused; nothing leaves.
        StudyError: the study's backbone cannot be trained privately.
    """
    kept = gate.store.made_of(gate.admitted, "reference")
    data, backbone = study.data, study.validation.backbone
    if kept.exists():
        arrays = unpack_arrays(kept.read_bytes(), where=str(kept))
        return BiomarkerClassifier.from_state(
            arrays, classes=len(data.classes), channels=data.channels, image_size=data.image_size, backbone=backbone
        )
    model = BiomarkerClassifier.fresh(study)
    physical = physical_batch_for(
        model.net, cross_entropy, _draw, record=(1, data.channels, data.image_size, data.image_size), label=(1,),
        memory_mb=memory_mb, name=backbone, where="validation.backbone",
    )  # fmt: skip
    try:
        _train(gate, study, units, model, expected_batch=expected_batch, physical_batch=physical, kept=kept)
    except BudgetError:
        return None
    return model


def _train(
    gate: Gate, study: Study, units: Units, model: BiomarkerClassifier, *, expected_batch: float, physical_batch: int,
    kept: Path,
) -> None:  # fmt: skip
    """DP-SGD (Abadi et al. 2016, algorithm 1) with Adam, as many steps as planned; the result is stored at `kept`."""
    choice = np.random.default_rng()  # which image of a patient: no secret
    parameters = dict(model.net.named_parameters())
    with gate.spend("reference") as permit:
        plan = permit.plan("reference")
        gradients = PrivateGradients(
            model.net, cross_entropy, _draw, max_grad_norm=plan.sensitivity, physical_batch=physical_batch
        )
        adam = torch.optim.Adam(parameters.values(), lr=study.validation.reference_learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, warm_up_and_cosine(plan.steps))
        for _ in range(plan.steps):
            total = gradients.clipped_sum(*units.draw(permit.sample("reference", len(units)), 1, choice))
            for name, noisy in permit.noisy("reference", total).tensors.items():
                parameters[name].grad = (noisy / expected_batch).to(parameters[name].dtype)
            adam.step()
            schedule.step()
        adam.zero_grad(set_to_none=True)
        gradients.close()
        model.net.eval()
        with permit.confirming():
            if bounded_arrays(model.state(), LARGEST_WEIGHT):  # else it is paid for and useless: it would not be read
                atomic_write(kept, pack_arrays(model.state()))


def _draw(pixels: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return pixels[:, 0], labels[:, 0]
