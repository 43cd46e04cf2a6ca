"""Public images carried to private moments, and the network's start on them."""

from __future__ import annotations

import numpy as np
import pytest

from common.images import ImageSet
from common.model.diffusion_model import initial_weights
from common.moments import coordinates
from common.phantoms import public_phantoms
from common.prior import Prior
from server.synthesis.corpus import carried, carried_together, low_moments, of_class, uncarried
from server.synthesis.pretrain import pretrained, turned
from server.synthesis.public_set import ANY_CLASS
from support.studies import tiny_study

STUDY = tiny_study()
SPACE = coordinates(16, 1, 4)


def _public(count=200, labels=None):
    images = public_phantoms("radiology", STUDY.data, count, seed=5).images
    return ImageSet(images, np.full(count, ANY_CLASS) if labels is None else labels)


def _prior(scale, shift, high=1.0):
    """Moments of the public images, stretched and moved; another way for each of two classes."""
    low, rest = SPACE.of(_public().images)
    covariance = low_moments(_public().images, SPACE)[1]
    means = np.stack([low.mean(axis=0) + s for s in (-shift, shift)])
    variance = np.zeros(SPACE.low.shape)
    variance[~SPACE.low] = np.square(rest).mean(axis=0) * high
    covariances, high = np.stack([covariance * s for s in scale]), np.repeat(variance[None], 2, axis=0)
    return Prior(SPACE, means, covariances, high, np.array([0.5, 0.5]))


def test_carried_images_have_the_private_means_and_covariances_and_one_copy_for_each_class():
    # little spread, so that no pixel leaves its range
    public, prior = _public(), _prior((0.5, 0.3), 0.02)
    corpus = carried(public, prior)
    assert corpus.labels.tolist() == [0] * 200 + [1] * 200
    for kind in (0, 1):
        low, _ = SPACE.of(corpus.images[corpus.labels == kind])
        np.testing.assert_allclose(low.mean(axis=0), prior.means[kind], atol=0.02)
        assert np.trace(np.cov(low.T)) == pytest.approx(np.trace(prior.covariances[kind]), rel=0.1)


def test_the_image_is_still_to_be_seen():
    """With moments of its own an image stays as it is; in no case is it replaced by another."""
    public = _public()
    same = carried(public, _prior((1.0, 1.0), 0.0)).images[:200]
    assert np.abs(same.astype(int) - public.images).mean() < 2.0


def test_gains_are_bounded_where_public_images_hardly_vary():
    flat = public_phantoms("radiology", STUDY.data, 200, seed=5).images
    flat = ((flat.astype(float) - 128) * 0.05 + 128).astype(np.uint8)
    corpus = carried(ImageSet(flat, np.full(200, ANY_CLASS)), _prior((1.0, 1.0), 0.0))
    for part in (corpus.images[:200], corpus.images[200:]):
        assert part.astype(float).std(axis=0).mean() < 3.0 * flat.astype(float).std(axis=0).mean() + 1.0


def test_a_class_is_made_of_the_public_images_that_are_likeliest_for_it(monkeypatch):
    """Half of the public images have a bright middle, and are said to be likelier for the second class."""
    monkeypatch.setattr("server.synthesis.corpus._FEWEST", 20)
    images = np.random.default_rng(0).integers(100, 140, (200, 1, 16, 16)).astype(np.uint8)
    images[::2, :, 5:11, 5:11] += 60
    public, prior = ImageSet(images, np.full(200, ANY_CLASS)), _prior((1.0, 1.0), 0.0)
    likely = np.stack([np.arange(200) % 2, 1 - np.arange(200) % 2], axis=1).astype(np.float64)
    assert len(carried(public, prior)) == len(carried(public, prior, likely=likely)) == 400
    corpus = carried(public, prior, likely=likely, class_share=0.5)
    halves = [carried(public.select(np.arange(200) % 2 == odd), prior) for odd in (1, 0)]
    assert np.bincount(corpus.labels).tolist() == [100, 100]
    for kind, half in enumerate(halves):
        assert np.array_equal(corpus.images[corpus.labels == kind], half.images[half.labels == kind])


def test_images_carried_together_have_the_moments_of_all_classes():
    prior, public = _prior((1.0, 1.0), 0.1), _public()
    low, _ = SPACE.of(carried_together(public.images, prior))
    mean = prior.shares @ prior.means
    np.testing.assert_allclose(low.mean(axis=0), mean, atol=0.05)
    apart = prior.means - mean
    whole = np.einsum("k,kde->de", prior.shares, prior.covariances) + apart.T @ (prior.shares[:, None] * apart)
    assert np.trace(np.cov(low.T)) == pytest.approx(np.trace(whole), rel=0.15)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("symmetry", ["none", "hflip", "dihedral"])
