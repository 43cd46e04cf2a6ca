"""The biomarker classifier: trained on synthetic images, tested on real ones.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, B images of one batch, C channels, H×W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.errors import DataError
from common.images import ImageSet, to_unit
from common.model.timm_backbones import create_backbone
from common.model.weights import fitting
from common.study import Study, Symmetry, ValidationConfig

BATCH = 256  # images per pass of a test
_WEIGHT_DECAY = 0.01
_WARM_UP = 0.1  # share of the steps
_SHIFT = 14  # images are shifted by at most side / 14 pixels


class BiomarkerClassifier:
    """A timm network with its sizes; made by `fit`, `fresh` or `from_state`, always in evaluation mode."""

    def __init__(self, net: nn.Module, *, classes: int, channels: int, image_size: int, backbone: str) -> None:
        self.net = net.eval()
        self.classes = classes
        self.channels = channels
        self.image_size = image_size
        self.backbone = backbone

    @classmethod
    def fit(
        cls,
        images: ImageSet,
        *,
        classes: int,
        channels: int,
        config: ValidationConfig,
        seed: int,
        symmetry: Symmetry = "none",
        progress: Callable[[int, int], None] | None = None,
    ) -> BiomarkerClassifier:
        """Train without privacy: AdamW, warm-up and cosine, every class drawn equally often.

        The same seed gives the same network on one thread; with more, a busy machine may split a sum otherwise.

        Args:
            images: at least one image; a class without images is simply never drawn.
            symmetry: changes of an image that mean nothing, made at random; besides, images are shifted a little.
            progress: called with (steps done, steps in all) after each step.

        Raises:
            DataError: no images, or labels or shapes that do not fit.
            StudyError: timm does not know `config.backbone`.
        """
        _check(images, classes, channels)
        with _seeded(seed):
            model = cls._fresh(images, classes, channels, config.backbone)
            net = model.net.train()
            optimiser = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=_WEIGHT_DECAY)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warm_up_and_cosine(config.steps))
            draws = np.random.default_rng(seed)
            for step in range(config.steps):
                index = _balanced(images.labels, config.batch_size, draws)
                batch = _augment(to_unit(images.images[index]), draws, symmetry)
                loss = nn.functional.cross_entropy(net(batch), torch.from_numpy(images.labels[index]))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                if progress is not None:
                    progress(step + 1, config.steps)
            net.eval()
        return model

    @classmethod
    def fresh(cls, study: Study) -> BiomarkerClassifier:
        """The study's classifier, untrained; initial weights are drawn from the study's seed.

        Raises:
            StudyError: timm does not know the backbone.
        """
        classes, data, backbone = len(study.data.classes), study.data, study.validation.backbone
        with _seeded(study.study.seed):
            net = create_backbone(backbone, channels=data.channels, classes=classes, image_size=data.image_size)
        return cls(net, classes=classes, channels=data.channels, image_size=data.image_size, backbone=backbone)

    def predict(self, images: NDArray[np.uint8], batch: int = BATCH) -> NDArray[np.float32]:
        """Class probabilities (N, K) of images (N, C, H, W), each row summing to 1; N may be 0.

        Every pass has `batch` images, the last one filled with black ones: rounding depends on the size of a batch, and
        no image may move another's score by being there. Where the network overflows, the row is 1/K: an error raised
        for one image would tell that it was there.

        Raises:
            DataError: channels or size differ from those the classifier was trained on.
        """
        expected = (self.channels, self.image_size, self.image_size)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise DataError(
                f"images of {images.dtype} and shape {images.shape[1:]} instead of uint8 and {expected}",
                where="classifier",
                remedy="Prepare the images to the study's size.",
            )
        count = len(images)
        images = np.concatenate([images, np.zeros((-count % batch, *expected), dtype=np.uint8)])
        with torch.inference_mode():
            parts = [
                self.net(to_unit(images[start : start + batch])).softmax(dim=1).numpy()
                for start in range(0, len(images), batch)
            ]
        scores = np.concatenate(parts)[:count] if parts else np.zeros((0, self.classes), dtype=np.float32)
        scores[~np.isfinite(scores).all(axis=1)] = 1.0 / self.classes
        return scores

    def state(self) -> dict[str, NDArray[np.float32]]:
        """All learnt values as float32 arrays by name (copies)."""
        return {name: value.detach().numpy().copy() for name, value in _learnt(self.net).items()}

    @classmethod
    def from_state(
        cls, state: dict[str, NDArray[np.float32]], *, classes: int, channels: int, image_size: int, backbone: str
    ) -> BiomarkerClassifier:
        """Rebuild a classifier from `state`.

        Raises:
            ReplyError: it is not this network's (`common/model/weights.py: fitting`).
            StudyError: timm does not know `backbone`.
        """
        with _seeded(0):
            net = create_backbone(backbone, channels=channels, classes=classes, image_size=image_size)
        wanted = _learnt(net)
        with torch.no_grad():
            for name, value in fitting(state, wanted, where="classifier").items():
                wanted[name].copy_(value)
        return cls(net, classes=classes, channels=channels, image_size=image_size, backbone=backbone)

    @classmethod
    def _fresh(cls, images: ImageSet, classes: int, channels: int, backbone: str) -> BiomarkerClassifier:
        side = images.images.shape[-1]
        net = create_backbone(backbone, channels=channels, classes=classes, image_size=side)
        return cls(net, classes=classes, channels=channels, image_size=side, backbone=backbone)


def cross_entropy(net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each record, (B,), of pixels (B, C, H, W) and labels (B,)."""
    return nn.functional.cross_entropy(net(pixels), labels, reduction="none")


