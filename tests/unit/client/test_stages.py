"""What each stage lets out is its exact sum plus noise of the planned size: no more, and no less.

Chi-square tests of the noise at alpha 1e-6, two-sided. Over 40 numbers, the fewest, none of the noise or a third of it
is seen with power over 0.999; over 250 (moments, histograms) two thirds of it are.
"""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import pytest
import torch
from scipy import stats

from client.stages.features import vectors
from common.accounting import plan_study
from common.features import View, directions_of, feature_sums, features_of
from common.files import unpack_arrays
from common.images import Units
from common.metrics import l2_sensitivity, score_sum
from common.model.classifier import BiomarkerClassifier
from common.model.diffusion_model import space_of
from common.moments import class_means, class_sums, spread_sums
from common.protocol import (
    EnrolReply,
    EnrolRequest,
    FeaturesReply,
    FeaturesRequest,
    MomentsReply,
    MomentsRequest,
    ValidateReply,
    ValidateRequest,
)
from support.sites import ask, open_phantom_site
from support.studies import agreement, tiny_study

STUDY = tiny_study(validation={"bins": 64})
COUNTS = (40.0, 40.0)


@pytest.fixture
def site(tmp_path):
    return open_phantom_site(tmp_path, STUDY)


@pytest.fixture
def path(site, tmp_path):
    return tmp_path / "site-1.toml"


def _is_noise_of(numbers: np.ndarray, std: float) -> bool:
    assert numbers.size >= 40
    statistic = float(np.square(numbers).sum()) / std**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], numbers.size)
    return low < statistic < high


def _flat(*parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in parts])


def test_the_test_of_the_noise_sees_what_it_says():
    draws = np.random.default_rng(0)
    assert all(_is_noise_of(draws.standard_normal(40), 1.0) for _ in range(1000))
    assert not any(_is_noise_of(draws.standard_normal(40) / 3, 1.0) for _ in range(1000))
    assert not any(_is_noise_of(draws.standard_normal(250) * 2 / 3, 1.0) for _ in range(1000))
    assert not _is_noise_of(np.zeros(40), 1.0)


def test_counts_leave_with_the_planned_noise(tmp_path):
    """Twenty-five sites, two counts each."""
    noise = []
    for seed in range(25):
        folder = tmp_path / str(seed)
        folder.mkdir()
        own = open_phantom_site(folder, STUDY, seed=seed)
        answer, arrays = ask(folder / "site-1.toml", EnrolRequest(agreement=agreement(STUDY)))
        assert answer.body == EnrolReply()
        noise.append(arrays["counts"] - np.bincount(own.splits.train.labels, minlength=2))
    assert _is_noise_of(_flat(*noise), plan_study(STUDY)["counts"].noise_std)


def test_both_parts_of_the_moments_leave_with_the_noise_of_the_whole(site, path):
    answer, arrays = ask(path, MomentsRequest(agreement=agreement(STUDY), counts=COUNTS))
    assert answer.body == MomentsReply()
    assert (answer.spent.reserved, answer.spent.confirmed) == (1, 1)
    space, std = space_of(STUDY), plan_study(STUDY)["moments"].noise_std
    exact = class_sums(site.train, 2, space).parts["means"].numpy()
    first = _flat(arrays["means"]) - _flat(exact)
    assert first.size >= 30
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], first.size)
    assert low < float(np.square(first).sum()) / std**2 < high
    centres = class_means(arrays["means"], np.array(COUNTS), space, noise_std=std)
    parts = spread_sums(site.train, centres, space).parts
    assert set(arrays) == {"means", *parts}
    for name in ("second_moments", "band_power"):
        second = _flat(arrays[name]) - _flat(parts[name].numpy())
        if second.size >= 40:
            assert _is_noise_of(second, std)
    everything = _flat(first, *(arrays[name] - parts[name].numpy() for name in parts))
    assert _is_noise_of(everything, std)


def _view(scale: float = 0.05) -> View:
    rng, features, many = np.random.default_rng(0), features_of(STUDY).dimension, directions_of(STUDY)
    return View(np.zeros(features, np.float32), (scale * rng.standard_normal((features, many))).astype(np.float32))


def test_features_leave_with_the_planned_noise(site, path):
    answer, arrays = ask(path, FeaturesRequest(agreement=agreement(STUDY)), _view().arrays())
    assert answer.body == FeaturesReply()
    assert (answer.spent.reserved, answer.spent.confirmed) == (1, 1)
    exact = feature_sums(site.train, _view().of(features_of(STUDY).of(site.splits.train.images)), 2).parts
    assert set(arrays) == set(exact)
    assert float(exact["means"].abs().max()) > 1
    for name, part in exact.items():
        assert _is_noise_of(_flat(arrays[name]) - _flat(part.numpy()), plan_study(STUDY)["features"].noise_std)


@pytest.mark.parametrize("value", [np.nan, 2e6])
def test_directions_that_are_no_numbers_are_refused_before_anything_is_spent(path, value):
    arrays = _view().arrays()
    arrays["directions"][0, 0] = value
    answer, _ = ask(path, FeaturesRequest(agreement=agreement(STUDY)), arrays)
    assert answer.body.kind == "ReplyError"
    assert answer.spent.reserved == 0


