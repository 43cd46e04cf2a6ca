"""Fingerprints tell which records stood where, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.privacy.fingerprints import Fingerprints, in_words, packed_digest
from common.images import ImageSet

KEY, OTHER = b"k" * 32, b"o" * 32


def _images(count=6, *, seed=0, patients=True, size=4):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 1, size, size), dtype=np.uint8)
    return ImageSet(images, np.arange(count) % 2, 100 * seed + np.arange(count) // 2 if patients else None)


TRAIN, HOLDOUT = _images(seed=1), _images(seed=2)


def _of(train=TRAIN, holdout=HOLDOUT, key=KEY):
    return Fingerprints.of(key, train, holdout)


def test_every_image_and_every_known_patient_has_one_of_sixteen_bytes():
    assert len(_of().train) == 6 + 3
    assert len(Fingerprints.of(KEY, _images(patients=False), HOLDOUT).train) == 6
    assert {len(mark) for mark in _of().train | _of().holdout} == {16}
    assert _of().on_both_sides == frozenset()


def test_without_the_key_they_tell_nothing_that_two_sites_could_compare():
    ours, theirs = _of(), _of(key=OTHER)
    assert not ours.shared(theirs)
    assert ours.digest != theirs.digest


@given(st.permutations(range(6)))
def test_the_order_of_the_records_changes_nothing(order):
    assert _of(TRAIN.select(np.array(order))) == _of()


@given(st.integers(0, 5), st.sampled_from(["pixel", "label", "patient", "left out", "twice", "other side"]))
def test_every_change_of_a_record_changes_the_digest(at, change):
    train, holdout = ImageSet(TRAIN.images.copy(), TRAIN.labels.copy(), TRAIN.patients.copy()), HOLDOUT
    keep = np.arange(6) != at
    if change == "pixel":
        train.images[at, 0, 0, 0] ^= 1
    elif change == "label":
        train.labels[at] ^= 1
    elif change == "patient":
        train.patients[at] += 7
    elif change == "left out":
        train = train.select(keep)
    elif change == "twice":
        train = train.select(np.append(np.arange(6), at))
    else:
        parts = zip((TRAIN, HOLDOUT), (keep, np.ones(6, bool)), strict=True)
        train, _ = (images.select(mask) for images, mask in parts)
        holdout = ImageSet(
            np.concatenate([HOLDOUT.images, TRAIN.images[[at]]]), np.append(HOLDOUT.labels, TRAIN.labels[at]),
            np.append(HOLDOUT.patients, TRAIN.patients[at]),
        )  # fmt: skip
    assert _of(train, holdout).digest != _of().digest


def test_swapped_partitions_are_seen_whole():
    assert _of(HOLDOUT, TRAIN).changed_sides(_of()) == _of().train | _of().holdout
    assert not _of().changed_sides(_of())


def test_a_patient_is_seen_again_by_other_images():
    new = ImageSet(_images(seed=9).images, TRAIN.labels, TRAIN.patients)
    moved = _of(HOLDOUT, new).changed_sides(_of())
    assert in_words(moved & _of().train) == "3 patients"


def test_a_number_that_is_a_patient_here_and_pixels_there_is_not_taken_for_the_same():
    image = ImageSet(np.full((1, 1, 1, 1), 55, np.uint8), np.zeros(1, np.int64), np.array([7]))  # 55 is "7"
    assert len(_of(image).train) == 2


def test_the_same_bytes_in_another_shape_are_another_image():
    square, wide = (ImageSet(TRAIN.images.reshape(6, 1, *shape), TRAIN.labels) for shape in ((4, 4), (2, 8)))
    assert not _of(square).train & _of(wide).train


def test_they_come_back_from_the_ledger_as_they_went():
    assert Fingerprints.unpacked(*_of().packed(), _of().digest) == _of()
    train, holdout = _of().packed()
    assert packed_digest(train, holdout) != packed_digest(train + holdout, b"")


@pytest.mark.parametrize(
    ("marks", "words"), [({b"i1"}, "1 image"), ({b"p1", b"p2", b"i1", b"i2"}, "2 images and 2 patients")]
)
def test_they_are_counted_in_words(marks, words):
    assert in_words(frozenset(marks)) == words
