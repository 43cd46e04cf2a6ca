"""Pre-training on a public file: the file that the study names and no other, and it is what the network learns from."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError, StudyError
from common.files import sha256_file
from common.study import DataConfig
from server.synthesis.public_set import ANY_CLASS, check_public_set, fitted, public_images
from support.datasets import good_arrays, write_npz
from support.studies import tiny_study


@pytest.fixture
def file(tmp_path):
    return write_npz(tmp_path / "public.npz", good_arrays(size=16, train=80))


def _study(file, **changes):
    named = {"source": "npz", "path": str(file), "sha256": sha256_file(file)}
    return tiny_study(pretrain={**named, **changes})


def test_the_train_partition_of_the_named_file_is_what_lends_its_shapes(file):
    study = _study(file)
    images = public_images(study)
    assert np.array_equal(images.images[:, 0], good_arrays(size=16, train=80)["train_images"])
    assert set(images.labels.tolist()) == {ANY_CLASS}


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (33, 1), (20, 3)])
def test_images_of_another_size_or_colour_are_made_to_fit(size, channels, tmp_path):
    shape = (70, size, size + 4) + ((3,) if channels == 3 else ())
    pixels = np.full(shape, 90, np.uint8)
    pixels[:, :, : size // 2 + 2] = 30
    pixels[-1, -1, -1] = 0  # all the same are refused
    path = tmp_path / "any.npz"
    np.savez(path, images=pixels)
    images = public_images(_study(path)).images
    assert images.shape == (70, 1, 16, 16)
    assert images[0, 0, 8, 2] == 30 and images[0, 0, 8, 13] == 90
    grey = np.full((2, 3, 16, 16), 0, np.uint8)
    grey[:, 1] = 100
    assert fitted(grey, tiny_study().data)[0, 0, 0, 0] == round(58.7)
    colour = DataConfig(image_size=16, channels=3, classes=("a", "b"))
    assert (fitted(images, colour) == images).all()


def test_another_file_a_missing_one_and_one_of_other_images_are_refused_in_a_line(file, tmp_path):
    study = _study(file)
    with pytest.raises(DataError, match="images are 12×12 px, the study has 16×16"):
        public_images(_study(write_npz(tmp_path / "small.npz", good_arrays(size=12, train=80))))
    with pytest.raises(DataError, match="40 images, 64 needed"):
        public_images(_study(write_npz(tmp_path / "few.npz", good_arrays(size=16, train=40))))
    alike = {"train_images": np.repeat(good_arrays(size=16)["train_images"][:1], 80, axis=0)}
    with pytest.raises(DataError, match="all images are the same"):
        public_images(_study(write_npz(tmp_path / "alike.npz", alike)))
    with pytest.raises(DataError, match="no such file"):
        public_images(tiny_study(pretrain={"source": "npz", "path": "nowhere.npz", "sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"pretrain.path: missing"):
        check_public_set(_study(file, path=None))
    write_npz(file, good_arrays(size=16, train=81))
    with pytest.raises(DataError, match=f"its SHA-256 is {sha256_file(file)}") as refused:
        public_images(study)
    assert "pretrain.path" in str(refused.value)


def test_a_public_set_is_asked_for_before_a_study_that_reads_it_and_no_other():
    nowhere = {"source": "npz", "path": "nowhere.npz", "sha256": "0" * 64}
    with pytest.raises(DataError, match="no such file"):
        check_public_set(tiny_study(pretrain=nowhere))
    check_public_set(tiny_study())


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"sha256": None}, "pretrain.sha256"), ({"source": "none"}, "pretrain.sha256"),
     ({"source": "none", "sha256": None}, "pretrain.path"), ({"sha256": "abc"}, "pretrain.sha256")],
)  # fmt: skip
def test_a_public_set_needs_a_hash_and_nothing_else_has_one(file, changes, field):
    with pytest.raises(StudyError, match=field):
        _study(file, **changes)
