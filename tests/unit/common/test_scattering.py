"""Scattering features: what changes them, and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from common.scattering import scattering

TURNS = [(flip, turns) for flip in (False, True) for turns in range(4)]


def _images(count: int, channels: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    coarse = rng.integers(0, 256, (count, channels, -(-size // 4), -(-size // 4)))
    fine = rng.integers(-20, 21, (count, channels, size, size))
    return (np.kron(coarse, np.ones((4, 4)))[..., :size, :size] + fine).clip(0, 255).astype(np.uint8)


def _changed(images: np.ndarray, *, flip: bool, turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(images[..., ::-1] if flip else images, turns, axes=(2, 3)))


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (9, 3), (28, 3), (64, 1), (100, 3)])
@pytest.mark.parametrize("symmetry", ["none", "hflip", "dihedral"])
def test_features_stay_under_the_changes_of_the_symmetry_and_under_no_other(size, channels, symmetry):
    images, features = _images(6, channels, size), scattering(size, channels, symmetry)
    found = features.of(images)
    assert found.shape == (6, features.dimension) and found.dtype == np.float32
    same = {"none": TURNS[:1], "hflip": [(False, 0), (True, 0)], "dihedral": TURNS}[symmetry]
    for flip, turns in TURNS:
        apart = np.abs(features.of(_changed(images, flip=flip, turns=turns)) - found).max() / found.std()
        assert (apart < 1e-4) == ((flip, turns) in same), (flip, turns, apart)


def test_a_row_is_of_its_own_image_alone():
    images, features = _images(5, 1, 28), scattering(28, 1, "none")
    together = features.of(images)
    for row, image in enumerate(images):
        np.testing.assert_allclose(features.of(image[None])[0], together[row], atol=1e-5)
    assert features.of(images[:0]).shape == (0, features.dimension)


def test_stripes_answer_the_wavelet_that_lies_across_them():
    """Order 1 tells a texture that averages of pixels do not."""
    stripes = np.zeros((1, 1, 32, 32), np.uint8)
    stripes[..., ::3] = 255
    features = scattering(32, 1, "none")
    paths = features._paths
    upright, flat = (
        features.of(x).reshape(len(paths), -1).mean(axis=1) for x in (stripes, stripes.transpose(0, 1, 3, 2).copy())
    )
    fine = {angle: at for at, path in enumerate(paths) if len(path) == 1 for scale, angle in path if scale == 0}
    assert upright[fine[0]] > 5 * upright[fine[2]]
    assert flat[fine[2]] > 5 * flat[fine[0]]
    assert np.isclose(upright[0], flat[0], atol=1e-3)  # the averages of pixels


def test_constant_images_have_no_edges():
    features = scattering(28, 1, "none")
    found = features.of(np.full((1, 1, 28, 28), 200, np.uint8)).reshape(len(features._paths), -1)
    assert np.abs(found[1:]).max() < 1e-5 < found[0].min()
