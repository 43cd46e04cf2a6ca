"""What exact per-record clipping costs beside a plain training step, both in one process, in turn.

SPDX-License-Identifier: Apache-2.0

Run: .venv/bin/python benchmarks/step_time.py [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from client.privacy.grad_sample import clipped_gradient_sum
from common.model.diffusion import DiffusionLoss, NoiseSchedule
from common.model.swin_unet import SwinUNet, parameter_count
from common.study import load_study

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, process CPU time, medians")
    print(f"{'study':<12}{'parameters':>12}{'records':>9}{'plain s':>10}{'clipped s':>11}{'ratio':>7}")
    for name, records in (("pneumonia", 64), ("histology", 64), ("fundus", 32)):
        study = load_study(CONFIGS / f"{name}.toml")
        net = SwinUNet(study.network, study.data)
        loss = DiffusionLoss(NoiseSchedule(1000), study.diffusion.noise_multiplicity, 0.1, len(study.data.classes))
        generator = torch.Generator().manual_seed(0)
        side = study.data.image_size
        x = torch.rand(records, study.data.channels, side, side) * 2 - 1
        y = torch.zeros(records, dtype=torch.int64)

        def plain(net=net, loss=loss, x=x, y=y, generator=generator):
            net.zero_grad()
            loss(net, x, y, generator=generator).mean().backward()

        def clipped(net=net, loss=loss, x=x, y=y, generator=generator):
            def per_record(a, b):
                return loss(net, a, b, generator=generator)

            clipped_gradient_sum(net, per_record, x, y, max_grad_norm=1.0, physical_batch=len(y))

        times: dict[str, list[float]] = {"plain": [], "clipped": []}
        for _ in range(arguments.repeats + 1):
            for kind, step in (("plain", plain), ("clipped", clipped)):
                began = time.process_time()
                step()
                times[kind].append(time.process_time() - began)
        one, two = (statistics.median(times[kind][1:]) for kind in ("plain", "clipped"))
        print(f"{name:<12}{parameter_count(net):>12,}{records:>9}{one:>10.3f}{two:>11.3f}{two / one:>7.2f}")


if __name__ == "__main__":
    main()
