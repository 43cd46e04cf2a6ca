"""The teacher: it tells textures apart from noisy sums, and says which images are of their class."""

from __future__ import annotations

import numpy as np
import pytest

from common.features import feature_sums
from common.images import ImageSet, Units
from common.scattering import scattering
from server.synthesis.teacher import Teacher, view_of

FEATURES = scattering(16, 1, "none")


def _textures(count: int, seed: int) -> ImageSet:
    """Class 0 is striped upright, class 1 across; brightness and contrast say nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    wave = np.sin(np.arange(16)[None] * 2.1 + rng.uniform(0, 6, (count, 1)))
    striped = np.where(labels[:, None, None] == 0, wave[:, None, :], wave[:, :, None]) * rng.uniform(
        10, 60, (count, 1, 1)
    )
    pixels = 128 + striped + rng.normal(0, 20, (count, 16, 16)) + rng.uniform(-40, 40, (count, 1, 1))
    return ImageSet(pixels.clip(0, 255).astype(np.uint8)[:, None], labels)


def _teacher(noise_std: float, *, count: int = 400) -> Teacher:
    real, rng = _textures(count, 1), np.random.default_rng(0)
    view = view_of(_textures(300, 2).images, FEATURES, many=32, seed=0)
    sums = feature_sums(Units.of(real, "image"), view.of(FEATURES.of(real.images)), 2).parts
    noisy = {name: part.numpy() + noise_std * rng.standard_normal(part.shape) for name, part in sums.items()}
    counts = np.bincount(real.labels).astype(np.float64)
    return Teacher.fit(FEATURES, view, noisy["means"], noisy["second_moments"], counts, noise_std=noise_std)


@pytest.mark.parametrize("noise_std", [0.0, 2.0])
def test_it_tells_textures_apart(noise_std):
    test = _textures(300, 3)
    assert (_teacher(noise_std).margins(test) > 0).mean() > 0.95


def test_noise_does_not_hide_a_rare_class():
    """Nine of ten are of class 0; the noisy mean of the tenth is longer than the true one, and must not count so."""
    real, rng = _textures(2000, 7), np.random.default_rng(0)
    real = real.select(
        np.sort(np.concatenate([np.flatnonzero(real.labels == 0), np.flatnonzero(real.labels == 1)[:100]]))
    )
    view = view_of(_textures(300, 2).images, FEATURES, many=64, seed=0)
    sums = feature_sums(Units.of(real, "image"), view.of(FEATURES.of(real.images)), 2).parts
    counts, test = np.bincount(real.labels).astype(np.float64), _textures(400, 8)
    recalls = []
    for _ in range(5):
        noisy = {name: part.numpy() + 4.0 * rng.standard_normal(part.shape) for name, part in sums.items()}
        teacher = Teacher.fit(FEATURES, view, noisy["means"], noisy["second_moments"], counts, noise_std=4.0)
        agreed = teacher.margins(test) > 0
        recalls.append([agreed[test.labels == kind].mean() for kind in (0, 1)])
    common, rare = np.mean(recalls, axis=0)
    assert rare > 0.8 and common > 0.8, (common, rare)


def test_scores_do_not_depend_on_the_block(monkeypatch):
    teacher, test = _teacher(1.0), _textures(50, 9)
    whole = teacher.scores(test.images)
    monkeypatch.setattr("server.synthesis.teacher._AT_ONCE", 7)
    np.testing.assert_allclose(teacher.scores(test.images), whole, atol=1e-4)


def test_with_noise_alone_it_still_gives_numbers():
    assert np.isfinite(_teacher(1e4, count=4).scores(_textures(20, 4).images)).all()


def test_directions_are_scaled_so_that_half_of_the_public_images_are_no_longer_than_1():
    public = _textures(200, 5).images
    view = view_of(public, FEATURES, many=32, seed=0)
    lengths = np.linalg.norm(view.of(FEATURES.of(public)), axis=1)
    assert 0.45 < (lengths <= 1).mean() < 0.55


def test_fewer_public_images_than_directions_leave_the_rest_empty():
    view = view_of(_textures(20, 6).images, FEATURES, many=32, seed=0)
    assert np.isfinite(view.directions).all() and not view.directions[:, 20:].any()


class _Said(Teacher):
    """Its scores are an image's first pixels."""

    def scores(self, images):
        return images[:, 0, 0, : len(self.offset)].astype(np.float64)


def _said(classes: int) -> Teacher:
    nothing = np.zeros(0)
    return _Said(FEATURES, view_of(_textures(20, 6).images, FEATURES, many=4, seed=0), nothing, np.zeros(classes))


def _scored(rows: list[list[int]], labels: list[int]) -> ImageSet:
    images = np.zeros((len(rows), 1, 16, 16), np.uint8)
    images[:, 0, 0, : len(rows[0])] = rows
    return ImageSet(images, np.array(labels))


def test_of_each_class_the_share_is_kept_that_is_most_of_it(monkeypatch):
    """Also where the teacher takes all of a class for another one."""
    monkeypatch.setattr("server.synthesis.teacher._FEWEST", 1)
    found = _said(2).kept(_scored([[9, 1], [8, 7], [9, 3], [9, 2], [1, 9], [3, 4]], [1, 1, 1, 1, 0, 0]), 0.5)
    assert found.images[:, 0, 0, :2].tolist() == [[3, 4], [8, 7], [9, 3]]
    assert found.labels.tolist() == [0, 1, 1]


def test_of_a_small_class_no_more_is_left_out_than_it_can_spare(monkeypatch):
    monkeypatch.setattr("server.synthesis.teacher._FEWEST", 3)
    found = _said(2).kept(_scored([[9, 1]] * 2 + [[1, n] for n in range(2, 6)], [0, 0, 1, 1, 1, 1]), 0.5)
    assert np.bincount(found.labels).tolist() == [2, 3]
    assert found.images[found.labels == 1][:, 0, 0, 1].tolist() == [3, 4, 5]


def test_of_the_candidates_those_that_are_most_of_their_class_are_kept_as_they_come():
    rows = [[1, 9], [5, 4], [1, 2], [9, 1], [6, 1], [1, 3]]
    found = _said(2).chosen(_scored(rows, [0, 0, 0, 0, 1, 1]), np.array([0, 1, 0]))
    assert found.images[:, 0, 0, :2].tolist() == [[5, 4], [1, 3], [9, 1]]
    assert found.labels.tolist() == [0, 1, 0]
