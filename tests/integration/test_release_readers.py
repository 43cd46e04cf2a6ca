"""A release in other people's hands: the right labels by whatever reads it, for names in any script.

The readers are installed with the project's other tools (`dev`); what they do with a folder's name is also tested in
`tests/unit/server/test_server_parts.py`.
"""

from __future__ import annotations

import importlib
import subprocess

import numpy as np
import pytest

from common.images import ImageSet
from common.model.timm_backbones import create_backbone
from server.release.formats import folder_names, write_npz, write_pngs
from support.releases import a_release
from support.studies import tiny_study

NAMES = {
    2: ("test negative", "test positive"),
    12: (
        "train",
        "健康",
        "1 year",
        "val-2",
        'a "quoted" name',
        "Grüße",
        "dev",
        "x" * 80,
        "10",
        "9",
        "../up",
        "evaluation",
    ),
    64: tuple(f"class {number}" if number % 3 else f"testing {number}" for number in range(64)),
}


@pytest.fixture(params=NAMES)
def release(request, tmp_path):
    """(folder, labels by image, names): the brightness of an image is its label."""
    names = NAMES[request.param]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(names)), 3))
    images = ImageSet(np.repeat(labels, 64).reshape(-1, 1, 8, 8).astype(np.uint8), labels)
    write_npz(tmp_path / "images.npz", images)
    write_pngs(tmp_path / "images", images, names, note="synthetic")
    return tmp_path, labels, names


def test_torchvision(release):
    create_backbone("test_vit3", channels=1, classes=2, image_size=16)  # makes up for a torchvision of another torch
    datasets = importlib.import_module("torchvision.datasets")
    folder, labels, names = release
    found = datasets.ImageFolder(str(folder / "images"))
    assert found.classes == folder_names(names)
    assert sorted(found.targets) == sorted(labels.tolist())
    assert all(np.asarray(image)[0, 0, 0] == label for image, label in found)


def test_hugging_face(release, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_dataset = importlib.import_module("datasets").load_dataset
    folder, labels, names = release
    found = load_dataset("imagefolder", data_dir=str(folder / "images"), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"] and len(found["train"]) == len(labels)
    rows = [(np.asarray(row["image"]).flat[0], row["label"], row["class"]) for row in found["train"]]
    assert all(pixel == label and names[label] == name for pixel, label, name in rows)


def test_hugging_face_reads_the_card_of_a_whole_release(tmp_path, monkeypatch):
    """`load_dataset(FOLDER)`, as of a repository on the hub: one part, each image with its label and class."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_dataset = importlib.import_module("datasets").load_dataset
    names = ["test: negative", "健康", "- 'quoted' \"train\""]
    folder = a_release(tmp_path / "release", tiny_study(data={"classes": names}))
    found = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"] and set(found["train"].features) == {"image", "label", "class"}
    with np.load(folder / "images.npz") as archive:
        images, labels = archive["train_images"], archive["train_labels"][:, 0]
    assert [(row["label"], row["class"]) for row in found["train"]] == [(n, names[n]) for n in labels.tolist()]
    assert all(np.array_equal(row["image"], image) for row, image in zip(found["train"], images, strict=True))


def test_sha256sum_checks_a_release_without_this_program(tmp_path):
    folder = a_release(tmp_path / "release")
    ended = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    assert ended.returncode == 0


def test_pandas(release):
    read_csv = importlib.import_module("pandas").read_csv
    image = importlib.import_module("PIL.Image")
    folder, labels, names = release
    table = read_csv(folder / "images" / "metadata.csv", dtype={"class": str})
    assert len(table) == len(labels) and [names[label] for label in table["label"]] == table["class"].tolist()
    assert all(
        np.asarray(image.open(folder / "images" / file)).flat[0] == label
        for file, label in zip(table["file_name"], table["label"])
    )


def test_medmnist(release):
    """Its own reader takes the file under the name of one of its sets; it knows how many images those have, so its
    `len` is no use for others."""
    create_backbone("test_vit3", channels=1, classes=2, image_size=16)  # as above: it asks for torchvision
    medmnist = importlib.import_module("medmnist")
    folder, labels, _ = release
    (folder / "images.npz").rename(folder / "pneumoniamnist.npz")
    found = medmnist.PneumoniaMNIST(split="train", root=str(folder), download=False)
    empty = [medmnist.PneumoniaMNIST(split=split, root=str(folder), download=False) for split in ("val", "test")]
    assert all(len(part.imgs) == len(part.labels) == 0 for part in empty)
    rows = [found[number] for number in range(len(labels))]
    assert [int(label[0]) for _, label in rows] == labels.tolist()
    assert all(np.asarray(image).flat[0] == label for (image, _), label in zip(rows, labels, strict=True))


def test_the_layout_of_medmnist(release):
    folder, labels, _ = release
    with np.load(folder / "images.npz", allow_pickle=False) as archive:
        images, found = archive["train_images"], archive["train_labels"]
    assert images.dtype == np.uint8 and images.shape == (len(labels), 8, 8) and found.shape == (len(labels), 1)
    assert (images[:, 0, 0] == found[:, 0]).all() and (found[:, 0] == labels).all()
