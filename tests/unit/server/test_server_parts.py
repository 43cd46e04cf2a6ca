"""Averaging, moving average, labels, kept batches, checkpoints and release files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import CheckpointError, StorageError
from common.images import ImageSet, to_uint8, to_unit
from common.model.diffusion_model import initial_weights
from common.optimizer import largest_update_norm
from server.checkpoints import Checkpoint, RoundRow, RunFolder
from server.federation.aggregation import average, moved, moving_average, within
from server.release.checksums import verify_checksums
from server.release.formats import contact_sheet, folder_names, write_npz, write_pngs
from server.synthesis.generation import generate, planned_labels
from support.studies import agreement, tiny_study

STUDY = tiny_study()


def test_sites_are_weighed_by_their_noisy_counts():
    updates = {"a": {"w": np.array([1.0], np.float32)}, "b": {"w": np.array([4.0], np.float32)}}
    mean = average(updates, {"a": 300.0, "b": 100.0, "absent": 999.0})
    np.testing.assert_allclose(mean["w"], [1.75])


def test_no_sum_of_weights_and_changes_can_become_infinite_or_pass_what_a_site_takes():
    weights = {"w": np.full(3, 3e38, np.float32), "kept": np.ones(1, np.float32)}
    change = {"w": np.array([3e38, -float(np.float32(3e38)), 1e300])}
    bounded = within(moved(weights, change), 1e4)
    assert bounded["w"].tolist() == [1e4, 0.0, 1e4]
    assert bounded["w"].dtype == np.float32
    assert list(bounded) == ["w"]
    small = within(moved({"w": np.ones(1, np.float32)}, {"w": np.full(1, 0.5)}), 1e4)
    assert small["w"].tolist() == [1.5]


def test_the_moving_average_follows_slowly_and_forgets_the_first_weights():
    ema, weights = {"w": np.zeros(1, np.float32)}, {"w": np.ones(1, np.float32)}
    once = moving_average(ema, weights, decay=0.99, steps=10, step=10_000)
    np.testing.assert_allclose(once["w"], [1 - 0.99**10], rtol=1e-5)
    early = moving_average(ema, weights, decay=0.99, steps=10, step=10)
    assert early["w"][0] > 0.99


@pytest.mark.parametrize("counts", [[300.0, 100.0], [1000.0, -5.0], [-3.0, -4.0], [1e-9, 1.0]])
def test_labels_follow_the_private_counts_with_every_class_present(counts):
    labels = planned_labels(counts, 40, seed=1)
    assert len(labels) == 40
    numbers = np.bincount(labels, minlength=2)
    assert numbers.min() >= 1
    if counts[0] == 300.0:
        assert numbers.tolist() == [30, 10]


def test_generation_takes_up_finished_batches_and_gives_the_same_set(tmp_path):
    ema = initial_weights(STUDY)
    labels = planned_labels([1, 1], 24, seed=0)
    whole = generate(STUDY, ema, labels, tmp_path / "a")
    seen = []
    generate(STUDY, ema, labels, tmp_path / "b", on_batch=lambda done, total: seen.append((done, total)))
    assert seen == [(12, 24), (24, 24)]
    batch = tmp_path / "b" / "batch-00001.npz"
    kept = batch.read_bytes()
    for spoilt in (b"cut short", b"PK", kept[:-40], kept[:80] + b"\xff" * 40 + kept[120:]):
        batch.write_bytes(spoilt)
        assert np.array_equal(generate(STUDY, ema, labels, tmp_path / "b").images, whole.images)
    again = generate(STUDY, ema, labels, tmp_path / "b")
    assert np.array_equal(whole.images, again.images)


def test_guidance_uses_the_null_class_of_the_real_model(tmp_path):
    """With guidance, images of a class move away from what the model draws of no class at all."""
    weights = initial_weights(STUDY)
    rng = np.random.default_rng(0)
    weights = {n: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for n, a in weights.items()}
    label = weights["net.label.weight"]
    label[0], label[1], label[2] = -3.0, 3.0, 0.0  # the last row is the null class
    labels = np.array([0, 1] * 6)

    def gap(guidance):
        study = tiny_study(generation={"guidance": guidance})
        images = generate(study, weights, labels, tmp_path / f"{guidance:g}").images.astype(float)
        return np.abs(images[labels == 1].mean(axis=0) - images[labels == 0].mean(axis=0)).mean()

    assert gap(2.0) > 1.3 * gap(0.0) > 0


@pytest.mark.parametrize("sampler", ["dpm-solver++", "ancestral"])
def test_an_image_does_not_depend_on_the_batch_that_it_is_drawn_in(tmp_path, sampler):
    rng, labels = np.random.default_rng(0), np.array([0, 1] * 6)
    weights = {n: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for n, a in initial_weights(STUDY).items()}
    sets = [
        generate(tiny_study(generation={"batch_size": size, "sampler": sampler}), weights, labels, tmp_path / str(size))
        for size in (12, 5)
    ]
    assert np.abs(sets[0].images.astype(int) - sets[1].images).max() <= 1  # rounding


def test_a_run_folder_never_overwrites_another(tmp_path):
    first = RunFolder.create(tmp_path, STUDY, agreement().plan)
    second = RunFolder.create(tmp_path, STUDY, agreement().plan)
    assert first.path != second.path
    assert first.study() == STUDY
    assert first.plan() == agreement().plan
    assert first.study().sha256 == (first.path / "study.sha256").read_text().strip()


def test_a_changed_study_file_is_noticed_before_a_resume(tmp_path):
    folder = RunFolder.create(tmp_path, STUDY, agreement().plan)
    path = folder.path / "study.toml"
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = 9.0"))
    with pytest.raises(CheckpointError, match="changed after the run began"):
        folder.study()


def test_settings_of_the_machine_may_be_put_right_before_a_resume(tmp_path):
    folder = RunFolder.create(tmp_path, STUDY, agreement().plan)
    path = folder.path / "study.toml"
    path.write_text(path.read_text().replace("timeout_seconds = 120.0", "timeout_seconds = 240.0"))
    assert folder.study().federation.timeout_seconds == 240.0
    assert folder.study().sha256 == STUDY.sha256


def test_a_folder_without_a_plan_is_no_run_yet(tmp_path):
    folder = RunFolder.create(tmp_path, STUDY)
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder.open(folder.path)
    folder.keep_plan(agreement().plan)
    assert RunFolder.open(folder.path).plan() == agreement().plan
    (folder.path / "plan.json").write_text('{"mechanisms": "none"}')
    with pytest.raises(CheckpointError, match="not a plan"):
        folder.plan()


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder.open(tmp_path)


def _checkpoint(number):
    weights = {"w": np.full((2, 2), number, np.float32)}
    row = RoundRow(number, 0.5, {"a": 1.0}, ["a"], {"b": "no"}, 2.0)
    return Checkpoint(number, weights, weights, [row])


def test_checkpoints_read_back_and_only_the_last_few_are_kept(tmp_path):
    folder = RunFolder.create(tmp_path, STUDY, agreement().plan)
    assert folder.last_checkpoint() is None
    for number in range(1, 7):
        folder.save_checkpoint(_checkpoint(number))
    last = folder.last_checkpoint()
    assert last is not None
    assert last.round == 6
    assert last.rows == _checkpoint(6).rows
    assert np.array_equal(last.ema["w"], _checkpoint(6).ema["w"])
    assert len(list((folder.path / "checkpoints").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_checkpoints_are_passed_over_and_all_damaged_is_an_error(tmp_path, damage):
    folder = RunFolder.create(tmp_path, STUDY, agreement().plan)
    for number in (1, 2):
        folder.save_checkpoint(_checkpoint(number))
    files = sorted((folder.path / "checkpoints").glob("*.safetensors"))
    for file in reversed(files):
        file.unlink() if damage is None else file.write_bytes(damage)
        if file is files[1]:
            kept = folder.last_checkpoint()
            assert kept is not None
            assert kept.round == 1
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        folder.last_checkpoint()


def test_a_manifest_cannot_point_outside_the_folder(tmp_path):
    folder = RunFolder.create(tmp_path, STUDY, agreement().plan)
    folder.save_checkpoint(_checkpoint(1))
    manifest = folder.path / "checkpoints" / "round-00001.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "file": "../../secret.safetensors"}))
    with pytest.raises(CheckpointError):
        folder.last_checkpoint()


def test_events_cut_by_a_crash_are_passed_over(tmp_path):
    folder = RunFolder.create(tmp_path, STUDY, agreement().plan)
    folder.event("begin", study="x")
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert [event["event"] for event in folder.events()] == ["begin"]
    folder.event("begin")  # who follows the run has to see that one
    assert [event["event"] for event in folder.events()] == ["begin", "begin"]


@pytest.mark.parametrize("channels", [1, 3])
def test_released_images_are_the_generated_pixels(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (5, channels, 8, 8), dtype=np.uint8), np.array([0, 1, 1, 0, 1]))
    write_npz(tmp_path / "set.npz", images)
    with np.load(tmp_path / "set.npz", allow_pickle=False) as back:
        expected = images.images[:, 0] if channels == 1 else images.images.transpose(0, 2, 3, 1)
        assert np.array_equal(back["train_images"], expected)
        assert back["train_labels"].tolist() == [[0], [1], [1], [0], [1]]
    write_pngs(tmp_path / "png", images, ("a", "b/../c"), note="synthetic")
    assert (tmp_path / "png" / "metadata.csv").read_text().startswith("file_name,label,class\n0-a/00000.png,0,a\n")
    files = sorted((tmp_path / "png").rglob("*.png"))
    assert [f.parent.name for f in files] == ["0-a", "0-a", "1-b-c", "1-b-c", "1-b-c"]
    with Image.open(files[0]) as picture:
        assert np.array_equal(np.asarray(picture), expected[0])
        assert picture.info["Description"] == "synthetic"
    assert contact_sheet(images, 0).startswith(b"\x89PNG")


@given(st.lists(st.text(max_size=80), min_size=2, max_size=64))
def test_folders_of_classes_are_in_order_one_for_each_and_no_split(names):
    """The rule of Hugging Face's `datasets`: a keyword between its separators (`-._ 0-9`) names a split."""
    keywords = "train|training|test|testing|eval|evaluation|val|valid|validation|dev"
    found = folder_names(names)
    assert found == sorted(found) and len(set(found)) == len(names)
    for folder in found:
        assert folder.isprintable() and not set('/\\:*?"<>| .') & set(folder) and len(folder.encode()) < 200
        assert not re.search(rf"(^|[-._ 0-9])({keywords})([-._ 0-9]|$)", folder, re.IGNORECASE)


