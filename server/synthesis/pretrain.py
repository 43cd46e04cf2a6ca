"""The network's start: trained on the corpus at the coordinator; reads noisy sums and public images, nothing of a site.

SPDX-License-Identifier: Apache-2.0

It can be stopped at any time: what it has is kept every minute, and it goes on from there with the same numbers, since
the randomness of a step depends on the study's seed and the step alone.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import CheckpointError, SynthwardError
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.images import ImageSet, to_unit
from common.model.diffusion import DiffusionLoss
from common.model.diffusion_model import DiffusionModel, initial_weights, load_model
from common.protocol import Arrays
from common.study import Study, Symmetry

_REPORT_EVERY, _SAVE_SECONDS = 20, 60.0
_WARM_UP = 50  # steps
_LAST_RATE = 0.02  # of the learning rate, at the end of the cosine
_AVERAGE = 0.998  # of the moving average, a step, later; shorter at first
_LONGEST_STEP = 1.0  # norm of a step's gradient
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch calls Adam's


def pretrained(
    study: Study, corpus: ImageSet, file: Path, *, on_step: Callable[[int, int, float], None] | None = None
) -> Arrays:
    """Moving average of the weights after `pretrain.steps` steps of AdamW with a cosine rate; kept in `file`.

    Args:
        on_step: called with (steps done, steps in all, mean loss of late) now and then.
    """
    run = _Run.resumed(study, file, corpus)
    data, steps, losses = _Batches(study, corpus), study.pretrain.steps, list[float]()
    saved = time.monotonic()
    while run.step < steps:
        losses.append(run.train(*data.at(run.step)))
        if time.monotonic() - saved > _SAVE_SECONDS or run.step == steps:
            run.save(file)
            saved = time.monotonic()
        if on_step is not None and (run.step % _REPORT_EVERY == 0 or run.step == steps):
            on_step(run.step, steps, float(np.mean(losses[-_REPORT_EVERY:])))
    return run.average.weights()


@dataclass
class _Run:
    """Everything that a stop must not lose."""

    study: Study
    corpus: NDArray[np.uint8]  # digest of what it learns from
    model: DiffusionModel
    average: DiffusionModel
    adam: torch.optim.AdamW
    step: int

    @classmethod
    def begun(cls, study: Study, corpus: ImageSet) -> _Run:
        model = load_model(study, initial_weights(study))
        rate = study.pretrain.learning_rate
        adam = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        return cls(study, _digest(corpus), model, copy.deepcopy(model), adam, 0)

    @classmethod
    def resumed(cls, study: Study, file: Path, corpus: ImageSet) -> _Run:
        """From what `save` kept, where it is whole, of this network and corpus; else from the initial weights."""
        run = cls.begun(study, corpus)
        try:
            run._load(unpack_arrays(file.read_bytes(), where=str(file)))
        except (OSError, SynthwardError, KeyError):
            return cls.begun(study, corpus)
        return run

    def train(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> float:
        """One step; its loss."""
        self._set_rate()
        loss = DiffusionLoss(1, self.study.diffusion.label_dropout, len(self.study.data.classes))
        draws = loss.draw(len(labels), tuple(images.shape[-3:]), generator=generator, dtype=torch.float32)
        self.adam.zero_grad()
        value = loss.losses(self.model.train(), images, labels, draws).mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _LONGEST_STEP)
        self.adam.step()
        keep = min(_AVERAGE, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        self.step += 1
        return float(value.detach())

    def _set_rate(self) -> None:
        config, done = self.study.pretrain, self.step
        falling = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + np.cos(np.pi * done / config.steps))
        for group in self.adam.param_groups:
            group["lr"] = config.learning_rate * min((done + 1) / _WARM_UP, falling)

    def save(self, file: Path) -> None:
        """Write all of it."""
        arrays = {f"weights/{n}": a for n, a in self.model.weights().items()}
        arrays |= {f"average/{n}": a for n, a in self.average.weights().items()}
        for name, parameter in self.model.named_parameters():
            arrays |= {f"{part}/{name}": self.adam.state[parameter][part].numpy() for part in _MOMENTS}
        atomic_write(file, pack_arrays({**arrays, "step": np.array([self.step]), "corpus": self.corpus}))

    def _load(self, arrays: Arrays) -> None:
        def part(prefix: str) -> Arrays:
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

        if not np.array_equal(arrays["corpus"], self.corpus):
            raise CheckpointError("of another corpus", where="pretrained.safetensors")
        self.model.load_state_dict(load_model(self.study, part("weights/")).state_dict())
        self.average.load_state_dict(load_model(self.study, part("average/")).state_dict())
        self.step = int(arrays["step"][0])
        for name, parameter in self.model.named_parameters():
            moments = {kind: torch.from_numpy(arrays[f"{kind}/{name}"].copy()) for kind in _MOMENTS}
            self.adam.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def _digest(corpus: ImageSet) -> NDArray[np.uint8]:
    """SHA-256 of images and labels, (32,)."""
    found = hashlib.sha256(corpus.images.tobytes())
    found.update(corpus.labels.tobytes())
    return np.frombuffer(found.digest(), np.uint8)


class _Batches:
    """Batches of the corpus, each from its step's own seed; what the study's symmetry allows is done to images."""

    def __init__(self, study: Study, corpus: ImageSet) -> None:
        self._study, self._corpus = study, corpus

    def at(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """(images, labels, randomness of the loss) of a step."""
        rng = np.random.default_rng([self._study.study.seed, step])
        rows = rng.integers(0, len(self._corpus), self._study.pretrain.batch_size)
        images = turned(self._corpus.images[rows], self._study.symmetry, rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return to_unit(images), torch.from_numpy(self._corpus.labels[rows]), generator


def turned(images: NDArray[np.uint8], symmetry: Symmetry, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images (N, C, S, S), each changed at random in one of the ways that the symmetry allows."""
    if symmetry == "none":
        return images
    out = images.copy()
    for row in np.flatnonzero(rng.random(len(out)) < 0.5):
        out[row] = out[row, :, :, ::-1]
    if symmetry == "dihedral":
        for row, turns in enumerate(rng.integers(0, 4, len(out))):
            out[row] = np.rot90(out[row], turns, axes=(1, 2))
    return out
