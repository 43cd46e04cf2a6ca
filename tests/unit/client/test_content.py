"""What is wrong with pixels of the right type: each kind of spoilt export is seen; phantoms are none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.data.content import look_at, sheet
from client.data.phantoms import PhantomConfig, draw_phantoms
from client.data.splits import Splits
from common.images import ImageSet
from common.study import DataConfig

SCHEMA = DataConfig(image_size=32, channels=1, classes=("clear", "opacity"))
PHANTOMS, _ = draw_phantoms(PhantomConfig(source="phantoms", modality="radiology", records=400, seed=2), SCHEMA)


def _changed(change, *, part="train") -> Splits:
    """The phantoms, `change`d in one part: a function of pixels (N, 1, 32, 32)."""
    parts = {"train": PHANTOMS.train, "holdout": PHANTOMS.holdout}
    before = parts[part]
    parts[part] = ImageSet(change(before.images.copy()), before.labels, before.patients)
    return Splits(parts["train"], parts["holdout"], phantom=True)


def test_whole_images_are_as_they_should_be():
    found = look_at(PHANTOMS, SCHEMA)
    assert found.refusals == () and found.warnings == ()
    assert [(look.part, look.name, look.images) for look in found.looks] == [
        (part, name, int((images.labels == kind).sum()))
        for part, images in (("train", PHANTOMS.train), ("holdout", PHANTOMS.holdout))
        for kind, name in enumerate(SCHEMA.classes)
    ]
    mine = PHANTOMS.train.images[PHANTOMS.train.labels == 0]
    assert found.looks[0].brightness == pytest.approx(mine.mean())
    assert (found.looks[0].darkest, found.looks[0].brightest) == (mine.min(), mine.max())
    assert sorted(found.unusual) == list(range(len(PHANTOMS.train)))


@given(bits=st.integers(1, 5), part=st.sampled_from(["train", "holdout"]))
@settings(max_examples=20, deadline=None)
def test_too_few_bits_are_refused(bits, part):
    found = look_at(_changed(lambda x: x >> (8 - bits), part=part), SCHEMA)
    assert len(found.refusals) == 1 and found.refusals[0].startswith(f"{part}: all pixels lie between 0 and")


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda x: np.where(x > 128, 255, 0).astype(np.uint8), "masks"),
     (lambda x: np.full_like(x, 255), "white to the eye"),
     (lambda x: (224 + (x >> 3)).astype(np.uint8), "white to the eye"),
     (lambda x: np.where(np.arange(len(x))[:, None, None, None] % 3 > 0, 90, x).astype(np.uint8), "one flat colour")],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(change, words):
    assert any(words in line for line in look_at(_changed(change), SCHEMA).refusals)


@given(share=st.floats(0.02, 0.5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_negatives_among_the_images_are_counted(share, seed):
    wrong = np.random.default_rng(seed).random(len(PHANTOMS.train)) < share
    wrong[0] = True
    found = look_at(_changed(lambda x: np.where(wrong[:, None, None, None], 255 - x, x)), SCHEMA)
    (line,) = [line for line in found.warnings if "negatives" in line]
    said, true = int(line.split()[1]), min(int(wrong.sum()), int((~wrong).sum()))
    assert 0.8 * true <= said <= true + 0.02 * len(wrong) or said == pytest.approx(len(wrong) / 2, rel=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda x: (x >> 2).astype(np.uint8), "look at the export's bits"),
     (lambda x: (x // 32 * 32).astype(np.uint8), "look at the export's bits"),
     (lambda x: (120 + x / 10).astype(np.uint8), "hardly vary"),
     (lambda x: np.concatenate([x[:-5], x[:5]]), "5 image(s) are exact copies"),
     (lambda x: np.minimum(x.astype(int) + 70, 255).astype(np.uint8), "another export?")],
)  # fmt: skip
def test_what_should_be_looked_at_is_said(change, words):
    found = look_at(_changed(change), SCHEMA)
    assert any(words in line for line in found.warnings), found


def test_near_copies_over_the_two_parts_are_counted():
    noise = np.random.default_rng(0).integers(-2, 3, (7, 1, 32, 32))
    near = np.clip(PHANTOMS.train.images[:7].astype(int) + noise, 0, 255).astype(np.uint8)
    found = look_at(_changed(lambda x: np.concatenate([near, x[7:]]), part="holdout"), SCHEMA)
    assert any(line.startswith("7 holdout image(s) look like copies") for line in found.warnings), found.warnings


def test_the_strangest_image_comes_first_and_is_shown():
    found = look_at(_changed(lambda x: np.concatenate([x[:20], np.zeros_like(x[:1]), x[21:]])), SCHEMA)
    assert found.unusual[0] == 20
    page = Image.open(io.BytesIO(sheet(PHANTOMS.train, found.unusual[:20])))
    assert page.size == (16 * 64, 2 * 64)
    grey = PHANTOMS.train.select(np.array([5, 6]))
    grey = ImageSet(np.full_like(grey.images, 128), grey.labels, grey.patients)
    assert len(set(np.unique(Image.open(io.BytesIO(sheet(grey, [0, 1]))))) - {128, 255}) > 2, "no row and label"
    assert sheet(grey, [0, 1]) != sheet(grey, [1, 0])


def _of_class(change):
    """A change of the second class's pixels alone."""
    mine = PHANTOMS.train.labels == 1
    return lambda x: np.where(mine[:, None, None, None], change(x), x).astype(np.uint8)


