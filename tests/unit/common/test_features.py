"""Class features: the bound of their sums, whatever the directions are, and what is read from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ReplyError
from common.features import View, clipped, directions_of, feature_sums, features_of, means_and_products
from common.images import ImageSet, Units
from support.studies import tiny_study

STUDY = tiny_study()


def _units(labels, patients=None):
    images = ImageSet(np.zeros((len(labels), 1, 2, 2), np.uint8), np.asarray(labels), patients)
    return Units.of(images, "image" if patients is None else "patient")


def _flat(total):
    return torch.cat([part.ravel() for part in total.parts.values()])


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from([0.0, 1e-30, 0.3, 1.0, 7.0, 1e150, np.inf, np.nan]), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_one_patient_moves_the_sums_by_1_at_most_whatever_the_vectors_are(records, size, seed):
    labels, patients = (np.array(column) for column in zip(*records, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):
        vectors = np.random.default_rng(seed).standard_normal((len(labels), 5)) * size
        whole = feature_sums(_units(labels, patients), vectors, 3)
        keep = patients != patients[0]
        rest = feature_sums(_units(labels[keep], patients[keep]), vectors[keep], 3)
    assert whole.bound == pytest.approx(1.0)
    moved = float((_flat(whole) - _flat(rest)).norm())
    assert moved <= whole.bound
    assert moved == pytest.approx(1.0) or size < 7 or not np.isfinite(vectors).all() or (~keep).sum() > 1


def test_sums_without_noise_are_the_class_means_and_the_mean_product():
    rng = np.random.default_rng(0)
    labels, vectors = np.arange(40) % 3, rng.standard_normal((40, 5))
    parts = {name: part.numpy() for name, part in feature_sums(_units(labels), vectors, 3).parts.items()}
    means, products = means_and_products(
        parts["means"], parts["second_moments"], np.bincount(labels).astype(np.float64)
    )
    short = clipped(vectors)
    assert np.linalg.norm(short, axis=1).max() <= 1 + 1e-12
    np.testing.assert_allclose(means, [short[labels == kind].mean(axis=0) for kind in range(3)], rtol=1e-6)
    np.testing.assert_allclose(products, short.T @ short / 40, rtol=1e-6, atol=1e-9)


def _arrays(**changed):
    features, many = features_of(STUDY).dimension, directions_of(STUDY)
    return {"centre": np.zeros(features, np.float32), "directions": np.ones((features, many), np.float32), **changed}


@pytest.mark.parametrize("changed", [
    {"centre": np.zeros(3, np.float32)}, {"centre": np.full(features_of(STUDY).dimension, np.nan, np.float32)},
    {"directions": np.full((features_of(STUDY).dimension, directions_of(STUDY)), 1e7, np.float32)},
    {"directions": np.zeros((2, 2), np.float64)}, {"more": np.zeros(1, np.float32)},
])  # fmt: skip
def test_arrays_that_are_no_view_of_the_study_are_refused(changed):
    assert View.read(STUDY, _arrays()).of(np.ones((2, features_of(STUDY).dimension), np.float32)).shape[0] == 2
    with pytest.raises(ReplyError, match="features: "):
        View.read(STUDY, _arrays(**changed))