def test_verify_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no finished release"):
        verify_checksums(tmp_path)
    sums = tmp_path / "SHA256SUMS"
    sums.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not a list of checksums"):
        verify_checksums(tmp_path)
    sums.write_text(f"{'0' * 64}  ../outside\n{'0' * 64}  gone\n{'0' * 64}  here\n\n")
    (tmp_path / "here").write_text("x")
    none = "SHA256SUMS has a line for no file of the release"
    problems = verify_checksums(tmp_path)
    assert problems[:3] == [none, "gone is missing", "here was changed"]
    assert "report.html is not listed" in problems and "claim.json is not listed" in problems
    with pytest.raises(CheckpointError, match="Give the folder"):
        verify_checksums(tmp_path / "here")
    sums.unlink()
    sums.mkdir()
    with pytest.raises(StorageError, match="SHA256SUMS"):
        verify_checksums(tmp_path)


def test_pixels_survive_the_one_scaling():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(to_unit(pixels)), pixels)
    assert to_unit(pixels).min() == -1
    assert to_unit(pixels).max() == 1


def test_adam_never_moves_further_than_its_stated_bound():
    import torch

    from common.optimizer import Adam

    torch.manual_seed(0)
    parameter = torch.zeros(50)
    adam = Adam({"w": parameter}, learning_rate=0.01)
    for step in range(30):
        before = parameter.clone()
        adam.step({"w": torch.randn(50) * 10.0 ** (step % 7 - 3)})
        moved = (parameter - before).norm().item()
        assert moved <= largest_update_norm(parameters=50, steps=1, learning_rate=0.01) * (1 + 1e-6)
