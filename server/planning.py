"""What a run will take and ask, before it starts; and its result in one table, after it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.accounting import MechanismPlan, StudyPlan, epsilon_of
from common.files import read_json
from common.mechanisms import PARTITIONS
from common.study import ENVIRONMENT, Study
from server.checkpoints import RunFolder
from server.launch import SiteCheck


@dataclass(frozen=True)
class Estimate:
    """Rough needs of a run on this machine.

    Attributes:
        parameters: of the diffusion network; `trained` of them at the sites.
        pretrain_seconds, train_seconds, generate_seconds: from a short measurement here, the sites one after another.
        megabytes: model traffic of one site over the whole study, both ways.
    """

    parameters: int
    trained: int
    pretrain_seconds: float
    train_seconds: float
    generate_seconds: float
    megabytes: float


def estimate(study: Study, facts: Sequence[SiteCheck]) -> Estimate:
    """Measure one small training step and one small sampling step, and scale them up."""
    import torch

    from common.model.diffusion import DiffusionLoss
    from common.model.diffusion_model import DiffusionModel

    net = DiffusionModel(study)
    trained = net.set_trainable(study.training.parameters)
    side, channels, records = study.data.image_size, study.data.channels, 16
    draws = study.diffusion.noise_multiplicity
    loss = DiffusionLoss(draws, 0.0, len(study.data.classes))
    x, y = torch.zeros(records, channels, side, side), torch.zeros(records, dtype=torch.int64)
    made = loss.draw(records, (channels, side, side), generator=torch.Generator(), dtype=x.dtype)

    def train_step() -> None:
        loss.losses(net, x, y, made).sum().backward()

    def sample_step() -> None:
        with torch.no_grad():
            net(x, torch.ones(records), y)

    training = study.training
    batch = sum(fact.units for fact in facts) * training.sample_rate
    per_record = _seconds(train_step) / records * 1.2  # book-keeping of per-record gradients costs about a fifth more
    evaluations = study.generation.steps * (2 if study.generation.guidance > 0 else 1)
    evaluations *= 2 if study.generation.sampler == "heun" else 1
    parameters = sum(p.numel() for p in net.parameters())
    sent = sum(p.numel() for name, p in net.named_parameters() if name in trained)
    return Estimate(
        parameters=parameters,
        trained=sent,
        pretrain_seconds=_pretrain_draws(study) * per_record / draws,
        train_seconds=per_record * batch * training.local_steps * training.rounds,
        generate_seconds=_seconds(sample_step) / records * evaluations * _drawn(study),
        megabytes=4 * (parameters + sent) * training.rounds / 1e6,
    )


def _drawn(study: Study) -> int:
    """Images that the network draws, those that are not kept among them."""
    return study.generation.images * (study.generation.candidates if study.privacy.features_share > 0 else 1)


def _pretrain_draws(study: Study) -> int:
    """Images that the public start is trained on, each as often as it is drawn."""
    return 0 if study.pretrain.source == "none" else study.pretrain.steps * study.pretrain.batch_size


def _seconds(step: Any) -> float:
    step()
    began = time.monotonic()
    for _ in range(3):
        step()
    return (time.monotonic() - began) / 3


def describe(study: Study, plan: StudyPlan, facts: Sequence[SiteCheck]) -> str:
    """The plan as text: units and images per site, noise and epsilon by stage, size, time and traffic."""
    privacy, needs = study.privacy, estimate(study, facts)
    lines = [f"study {study.study.name}  sha256 {study.sha256}", ""]
    unit = privacy.unit
    lines.append(
        f"{'site':<12}{unit + 's':>10}{'train':>8}{'held out':>10}   train images by class (known to the site)"
    )
    for fact in facts:
        by_class = ", ".join(f"{name} {n}" for name, n in zip(study.data.classes, fact.train, strict=True))
        lines.append(f"{fact.name:<12}{fact.units:>10}{sum(fact.train):>8}{sum(fact.holdout):>10}   {by_class}")
        lines += [f"{'':<12}warning: {warning}" for warning in fact.warnings]
    needed = units_needed(plan, needs.trained)
    if any(fact.units < needed for fact in facts):
        lines.append(
            f"warning: at this epsilon the noise drowns everything a site with fewer than about {needed} {unit}s could "
            f"say, even if all its gradients agreed; give sites more {unit}s, raise epsilon, or do fewer rounds"
        )
    lines += [
        "",
        f"{'stage':<12}{'records':<10}{'noise_multiplier':>17}{'sample_rate':>13}{'steps':>8}{'epsilon alone':>15}",
    ]
    for mechanism in plan.mechanisms:
        lines.append(
            f"{mechanism.name:<12}{mechanism.partition:<10}{mechanism.noise_multiplier:>17.4f}"
            f"{mechanism.sample_rate:>13g}{mechanism.whole_loss.steps:>8}{_alone(study, mechanism):>15.3f}"
        )
    for partition in PARTITIONS:
        total = epsilon_of(plan.losses(partition), delta=privacy.delta, accountant=privacy.accountant)
        lines.append(f"together, {partition + ' records:':<21}epsilon {total:.3f} of {privacy.epsilon:g}"
                     f" at delta {privacy.delta:g} ({privacy.accountant})")  # fmt: skip
    once = epsilon_of([plan["evaluate"].loss], delta=privacy.delta, accountant=privacy.accountant)
    lines.append(f"of that, held-out records spend {once:.3f} unless a site has to answer 'evaluate' a second time")
    minutes = (needs.pretrain_seconds + needs.train_seconds + needs.generate_seconds) / 60
    lines += [
        "",
        f"network     {needs.parameters:,} parameters, {needs.trained:,} of them trained at the sites",
        f"time        about {minutes:.0f} min on this machine ({needs.pretrain_seconds / 60:.1f} pretraining, "
        f"{needs.train_seconds / 60:.1f} training, {needs.generate_seconds / 60:.1f} generating), and a few for start "
        "and validation",
        f"traffic     about {needs.megabytes:.0f} MB per site",
        "",
        "Everything that the study names has been tried. Once a run has begun its study cannot change: sites approve",
        f"its hash, and another study is paid for anew. Settings of this machine ({_of_the_machine()})",
        "may be edited in RUN/study.toml before `synthward run --resume RUN`.",
    ]
    return "\n".join(lines)


def _of_the_machine() -> str:
    """The settings that are not agreed, as a run can still change them."""
    sections = {section: names for section, names in ENVIRONMENT.items() if names is not True}
    return ", ".join(f"{section}.{name}" for section, names in sections.items() for name in sorted(names))


def units_needed(plan: StudyPlan, parameters: int) -> int:
    """Fewest units at a site for which training is not sure to be useless.

    Over T steps at sample rate q, n units add at most T·q·n·C to the gradients' sum if all of them agree; the noise has
    norm sigma·C·sqrt(T·d) over d parameters. sigma does not depend on n, so the n at which the two are equal does.
    """
    train = plan.get("train")
    if train is None:
        return 0
    steps = train.whole_loss.steps
    return math.ceil(train.noise_multiplier * math.sqrt(parameters / steps) / train.sample_rate)


def _alone(study: Study, mechanism: MechanismPlan) -> float:
    privacy = study.privacy
    return epsilon_of([mechanism.whole_loss], delta=privacy.delta, accountant=privacy.accountant)


def summary(folder: RunFolder) -> str:
    """The final table of a finished run, from its metrics.json."""
    metrics = read_json(folder.release / "metrics.json")
    lines = ["", f"{'':<34}{'AUC':>22}{'macro F1':>22}"]
    for row in metrics["validation"]:
        lines.append(f"{row['name'][:34]:<34}{_figure(row['auc_macro']):>22}{_figure(row['f1_macro']):>22}")
    lines.append("")
    for site, spent in metrics["epsilon"]["sites"].items():
        lines.append(f"{site:<12} epsilon {spent:.3f} (ceiling {metrics['epsilon']['ceiling']:g}, "
                     f"delta {metrics['epsilon']['delta']:g})")  # fmt: skip
    lines += [
        "",
        f"{metrics['images']} synthetic images, {metrics['minutes']:.1f} min, "
        f"peak memory {metrics['peak_memory_mb']:.0f} MB",
        f"release: {folder.release}",
        f"report: {folder.release / 'report.html'}",
    ]
    return "\n".join(lines)


def _figure(value: dict[str, float | None] | None) -> str:
    if value is None or value["value"] is None:
        return "-"
    if value.get("low") is None or value.get("high") is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
