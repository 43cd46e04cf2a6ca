"""The biomarker classifier: learns, and travels without loss; what does not fit is refused.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import pytest
import torch
from opacus.validators import ModuleValidator
from torch import nn

from common.errors import DataError, ReplyError, StudyError
from common.images import ImageSet
from common.model.classifier import BiomarkerClassifier, _augment
from common.model.timm_backbones import create_backbone, import_timm, with_group_norms
from common.model.weights import LARGEST_WEIGHT
from common.study import ValidationConfig

CONFIG = ValidationConfig(steps=12, batch_size=24, learning_rate=3e-3, reference_steps=1, backbone="test_byobnet")


class Sizes(TypedDict):
    classes: int
    channels: int


SIZES: Sizes = {"classes": 2, "channels": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


def easy(count: int, seed: int, side: int = 28) -> ImageSet:
    """Class 1 has a bright disc; nine of ten records are class 0."""
    draws = np.random.default_rng(seed)
    labels = (draws.random(count) < 0.1).astype(np.int64)
    labels[:2] = (0, 1)
    pixels = draws.integers(0, 120, (count, 1, side, side))
    rows, columns = np.mgrid[:side, :side]
    disc = (rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (side / 4) ** 2
    pixels[labels == 1] += 100 * disc
    return ImageSet(pixels.astype(np.uint8), labels)


@pytest.mark.parametrize(("symmetry", "ways"), [("none", 1), ("hflip", 2), ("dihedral", 8)])
def test_images_are_changed_only_in_the_ways_that_mean_nothing(symmetry, ways):
    """An L-shaped mark is seen in each of its 1, 2 or 8 poses, wherever it is shifted to."""
    image = torch.zeros(400, 1, 28, 28)
    image[:, :, 8:20, 10] = image[:, :, 19, 10:16] = 1.0
    seen = {
        tuple(map(tuple, place.int().tolist()))
        for exposed in _augment(image, np.random.default_rng(0), symmetry)[:, 0]
        for moved in [exposed > exposed.mean()]
        for place in [moved[moved.any(dim=1)][:, moved.any(dim=0)]]
    }
    assert len(seen) == ways


@pytest.fixture(scope="module")
def trained() -> Iterator[BiomarkerClassifier]:
    """On one thread: with more, a busy machine splits sums otherwise from one run to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield BiomarkerClassifier.fit(easy(120, seed=0), **SIZES, config=CONFIG, seed=1)
    torch.set_num_threads(threads)


def test_training_beats_chance_on_a_rare_class(trained: BiomarkerClassifier) -> None:
    test = easy(200, seed=5)
    predicted = trained.predict(test.images)
    assert predicted.shape == (200, 2) and predicted.dtype == np.float32
    np.testing.assert_allclose(predicted.sum(axis=1), 1.0, atol=1e-5)
    for k in (0, 1):
        assert (predicted.argmax(axis=1) == k)[test.labels == k].mean() > 0.8


def test_same_seed_gives_the_same_network_and_leaves_the_global_generator_alone(trained: BiomarkerClassifier) -> None:
    torch.manual_seed(77)
    expected = torch.rand(1)
    torch.manual_seed(77)
    steps: list[tuple[int, int]] = []
    again = BiomarkerClassifier.fit(
        easy(120, seed=0), **SIZES, config=CONFIG, seed=1, progress=lambda done, of: steps.append((done, of))
    )
    assert torch.equal(torch.rand(1), expected)
    assert steps == [(step + 1, 12) for step in range(12)]
    first, second = trained.state(), again.state()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_state_round_trip_gives_identical_predictions(trained: BiomarkerClassifier) -> None:
    state = trained.state()
    assert all(value.dtype == np.float32 for value in state.values())
    rebuilt = BiomarkerClassifier.from_state(state, **SIZES, image_size=28, backbone=CONFIG.backbone)
    images = easy(30, seed=6).images
    assert np.array_equal(rebuilt.predict(images), trained.predict(images))
    np.testing.assert_allclose(rebuilt.predict(images, batch=7), trained.predict(images), atol=1e-5)
    assert rebuilt.predict(images[:0]).shape == (0, 2)


