"""The figures of a run: exact, with intervals that hold, and only of the run that was asked for."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from benchmarks.utility import measure as room
from benchmarks.utility.measure import alike, exact_figures, measure, released_figures
from benchmarks.utility.results import Result
from common.errors import CheckpointError
from common.files import atomic_write, pack_arrays, write_json
from common.images import ImageSet
from common.model.classifier import BiomarkerClassifier
from server.release.formats import write_npz as release_npz
from server.stages import release
from support.datasets import write_npz
from support.reports import claim_with, site_claim
from support.studies import tiny_study

STUDY = tiny_study(simulation={"sites": 2}, validation={"steps": 12})


def scores(count: int, classes: int, seed: int, signal: float = 1.0, ties: bool = False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(0, 1, (count, classes)) + signal * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return (probabilities.round(1) if ties else probabilities).astype(np.float32), labels


@pytest.mark.parametrize(("classes", "ties"), [(2, False), (4, False), (4, True)])
def test_auc_and_f1_are_those_of_the_textbook(classes, ties):
    probabilities, labels = scores(300, classes, 1, ties=ties)
    auc, f1 = exact_figures(probabilities, labels, replicates=0)
    per_class = [roc_auc_score(labels == k, probabilities[:, k]) for k in range(classes)]
    assert auc.value == pytest.approx(np.mean(per_class))
    assert f1.value == pytest.approx(f1_score(labels, probabilities.argmax(axis=1), average="macro"))
    assert np.isnan(auc.low) and np.isnan(f1.high)


def hits_of_intervals(width: float) -> np.ndarray:
    """How many of 120 intervals, scaled to `width` about their value, hold the AUC and the F1 of 200,000 images."""
    truth = exact_figures(*scores(200_000, 2, 0), replicates=0)
    hits = np.zeros(2, dtype=int)
    for seed in range(1, 121):
        for place, found in enumerate(exact_figures(*scores(150, 2, seed), replicates=200)):
            low, high = (found.value + width * (end - found.value) for end in (found.low, found.high))
            hits[place] += low <= truth[place].value <= high
    return hits


def test_an_interval_holds_the_true_value_as_often_as_it_says_and_half_of_one_does_not():
    """At 95 %, fewer than 103 of 120 has probability 3e-5; at half the width, that is 67 %, 103 or more has 3e-6."""
    assert (hits_of_intervals(1.0) >= 103).all()
    assert (hits_of_intervals(0.5) < 103).all()


def test_an_interval_is_the_same_every_time():
    assert exact_figures(*scores(80, 3, 5)) == exact_figures(*scores(80, 3, 5))


def test_a_class_without_test_images_is_left_out_of_the_mean():
    probabilities, labels = scores(100, 3, 2)
    kept = labels != 2
    auc, _ = exact_figures(probabilities[kept], labels[kept], replicates=20)
    per_class = [roc_auc_score(labels[kept] == k, probabilities[kept, k]) for k in range(2)]
    assert auc.value == pytest.approx(np.mean(per_class))
    assert auc.low <= auc.value <= auc.high


def test_images_are_drawn_with_the_wanted_class_mix_and_none_twice():
    labels = np.repeat([0, 1, 2], [50, 30, 5])
    wanted = np.repeat([0, 1, 2], [4, 20, 3])
    chosen = alike(wanted, labels, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 27
    assert np.bincount(labels[chosen]).tolist() == [4, 20, 3]


def test_a_class_that_is_missing_is_filled_up_with_others_so_that_it_shows():
    labels, wanted = np.repeat([0, 1], [30, 2]), np.repeat([0, 1], [5, 10])
    chosen = alike(wanted, labels, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 15 and np.bincount(labels[chosen]).tolist() == [13, 2]


def pictures(count: int, seed: int):
    """Bright and dark images, by class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    base = np.where(labels == 1, 170, 90)[:, None, None]
    return np.clip(base + rng.normal(0, 30, (count, 16, 16)), 0, 255).astype(np.uint8), labels