def test_a_records_vector_does_not_depend_on_who_else_is_there(site, monkeypatch):
    """With features that show the place in a batch and its size: places are drawn, and stay (`places`)."""

    class ByPlace:
        def of(self, images):
            rows = np.zeros((len(images), features_of(STUDY).dimension), np.float32)
            rows[:, 0], rows[:, 1] = np.arange(len(images)), len(images)
            return rows

    class Drawn:
        """The same place for the same record, whoever else is there."""

        def integers(self, low, high, count):
            return (np.arange(len(site.train))[-count:] * 7) % high

    monkeypatch.setattr("client.stages.features.features_of", lambda _: ByPlace())
    monkeypatch.setattr(np.random, "default_rng", Drawn)
    view = View(np.zeros(features_of(STUDY).dimension, np.float32),
                np.eye(features_of(STUDY).dimension, directions_of(STUDY), dtype=np.float32))  # fmt: skip
    whole = vectors(site.train, STUDY, view)
    left = site.train.images.select(np.arange(1, len(site.train)))
    assert np.array_equal(vectors(Units.of(left, "image"), STUDY, view), whole[1:])
    assert len(np.unique(whole[:, 0])) > 20 and len(np.unique(whole[:, 1])) == 1


def test_the_squares_are_about_means_that_have_left_already(site, path, monkeypatch):
    """Their centres are computed from the very numbers that the answer holds, with the counts of the request."""
    seen = []
    original = class_means
    monkeypatch.setattr(
        "client.stages.moments.class_means",
        lambda sums, counts, *rest, **more: (seen.append((sums, counts)), original(sums, counts, *rest, **more))[1],
    )
    _, arrays = ask(path, MomentsRequest(agreement=agreement(STUDY), counts=COUNTS))
    np.testing.assert_array_equal(seen[0][0], arrays["means"])
    np.testing.assert_array_equal(seen[0][1], COUNTS)


@pytest.mark.parametrize("counts", [(1.0,), (1.0, 2.0, 3.0), ()])
def test_counts_of_another_number_of_classes_are_refused_before_anything_is_spent(path, counts):
    answer, _ = ask(path, MomentsRequest(agreement=agreement(STUDY), counts=counts))
    assert answer.body.kind == "ReplyError"
    assert answer.spent.reserved == 0


@pytest.mark.parametrize("counts", [(-1e300, 1e300), (0.0, 0.0), (1e-300, 1e308)])
def test_counts_that_no_site_gave_make_no_answer_fail(site, path, counts):
    answer, arrays = ask(path, MomentsRequest(agreement=agreement(STUDY), counts=counts))
    assert answer.body == MomentsReply()
    assert all(np.isfinite(part).all() for part in arrays.values())


@pytest.fixture
def classifier(site):
    torch.manual_seed(0)
    return BiomarkerClassifier.fit(
        site.splits.train, classes=2, channels=1, config=STUDY.validation, seed=1, symmetry="none"
    )


def test_histograms_of_both_classifiers_leave_with_the_planned_noise(site, path, classifier):
    plan = plan_study(STUDY)
    assert plan["evaluate"].sensitivity == pytest.approx(math.sqrt(2) * l2_sensitivity(2))
    request = ValidateRequest(agreement=agreement(STUDY), expected_reference_batch=6.0)
    answer, arrays = ask(path, request, classifier.state())
    assert answer.body == ValidateReply()
    assert (answer.spent.reserved, answer.spent.confirmed) == (2, 2)  # the reference, and the evaluation
    kept = next(site.state.glob("reference-*.safetensors"))
    reference = BiomarkerClassifier.from_state(
        unpack_arrays(kept.read_bytes(), where="kept"), classes=2, channels=1, image_size=16,
        backbone=STUDY.validation.backbone,
    )  # fmt: skip
    for name, tested in (("synthetic", classifier), ("reference", reference)):
        scores = tested.predict(site.holdout.images.images)
        exact = score_sum(site.holdout, scores, STUDY.validation.bins, name=name).parts[name].numpy()
        assert _is_noise_of(_flat(arrays[name]) - _flat(exact), plan["evaluate"].noise_std)


def test_a_study_without_a_reference_plans_and_sends_one_histogram(tmp_path):
    study = tiny_study(privacy={"reference_share": 0.0})
    site = open_phantom_site(tmp_path, study)
    fresh = BiomarkerClassifier.fit(site.splits.train, classes=2, channels=1, config=study.validation, seed=1)
    request = ValidateRequest(agreement=agreement(study), expected_reference_batch=6.0)
    answer, arrays = ask(tmp_path / "site-1.toml", request, fresh.state())
    assert set(arrays) == {"synthetic"}
    assert answer.spent.reserved == 1
    with closing(site.config.ledger()) as ledger:
        assert ledger.losses("holdout") == [plan_study(study)["evaluate"].loss]
