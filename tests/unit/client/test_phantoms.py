"""Phantoms are repeatable, differ by site, and show a biomarker that is known exactly.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from client.data.checks import check_splits
from client.data.phantoms import Biomarkers, PhantomConfig, draw_phantoms
from client.data.splits import Splits
from common.errors import DataError
from common.images import ImageSet
from common.study import Modality
from support.datasets import schema_of

MODALITIES: tuple[Modality, ...] = get_args(Modality)
every_modality = pytest.mark.parametrize("modality", MODALITIES)


def draw(
    modality: Modality, *, records: int = 120, size: int = 28, channels: int = 1, classes: int = 2, **shard: float
) -> tuple[Splits, Biomarkers]:
    config = PhantomConfig.model_validate({"source": "phantoms", "modality": modality, "records": records, **shard})
    return draw_phantoms(config, schema_of(size=size, channels=channels, classes=classes))


def everything(splits: Splits) -> ImageSet:
    both = (splits.train, splits.holdout)
    patients = np.concatenate([part.patients for part in both if part.patients is not None])
    return ImageSet(
        np.concatenate([part.images for part in both]), np.concatenate([part.labels for part in both]), patients
    )


def spots(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Brightness-free features: quantiles of how a pixel stands out at three scales, over the image's own spread."""
    grey = images.mean(axis=1)
    grey = (grey - grey.mean(axis=(1, 2), keepdims=True)) / grey.std(axis=(1, 2), keepdims=True)
    features = []
    for reach in (1, 2, 4):
        around = sum(np.roll(grey, shift, axis=axis) for shift in (-reach, reach) for axis in (1, 2)) / 4
        stands_out = np.sort((grey - around).reshape(len(grey), -1), axis=1)
        ranks = (np.array([0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99]) * stands_out.shape[1]).astype(int)
        features.append(stands_out[:, ranks])
    blocks = grey.reshape(len(grey), 7, 4, 7, 4).mean(axis=(2, 4)).reshape(len(grey), -1)
    return np.concatenate([*features, blocks], axis=1)


@every_modality
def test_the_same_settings_give_the_same_bytes_and_another_seed_or_site_others(modality: Modality) -> None:
    first, again = draw(modality)[0], draw(modality)[0]
    assert np.array_equal(first.train.images, again.train.images)
    assert np.array_equal(first.holdout.labels, again.holdout.labels)
    for other in ({"seed": 1}, {"shard_index": 1, "shard_count": 2}):
        assert not np.array_equal(everything(first).images, everything(draw(modality, **other)[0]).images)


@every_modality
def test_the_biomarker_is_seen_by_a_simple_classifier_but_not_by_brightness(modality: Modality) -> None:
    splits, truth = draw(modality, records=600)
    train, holdout = splits.train, splits.holdout
    seer = LogisticRegression(max_iter=2000).fit(spots(train.images), train.labels)
    assert roc_auc_score(holdout.labels, seer.decision_function(spots(holdout.images))) > 0.9
    whole = everything(splits)
    brightness = float(roc_auc_score(whole.labels, whole.images.mean(axis=(1, 2, 3))))
    assert max(brightness, 1 - brightness) < 0.85
    assert np.array_equal(truth.presence, whole.labels > 0)


@every_modality
def test_the_class_index_scales_the_biomarker(modality: Modality) -> None:
    splits, truth = draw(modality, records=400, classes=4, size=32)
    labels = everything(splits).labels
    burden = [float((truth.count * truth.size**2)[labels == c].mean()) for c in range(4)]
    assert burden == sorted(burden) and burden[3] > 2 * burden[1] * 0.9
    if modality != "histopathology":
        assert (truth.count[labels == 0] == 0).all() and (truth.size[labels == 0] == 0).all()
        assert (truth.count[labels > 0] > 0).all() and (truth.size[labels > 0] > 0).all()