def a_run(folder, *, sha: str = STUDY.sha256, synthetic=None):
    """What `synthward run` leaves, as far as it is measured."""
    images, labels = synthetic or pictures(60, 9)
    released = ImageSet(images[:, None], labels)
    release_npz(folder / "release" / "images.npz", released)
    classifier = BiomarkerClassifier.fit(released, classes=2, channels=1, config=STUDY.validation, seed=3)
    atomic_write(folder / "checkpoints" / "classifier-0.safetensors", pack_arrays(classifier.state()))
    estimate = {"value": 0.7, "low": 0.6, "high": 0.8}
    names = [*release._NAMES.values(), "chance"]
    rows = [{"name": name, "auc_macro": {**estimate, "value": 0.7 - i / 100}, "f1_macro": estimate}
            for i, name in enumerate(names)]  # fmt: skip
    write_json(folder / "release" / "metrics.json", {"sha256": sha, "peak_memory_mb": 12.5, "validation": rows})
    sites = site_claim("site-1", 7.5, 1.0), site_claim("site-2", 7.75, 1.0)
    claim = claim_with(study="tiny", study_sha256=sha, accountant="rdp", sites=sites)
    write_json(folder / "release" / "claim.json", claim.to_json())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    arrays = {}
    for seed, (part, count) in enumerate((("train", 120), ("val", 30), ("test", 60))):
        arrays[f"{part}_images"], labels = pictures(count, seed)
        arrays[f"{part}_labels"] = labels.astype(np.uint8)[:, None]
    return write_npz(tmp_path_factory.mktemp("data") / "set.npz", arrays)


@pytest.fixture(scope="module")
def good(tmp_path_factory, data):
    """(run folder, cache, figures) of a run whose images are like the real ones."""
    folder = tmp_path_factory.mktemp("good")
    run, cache = a_run(folder / "run"), folder / "cache"
    return run, cache, measure(STUDY, run, data, cache=cache, real_steps=12)


def test_a_finished_run_gives_every_measured_figure(good):
    _, _, figures = good
    told = {"dataset", "epsilon", "recipe", "seed", "status", "finished", "code", "commit", "dirty", "ruler",
            "study_sha256", "budget_minutes", "minutes", "hardware", "settings"}  # fmt: skip
    assert figures.keys() == {field.name for field in fields(Result)} - told
    assert (figures["released_auc"], figures["reference_auc"], figures["epsilon_spent"]) == (0.7, 0.69, 7.75)
    assert (figures["images"], figures["peak_memory_mb"], figures["fidelity_images"]) == (60, 12.5, 60)
    assert figures["test_auc_low"] <= figures["test_auc"] <= figures["test_auc_high"]
    assert figures["test_auc"] > 0.9, "bright and dark is easily told"


def test_figures_know_good_images_from_noise(tmp_path, data, good):
    _, cache, figures = good
    trained = list(cache.iterdir())
    noise = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8), np.arange(60) % 2
    bad = measure(STUDY, a_run(tmp_path / "bad", synthetic=noise), data, cache=cache, real_steps=12)
    assert figures["kid"] < bad["kid"] and figures["two_sample"] < bad["two_sample"]
    assert figures["floor_kid"] == bad["floor_kid"] and figures["real_auc"] == bad["real_auc"]
    assert len(trained) == 2 and list(cache.iterdir()) == trained, "classifiers of real images are trained once"


def test_a_run_of_another_study_is_not_measured(tmp_path):
    with pytest.raises(CheckpointError, match="another study"):
        released_figures(STUDY, a_run(tmp_path, sha="0" * 64))


@pytest.mark.parametrize("file", ["metrics.json", "claim.json"])
def test_a_run_that_is_not_finished_is_one_error(tmp_path, file):
    a_run(tmp_path)
    (tmp_path / "release" / file).write_text("{}")
    with pytest.raises(CheckpointError):
        released_figures(STUDY, tmp_path)
    (tmp_path / "release" / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        released_figures(STUDY, tmp_path)


def test_a_damaged_cache_is_made_anew_and_gives_the_same_figures(tmp_path, data, good):
    run, kept, figures = good
    for file in kept.iterdir():
        (tmp_path / file.name).write_bytes(b"nothing")
    assert measure(STUDY, run, data, cache=tmp_path, real_steps=12) == figures
    for file in kept.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    names = {room._cache_name(data, steps, part) for steps in (12, 13) for part in ("train", "val")}
    assert len(names) == 4
