"""Score counts and figures: exact against sklearn, bounded by one record, honest under noise.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from common.errors import DataError, ReplyError
from common.images import ImageSet, Units
from common.metrics import (
    Figures,
    ScoreCounts,
    auc_from_counts,
    chance,
    count_scores,
    figures,
    l2_sensitivity,
    score_sum,
    vector_length,
)

Floats = NDArray[np.float64]


def scored(count: int, classes: int, seed: int, strength: float = 1.5) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities of an imperfect classifier, unequal classes."""
    draws = np.random.default_rng(seed)
    share = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = draws.choice(classes, size=count, p=share).astype(np.int64)
    logits = draws.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True), labels


def binned(probabilities: Floats, bins: int) -> NDArray[np.int64]:
    logits = np.clip(np.log(probabilities / (1 - probabilities)), -6, 6)
    return np.clip(np.floor((logits + 6) / 12 * bins), 0, bins - 1).astype(np.int64)


@pytest.mark.parametrize("classes", [2, 4])
def test_auc_equals_sklearn_on_binned_scores_and_nearly_on_exact_ones(classes: int) -> None:
    probabilities, labels = scored(3000, classes, seed=1)
    counts = count_scores(probabilities, labels, bins=48)
    ours = auc_from_counts(counts.positives, counts.negatives)
    for k in range(classes):
        assert ours[k] == pytest.approx(roc_auc_score(labels == k, binned(probabilities[:, k], 48)), abs=1e-12)
        assert ours[k] == pytest.approx(roc_auc_score(labels == k, probabilities[:, k]), abs=0.01)


@pytest.mark.parametrize("classes", [2, 4])
def test_rates_equal_sklearn(classes: int) -> None:
    probabilities, labels = scored(500, classes, seed=2)
    predicted = probabilities.argmax(axis=1)
    result = figures(count_scores(probabilities, labels, bins=24), noise_std=0.0, replicates=20)
    assert result.f1_macro.value == pytest.approx(f1_score(labels, predicted, average="macro"))
    for k in range(classes):
        assert result.sensitivity[k].value == pytest.approx(recall_score(labels == k, predicted == k))
        assert result.specificity[k].value == pytest.approx(recall_score(labels != k, predicted != k))
        assert result.support[k].value == (labels == k).sum() == result.support[k].low


@given(data=st.data(), classes=st.integers(2, 6), bins=st.integers(4, 40), count=st.integers(0, 8))
def test_one_record_moves_the_vector_by_exactly_the_sensitivity(
    data: st.DataObject, classes: int, bins: int, count: int
) -> None:
    value = st.floats(0, 1)
    rows = data.draw(
        st.lists(st.lists(value, min_size=classes, max_size=classes), min_size=count + 1, max_size=count + 1)
    )
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=count + 1, max_size=count + 1)))
    probabilities = np.array(rows)
    with_it = count_scores(probabilities, labels, bins).vector()
    without = count_scores(probabilities[:-1], labels[:-1], bins).vector()
    moved = float(np.linalg.norm(with_it - without))
    assert moved <= l2_sensitivity(classes) + 1e-12
    assert moved == pytest.approx(math.sqrt(classes + 1))
    assert without.sum() == count * (classes + 1)


def units_of(labels: NDArray[np.int64], patients: NDArray[np.int64] | None = None) -> Units:
    images = ImageSet(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, patients)
    return Units.of(images, "image" if patients is None else "patient")


@pytest.mark.parametrize("classes", [2, 5])
def test_the_sum_that_leaves_a_site_is_the_exact_counts_with_their_bound(classes: int) -> None:
    probabilities, labels = scored(700, classes, seed=13)
    bounded = score_sum(units_of(labels), probabilities, 24, name="synthetic")
    assert bounded.bound == l2_sensitivity(classes)
    exact = count_scores(probabilities, labels, 24).vector()
    np.testing.assert_allclose(bounded.parts["synthetic"].numpy(), exact, rtol=1e-8)
    assert not score_sum(units_of(labels[:0]), probabilities[:0], 24, name="none").parts["none"].any()


