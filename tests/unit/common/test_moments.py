"""Class moments: bounded for any images, exact without noise, sober with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import MOMENTS_SENSITIVITY
from common.images import ImageSet, Units
from common.moments import Prior, basis, class_sums, features

CLASSES, SIZE, K = 3, 8, 4


@st.composite
def hospitals(draw):
    """1 to 6 patients with 1 to 5 images each: random, black, white or checkered; classes may be missing."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.sampled_from([1, 3]))
    patients = np.repeat(np.arange(len(sizes)), sizes)
    images = rng.integers(0, 256, (len(patients), channels, SIZE, SIZE), dtype=np.uint8)
    for index in range(len(images)):
        kind = draw(st.sampled_from(["random", "black", "white", "checkered"]))
        if kind != "random":
            board = np.indices((SIZE, SIZE)).sum(axis=0) % 2 * 255
            images[index] = {"black": 0, "white": 255, "checkered": board}[kind]
    return ImageSet(images, rng.integers(0, draw(st.integers(1, CLASSES)), len(images)), patients)


def _vector(images, unit):
    sums = class_sums(Units.of(images, unit), CLASSES, K)
    return np.concatenate([sums["means"].ravel(), sums["squares"]])


@given(hospitals(), st.sampled_from(["image", "patient"]))
@settings(max_examples=80, deadline=None)
def test_one_unit_moves_all_sums_together_by_at_most_the_sensitivity(images, unit):
    whole = _vector(images, unit)
    for gone in range(len(images)) if unit == "image" else np.unique(images.patients):
        keep = np.arange(len(images)) != gone if unit == "image" else images.patients != gone
        assert np.linalg.norm(whole - _vector(images.select(keep), unit)) <= MOMENTS_SENSITIVITY * (1 + 1e-9)


def test_the_sensitivity_is_reached():
    white = ImageSet(np.full((1, 1, SIZE, SIZE), 255, np.uint8), np.zeros(1, np.int64))
    assert np.linalg.norm(_vector(white, "image")) == pytest.approx(MOMENTS_SENSITIVITY)


def test_the_basis_is_orthonormal_and_holds_what_is_smooth():
    rows = basis(SIZE, SIZE)
    np.testing.assert_allclose(rows @ rows.T, np.eye(SIZE), atol=1e-12)
    ramp = np.tile(np.linspace(60, 200, SIZE), (SIZE, 1)).astype(np.uint8)[None, None]
    kept = np.linalg.norm(features(ramp, K)) / np.linalg.norm(features(ramp, SIZE))
    assert kept > 0.999


def _images(count, seed=0):
    """Two classes that differ in brightness, with one smooth direction of variation."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    shape = np.cos(np.pi * (np.arange(SIZE) + 0.5) / SIZE)[None, None, None, :]
    pixels = 110 + 40 * labels[:, None, None, None] + 25 * rng.standard_normal((count, 1, 1, 1)) * shape
    images = np.clip(pixels + np.zeros((1, 1, SIZE, 1)), 0, 255).round().astype(np.uint8)
    return ImageSet(images, labels)


def _fit(images, noise_std, seed=0):
    rng = np.random.default_rng(seed)
    sums = class_sums(Units.of(images, "image"), 2, K)
    noisy = {name: part + noise_std * rng.standard_normal(part.shape) for name, part in sums.items()}
    counts = np.bincount(images.labels, minlength=2).astype(float)
    return Prior.fit(noisy, counts, noise_std=noise_std, size=SIZE, channels=1)


def test_without_noise_samples_have_the_means_and_the_spread_of_the_images():
    images = _images(4000)
    labels = np.arange(4000) % 2
    drawn = _fit(images, 0.0).sample(labels, np.random.default_rng(1))
    for label in (0, 1):
        mine, theirs = (s.images[s.labels == label].astype(float) for s in (drawn, images))
        np.testing.assert_allclose(mine.mean(axis=0), theirs.mean(axis=0), atol=2.0)
        np.testing.assert_allclose(mine.std(axis=0), theirs.std(axis=0), atol=2.5)


def test_with_noise_only_the_directions_that_stand_out_are_kept():
    prior = _fit(_images(2000), 4.0)
    assert len(prior.scales) == 1  # the one direction in which these images vary
    assert len(_fit(_images(2000), 0.0).scales) > 1


def test_pure_noise_gives_no_directions_and_one_mean():
    """Five seeds of noise alone: of 16 eigenvalues, the edge of an infinite matrix lets at most two by."""
    empty = ImageSet(np.full((2, 1, SIZE, SIZE), 128, np.uint8), np.array([0, 1]))
    for seed in range(5):
        prior = _fit(empty, 3.0, seed)
        assert len(prior.scales) <= 2


def test_a_rare_class_is_drawn_towards_the_mean_of_all():
    images = _images(1000)
    rare = images.select(np.r_[np.flatnonzero(images.labels == 0), np.flatnonzero(images.labels == 1)[:2]])
    exact, noisy = _fit(rare, 0.0), _fit(rare, 5.0)
    assert np.linalg.norm(exact.means[1] - exact.means[0]) > 0.1
    assert np.linalg.norm(noisy.means[1]) < 3 * np.linalg.norm(exact.means[0])  # noise of 5 over 2 images: 10 a number
