"""A MedMNIST file is read exactly, refused in one clear line when it is wrong, and dealt out without loss.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from client.data.npz import NpzConfig
from client.data.sources import PhantomConfig, SourceConfig, open_source
from client.data.splits import ShardSettings, Splits, assign_shards, class_shares, keyed_hash, quotas
from common.errors import DataError
from common.images import ImageSet
from common.study import DataConfig
from support.datasets import broken_arrays, good_arrays, schema_of, write_npz
from support.paths import real_data


def load(path: Path, schema: DataConfig | None = None, **shard: float) -> Splits:
    config = TypeAdapter(SourceConfig).validate_python({"source": "npz", "path": str(path), **shard})
    return open_source(config, schema or schema_of(), modality="radiology")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_good_file_is_read_without_changing_a_pixel(tmp_path: Path, channels: int) -> None:
    arrays = good_arrays(channels=channels, patients=True)
    splits = load(write_npz(tmp_path / "a.npz", arrays), schema_of(channels=channels))
    stored = arrays["train_images"]
    expected = stored[:, None] if channels == 1 else np.moveaxis(stored, -1, 1)
    assert np.array_equal(splits.train.images, expected)
    assert np.array_equal(splits.train.labels, arrays["train_labels"][:, 0])
    assert splits.train.labels.dtype == np.int64 and splits.train.images.dtype == np.uint8
    assert splits.holdout.patients is not None
    assert np.array_equal(splits.holdout.patients, arrays["test_groups"])
    assert not splits.phantom


def test_the_val_partition_reaches_neither_train_nor_holdout(tmp_path: Path) -> None:
    arrays = good_arrays()
    val = np.full((5, 8, 8), 7, np.uint8)
    splits = load(write_npz(tmp_path / "a.npz", arrays | {"val_images": val, "val_labels": np.zeros(5, np.uint8)}))
    assert (len(splits.train), len(splits.holdout)) == (40, 16)


@pytest.mark.parametrize(
    ("kind", "key", "said"),
    [
        ("float pixels", "train_images", "float32, uint8 0..255 needed"),
        ("nan pixels", "train_images", "float64 with NaN inside"),
        ("pickled labels", "train_labels", "pickled"),
        ("missing key", "train_labels", "Rename 'train_label' to 'train_labels'"),
        ("wrong size", "test_images", "images are 9×8 px, the study has 8×8"),
        ("wrong channels", "train_images", "3 channel(s), the study has 1"),
        ("channels first", "train_images", "channels first"),
        ("flat images", "train_images", "shape (40, 64)"),
        ("too few labels", "train_labels", "37 values for 40 images"),
        ("too few groups", "test_groups", "15 values for 16 images"),
        ("groups for train only", "test_groups", "missing"),
        ("empty partition", "test_images", "no images"),
        ("label too large", "test_labels", "label 7 at index 5, allowed are 0 to 1"),
        ("negative label", "train_labels", "label -1 at index 9"),
        ("float labels", "train_labels", "float64, integers needed"),
        ("nan labels", "train_labels", "NaN"),
        ("one-hot labels", "train_labels", "not one-hot"),
        ("patient in both", "test_groups", "patient 4 is in both train and test"),
        ("huge patient number", "train_groups", "too large"),
    ],
)
def test_a_wrong_array_is_refused_in_one_line_that_names_file_key_and_remedy(
    tmp_path: Path, kind: str, key: str, said: str
) -> None:
    path = write_npz(tmp_path / "site.npz", broken_arrays(kind))
    with pytest.raises(DataError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: {key}: ") and said in line and "\n" not in line
    assert caught.value.remedy


def test_a_file_that_is_not_an_npz_is_refused(tmp_path: Path) -> None:
    whole = write_npz(tmp_path / "whole.npz", good_arrays()).read_bytes()
    np.save(tmp_path / "single.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("train_images", "not an array")
    damaged = bytearray(whole)
    damaged[400:600] = bytes(200)
    cases = {
        "empty.npz": (b"", "empty"),
        "text.txt": (b"hello, this is text", "not an .npz archive"),
        "pickle.npz": (b"\x80\x04]\x94(K\x01K\x02e.", "not an .npz archive"),
        "cut.npz": (whole[: len(whole) // 2], "damaged or cut short"),
        "flipped.npz": (bytes(damaged), "damaged or cut short"),
    }
    for name, (content, said) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            load(tmp_path / name)
    for name, said in (
        ("absent.npz", "no such file"),
        (".", "folder"),
        ("single.npy", "not an .npz"),
        ("text.npz", "not a numpy array"),
    ):
        with pytest.raises(DataError, match=said):
            load(tmp_path / name)


def test_a_pickled_array_is_never_executed(tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (touched,))

    arrays = good_arrays() | {"train_images": np.array([Trap()], dtype=object)}
    with pytest.raises(DataError, match="pickled"):
        load(write_npz(tmp_path / "a.npz", arrays))
    assert not touched.exists()


@pytest.mark.parametrize(
    "bad", [{"shard_index": 2, "shard_count": 2}, {"label_skew": 1.5}, {"paths": "x"}, {"source": "folder"}]
)
def test_an_impossible_source_setting_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(SourceConfig).validate_python({"source": "npz", "path": "a.npz"} | bad)


def test_phantoms_of_another_modality_are_refused() -> None:
    config = PhantomConfig(source="phantoms", modality="ophthalmology", records=20)
    with pytest.raises(DataError, match="ophthalmology in a study of radiology"):
        open_source(config, schema_of(size=16), modality="radiology")


# ---- dealing one file out to simulated hospitals ----


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[ImageSet, int]:
    classes, count = draw(st.integers(2, 6)), draw(st.integers(1, 80))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    owners = draw(st.none() | st.lists(st.integers(-5, 12), min_size=count, max_size=count))
    images = np.zeros((count, 1, 1, 1), np.uint8)
    return ImageSet(images, np.array(labels), None if owners is None else np.array(owners)), classes


@settings(max_examples=80, deadline=None)
@given(cohorts(), st.integers(1, 7), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_shards_partition_the_records_and_never_split_a_patient(
    cohort: tuple[ImageSet, int], shards: int, skew: float, seed: int
) -> None:
    images, classes = cohort
    shard = ShardSettings(shard_count=shards, label_skew=skew, seed=seed)
    owner = assign_shards(images, shard, classes=classes, stream=1)
    assert owner.shape == (len(images),) and owner.min() >= 0 and owner.max() < shards
    assert np.array_equal(owner, assign_shards(images, shard, classes=classes, stream=1))
    if images.patients is not None:
        for patient in np.unique(images.patients):
            assert len(np.unique(owner[images.patients == patient])) == 1
    else:
        for label, count in zip(*np.unique(images.labels, return_counts=True), strict=True):
            if count >= shards:
                assert len(np.unique(owner[images.labels == label])) == shards


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 12), st.integers(1, 9), st.floats(0, 1))
def test_quotas_add_up_and_starve_nobody(total: int, shards: int, classes: int, skew: float) -> None:
    shares = class_shares(classes, shards, skew)
    assert np.allclose(shares.sum(axis=1), 1) and (shares > 0).all()
    for row in shares:
        counts = quotas(total, row)
        assert counts.sum() == total and counts.min() >= (1 if total >= shards else 0)


def test_the_shards_of_a_file_are_the_file(tmp_path: Path) -> None:
    arrays = good_arrays(train=60, test=30, classes=3, patients=True)
    path, schema = write_npz(tmp_path / "a.npz", arrays), schema_of(classes=3)
    whole = load(path, schema)
    shards = [load(path, schema, shard_index=i, shard_count=3, label_skew=0.7, seed=5) for i in range(3)]
    for part in ("train", "holdout"):
        seen = sorted(image.tobytes() for shard in shards for image in getattr(shard, part).images)
        assert seen == sorted(image.tobytes() for image in getattr(whole, part).images)


def test_skew_zero_gives_every_shard_the_same_mix_and_skew_one_a_strongly_different_one() -> None:
    labels = np.repeat(np.arange(2), 3000)
    images = ImageSet(np.zeros((6000, 1, 1, 1), np.uint8), labels)

    def share_of_class_one(skew: float, stream: int) -> np.ndarray:
        owner = assign_shards(images, ShardSettings(shard_count=3, label_skew=skew), classes=2, stream=stream)
        return np.array([labels[owner == s].mean() for s in range(3)])

    assert np.ptp(share_of_class_one(0.0, 1)) < 0.01
    assert 0.2 < np.ptp(share_of_class_one(0.5, 1)) < 0.6
    assert np.ptp(share_of_class_one(1.0, 1)) > 0.7
    assert np.allclose(share_of_class_one(0.5, 1), share_of_class_one(0.5, 2)), "a holdout must resemble its train"


def test_another_seed_deals_another_hand() -> None:
    images = ImageSet(np.zeros((300, 1, 1, 1), np.uint8), np.zeros(300, np.int64))
    deals = [assign_shards(images, ShardSettings(shard_count=3, seed=s), classes=2, stream=1) for s in (0, 1)]
    assert 0.5 < (deals[0] != deals[1]).mean() < 0.85


def test_taking_one_record_away_moves_at_most_one_record_over_each_cut() -> None:
    labels = np.arange(400) % 2
    patients = np.arange(400) * 7
    images = ImageSet(np.zeros((400, 1, 1, 1), np.uint8), labels, patients)
    shard = ShardSettings(shard_count=4, label_skew=0.5, seed=3)
    before = assign_shards(images, shard, classes=2, stream=1)
    for gone in range(0, 400, 23):
        kept = np.arange(400) != gone
        after = assign_shards(images.select(kept), shard, classes=2, stream=1)
        assert (before[kept] != after).sum() <= 3


def test_the_hash_spreads_evenly() -> None:
    buckets = np.bincount((keyed_hash(np.arange(20_000), 1, 2) % np.uint64(20)).astype(np.int64), minlength=20)
    assert abs(buckets - 1000).max() < 150  # 5 standard deviations


@pytest.mark.parametrize(
    ("name", "size", "channels", "classes"),
    [("pneumoniamnist", 28, 1, 2), ("fundus4", 64, 3, 4), ("colonpath4", 28, 3, 4)],
)
def test_three_shards_of_a_real_file_keep_every_class(name: str, size: int, channels: int, classes: int) -> None:
    path = real_data(f"{name}.npz")
    schema = schema_of(size=size, channels=channels, classes=classes)
    for index in range(3):
        config = NpzConfig(source="npz", path=path, shard_index=index, shard_count=3, label_skew=0.5)
        splits = open_source(config, schema, modality="radiology")
        assert np.bincount(splits.train.labels, minlength=classes).min() >= 20
        assert np.bincount(splits.holdout.labels, minlength=classes).min() >= 1


def test_no_remedy_makes_labels_of_images(tmp_path: Path) -> None:
    """Before: "Rename 'test_labels' to 'test_images'?"."""
    arrays = good_arrays()
    del arrays["test_images"]
    with pytest.raises(DataError) as caught:
        load(write_npz(tmp_path / "a.npz", arrays))
    assert caught.value.remedy == "Add an array of the name 'test_images'."
