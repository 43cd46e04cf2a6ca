"""A site learns before the study what its data lack, in one line that it can act on.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from client.data.checks import check_splits
from client.data.splits import Splits
from common.errors import DataError
from common.images import ImageSet
from support.datasets import schema_of, splits_of

GOOD = [0, 1, 0, 1, 0, 1]


def test_a_good_site_gets_exact_counts_and_no_warning() -> None:
    report = check_splits(splits_of([0, 0, 0, 1, 1], [0, 1, 1]), schema_of(), where="site.npz")
    assert report.train_counts == (3, 2) and report.holdout_counts == (1, 2)
    assert (report.duplicates, report.patients_train, report.warnings) == (0, None, ())


def test_patients_are_counted_where_known() -> None:
    splits = splits_of(GOOD, [0, 1])
    train = dataclasses.replace(splits.train, patients=np.array([5, 5, 5, 9, 9, 11]))
    assert check_splits(Splits(train, splits.holdout, False), schema_of(), where="s").patients_train == 3


@pytest.mark.parametrize(
    ("train", "holdout", "said"),
    [
        ([0, 0, 0, 0, 0], [0, 1], "s: train: no image of class 'c1'"),
        ([0, 0, 0, 0, 1], [0, 1], "s: train: class 'c1' has only 1 image (at least 2)"),
        (GOOD, [0, 0], "s: holdout: no image of class 'c1'"),
        (GOOD, [], "s: holdout: no image of class 'c0'"),
        ([0, 1, 1], [0, 1], "s: train: 3 images are too few for 2 classes (at least 4)"),
        ([], [0, 1], "s: train: 0 images are too few"),
        ([0, 1, 0, 1, 2], [0, 1], "s: train: a label is outside 0 to 1"),
    ],
)
def test_a_site_that_cannot_take_part_is_told_why(train: list[int], holdout: list[int], said: str) -> None:
    with pytest.raises(DataError) as caught:
        check_splits(splits_of(train, holdout), schema_of(), where="s")
    assert str(caught.value).startswith(said) and caught.value.remedy


def test_the_smallest_class_size_is_the_callers_choice() -> None:
    splits = splits_of(GOOD, [0, 1])
    check_splits(splits, schema_of(), where="s", min_per_class=3)
    with pytest.raises(DataError, match="at least"):
        check_splits(splits, schema_of(), where="s", min_per_class=4)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match="the study has uint8"):
        check_splits(splits_of(GOOD, [0, 1], size=9), schema_of(), where="s")


def test_copies_across_partitions_are_counted_and_only_warned_about() -> None:
    splits = splits_of(GOOD, [0, 1, 0])
    images = splits.holdout.images.copy()
    images[0] = splits.train.images[3]
    images[2] = splits.train.images[4]
    copied = Splits(splits.train, ImageSet(images, splits.holdout.labels), False)
    report = check_splits(copied, schema_of(), where="s")
    assert report.duplicates == 2 and "2 holdout image(s)" in report.warnings[0] and len(report.warnings) == 1


def test_strong_imbalance_is_warned_about_and_mild_is_not() -> None:
    assert not check_splits(splits_of([0] * 20 + [1] * 2, [0, 1]), schema_of(), where="s").warnings
    report = check_splits(splits_of([0] * 40 + [1] * 2, [0, 1]), schema_of(), where="s")
    assert "'c0' has 20 times as many images as 'c1'" in report.warnings[0]
