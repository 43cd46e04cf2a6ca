"""What is watched while a study is simulated; the processes themselves are tested in tests/e2e/test_stops.py."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from server.simulation import _Process, _Serving

SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def engine(tmp_path):
    """A process that has started another one, and never asks how that fares."""
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"
    process = _Process("engine", subprocess.Popen([sys.executable, "-c", program]), tmp_path / "log")
    process.log.touch()
    yield process
    process.end()


def test_a_daemon_that_is_gone_is_missed_and_one_that_lives_is_not(engine, monkeypatch):
    monkeypatch.setattr("server.simulation._DAEMONS", ("python",))  # which it is, like any other by its name
    deadline = time.monotonic() + 30
    while not engine.named and time.monotonic() < deadline:
        engine.look()
        time.sleep(0.05)
    assert not engine.daemons, "a child has its parent's name between fork and exec"
    engine.look()
    (daemon,) = engine.daemons
    assert engine.lost() is None
    with monkeypatch.context() as renamed:
        renamed.setattr("server.simulation._DAEMONS", ("raylet",))
        engine.look()
        assert not engine.daemons, "it lives, and is none any more"
    engine.look()
    engine.look()
    daemon.kill()
    while engine.lost() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    monkeypatch.setattr("server.simulation._DAEMONS", ("a name of a zombie is cut off",))
    engine.look()
    assert engine.lost() == engine.daemons[daemon]
    assert engine.popen.poll() is None


def test_what_the_processes_of_sites_warn_of_is_told_once(tmp_path):
    log = tmp_path / "log-0"
    log.write_text("chatter of a library\nwarning: no space left\x1b[2J\nwarning: half a li")
    serving = object.__new__(_Serving)
    serving._processes, serving._warned = [_Process("sites", subprocess.Popen(["true"]), log)], set()
    assert list(serving.warnings()) == ["warning: no space left [2J"]
    assert list(serving.warnings()) == []
    log.write_text(log.read_text() + "ne\u2028warning: forged\n")
    assert list(serving.warnings()) == ["warning: half a line warning: forged"]
    log.unlink()
    assert list(serving.warnings()) == []