def test_tampered_state_is_refused(trained: BiomarkerClassifier) -> None:
    state = trained.state()
    name = next(iter(state))
    tampered = {
        "names differ": {k: v for k, v in state.items() if k != name},
        "names": {**state, "extra.weight": np.zeros(1, np.float32)},
        "float32": {**state, name: state[name].ravel()[:-1]},
        "float64": {**state, name: state[name].astype(np.float64)},
        "NaN": {**state, name: np.full_like(state[name], np.nan)},
        "a value over 1e": {**state, name: np.full_like(state[name], -1.1 * LARGEST_WEIGHT)},
    }
    for message, bad in tampered.items():
        with pytest.raises(ReplyError, match=message):
            BiomarkerClassifier.from_state(bad, **SIZES, image_size=28, backbone=CONFIG.backbone)


def test_weights_that_overflow_give_even_probabilities(trained: BiomarkerClassifier) -> None:
    hostile = BiomarkerClassifier.from_state(trained.state(), **SIZES, image_size=28, backbone=CONFIG.backbone)
    with torch.no_grad():
        for parameter in hostile.net.parameters():
            parameter.fill_(3e38)
    assert np.array_equal(hostile.predict(easy(3, seed=1).images), np.full((3, 2), 0.5, np.float32))


def test_no_image_moves_anothers_score_by_being_there(trained: BiomarkerClassifier) -> None:
    images = easy(9, seed=5).images
    whole = trained.predict(images, batch=16)
    for gone in (0, 4, 8):
        keep = np.arange(9) != gone
        assert np.array_equal(trained.predict(images[keep], batch=16), whole[keep])


def test_images_of_another_size_and_labels_out_of_range_are_refused(trained: BiomarkerClassifier) -> None:
    with pytest.raises(DataError, match="28"):
        trained.predict(easy(2, seed=0, side=32).images)
    images = easy(4, seed=0)
    with pytest.raises(DataError, match="label"):
        BiomarkerClassifier.fit(images, classes=1, channels=1, config=CONFIG, seed=0)
    with pytest.raises(DataError, match="3 channels"):
        BiomarkerClassifier.fit(images, classes=2, channels=3, config=CONFIG, seed=0)
    with pytest.raises(DataError, match="no images"):
        BiomarkerClassifier.fit(images.select(np.zeros(0, np.int64)), **SIZES, config=CONFIG, seed=0)


def test_unknown_backbone_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(StudyError, match="test_resnet"):
        create_backbone("test_resnett", channels=1, classes=2, image_size=28)


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "test_resnet", "test_vit3"])
def test_backbone_has_no_batch_statistics_and_takes_small_images(name: str) -> None:
    torch.manual_seed(0)
    net = create_backbone(name, channels=3, classes=4, image_size=16)
    assert not any("BatchNorm" in type(module).__name__ for module in net.modules())
    assert ModuleValidator.validate(net, strict=False) == []
    images = torch.rand(3, 3, 16, 16)
    alone = torch.cat([net.eval()(image[None]) for image in images])
    torch.testing.assert_close(net(images), alone, atol=1e-5, rtol=1e-4)


def test_group_norm_keeps_the_activation_that_timm_folds_into_its_norm() -> None:
    import_timm()
    from timm.layers import BatchNormAct2d

    net = with_group_norms(nn.Sequential(BatchNormAct2d(12)))
    found = net(torch.randn(2, 12, 4, 4)).detach()
    assert float(found.min()) == 0.0
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == [6]


def test_a_norm_with_an_activation_is_taken_apart_and_computes_the_same() -> None:
    """Opacus has a formula for nn.GroupNorm itself; for timm's subclass it would differentiate record by record."""
    torch.manual_seed(0)
    whole = import_timm().create_model("test_efficientnet_gn", num_classes=2, in_chans=1)
    apart = with_group_norms(copy.deepcopy(whole))
    assert {type(m) for m in apart.modules() if isinstance(m, nn.GroupNorm)} == {nn.GroupNorm}
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(apart.eval()(images), whole.eval()(images))


def test_no_layer_of_a_backbone_changes_what_it_was_given() -> None:
    net = create_backbone("test_efficientnet_gn", channels=1, classes=2, image_size=28)
    assert not any(getattr(module, "inplace", False) for module in net.modules())
