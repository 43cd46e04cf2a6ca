"""The commands as a user calls them: a whole small study under Flower's engine, and every mistake in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from server.release.checksums import verify_checksums
from support.datasets import good_arrays, write_npz
from support.paths import real_data
from support.studies import tiny_toml

PYTHON = sys.executable


def _synthward(*arguments, cwd, timeout=300):
    return subprocess.run(
        [PYTHON, "-m", "server.cli", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        check=False, env=_environment(),
    )  # fmt: skip


def _environment():
    from support.paths import REPOSITORY

    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_toml())
    return path


def _assert_one_line(result, *, code, words):
    lines = [line for line in result.stderr.splitlines() if not line.startswith("tiny: trying")]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


def _npz(tmp_path, **changes):
    arrays = good_arrays(size=16)
    arrays.update(changes)
    return write_npz(tmp_path / "data.npz", arrays)


def _labels(arrays, key, change):
    labels = arrays[key].copy()
    change(labels)
    return {key: labels}


def _bad_data(kind, tmp_path):
    base = good_arrays(size=16)
    labels, images = base["train_labels"], base["train_images"]
    if kind == "missing":
        return tmp_path / "nowhere.npz", ["nowhere.npz"]
    if kind == "layout":
        path = tmp_path / "data.npz"
        np.savez(path, pictures=images)
        return path, ["data.npz", "train_images"]
    if kind == "nan":
        return _npz(tmp_path, train_images=np.full(images.shape, np.nan, np.float32)), ["train_images", "NaN"]
    if kind == "class missing":
        return _npz(tmp_path, train_labels=np.zeros_like(labels)), ["opacity"]
    if kind == "one image in a class":
        one = np.zeros_like(labels)
        one.flat[0] = 1
        return _npz(tmp_path, train_labels=one), ["opacity"]
    if kind == "label out of range":
        wrong = labels.copy()
        wrong.flat[3] = 9
        return _npz(tmp_path, train_labels=wrong), ["train_labels", "9"]
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["missing", "label out of range"]  # all kinds: tests/unit/client/test_npz_source.py and test_checks.py
    + [
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("layout", "nan", "class missing", "one image in a class")
    ],
)
def test_bad_data_gives_one_line_and_nothing_is_made_or_spent(study, tmp_path, kind):
    path, words = _bad_data(kind, tmp_path)
    result = _synthward("run", study, "--data", path, "--out", tmp_path / "runs", cwd=tmp_path)
    _assert_one_line(result, code=2, words=words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.toml"], ["nowhere.toml"]),
        (["run", "tiny.toml", "--set", "training.round=2"], ["training.round", "Did you mean 'rounds'?"]),
        (["run", "tiny.toml", "--set", "privacy.epsilon=0.01"], ["privacy.epsilon", "least possible"]),
        (["run", "tiny.toml", "--set", "validation.backbone=efficientnet_b_0"], ["validation.backbone"]),
        (["run", "tiny.toml", "--dry-run", "--set", "validation.backbone=efficientnet_b_0"], ["validation.backbone"]),
        (["run", "tiny.toml", "--set", "federation.min_sites=4"], ["federation.min_sites", "3 simulated"]),
        (
            [
                "run",
                "tiny.toml",
                "--set",
                "pretrain.source=npz",
                "--set",
                f"pretrain.sha256={'0' * 64}",
                "--set",
                "pretrain.path=nowhere.npz",
            ],
            ["nowhere.npz", "no such file"],
        ),
        (["run", "--resume", "nowhere"], ["nowhere", "not a run folder"]),
        (["run", "tiny.toml", "--resume", "x"], ["--resume"]),
        (["run"], ["no study file"]),
        (["run", "tiny.toml", "--dry-runn"], ["--dry-runn"]),
        (["verify", "nowhere"], ["no finished release"]),
        (["release", "nowhere"], ["nowhere", "not a run folder"]),
        (["release", "nowhere", "--uid-root", "1.2"], ["--uid-root", "--dicom"]),
    ],
)
def test_a_mistake_on_the_command_line_gives_one_line(study, tmp_path, arguments, words):
    result = _synthward(*arguments, "--out", tmp_path / "runs", cwd=tmp_path) if arguments[0] == "run" else (
        _synthward(*arguments, cwd=tmp_path)
    )  # fmt: skip
    _assert_one_line(result, code=2, words=words)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_plan_and_spends_nothing(study, tmp_path):
    result = _synthward("run", study, "--dry-run", "--out", tmp_path / "runs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = ("noise_multiplier", "counts", "train", "evaluate", "parameters", "MB per site", "site-3", "min on this",
             "its study cannot change", "federation.timeout_seconds, pretrain.path")  # fmt: skip
    for word in words:
        assert word in result.stdout
    assert not (tmp_path / "runs").exists()


def test_help_has_an_example_for_each_command_and_is_quick(tmp_path):
    for module, commands in (("server.cli", ("run", "verify", "release")), ("client.cli", ("check", "budget"))):
        for command in commands:
            result = subprocess.run(
                [PYTHON, "-m", module, command, "--help"],
                capture_output=True,
                text=True,
                check=True,
                env=_environment(),
            )
            assert f"{'synthward' if module == 'server.cli' else 'synthward-site'} {command}" in result.stdout
    loaded = subprocess.run(
        [PYTHON, "-c", "import server.cli, client.cli, sys; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True, env=_environment(),
    )  # fmt: skip
    assert loaded.stdout.strip() == "False"


def test_a_study_runs_under_flowers_engine_to_a_verified_release(study, tmp_path):
    result = _synthward("run", study, "--out", tmp_path / "runs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert f"report: {tmp_path / 'runs' / run.name / 'release' / 'report.html'}" in result.stdout
    for name in ("study.toml", "study.sha256", "events.jsonl", "checkpoints/round-00002.safetensors",
                 "release/report.html", "release/images.npz"):  # fmt: skip
        assert (run / name).is_file(), name
    given = _synthward("release", run, "--out", tmp_path / "out", cwd=tmp_path)
    assert (given.returncode, given.stdout) == (0, f"{tmp_path / 'out'}: can be given away as it is\n"), given.stderr
    shutil.rmtree(run / "release")  # what was given away stands alone
    checked = _synthward("verify", tmp_path / "out", cwd=tmp_path)
    assert checked.returncode == 0 and "the ledger of site-1, site-2, site-3" in checked.stdout, checked.stderr
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.is_file() and bytes(tmp_path) in path.read_bytes()
    ]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["epsilon"]["sites"]) == {"site-1", "site-2", "site-3"}
    assert 0 < metrics["epsilon"]["max"] <= 8
    assert (run / "sites" / "site-1" / "ledger.sqlite").is_file()
    assert json.loads((run / "sites" / "site-2.registry.json").read_text())[0]["site"] == "site-2"


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_round(study, tmp_path):
    command = [PYTHON, "-m", "server.cli", "run", str(study), "--out", str(tmp_path / "runs"),
               "--set", "training.rounds=6"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, env=_environment(), stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 240
    while not list((tmp_path / "runs").glob("*/checkpoints/round-00002.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (run,) = (tmp_path / "runs").iterdir()
    result = _synthward("run", "--resume", run, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert verify_checksums(run / "release") == []
    metrics = json.loads((run / "release" / "metrics.json").read_text())
    assert metrics["rounds"] >= 5
    assert metrics["epsilon"]["max"] <= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"),
    [("pneumonia", "pneumoniamnist.npz"), ("histology", "colonpath4.npz"), ("fundus", "fundus4.npz")],
)
def test_each_study_makes_its_plan_on_real_images(name, data, tmp_path):
    from support.paths import REPOSITORY

    result = _synthward("run", REPOSITORY / "configs" / f"{name}.toml", "--data", real_data(data), "--dry-run",
                        cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "together, train records" in result.stdout
    assert "unless a site has to answer 'evaluate' a second time" in result.stdout
