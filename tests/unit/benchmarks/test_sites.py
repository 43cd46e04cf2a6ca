"""The benchmark's sites are those of the run, and the val split is the file's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.utility.sites import site_config, site_splits, synthetic_set, validation_split, whole
from client.site import load_site_config
from common.errors import DataError
from common.images import ImageSet
from server.launch import write_site_files
from server.release.formats import write_npz as release_npz
from support.datasets import good_arrays, write_npz
from support.studies import tiny_study

STUDY = tiny_study(simulation={"sites": 3, "label_skew": 0.7}, study={"seed": 5})


def data_file(folder, **changes):
    arrays = good_arrays(train=60, test=30, size=16)
    rng = np.random.default_rng(7)
    arrays["val_images"] = rng.integers(0, 256, (8, 16, 16), dtype=np.uint8)
    arrays["val_labels"] = (np.arange(8) % 2).astype(np.uint8)[:, None]
    return write_npz(folder / "set.npz", {**arrays, **changes})


def test_a_site_is_dealt_what_the_run_deals_it(tmp_path):
    data = data_file(tmp_path)
    for index, file in enumerate(write_site_files(tmp_path / "sites", STUDY, data)):
        assert load_site_config(file).data == site_config(STUDY, data, index)


def test_every_image_is_at_one_site(tmp_path):
    data = data_file(tmp_path)
    sites, everything = site_splits(STUDY, data), whole(data, STUDY.data)
    for part in ("train", "holdout"):
        dealt = [image.tobytes() for site in sites for image in getattr(site, part).images]
        assert sorted(dealt) == sorted(image.tobytes() for image in getattr(everything, part).images)


def test_the_val_split_is_the_files_own(tmp_path):
    data = data_file(tmp_path)
    val = validation_split(data, STUDY.data)
    with np.load(data) as archive:
        assert np.array_equal(val.images[:, 0], archive["val_images"])
    assert val.labels.tolist() == [0, 1] * 4


def test_a_released_set_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (5, 1, 16, 16), dtype=np.uint8), np.array([0, 1, 1, 0, 1]))
    release_npz(tmp_path / "synthetic.npz", images)
    back = synthetic_set(tmp_path / "synthetic.npz", STUDY.data)
    assert np.array_equal(back.images, images.images) and np.array_equal(back.labels, images.labels)


@pytest.mark.parametrize(
    "changes",
    [
        {"val_images": np.zeros((8, 16, 16), np.float32)},
        {"val_images": np.zeros((8, 12, 12), np.uint8)},
        {"val_labels": np.full((8, 1), 2)},
        {"val_labels": np.zeros((7, 1), np.uint8)},
        {"val_images": np.zeros((0, 16, 16), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)},
    ],
)
def test_a_val_split_that_does_not_fit_is_one_error(tmp_path, changes):
    with pytest.raises(DataError, match=r"npz: val_(images|labels): "):
        validation_split(data_file(tmp_path, **changes), STUDY.data)


def test_a_missing_or_damaged_file_is_one_error(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    for name in ("none.npz", "broken.npz"):
        with pytest.raises(DataError, match=name):
            synthetic_set(tmp_path / name, STUDY.data)