def _learnt(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if value.dtype == torch.float32}


def _check(images: ImageSet, classes: int, channels: int) -> None:
    pixels, labels = images.images, images.labels
    remedy = "Prepare the images to the study's classes and size."
    if pixels.ndim != 4 or pixels.shape[1] != channels or pixels.shape[2] != pixels.shape[3]:
        raise DataError(f"images of shape {pixels.shape}, {channels} channels wanted", where="images", remedy=remedy)
    if not len(labels):
        raise DataError("no images to train a classifier on", where="images", remedy="Give at least one image.")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"a label outside 0 to {classes - 1}", where="labels", remedy=remedy)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's global generator set to `seed` inside, and as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def warm_up_and_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each of `steps` steps: a tenth of them rising, then half a cosine."""
    warm = max(1, round(_WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return factor


def _balanced(labels: NDArray[np.int64], count: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """`count` record numbers, with replacement; each class that occurs is equally likely."""
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    weights = 1.0 / sizes[inverse]
    return draws.choice(len(labels), size=count, p=weights / weights.sum())


def _augment(batch: torch.Tensor, draws: np.random.Generator, symmetry: Symmetry) -> torch.Tensor:
    """Shift each image by up to side / 14 pixels, and change it at random in the ways that mean nothing.

    No more: what a release says of itself must not hang on an augmentation that its readers do not use.
    """
    count, _, side, _ = batch.shape
    reach = max(1, side // _SHIFT)
    padded = nn.functional.pad(batch, (reach,) * 4, mode="replicate")

    def places(*, flipped: bool) -> torch.Tensor:
        shifted = torch.from_numpy(draws.integers(0, 2 * reach + 1, (count, 1))) + torch.arange(side)
        chosen = torch.from_numpy(draws.random((count, 1)) < 0.5)
        return torch.where(chosen, shifted.flip(1), shifted) if flipped else shifted

    rows, columns = places(flipped=symmetry == "dihedral"), places(flipped=symmetry != "none")
    records = torch.arange(count)[:, None, None]
    moved = padded[records, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if symmetry == "dihedral":
        turned = torch.from_numpy(draws.random((count, 1, 1, 1)) < 0.5)
        moved = torch.where(turned, moved.transpose(2, 3), moved)
    return moved.contiguous()
