"""Class moments and the prior made of them: bounded for any images, exact without noise, sober with it."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.images import ImageSet, Units
from common.moments import (
    BAND_POWER_PART,
    MEAN_CLIP_NORM,
    MEANS_PART,
    NORM_CLIP,
    NORM_PART,
    SECOND_MOMENTS_PART,
    SPREAD_CLIP_NORM,
    SPREAD_PART,
    class_counts,
    class_means,
    class_sums,
    coordinates,
    dct_basis,
    pack,
    spread_sums,
    unpack,
)
from common.prior import Prior, cleaned

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


def _space(images):
    return coordinates(SIZE, images.images.shape[1], K)


def _sums(images, unit, centres):
    units, space = Units.of(images, unit), _space(images)
    return class_counts(units, CLASSES), class_sums(units, CLASSES, space), spread_sums(units, centres, space)


def _flat(bounded):
    return np.concatenate([bounded.parts[name].numpy().ravel() for name in sorted(bounded.parts)])


@given(hospitals(), st.sampled_from(["image", "patient"]), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_one_unit_moves_each_sum_by_at_most_its_bound_whatever_the_centres(images, unit, seed):
    centres = np.random.default_rng(seed).normal(size=(CLASSES, _space(images).dimension)) * (seed % 3)
    whole = _sums(images, unit, centres)
    assert [each.bound for each in whole] == [1.0, MEANS_PART, SPREAD_PART]
    for gone in range(len(images)) if unit == "image" else np.unique(images.patients):
        keep = np.arange(len(images)) != gone if unit == "image" else images.patients != gone
        for one, other in zip(whole, _sums(images.select(keep), unit, centres), strict=True):
            assert np.linalg.norm(_flat(one) - _flat(other)) <= one.bound


def _by_hand(images, unit, centres):
    """The same sums without rows: products by a matrix, everything else by class, one image after another."""
    space, weights = _space(images), Units.of(images, unit).weights()
    d, out = space.dimension, {"counts": np.zeros(CLASSES), "means": np.zeros((CLASSES, space.dimension))}
    out |= {
        "second_moments": np.zeros((d, d)),
        "band_power": np.zeros((CLASSES, space.band_count)),
        "norm": np.zeros(1),
    }
    clip = lambda vector, norm: vector / max(np.linalg.norm(vector), norm)
    for image, label, weight in zip(images.images, images.labels, weights, strict=True):
        low, high = (part[0] for part in space.of(image[None]))
        whole = np.concatenate([low - centres[label], high])
        clipped = clip(whole, SPREAD_CLIP_NORM)
        out["counts"][label] += weight
        out["means"][label] += weight * MEANS_PART * clip(low, MEAN_CLIP_NORM)
        out["second_moments"] += weight * SECOND_MOMENTS_PART * np.outer(clipped[:d], clipped[:d])
        places = np.concatenate([space.bands[space.low], space.bands[~space.low]])
        np.add.at(out["band_power"][label], places, weight * BAND_POWER_PART * clipped**2)
        out["norm"] += weight * NORM_PART * min((np.linalg.norm(whole) / NORM_CLIP) ** 2, 1.0)
    return out | {"second_moments": pack(out["second_moments"])}


@given(hospitals(), st.sampled_from(["image", "patient"]), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_rows_add_up_to_what_the_formulas_say(images, unit, seed):
    centres = np.random.default_rng(seed).normal(size=(CLASSES, _space(images).dimension)) * (0.02 + seed % 3)
    expected = _by_hand(images, unit, centres)
    got = {name: part.numpy() for each in _sums(images, unit, centres) for name, part in each.parts.items()}
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        np.testing.assert_allclose(got[name], part, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("unit", ["image", "patient"])
def test_images_a_block_at_a_time_give_the_sums_of_all_at_once(monkeypatch, unit):
    images = _images(70)
    images = ImageSet(images.images, images.labels, np.arange(70) // 3)
    centres = np.random.default_rng(1).normal(size=(CLASSES, K * K)) * 0.1
    whole = _sums(images, unit, centres)
    monkeypatch.setattr("common.moments._BLOCK_BYTES", 1)  # one image at a time
    for one, other in zip(whole, _sums(images, unit, centres), strict=True):
        np.testing.assert_allclose(_flat(one), _flat(other), atol=1e-12)


def test_the_largest_rows_of_a_study_are_made_in_blocks_that_fit_memory():
    """32 components, 256 px in colour, 64 classes: numpy's share; torch's copies of a block are two more."""
    images = ImageSet(np.full((12, 3, 256, 256), 200, np.uint8), np.arange(12))
    space, units = coordinates(256, 3, 32), Units.of(images, "image")
    for make in (
        lambda: class_sums(units, 64, space),
        lambda: spread_sums(units, np.zeros((64, space.dimension)), space),
    ):
        make()  # what is made once and kept, is
        tracemalloc.start()
        make()
        assert tracemalloc.get_traced_memory()[1] < 75e6
        tracemalloc.stop()


def test_the_parts_together_are_no_more_than_one_release():
    assert 0.99 < MEANS_PART**2 + SPREAD_PART**2 <= 1


def test_the_bounds_are_reached():
    half = np.where(np.arange(SIZE) < SIZE // 2, 255, 0) * np.ones((1, 1, SIZE, 1))
    image = ImageSet(half.astype(np.uint8), np.zeros(1, np.int64))
    far = np.zeros((CLASSES, K * K))
    far[:, 0] = -500.0  # all in one band
    counts, first, second = _sums(image, "image", far)
    assert np.linalg.norm(_flat(counts)) == pytest.approx(1)
    assert np.linalg.norm(_flat(first)) == pytest.approx(MEANS_PART)
    assert np.linalg.norm(_flat(second)) == pytest.approx(SPREAD_PART, rel=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_coordinates_hold_the_whole_image(channels):
    """Weights undone, colours and frequencies turned back: the pixels; so nothing is counted twice or lost."""
    space = coordinates(SIZE, channels, K)
    images = np.random.default_rng(0).integers(0, 256, (5, channels, SIZE, SIZE), dtype=np.uint8)
    low, high = space.of(images)
    coefficients = np.zeros(images.shape)
    coefficients[:, space.low], coefficients[:, ~space.low] = low, high
    rows = dct_basis(SIZE)
    pixels = np.einsum("ec,neij->ncij", space.colours, rows.T @ (coefficients / space.weights) @ rows)
    np.testing.assert_allclose((pixels + 1) * 127.5, images, atol=1e-9)
    np.testing.assert_allclose(rows @ rows.T, np.eye(SIZE), atol=1e-12)
    assert set(space.bands.ravel()) == set(range(space.band_count))
    assert not set(space.bands[space.low]) & set(space.bands[~space.low])
    whole = np.square(np.concatenate([low, high], axis=1))
    power = space.by_band(whole)
    np.testing.assert_allclose(power.sum(axis=1), whole.sum(axis=1))
    assert all(np.allclose(power[:, band], np.square(coefficients * (space.bands == band)).sum(axis=(1, 2, 3)))
               for band in range(space.band_count))  # fmt: skip


def test_the_basis_is_the_cosines():
    k, n = np.arange(SIZE)[:, None], np.arange(SIZE)[None, :]
    cosines = np.cos(np.pi * (n + 0.5) * k / SIZE) * np.sqrt(np.where(k == 0, 1.0, 2.0) / SIZE)
    np.testing.assert_allclose(dct_basis(SIZE), cosines, atol=1e-14)


@pytest.mark.parametrize("symmetry", ["none", "hflip", "dihedral"])
@pytest.mark.parametrize(("channels", "components"), [(1, 4), (3, 4), (1, 1), (3, 3)])
def test_blocks_are_those_of_the_mean_covariance_over_all_poses(symmetry, channels, components):
    """The covariance and mean of any images, seen in all poses, are kept by the projection, and any others are not."""
    space = coordinates(SIZE, channels, components, symmetry)
    images = np.random.default_rng(0).integers(0, 256, (40, channels, SIZE, SIZE), dtype=np.uint8)
    poses = [images] if symmetry == "none" else [images, images[..., ::-1]]
    poses = (
        poses
        if symmetry != "dihedral"
        else [q for p in poses for r in (p, p[:, :, ::-1]) for q in (r, r.swapaxes(2, 3))]
    )
    low = np.concatenate([space.of(pose)[0] for pose in poses])
    bases = np.concatenate([basis for group in space.blocks for basis in group], axis=1)
    np.testing.assert_allclose(bases.T @ bases, np.eye(space.dimension), atol=1e-12)
    still = space.blocks[0][0]
    np.testing.assert_allclose(low.mean(axis=0) @ still @ still.T, low.mean(axis=0), atol=1e-12)
    kept, second = np.zeros((space.dimension,) * 2), low.T @ low / len(low)
    for group in space.blocks:
        alike = [basis.T @ second @ basis for basis in group]
        for one in alike:
            np.testing.assert_allclose(one, alike[0], atol=1e-12)
        kept += sum(basis @ alike[0] @ basis.T for basis in group)
    np.testing.assert_allclose(kept, second, atol=1e-12)
    if symmetry != "none" and components > 2:
        lopsided = space.of(images)[0]
        assert np.abs(lopsided.mean(axis=0) @ still @ still.T - lopsided.mean(axis=0)).max() > 0.01


def test_what_clipping_took_from_the_spread_is_given_back():
    """White noise of a spread far over the clipping norm: without the sum of norms it would come out too calm."""
    rng = np.random.default_rng(0)
    images = ImageSet(np.clip(127 + 33 * rng.standard_normal((600, 1, SIZE, SIZE)), 0, 255).astype(np.uint8),
                      rng.integers(0, 2, 600))  # fmt: skip
    low, high = coordinates(SIZE, 1, K).of(images.images)
    norms = np.square(low).sum(axis=1) + np.square(high).sum(axis=1)
    assert 1.5 * SPREAD_CLIP_NORM**2 < norms.mean() < 0.8 * NORM_CLIP**2
    prior = fit(images, 0.0)
    power = [np.trace(prior.covariances[k]) + prior.high[k].sum() for k in (0, 1)]
    assert np.average(power, weights=np.bincount(images.labels)) == pytest.approx(norms.mean(), rel=0.05)


def test_packing_keeps_matrix_and_norm():
    matrix = np.random.default_rng(0).normal(size=(7, 7))
    matrix += matrix.T
    np.testing.assert_allclose(unpack(pack(matrix), 7), matrix)
    assert np.linalg.norm(pack(matrix)) == pytest.approx(np.linalg.norm(matrix))


def _images(count, seed=0):
    """Two classes that differ in brightness, with one smooth direction of variation and some grain."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    shape = np.cos(np.pi * (np.arange(SIZE) + 0.5) / SIZE)[None, None, None, :]
    pixels = 110 + 40 * labels[:, None, None, None] + 25 * rng.standard_normal((count, 1, 1, 1)) * shape
    pixels = pixels + 5 * rng.standard_normal((count, 1, SIZE, SIZE))
    return ImageSet(np.clip(pixels, 0, 255).round().astype(np.uint8), labels)


