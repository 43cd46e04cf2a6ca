"""Everything that a study names, tried once on random numbers, before a record is touched or any budget spent.

SPDX-License-Identifier: Apache-2.0

A misspelt network would else be found by the last stage, when the sites have paid for all the others.
"""

from __future__ import annotations

import torch

from common.errors import StudyError
from common.model.classifier import cross_entropy
from common.model.diffusion import record_loss
from common.model.diffusion_model import DiffusionModel
from common.model.record_rule import refuse_inexact
from common.model.samplers import sample
from common.model.timm_backbones import create_backbone
from common.study import Study

_ROWS = 4  # random records
_QUICK = 100  # sampling steps that are tried; more of them differ in nothing but number


def try_study(study: Study) -> None:
    """Build every network that the study names, and run each once as its stages will.

    Raises:
        StudyError: one cannot be built, does not take the study's images, or has no exact gradient per record; says
            which setting.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _try_diffusion(study)
        _try_backbone(study)


def _try_diffusion(study: Study) -> None:
    data = study.data
    shape = (data.channels, data.image_size, data.image_size)
    try:
        model = DiffusionModel(study)
        if study.training.rounds:
            loss, draw = record_loss(study, torch.Generator().manual_seed(0))
            labels = torch.arange(_ROWS) % len(data.classes)
            model.set_trainable(study.training.parameters)
            rows = draw(torch.rand(_ROWS, *shape) * 2 - 1, labels)
            refuse_inexact(model, loss, rows, name="the study's network", where="network")
        if study.generation.steps <= _QUICK:
            sample(
                model, torch.zeros(1, dtype=torch.int64), null_label=len(data.classes), shape=shape,
                config=study.generation, seeds=[0],
            )  # fmt: skip
    except StudyError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise StudyError(f"the network or its sampler fails ({error})", where="network",
                         remedy="Change the sizes or the steps.") from error  # fmt: skip


def _try_backbone(study: Study) -> None:
    data, backbone = study.data, study.validation.backbone
    net = create_backbone(backbone, channels=data.channels, classes=len(data.classes), image_size=data.image_size)
    if study.privacy.reference_share > 0:
        rows = (torch.rand(_ROWS, data.channels, data.image_size, data.image_size) * 2 - 1,
                torch.arange(_ROWS) % len(data.classes))  # fmt: skip
        refuse_inexact(net, cross_entropy, rows, name=backbone, where="validation.backbone")
