"""The benchmark's command: runs what is missing once, takes up what was begun, and ends what takes too long."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.utility import process, rows
from benchmarks.utility import run as command
from benchmarks.utility.grid import Row, quick_grid
from benchmarks.utility.results import load
from benchmarks.utility.rows import Bench, run_folder
from common.errors import CheckpointError, FederationError
from support.paths import REPOSITORY

ROW = quick_grid()[0]
FIGURES = {"test_auc": 0.75, "test_f1": 0.5, "images": 3}
# A stand-in for `synthward`: notes every call, and does what its orders say, one a call; the last one is repeated.
FAKE = """
import json, pathlib, sys, time
here, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
calls = here / "calls.json"
before = json.loads(calls.read_text()) if calls.exists() else []
calls.write_text(json.dumps([*before, arguments]))
orders = json.loads((here / "orders.json").read_text())
order = orders[min(len(before), len(orders) - 1)]
if "--resume" in arguments:
    run = pathlib.Path(arguments[arguments.index("--resume") + 1])
else:
    run = pathlib.Path(arguments[arguments.index("--out") + 1]) / f"pneumonia-{len(before)}"
    run.mkdir()
    (run / "study.sha256").write_text("x")
if order == "fail early":
    sys.exit("error: no good")
(run / "plan.json").write_text("{}")
(run / "events.jsonl").write_text("{}")
if order == "hang":
    time.sleep(60)
if order == "fail":
    sys.exit("error: no good")
(run / "release").mkdir()
(run / "release" / "SHA256SUMS").write_text("")
"""


class Stage:
    """A bench with the stand-in for a command."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.measured = folder, 0
        (folder / "fake.py").write_text(FAKE)
        monkeypatch.setattr(process, "_POLL_SECONDS", 0.02)
        monkeypatch.setattr(process, "_LEFTOVER_SECONDS", 0.5)
        monkeypatch.setattr(rows, "code_version", lambda: "c0de")
        self.bench = Bench(
            data=folder, out=folder / "out", results=folder / "results.csv",
            command=(sys.executable, str(folder / "fake.py")), measure=self.measure, code="c0de",
        )  # fmt: skip

    def measure(self, *_, **__):
        self.measured += 1
        return FIGURES

    def orders(self, *orders: str) -> None:
        (self.folder / "orders.json").write_text(json.dumps(orders))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.json"
        return json.loads(path.read_text()) if path.exists() else []

    @property
    def results(self):
        return load(self.folder / "results.csv")[0]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    return Stage(tmp_path, monkeypatch)


def give_minutes(monkeypatch, minutes: float) -> None:
    monkeypatch.setattr(Row, "budget_minutes", minutes)


def test_a_row_is_run_by_the_command_with_its_own_settings_and_kept(stage):
    stage.orders("work")
    stage.bench.run(ROW)
    (call,) = stage.calls
    assert call[:4] == ["run", str(ROW.study_file), "--data", str(stage.folder / "pneumoniamnist.npz")]
    assert [call[i + 1] for i, word in enumerate(call) if word == "--set"] == list(ROW.overrides)
    (result,) = stage.results
    assert (result.status, result.test_auc, result.code, result.study_sha256) == (
        "ok", 0.75, "c0de", ROW.study().sha256
    )  # fmt: skip
    assert 0 < result.minutes < 1 and json.loads(result.settings)["study"]["seed"] == 1


def test_a_finished_row_is_not_run_twice(stage):
    stage.orders("work")
    assert not stage.bench.is_done(ROW)
    stage.bench.run(ROW)
    assert stage.bench.is_done(ROW)
    assert not stage.bench.is_done(replace(ROW, seed=2))
    assert not stage.bench.is_done(replace(ROW, quick=False))
    assert not replace(stage.bench, code="new").is_done(ROW)


def test_another_ruler_measures_a_finished_run_again_without_running_it(stage, monkeypatch):
    stage.orders("work")
    stage.bench.run(ROW)
    monkeypatch.setattr(rows, "RULER", 99)
    assert not stage.bench.is_done(ROW)
    stage.bench.run(ROW)
    assert (len(stage.calls), stage.measured, [r.ruler for r in stage.results]) == (1, 2, [4, 99])


def test_a_row_over_its_budget_is_ended_recorded_and_left_alone(stage, monkeypatch):
    give_minutes(monkeypatch, 1.5 / 60)
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.5)
    stage.orders("hang")
    began = time.monotonic()
    assert stage.bench.run(ROW).startswith("over budget")
    assert time.monotonic() - began < 20
    (result,) = stage.results
    assert (result.status, result.test_auc, stage.measured) == ("over budget", None, 0)
    assert result.minutes >= 1.5 / 60
    assert stage.bench.is_done(ROW)
    give_minutes(monkeypatch, 10)
    assert not stage.bench.is_done(ROW), "a larger budget may be enough"