SPACE = coordinates(SIZE, 1, K)
PUBLIC = np.diag(np.square(SPACE.spectrum * SPACE.weights)[SPACE.low])


def fit(images, noise_std, seed=0, symmetry="none", public_mean=None):
    """The prior of the images, with noise of this standard deviation on every sum."""
    rng, units = np.random.default_rng(seed), Units.of(images, "image")
    space = coordinates(SIZE, 1, K, symmetry)
    counts = np.bincount(images.labels, minlength=2).astype(float)
    noisy = lambda exact: {n: p.numpy() + noise_std * rng.standard_normal(p.shape) for n, p in exact.parts.items()}
    sums = noisy(class_sums(units, 2, space))["means"]
    spread = noisy(spread_sums(units, class_means(sums, counts, space, noise_std=noise_std), space))
    return Prior.fit(
        space, sums, spread["second_moments"], spread["band_power"], spread["norm"], counts, noise_std=noise_std,
        public=PUBLIC, public_mean=sums.sum(axis=0) * 0 if public_mean is None else public_mean,
    )  # fmt: skip


def test_without_noise_the_prior_has_the_means_and_the_spread_of_the_images():
    images = _images(3000)
    prior, (low, high) = fit(images, 0.0), coordinates(SIZE, 1, K).of(images.images)
    for label in (0, 1):
        mine = low[images.labels == label]
        np.testing.assert_allclose(prior.means[label], mine.mean(axis=0), atol=1e-9)
    within = low - prior.means[images.labels]
    shares = np.bincount(images.labels) / len(images)
    shared = np.einsum("k,kde->de", shares, prior.covariances[:2])
    np.testing.assert_allclose(shared, within.T @ within / len(within), atol=0.003)
    assert float(np.einsum("k,kcij->", shares, prior.high)) == pytest.approx(
        np.square(high).sum(axis=1).mean(), rel=0.02
    )  # clipping is undone on average


