"""The space in which images are compared: what a classifier of the set's real images looks at.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, D features, C channels, H×W pixels.

A network trained on photographs of everyday things would say little about 28 px of tissue, and would have to be
fetched. So the project's own small network is trained on the set's real val images, without privacy, and the last
layer's input is taken: neither the sites nor the synthetic images have anything of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from common.errors import ReplyError, SynthwardError
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.images import ImageSet
from common.model.classifier import BiomarkerClassifier
from common.study import Study, ValidationConfig

_SEED = 0
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class FeatureSpace:
    """A classifier of real images, and the scaling that gives each of its features mean 0 and spread 1 on them.

    Attributes:
        mean, spread: (D,), of the images that it was trained on.
    """

    classifier: BiomarkerClassifier
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def of(cls, classifier: BiomarkerClassifier, train: ImageSet) -> FeatureSpace:
        raw = penultimate(classifier, train.images)
        return cls(classifier, raw.mean(axis=0), np.maximum(raw.std(axis=0), _SMALLEST_SPREAD))

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Scaled features (N, D) of images (N, C, H, W)."""
        return (penultimate(self.classifier, images) - self.mean) / self.spread


def penultimate(classifier: BiomarkerClassifier, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the classifier's last linear layer is given, (N, D), for images (N, C, H, W)."""
    heads = [
        module for module in classifier.net.modules()
        if isinstance(module, nn.Linear) and module.out_features == classifier.classes
    ]  # fmt: skip
    if not heads:
        raise SynthwardError("the network does not end in a linear layer", where=classifier.backbone)
    seen: list[NDArray[np.float64]] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].double().numpy().copy())

    hook = heads[-1].register_forward_pre_hook(keep)
    try:
        classifier.predict(images)
    finally:
        hook.remove()
    return np.concatenate(seen)[: len(images)]  # the last batch is filled up


def real_classifier(train: ImageSet, study: Study, *, steps: int, cache: Path) -> BiomarkerClassifier:
    """A classifier of real images, from `cache` where it was trained before."""
    config, schema = ValidationConfig(steps=steps), study.data
    sizes: dict[str, Any] = {"classes": len(schema.classes), "channels": schema.channels}
    if cache.exists():
        try:
            state = unpack_arrays(cache.read_bytes(), where=str(cache))
            return BiomarkerClassifier.from_state(
                state, **sizes, image_size=schema.image_size, backbone=config.backbone
            )
        except (SynthwardError, ReplyError):
            cache.unlink()  # of another network, or damaged: trained again below
    classifier = BiomarkerClassifier.fit(train, **sizes, config=config, seed=_SEED, symmetry=study.symmetry)
    atomic_write(cache, pack_arrays(classifier.state()))
    return classifier