def test_a_patient_counts_as_the_mean_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities, labels = scored(60, 3, seed=14)
    patients = np.random.default_rng(15).integers(0, 17, 60)
    expected = np.zeros(vector_length(3, 8))
    for patient in np.unique(patients):
        mine = patients == patient
        expected += count_scores(probabilities[mine], labels[mine], 8).vector() / mine.sum()
    for block in (1 << 20, 1):  # all units at once, and each by itself
        monkeypatch.setattr("common.metrics._BLOCK_BYTES", block)
        got = score_sum(units_of(labels, patients), probabilities, 8, name="s").parts["s"].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, -1.0, math.nan, math.inf]), min_size=6, max_size=6))
def test_an_image_whose_scores_are_no_probabilities_adds_nothing_and_raises_nothing(values: list[float]) -> None:
    probabilities, labels = scored(5, 3, seed=16)
    probabilities[:2] = np.array(values).reshape(2, 3)
    usable = ((probabilities >= 0) & (probabilities <= 1)).all(axis=1)
    got = score_sum(units_of(labels), probabilities, 8, name="s").parts["s"].numpy()
    np.testing.assert_allclose(got, count_scores(probabilities[usable], labels[usable], 8).vector(), rtol=1e-8)


def test_vector_round_trip_keeps_every_count_in_its_place() -> None:
    counts = count_scores(*scored(200, 4, seed=3), bins=8)
    vector = counts.vector()
    assert vector.dtype == np.float64 and vector.shape == (vector_length(4, 8),)
    assert np.array_equal(vector[8:16], counts.negatives[0])
    assert np.array_equal(vector[-16:].reshape(4, 4), counts.confusion)
    back = ScoreCounts.from_vector(vector, 4, 8)
    assert np.array_equal(back.positives, counts.positives)
    assert np.array_equal(back.negatives, counts.negatives)
    assert np.array_equal((back + counts).vector(), 2 * vector)


def test_reply_of_wrong_length_or_with_nan_is_refused() -> None:
    vector = np.zeros(vector_length(2, 8))
    with pytest.raises(ReplyError, match="shape"):
        ScoreCounts.from_vector(vector[:-1], 2, 8)
    vector[3] = math.nan
    with pytest.raises(ReplyError, match="finite"):
        ScoreCounts.from_vector(vector, 2, 8)


def test_unusable_scores_are_refused() -> None:
    probabilities, labels = scored(10, 2, seed=4)
    with pytest.raises(DataError, match="labels"):
        count_scores(probabilities, labels + 1, 8)
    probabilities[3, 0] = math.nan
    with pytest.raises(DataError, match="NaN"):
        count_scores(probabilities, labels, 8)


def test_no_records_give_zero_counts_and_undefined_figures() -> None:
    counts = count_scores(np.zeros((0, 3)), np.zeros(0, dtype=np.int64), 8)
    assert not counts.vector().any()
    result = figures(counts, noise_std=0.0, replicates=20)
    assert math.isnan(result.auc_macro.value) and math.isnan(result.sensitivity[0].low)


def test_certain_scores_fall_into_the_end_bins() -> None:
    counts = count_scores(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]), 6)
    assert counts.positives[0, 5] == 1 and counts.negatives[0, 0] == 1


def test_side_without_records_has_no_auc() -> None:
    assert np.isnan(auc_from_counts(np.array([-1.0, 0.5]), np.array([3.0, 4.0])))
    assert np.isnan(auc_from_counts(np.array([3.0, 4.0]), np.zeros(2)))


def test_symmetric_noise_does_not_pull_the_auc_towards_one_half() -> None:
    counts = count_scores(*scored(600, 2, seed=5, strength=0.8), bins=24)
    exact = auc_from_counts(counts.positives, counts.negatives)[0]
    draws = np.random.default_rng(6)
    noisy = [
        auc_from_counts(counts.positives[0] + draws.normal(0, 8, 24), counts.negatives[0] + draws.normal(0, 8, 24))
        for _ in range(400)
    ]
    assert exact > 0.7
    assert np.mean(noisy) == pytest.approx(exact, abs=0.02)