def test_where_noise_is_all_there_is_the_mean_of_all_is_the_public_one():
    images, public = _images(600), np.linspace(0.3, -0.3, SPACE.dimension)
    for noise_std, drawn in ((1e-3, False), (3e3, True)):
        means = fit(images, noise_std, public_mean=public).means
        real = np.stack([SPACE.of(images.images)[0][images.labels == kind].mean(axis=0) for kind in (0, 1)])
        to_public, to_real = np.abs(means - public).max(), np.abs(means - real).max()
        assert (to_public < to_real) == drawn, (noise_std, to_public, to_real)


def test_a_class_that_varies_more_has_the_larger_covariance_and_a_rare_one_under_noise_has_that_of_all():
    images = _images(3000)
    calm = images.images.astype(np.float64)
    mean = calm[images.labels == 1].mean(axis=0)
    calm[images.labels == 1] = mean + 0.6 * (calm[images.labels == 1] - mean)
    images = ImageSet(calm.round().astype(np.uint8), images.labels)
    low, high = coordinates(SIZE, 1, K).of(images.images)
    exact = fit(images, 0.0)
    for label in (0, 1):
        mine = images.labels == label
        assert np.trace(exact.covariances[label]) == pytest.approx(low[mine].var(axis=0).sum(), rel=0.02)
        assert exact.high[label].sum() == pytest.approx(np.square(high[mine]).sum(axis=1).mean(), rel=0.02)
    rare = images.select(np.r_[np.flatnonzero(images.labels == 0), np.flatnonzero(images.labels == 1)[:3]])
    noisy = fit(rare, 7.0)
    ratio = np.trace(noisy.covariances[1]) / np.trace(noisy.covariances[0])
    assert ratio == pytest.approx(1.0, abs=0.15)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
