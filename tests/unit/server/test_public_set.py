"""Pre-training on a public file: the file that the study names and no other, and it is what the network learns from."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError, StudyError
from common.files import sha256_file
from server.synthesis.pretrain import pretrained
from server.synthesis.public_set import check_public_set, public_images
from support.datasets import good_arrays, write_npz
from support.studies import tiny_study


@pytest.fixture
def file(tmp_path):
    return write_npz(tmp_path / "public.npz", good_arrays(size=16))


def _study(file, **changes):
    named = {"source": "npz", "path": str(file), "sha256": sha256_file(file)}
    return tiny_study(pretrain={**named, **changes})


def test_the_train_partition_of_the_named_file_is_what_the_network_learns_from(file, tmp_path):
    study = _study(file)
    images = public_images(study)
    stored = good_arrays(size=16)
    assert np.array_equal(images.images[:, 0], stored["train_images"])
    on_file = pretrained(study, tmp_path / "a")
    on_phantoms = pretrained(tiny_study(), tmp_path / "b")
    assert np.abs(on_file["prior.means"] - on_phantoms["prior.means"]).max() > 0.05
    assert any(not np.array_equal(on_file[n], on_phantoms[n]) for n in on_file if n.startswith("swin."))


def test_another_file_a_missing_one_and_one_of_other_images_are_refused_in_a_line(file, tmp_path):
    study = _study(file)
    with pytest.raises(DataError, match="the study has 1"):
        public_images(_study(write_npz(tmp_path / "colour.npz", good_arrays(size=16, channels=3))))
    with pytest.raises(DataError, match="no such file"):
        public_images(tiny_study(pretrain={"source": "npz", "path": "nowhere.npz", "sha256": "0" * 64}))
    with pytest.raises(DataError, match=r"pretrain.path: missing"):
        check_public_set(_study(file, path=None))
    write_npz(file, good_arrays(size=16, train=41))
    with pytest.raises(DataError, match=f"its SHA-256 is {sha256_file(file)}") as refused:
        public_images(study)
    assert "pretrain.path" in str(refused.value)


def test_a_public_set_is_asked_for_before_a_study_that_reads_it_and_no_other():
    nowhere = {"source": "npz", "path": "nowhere.npz", "sha256": "0" * 64}
    with pytest.raises(DataError, match="no such file"):
        check_public_set(tiny_study(pretrain=nowhere))
    check_public_set(tiny_study(pretrain=nowhere, training={"rounds": 0}))
    check_public_set(tiny_study())


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"sha256": None}, "pretrain.sha256"), ({"source": "none"}, "pretrain.sha256"),
     ({"source": "none", "sha256": None}, "pretrain.path"), ({"sha256": "abc"}, "pretrain.sha256")],
)  # fmt: skip
def test_a_public_set_needs_a_hash_and_nothing_else_has_one(file, changes, field):
    with pytest.raises(StudyError, match=field):
        _study(file, **changes)