def test_heavy_noise_gives_figures_within_bounds_and_says_so_by_its_width() -> None:
    counts = count_scores(*scored(200, 4, seed=7), bins=24)
    noise = np.random.default_rng(8).normal(0, 40, counts.vector().shape)
    noisy = ScoreCounts.from_vector(counts.vector() + noise, 4, 24)
    result = figures(noisy, noise_std=40.0, replicates=200)
    for estimate in (*result.auc, *result.sensitivity, *result.specificity, result.f1_macro, result.auc_macro):
        assert math.isnan(estimate.value) or 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert result.f1_macro.high - result.f1_macro.low > 0.3


@pytest.mark.parametrize(("classes", "noise_std"), [(2, 0.0), (2, 6.0), (4, 6.0)])
def test_intervals_cover_the_truth_and_stay_useful(classes: int, noise_std: float) -> None:
    """60 studies of 500 records; at a true coverage of 95 % fewer than 51 successes have probability 0.001.

    Leaving the privacy noise (6.0) out of the interval drops coverage of F1 to about one half.
    """
    truth = figures(count_scores(*scored(200_000, classes, seed=9), bins=24), noise_std=0.0, replicates=2)
    draws = np.random.default_rng(10)
    covered = {"auc": 0, "f1": 0, "sens": 0}
    widths = []
    for repetition in range(60):
        vector = count_scores(*scored(500, classes, seed=100 + repetition), bins=24).vector()
        noisy = ScoreCounts.from_vector(vector + draws.normal(0, 1, vector.shape) * noise_std, classes, 24)
        found = figures(noisy, noise_std=noise_std, replicates=300, seed=repetition)
        covered["auc"] += found.auc_macro.low <= truth.auc_macro.value <= found.auc_macro.high
        covered["f1"] += found.f1_macro.low <= truth.f1_macro.value <= found.f1_macro.high
        covered["sens"] += found.sensitivity[0].low <= truth.sensitivity[0].value <= found.sensitivity[0].high
        widths.append(found.auc_macro.high - found.auc_macro.low)
    assert min(covered.values()) >= 51, covered
    assert np.median(widths) < 0.25


def test_perfect_score_of_few_records_still_has_an_interval() -> None:
    probabilities = np.tile([[0.9, 0.1], [0.1, 0.9]], (5, 1))
    found = figures(count_scores(probabilities, np.tile([0, 1], 5), 24), noise_std=0.0).sensitivity[0]
    assert found.value == found.high == 1.0 and found.low < 0.9


def test_same_seed_gives_the_same_figures_and_json_keeps_them() -> None:
    counts = count_scores(*scored(100, 4, seed=11), bins=8)
    counts.confusion[3] = 0.0  # a class without records: undefined figures must survive as null
    first = figures(counts, noise_std=2.0, replicates=50, seed=3)
    assert json.dumps(first.to_json()) == json.dumps(figures(counts, noise_std=2.0, replicates=50, seed=3).to_json())
    text = json.dumps(first.to_json(), allow_nan=False)
    assert first.to_json()["sensitivity"][3]["value"] is None
    assert json.dumps(Figures.from_json(json.loads(text)).to_json()) == text


def test_guessing_at_the_prevalence_reaches_the_stated_figures() -> None:
    share = np.array([0.7, 0.2, 0.1])
    draws = np.random.default_rng(12)
    labels, guesses = draws.choice(3, 100_000, p=share), draws.choice(3, 100_000, p=share)
    assert chance(3, 400 * share).f1_macro == pytest.approx(f1_score(labels, guesses, average="macro"), abs=0.01)
    assert chance(2, np.array([-3.0, 9.0])).f1_macro == 1.0
    assert chance(2, np.zeros(2)).auc == 0.5
