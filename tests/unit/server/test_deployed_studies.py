"""How a study over Flower is followed by its run folder's events, and what they are taken for."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from common.errors import CheckpointError, FederationError, StudyError
from common.supervision import since_boot
from server.checkpoints import RunFolder
from server.deployment import status, studies
from server.deployment.folder import Addresses, Deployment
from support.studies import agreement, tiny_study


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    agreed = agreement()
    return RunFolder.create(tmp_path / "runs", agreed.study, agreed.plan)


@pytest.fixture
def deployment(tmp_path) -> Deployment:
    (tmp_path / "sites").mkdir()
    return Deployment(tmp_path, Addresses(host="localhost"))


@pytest.fixture
def living():
    """A process that stands for the server app."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def _begin(folder: RunFolder, process: psutil.Process) -> None:
    folder.event("begin", study="x", pid=process.pid, since_boot=since_boot(process.pid))


def test_a_run_lives_while_the_process_of_its_newest_begin_does(folder, living):
    assert not studies.alive(folder)
    _begin(folder, living)
    assert studies.alive(folder) and status.run_status(folder).state == "running"
    living.kill()
    living.wait(10)
    assert not studies.alive(folder) and status.run_status(folder).state == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figure is exchanged")
@pytest.mark.parametrize("seconds", [-3600.0, 2.0, 3600.0])
def test_a_run_lives_though_the_clock_was_set_since_it_began(folder, living, monkeypatch, seconds):
    """Before: `status` called it stopped, `stop` would not end it, and `run --resume` submitted it a second time."""
    _begin(folder, living)
    booted = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + seconds)
    assert studies.alive(folder)


def test_another_process_that_has_the_number_now_is_not_taken_for_it(folder, living):
    folder.event("begin", study="x", pid=living.pid, since_boot=since_boot(living.pid) - 100)
    assert not studies.alive(folder)
    folder.event("begin", pid="no number")
    assert not studies.alive(folder)


def _carry_on(deployment, folder, monkeypatch, *lives):
    """Follow a run whose server app says, in each of its lives, what a test has written down."""
    told, left = [], list(lives)

    def start(_deployment, run, watch, tell):
        process = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.DEVNULL)
        _begin(run, psutil.Process(process.pid))
        left.pop(0)(run)
        process.wait()
        watch.read(tell)

    monkeypatch.setattr(studies, "_start", start)
    monkeypatch.setattr(studies, "_LOOK_SECONDS", 0.01)
    try:
        studies.carry_on(deployment, folder, told.append)
    finally:
        told.append(len(left))
    return told


def _step(run, number=1):
    run.event("step", stage="train", done=number, total=4, text="loss 1")


def _finish(run):
    run.release.mkdir()
    (run.release / "SHA256SUMS").write_text("")
    (run.release / "metrics.json").write_text('{"epsilon": {"sites": {}}}')


def test_a_run_whose_process_is_gone_without_a_word_is_started_again(folder, deployment, monkeypatch):
    told = _carry_on(deployment, folder, monkeypatch, _step, lambda run: _step(run, 2), _finish)
    assert sum("starting it again" in str(line) for line in told) == 2 and told[-1] == 0
    assert any("train     2/4  loss 1" in str(line) for line in told)


def test_one_that_makes_no_step_is_given_up(folder, deployment, monkeypatch):
    with pytest.raises(FederationError, match=r"lost the run 6 times.*superlink\.log"):
        _carry_on(deployment, folder, monkeypatch, *[lambda _run: None] * 6)


def test_an_error_of_the_server_apps_ends_it_in_its_own_words_and_kind(folder, deployment, monkeypatch):
    def fails(run):
        run.event("failed", error="CheckpointError", what="damaged\x1b[2J", where="here", remedy="Mend it.")

    with pytest.raises(CheckpointError, match=r"^here: damaged \[2J\. Mend it\.$"):
        _carry_on(deployment, folder, monkeypatch, fails)
    assert status.run_status(folder).state == "failed"
    told = _carry_on(deployment, folder, monkeypatch, _finish)  # an error of then is none of now
    assert told[-1] == 0


@pytest.mark.parametrize("kind", ["Exception", "os", "printable", "", None])
def test_no_word_of_an_event_makes_another_exception(folder, kind):
    assert type(studies._error({"error": kind, "what": "x"})) is FederationError


def test_a_run_that_was_stopped_is_not_started_again_by_who_follows_it(folder, deployment, monkeypatch):
    with pytest.raises(FederationError, match="was stopped by"):
        _carry_on(deployment, folder, monkeypatch, lambda run: run.event("stopped"), _finish)


def test_a_finished_run_is_left_alone(folder, deployment, monkeypatch):
    _finish(folder)
    assert _carry_on(deployment, folder, monkeypatch) == [0]
    assert status.run_status(folder).state == "finished"


def test_stopping_what_does_not_run_is_one_line(folder, deployment):
    for data in (None, b"", b"\xff\x00", b"run-dir = 1"):
        if data is not None:
            (folder.path / "flower.toml").write_bytes(data)
        _begin(folder, psutil.Process(os.getpid())) if data is not None else None
        with pytest.raises(CheckpointError, match="does not run"):
            studies.stop(deployment, folder)


def test_too_few_admitted_hospitals_are_told_before_a_run_folder_is_made(deployment):
    with pytest.raises(StudyError, match="2 sites needed, 0 admitted"):
        studies.begin(deployment, tiny_study())
    assert not (deployment.path / "runs").exists()


def test_events_of_any_kind_are_shown_or_passed_over(folder):
    folder.event("stage", stage="train", text="round 1")
    folder.event("wait", stage="online", text="waiting")
    folder.event("warning", text="odd")
    folder.event("something", x=1)
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "sta')
    lines = [studies.line_of(event) for event in folder.events()]
    assert [line[10:] for line in lines] == ["train     round 1", "online    waiting", "warning   odd", ""]


def test_the_status_has_the_newest_step_every_sites_epsilon_and_the_last_warnings(folder):
    _begin(folder, psutil.Process(os.getpid()))
    folder.event("step", stage="enrol", done=1, total=1, text="", site="a", epsilon=0.5)
    folder.event("step", stage="train", done=2, total=4, text="", epsilon={"a": 1.5, "b": 2.0}, accepted=["a"])
    for number in range(7):
        folder.event("warning", text=f"w{number}")
    found = status.run_status(folder)
    assert (found.state, found.stage, found.done, found.total) == ("running", "train", 2, 4)
    assert found.epsilon == {"a": 1.5, "b": 2.0} and set(found.heard) == {"a"}
    assert found.warnings == [f"w{n}" for n in range(2, 7)]
    text = status.table(status.Status(services="up", certificate_days=9, carriers=[], run=found))
    assert "train  2/4" in text and "epsilon 1.500" in text and "no carrier is admitted yet" in text
