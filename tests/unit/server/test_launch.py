"""The simulated sites: files that the sites' own command takes, and errors in one line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from client.site import load_site_config
from common.errors import DataError, StudyError
from server import cli, launch
from support.datasets import good_arrays, write_npz
from support.studies import tiny_study, tiny_toml


@pytest.mark.parametrize(("unit", "policy"), [("image", "image"), ("patient", "patient where known")])
@pytest.mark.parametrize("data", [None, Path("images.npz")])
def test_site_files_are_what_a_site_reads_and_keep_to_their_run(tmp_path, unit, policy, data):
    study = tiny_study(privacy={"unit": unit})
    files = launch.write_site_files(tmp_path, study, data)
    configs = [load_site_config(file) for file in files]
    assert [config.name for config in configs] == ["site-1", "site-2", "site-3"]
    for config in configs:
        assert config.policy.unit == policy
        assert config.policy.max_epsilon == config.policy.max_study_epsilon == study.privacy.epsilon
        assert config.registry == tmp_path / f"{config.name}.registry.json"
        assert config.state == tmp_path / config.name
        assert config.own_reference == (data is not None)
    assert [tomllib.loads(file.read_text())["data"]["shard_index"] for file in files] == [0, 1, 2]


@pytest.fixture
def commands(monkeypatch):
    """What the sites' command was asked, and what it says."""
    asked, said = [], {"check": "[]", "init": "", "approve": ""}
    monkeypatch.setattr(launch, "_site_command", lambda *words: (asked.append(words), said[words[0]])[1])
    return asked, said


ROW = {"name": "site-1", "units": 3, "train": [1, 2], "holdout": [1, 1], "warnings": []}


@pytest.mark.parametrize("command", ["check", "approve"])
def test_the_sites_begin_their_ledgers_and_approve_only_where_they_are_to(commands, command):
    asked, said = commands
    said[command] = json.dumps([{**ROW, "more": 1}])
    found = (launch.check_sites if command == "check" else launch.approve)(Path("study.toml"), [Path("a"), Path("b")])
    assert [check.name for check in found] == ["site-1"]
    assert [words[0] for words in asked] == ["init", command]
    assert all(words[-2:] == ("a", "b") for words in asked)


def test_a_failing_site_command_is_its_own_last_line(tmp_path):
    with pytest.raises(DataError) as failed:
        launch._site_command("verify-ledger", str(tmp_path / "nowhere.toml"))
    assert "nowhere.toml" in str(failed.value) and "error:" not in str(failed.value)


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_toml())
    return path


def test_more_sites_needed_than_simulated_is_said_before_anything_is_made(study_file, tmp_path):
    with pytest.raises(StudyError, match=r"federation.min_sites: 4 sites needed, 3 simulated"):
        cli._start(study_file, None, ("federation.min_sites=4",), tmp_path / "runs", dry_run=False)
    assert not (tmp_path / "runs").exists()


def test_the_sites_own_file_is_no_public_set(study_file, tmp_path, monkeypatch):
    data = write_npz(tmp_path / "private.npz", good_arrays(size=16, train=80))
    monkeypatch.setattr(launch, "_site_command", lambda *_: pytest.fail("a site was asked"))
    for dry_run in (False, True):
        with pytest.raises(StudyError, match="used without any noise") as refused:
            cli._start(study_file, data, cli._named(data), tmp_path / "runs", dry_run=dry_run)
        assert "--public" in str(refused.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("before", [False, True])
def test_where_a_site_does_not_approve_no_run_folder_is_left(study_file, tmp_path, monkeypatch, before):
    def refuse(*_):
        raise DataError("no", where="site-2")

    out = tmp_path / "runs"
    if before:
        (out / "an-earlier-run").mkdir(parents=True)
    monkeypatch.setattr("common.preflight.try_study", lambda _: None)
    monkeypatch.setattr(launch, "approve", refuse)
    with pytest.raises(DataError):
        cli._start(study_file, None, (), out, dry_run=False)
    assert sorted(path.name for path in out.glob("*")) == (["an-earlier-run"] if before else [])
    assert out.exists() == before


def test_what_a_study_names_is_tried_before_a_site_is_asked(study_file, tmp_path, monkeypatch):
    def misspelt(_):
        raise StudyError("no such model", where="validation.backbone")

    monkeypatch.setattr("common.preflight.try_study", misspelt)
    monkeypatch.setattr(launch, "_site_command", lambda *_: pytest.fail("a site was asked"))
    for dry_run in (False, True):
        with pytest.raises(StudyError, match="no such model"):
            cli._start(study_file, None, (), tmp_path / "runs", dry_run=dry_run)
    assert not (tmp_path / "runs").exists()