def test_the_marks_that_are_reported_are_the_marks_that_are_drawn() -> None:
    splits, truth = draw("histopathology", records=80, size=64, channels=3, classes=3)
    images = everything(splits).images.astype(np.int64)
    purple = (images[:, 0] < images[:, 2] - 15).sum(axis=(1, 2))
    area = truth.count * np.pi * truth.size**2
    assert np.corrcoef(purple, area)[0, 1] > 0.9


@every_modality
def test_a_patient_has_one_to_three_different_images_in_one_partition_with_one_biomarker(modality: Modality) -> None:
    splits, truth = draw(modality, records=200)
    train, holdout = splits.train.patients, splits.holdout.patients
    assert train is not None and holdout is not None and splits.phantom
    assert not set(train.tolist()) & set(holdout.tolist())
    images = everything(splits)
    assert images.patients is not None and len(np.unique(images.images, axis=0)) == 200
    sizes = np.unique(images.patients, return_counts=True)[1]
    assert sizes.min() >= 1 and sizes.max() <= 3 and (sizes > 1).any()
    for patient in np.unique(images.patients)[:20]:
        of_patient = images.patients == patient
        assert len(set(images.labels[of_patient])) == len(set(truth.count[of_patient])) == 1


@every_modality
def test_images_of_one_patient_are_more_alike_than_those_of_two(modality: Modality) -> None:
    images = everything(draw(modality, records=200)[0])
    assert images.patients is not None
    healthy = images.select(images.labels == 0)
    assert healthy.patients is not None
    flat = healthy.images.reshape(len(healthy), -1).astype(float)
    alike = np.corrcoef(flat)
    same = healthy.patients[:, None] == healthy.patients[None, :]
    assert alike[same & ~np.eye(len(healthy), dtype=bool)].mean() > alike[~same].mean() + 0.005


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(MODALITIES), st.sampled_from([16, 28, 37, 64]), st.sampled_from([1, 3]), st.integers(2, 9),
    st.integers(0, 60), st.floats(0, 1), st.integers(0, 2),
)  # fmt: skip
def test_every_allowed_setting_gives_a_site_that_passes_the_checks(
    modality: Modality, size: int, channels: int, classes: int, more: int, skew: float, site: int
) -> None:
    records = max(20, 4 * classes + more)
    splits, truth = draw(
        modality, records=records, size=size, channels=channels, classes=classes, label_skew=skew,
        shard_index=site, shard_count=3,
    )  # fmt: skip
    assert len(splits.train) + len(splits.holdout) == records == len(truth.count) == len(truth.size)
    assert splits.train.images.shape[1:] == (channels, size, size)
    report = check_splits(splits, schema_of(size=size, channels=channels, classes=classes), where="phantoms")
    assert report.duplicates == 0


def test_sites_differ_in_class_mix_only_by_the_skew() -> None:
    def prevalence(skew: float) -> list[float]:
        sites = [draw("radiology", records=400, label_skew=skew, shard_index=i, shard_count=3)[0] for i in range(3)]
        return [float(everything(site).labels.mean()) for site in sites]

    assert np.ptp(prevalence(0.0)) < 0.1 < 0.35 < np.ptp(prevalence(1.0))


def test_a_quarter_of_the_images_is_held_out() -> None:
    splits, _ = draw("radiology", records=600)
    assert 0.2 < len(splits.holdout) / 600 < 0.3


def test_sixty_four_classes_and_the_largest_size_can_be_drawn() -> None:
    splits, _ = draw("ophthalmology", records=256, size=16, classes=64)
    assert set(splits.train.labels) == set(splits.holdout.labels) == set(range(64))
    assert draw("histopathology", records=20, size=128, channels=3)[0].train.images.shape[1:] == (3, 128, 128)


@pytest.mark.parametrize(
    ("size", "classes", "said"), [(8, 2, "8 px"), (200, 2, "200 px"), (28, 30, "too few for 30 classes")]
)
def test_what_cannot_be_drawn_is_refused(size: int, classes: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        draw("radiology", records=60, size=size, classes=classes)
