"""What a private step costs beside a plain AdamW step: CPU time of both, in turn, in one process.

SPDX-License-Identifier: Apache-2.0

Run: .venv/bin/python -m benchmarks.step_time [--threads 1] [--repeats 5]
One line per geometry of a shipped study, what is trained ("bias": biases, norms, labels and last layer), noise draws
per record (K) and width. Both steps begin with pixels and end with moved weights or a clipped float64 sum.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from client.privacy.gradients import PrivateGradients
from common.images import to_unit
from common.model.diffusion import record_loss
from common.model.diffusion_model import DiffusionModel
from common.study import Study
from common.study_file import load_study

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, process CPU time, medians")
    print(f"{'study':<12}{'trained':>12}{'numbers':>11}{'K':>3}{'width':>7}{'batch':>7}"
          f"{'plain s':>9}{'private s':>11}{'ratio':>7}")  # fmt: skip
    for name, batch in (("pneumonia", 64), ("histology", 64), ("fundus", 16)):
        study = load_study(CONFIGS / f"{name}.toml")
        for which, draws, width in itertools.product(("bias", "all"), (1, 4), (16, 32)):
            sized = study.model_copy(update={
                "network": study.network.model_copy(update={"width": width}),
                "diffusion": study.diffusion.model_copy(update={"noise_multiplicity": draws}),
            })  # fmt: skip
            numbers, plain, private = _steps(sized, which, batch)
            one, two = _in_turn(plain, private, arguments.repeats)
            print(f"{name:<12}{which:>12}{numbers:>11,}{draws:>3}{width:>7}{batch:>7}"
                  f"{one:>9.3f}{two:>11.3f}{two / one:>7.2f}", flush=True)  # fmt: skip


def _steps(study: Study, which: str, batch: int) -> tuple[int, Callable[[], object], Callable[[], object]]:
    """(trained numbers, a plain step, a private step) on the same black images."""
    data = study.data
    images = np.zeros((batch, data.channels, data.image_size, data.image_size), dtype=np.uint8)
    labels = np.zeros(batch, dtype=np.int64)
    models = [DiffusionModel(study).train() for _ in range(2)]
    trained = [[p for name, p in model.named_parameters() if name in model.set_trainable(which)] for model in models]
    optimizer = torch.optim.AdamW(trained[0])
    loss, draw = record_loss(study, torch.Generator().manual_seed(0))
    engine = PrivateGradients(models[1], loss, draw, max_grad_norm=0.1, physical_batch=batch, loss_part=True)

    def plain() -> None:
        optimizer.zero_grad()
        loss(models[0], *draw(to_unit(images), torch.from_numpy(labels))).mean().backward()
        optimizer.step()

    return sum(p.numel() for p in trained[0]), plain, lambda: engine.clipped_sum(images, labels)


def _in_turn(plain: Callable[[], object], private: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of each, the first of each left out."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for kept, step in zip(times, (plain, private), strict=True):
            began = time.process_time()
            step()
            kept.append(time.process_time() - began)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


if __name__ == "__main__":
    main()