def test_what_was_begun_is_gone_on_with_and_its_time_counts(stage, monkeypatch):
    stage.orders("fail", "work")
    with pytest.raises(FederationError, match="no good"):
        stage.bench.run(ROW)
    spent = ROW.budget_minutes - stage.bench.minutes_left(ROW)
    stage.bench.run(ROW)
    first, second = stage.calls
    assert "--resume" not in first and second[:2] == ["run", "--resume"] and second[2].endswith("pneumonia-0")
    assert stage.results[0].minutes > spent > 0


def test_a_row_with_no_budget_left_is_not_begun_again(stage, monkeypatch):
    stage.orders("fail", "work")
    with pytest.raises(FederationError):
        stage.bench.run(ROW)
    give_minutes(monkeypatch, 1e-6)
    stage.bench.run(ROW)
    assert len(stage.calls) == 1 and stage.results[0].status == "over budget"


def test_a_run_that_cannot_be_gone_on_with_starts_anew(stage):
    stage.orders("fail", "fail", "work")
    with pytest.raises(FederationError):
        stage.bench.run(ROW)
    stage.bench.run(ROW)
    assert ["--resume" in call for call in stage.calls] == [False, True, False]
    assert len(stage.results) == 1


def test_a_run_that_failed_before_its_first_stage_starts_anew(stage):
    stage.orders("fail early", "work")
    with pytest.raises(FederationError, match="no good"):
        stage.bench.run(ROW)
    stage.bench.run(ROW)
    assert not any("--resume" in call for call in stage.calls)
    run = run_folder(stage.bench.log(ROW).parent)
    assert run is not None and run.name == "pneumonia-1"


def test_a_run_during_which_the_software_changed_is_not_counted(stage, monkeypatch):
    stage.orders("work")
    versions = iter(["c0de", "changed"])
    monkeypatch.setattr(rows, "code_version", lambda: next(versions))
    with pytest.raises(CheckpointError, match="changed"):
        stage.bench.run(ROW)
    assert stage.results == []


def test_rows_that_fail_are_named_and_the_others_run(stage, monkeypatch, capsys):
    stage.orders("fail early", "work")
    (stage.folder / "pneumoniamnist.npz").touch()
    monkeypatch.setattr(rows, "Bench", lambda **given: replace(stage.bench, lock=given["lock"]))
    arguments = (quick_grid(), stage.folder, stage.folder / "out", stage.folder / "results.csv")
    assert command._run(*arguments, None) == [ROW.identity]
    assert [result.recipe for result in stage.results] == ["moments"]
    assert "failed: " in capsys.readouterr().err
    assert command._run(*arguments, None) == []
    assert len(stage.results) == 2 and len(stage.calls) == 3


def test_no_row_is_begun_that_may_not_end_in_time(stage, monkeypatch, capsys):
    stage.orders("work")
    (stage.folder / "pneumoniamnist.npz").touch()
    monkeypatch.setattr(rows, "Bench", lambda **given: replace(stage.bench, lock=given["lock"]))
    command._run(quick_grid(), stage.folder, stage.folder / "out", stage.folder / "results.csv", 1.0)
    assert stage.calls == [] and capsys.readouterr().err.count("not begun") == 2


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.utility.run", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quick", "--data", "no-such-folder", "--out", "OUT"), "no pneumoniamnist.npz there"),
        (("--only", "no-such-row", "--out", "OUT"), "no row has 'no-such-row'"),
        (("--quick", "--report", str(command.HOME), "--out", "OUT"), "quick rows do not belong"),
        (("--quick", "--table-only", "--out", "OUT", "--report", "FILE"), "FILE"),
        (("--minutes", "soon"), "'soon'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    (tmp_path / "FILE").write_text("x")
    done = call(*(str(tmp_path / word) if word in ("OUT", "FILE") else word for word in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert not (tmp_path / "OUT").exists()


def test_a_second_benchmark_in_the_same_folder_waits_outside(tmp_path):
    (tmp_path / "pneumoniamnist.npz").touch()
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        done = call("--quick", "--data", str(tmp_path), "--out", str(tmp_path))
    finally:
        os.close(handle)
    assert done.returncode == 2 and "another benchmark is at work" in done.stderr


def test_a_polite_kill_is_an_interruption():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), command._stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_list_names_every_row_and_runs_none(tmp_path):
    done = call("--quick", "--list", "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == [
        row.identity for row in quick_grid()
    ]
    assert not (tmp_path / "out").exists()


def test_the_software_does_not_know_its_benchmarks():
    for package in ("common", "client", "server"):
        for path in (REPOSITORY / package).rglob("*.py"):
            assert not re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.MULTILINE), path