@settings(max_examples=25, deadline=None)
def test_a_prior_is_a_gaussian_whatever_the_noise(seed, noise_std):
    prior = fit(_images(60, seed), noise_std, seed)
    assert np.isfinite(prior.means).all()
    assert (np.linalg.eigvalsh(prior.covariances) > 0).all()
    assert (prior.high >= 0).all()


def _noisy(matrix, std, seed):
    noise = np.random.default_rng(seed).standard_normal(matrix.shape) * std
    noise = np.triu(noise) * np.where(np.eye(len(matrix)), 1, np.sqrt(0.5))
    return matrix + noise + np.triu(noise, 1).T


def test_noise_alone_is_next_to_no_correlation():
    """A 16 × 16 diagonal covariance under noise: over 20 seeds, less than a third of the noise is left."""
    std, left, off = 0.02, [], ~np.eye(16, dtype=bool)
    for seed in range(20):
        noisy = _noisy(np.eye(16), std, seed)
        left.append(np.linalg.norm(cleaned(noisy, std, np.eye(16))[off]) / np.linalg.norm(noisy[off]))
    assert np.mean(left) < 1 / 3
    strong = np.eye(16) + 0.5 * np.outer(np.ones(16), np.ones(16))
    assert cleaned(strong, std, np.eye(16))[0, 1] == pytest.approx(0.5, abs=0.02)


def test_where_noise_leaves_nothing_the_public_covariance_stands_at_the_private_scale():
    """Directions in which public images hardly vary: noise of a hundred times their variance does not show there."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    public = (basis * np.array([1.0] * 10 + [1e-4] * 10)) @ basis.T
    clean = cleaned(_noisy(2.0 * public, 0.01, 0), 0.01, public)
    along = np.diag(basis.T @ clean @ basis)
    assert along[:10] == pytest.approx(np.full(10, 2.0), rel=0.05)
    assert along[10:] == pytest.approx(np.full(10, 2e-4), rel=0.5)


def _shape(prior):
    """The shared covariance apart from its size, which is known from one number and has no symmetry."""
    return prior.covariances[0] / np.trace(prior.covariances[0])


def test_a_known_symmetry_takes_noise_out_of_the_prior():
    """Noise on the sums of symmetric images moves means and covariances less where the symmetry is known."""
    images = _images(2000)
    turned = [images.images[i::4] for i in range(4)]
    turned = np.concatenate([np.rot90(part, i, axes=(2, 3)) for i, part in enumerate(turned)])
    images = ImageSet(turned, np.concatenate([images.labels[i::4] for i in range(4)]))
    error = {}
    for symmetry in ("none", "dihedral"):
        exact = fit(images, 0.0, symmetry="dihedral")
        noisy = [fit(images, 10.0, seed, symmetry) for seed in range(5)]
        error[symmetry] = (
            np.mean([np.linalg.norm(one.means - exact.means) for one in noisy]),
            np.mean([np.linalg.norm(_shape(one) - _shape(exact)) for one in noisy]),
        )
    assert error["dihedral"][0] < 0.6 * error["none"][0]
    assert error["dihedral"][1] < 0.85 * error["none"][1]


def test_a_rare_class_is_drawn_towards_the_mean_of_all():
    images = _images(1000)
    rare = images.select(np.r_[np.flatnonzero(images.labels == 0), np.flatnonzero(images.labels == 1)[:2]])
    exact, noisy = fit(rare, 0.0), fit(rare, 5.0)
    assert np.linalg.norm(exact.means[1] - exact.means[0]) > 0.3
    assert np.linalg.norm(noisy.means[1] - noisy.means[0]) < 0.3  # noise of 5 over 2 images would be 25 a number