@pytest.mark.parametrize(("channels", "components"), [(1, 1), (3, 1), (1, 15)])
def test_any_coordinates_make_a_corpus(channels, components, symmetry):
    space = coordinates(16, channels, components, symmetry)
    images = np.repeat(_public(64).images, channels, axis=1)
    mean, covariance = low_moments(images, space)
    high = np.where(space.low, 0.0, 0.1)
    prior = Prior(space, np.stack([mean] * 3), np.stack([covariance] * 3), np.stack([high] * 3), np.full(3, 1 / 3))
    corpus = carried(ImageSet(images, np.full(64, ANY_CLASS)), prior, likely=np.zeros((64, 3)), class_share=0.5)
    assert carried_together(images, prior).shape == images.shape
    assert corpus.images.shape == (192, channels, 16, 16)


def test_one_image_of_a_class_is_too_few_to_carry_so_the_others_stand_in():
    public = _public(labels=np.array([0] + [1] * 199))
    assert np.bincount(carried(public, _prior((1.0, 1.0), 0.0)).labels).tolist() == [200, 199]


def test_few_public_images_are_shared_by_all_classes():
    corpus = carried(_public(), _prior((1.0, 1.0), 0.0), likely=np.eye(200, 2), class_share=0.1)
    assert len(corpus) == 400, "200 are fewer than a class needs"


def test_a_public_class_is_carried_to_its_own_class_and_the_rest_to_any():
    labels = np.array([0] * 80 + [ANY_CLASS] * 120)
    public = _public(labels=labels)
    assert of_class(public, 0).sum() == 80
    assert of_class(public, 1).sum() == 200, "for the network without moments"
    corpus = carried(public, _prior((1.0, 1.0), 0.0))
    assert np.bincount(corpus.labels).tolist() == [80, 200]
    plain = uncarried(public, 2)
    assert np.bincount(plain.labels).tolist() == [80, 200]
    assert np.array_equal(plain.images[:80], public.images[:80])


def test_the_start_is_made_once_and_a_stop_or_a_spoilt_file_changes_nothing(tmp_path):
    study, corpus, file, seen = tiny_study(pretrain={"steps": 4}), uncarried(_public(), 2), tmp_path / "kept", []
    whole = pretrained(study, corpus, tmp_path / "whole")

    def stop(done, total, loss):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.synthesis.pretrain._SAVE_SECONDS", 0.0)
        patch.setattr("server.synthesis.pretrain._REPORT_EVERY", 2)
        with pytest.raises(KeyboardInterrupt):
            pretrained(study, corpus, file, on_step=stop)
    assert file.exists()
    resumed = pretrained(study, corpus, file, on_step=lambda done, total, loss: seen.append((done, total)))
    assert seen == [(4, 4)]
    assert pretrained(study, corpus, file, on_step=lambda *_: seen.append("again")).keys() == whole.keys()
    assert seen == [(4, 4)], "nothing is left to do"
    other = ImageSet(corpus.images[::-1].copy(), corpus.labels)
    assert any(not np.array_equal(array, whole[name]) for name, array in pretrained(study, other, file).items()), (
        "what was learnt from another corpus is not taken up"
    )
    file.write_bytes(file.read_bytes()[:100])
    mended, start = pretrained(study, corpus, file), initial_weights(study)
    for name, array in whole.items():
        for weights in (resumed, mended):
            np.testing.assert_allclose(weights[name], array, atol=1e-6, err_msg=name)
    assert any(not np.array_equal(whole[name], start[name]) for name in start)


@pytest.mark.parametrize(("symmetry", "ways"), [("none", 1), ("hflip", 2), ("dihedral", 8)])
def test_an_image_is_turned_in_every_way_that_the_symmetry_allows(symmetry, ways):
    image = np.arange(9, dtype=np.uint8).reshape(1, 1, 3, 3)
    drawn = turned(np.repeat(image, 400, axis=0), symmetry, np.random.default_rng(0))
    assert len(np.unique(drawn.reshape(400, -1), axis=0)) == ways
    assert (np.sort(drawn.reshape(400, -1), axis=1) == np.arange(9)).all()