CLASS = "train, class 'opacity': "


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda x: x >> 4, "all pixels lie between 0 and 1"),
     (lambda x: (x > 128) * 255, "pixels have 2 values, 0 and 255: masks"),
     (lambda x: np.full_like(x, 77), "pixels have 1 values, 77 and 77: masks"),
     (lambda x: np.arange(len(x))[:, None, None, None] % 200 + 20 + 0 * x, "100% of the images are one flat colour")],
)  # fmt: skip
def test_a_class_that_came_another_way_is_refused_by_its_name(change, words):
    """Before: only the whole part was looked at, in which the other class hid it."""
    refusals = look_at(_changed(_of_class(change)), SCHEMA).refusals
    assert len(refusals) == 1 and refusals[0].startswith(CLASS + words), refusals


def test_a_class_of_few_values_is_warned_of():
    found = look_at(_changed(_of_class(lambda x: x // 32 * 32)), SCHEMA)
    assert any(line.startswith(f"{CLASS}all pixels") for line in found.warnings), found


@given(share=st.floats(0.005, 0.4), noise=st.integers(0, 2), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_flat_images_among_the_others_are_counted_whatever_their_greys(share, noise, seed):
    draws = np.random.default_rng(seed)
    flat = draws.random(len(PHANTOMS.train)) < share
    flat[0] = True
    greys = draws.integers(20, 235, len(flat))[:, None, None, None] + draws.integers(0, noise + 1, (1, 1, 32, 32))
    found = look_at(_changed(lambda x: np.where(flat[:, None, None, None], greys, x).astype(np.uint8)), SCHEMA)
    line = f"train: {flat.sum()} image(s) are one flat colour, or almost"
    assert line in found.warnings, (line, found.warnings, found.refusals)


def test_near_copies_within_train_are_counted_apart_from_exact_ones():
    noise = np.random.default_rng(0).integers(-2, 3, (6, 1, 32, 32))
    near = np.clip(PHANTOMS.train.images[:6].astype(int) + noise, 0, 255).astype(np.uint8)
    warnings = look_at(_changed(lambda x: np.concatenate([x[:-10], near, x[:4]])), SCHEMA).warnings
    assert "train: 4 image(s) are exact copies of others in it" in warnings
    assert any(line.startswith("train: 6 more image(s) look like copies in it") for line in warnings), warnings


def test_one_colour_is_flat_though_its_channels_differ():
    rng = np.random.default_rng(0)
    schema = DataConfig(image_size=32, channels=3, classes=("clear", "opacity"))
    coloured = {part: np.repeat(images.images, 3, axis=1) for part, images in
                (("train", PHANTOMS.train), ("holdout", PHANTOMS.holdout))}  # fmt: skip
    coloured["train"][:9] = rng.integers(0, 256, (9, 3, 1, 1))
    splits = Splits(
        ImageSet(coloured["train"], PHANTOMS.train.labels, PHANTOMS.train.patients),
        ImageSet(coloured["holdout"], PHANTOMS.holdout.labels, PHANTOMS.holdout.patients), phantom=True,
    )  # fmt: skip
    assert "train: 9 image(s) are one flat colour, or almost" in look_at(splits, schema).warnings


def test_one_finding_hides_no_other():
    """Before: one flat image hid a class of few values, and black copies hid near copies."""
    mine = np.flatnonzero(PHANTOMS.train.labels == 1)
    other = np.flatnonzero(PHANTOMS.train.labels == 0)
    noise = np.random.default_rng(0).integers(-2, 3, (5, 1, 32, 32))

    def spoil(x):
        x[mine] = x[mine] // 32 * 32
        x[other[:6]] = 0
        x[other[-5:]] = np.clip(x[other[10:15]].astype(int) + noise, 0, 255)
        return x

    warnings = look_at(_changed(spoil), SCHEMA).warnings
    for words in ("train: 6 image(s) are one flat colour", f"{CLASS}all pixels", "train: 5 image(s) are exact copies",
                  "train: 5 more image(s) look like copies in it"):  # fmt: skip
        assert any(line.startswith(words) for line in warnings), (words, warnings)


def test_a_holdout_of_negatives_and_a_class_of_negatives_are_named():
    """Before: a part was compared with itself alone, and the smaller class was blamed for the larger one's export."""
    warnings = look_at(_changed(lambda x: 255 - x, part="holdout"), SCHEMA).warnings
    (line,) = [line for line in warnings if "negatives" in line]
    many = len(PHANTOMS.holdout)
    assert line.startswith("holdout: ") and "look like negatives of the train ones" in line
    assert int(line.split()[1]) > 0.9 * many
    warnings = look_at(_changed(_of_class(lambda x: 255 - x)), SCHEMA).warnings
    assert any(line.startswith("train: class '") and "each other's negatives" in line for line in warnings), warnings
