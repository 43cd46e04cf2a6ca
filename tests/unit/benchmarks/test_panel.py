"""The panel of classifiers that judges a synthetic set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import panel
from benchmarks.panel import PANEL, Pictures, fidelity, kid, utility

pytestmark = pytest.mark.usefixtures("one_thread")


def _stripes(count, seed, *, grain=0.3, level=0.0):
    """Two classes: upright and level stripes, under grain."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    wave = np.sin(np.arange(28))[None, :].repeat(28, axis=0)
    images = np.where(labels[:, None, None] == 0, wave, wave.T) * 0.5 + grain * rng.standard_normal((count, 28, 28))
    return Pictures(torch.from_numpy(images[:, None] + level).float().clamp(-1, 1), labels)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(panel, "_BATCH", 32)
    monkeypatch.setattr(panel.trained, "__kwdefaults__", {"steps": 30})


def test_every_classifier_of_the_panel_learns_what_the_set_says_true_or_not(few_steps):
    found = utility(_stripes(200, 0), _stripes(120, 1), seeds=1)
    assert found.keys() == PANEL.keys()
    assert all(auc > 0.9 for auc, _ in found.values()), found
    wrong = Pictures(_stripes(200, 0).x, 1 - _stripes(200, 0).y)
    assert all(auc < 0.1 for auc, _ in utility(wrong, _stripes(120, 1), seeds=1).values())


def test_a_set_of_the_same_kind_is_near_and_another_is_far_and_told_apart(few_steps):
    real = _stripes(300, 0)
    near, far = fidelity(_stripes(300, 1), real), fidelity(_stripes(300, 1, level=0.4), real)
    assert abs(near[0]) < 0.2 * far[0]
    assert near[2] < 0.75
    assert far[2] > 0.95
    assert far[1] > 0.9


def test_the_kernel_distance_is_nothing_for_one_distribution_and_grows_with_a_shift():
    rng = np.random.default_rng(0)
    one, two = rng.standard_normal((2, 500, 8))
    assert abs(kid(one, two)) < 0.05
    assert kid(one, two + 1.0) > 1.0


def test_a_released_set_is_read_in_grey_and_in_colour(tmp_path):
    for shape in ((5, 8, 8), (5, 8, 8, 3)):
        path = tmp_path / f"{len(shape)}.npz"
        np.savez(path, train_images=np.full(shape, 255, np.uint8), train_labels=np.arange(5)[:, None] % 2)
        read = Pictures.read(path, "train")
        assert read.x.shape == (5, 3 if len(shape) == 4 else 1, 8, 8)
        assert float(read.x.min()) == 1.0
        assert read.y.tolist() == [0, 1, 0, 1, 0]
