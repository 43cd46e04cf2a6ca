"""Programs that are kept running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from common import supervision
from common.errors import StorageError
from common.supervision import Kept, Program


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(supervision, "_FIRST_WAIT", 0.2)
    monkeypatch.setattr(supervision, "_END_SECONDS", 5.0)


def _program(tmp_path, code: str, **more) -> Program:
    command = (sys.executable, "-c", code)
    return Program(
        "it", lambda: command, {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}, tmp_path / "log" / "it", **more
    )


def _until(condition, kept: Kept, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        kept.look()
        time.sleep(0.02)


def test_what_ends_is_started_again_and_its_last_word_is_told(tmp_path, quick):
    told, lines = [], []
    code = "print('\\x1b[31mout of \\x07luck\\x1b[0m'); raise SystemExit(3)"
    kept = Kept(_program(tmp_path, code, on_line=lines.append), told.append)
    _until(lambda: len(told) >= 2, kept)
    kept.end()
    assert told[0] == "it ended (exit code 3: out of  luck); again in 0 s"
    assert lines[:2] == ["out of  luck"] * 2
    assert "out of  luck" in (tmp_path / "log" / "it").read_text()


def test_waits_grow_to_a_bound_while_it_ends_at_once(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(supervision, "_LONGEST_WAIT", 0.5)
    told = []
    kept = Kept(_program(tmp_path, "raise SystemExit(1)"), told.append)
    waits = []
    while len(waits) < 4:
        _until(lambda: len(told) > len(waits), kept)
        waits.append(kept._wait)
    assert waits == [0.4, 0.5, 0.5, 0.5]


def test_what_is_killed_is_said_to_be(tmp_path, quick):
    told = []
    kept = Kept(_program(tmp_path, "import time; time.sleep(100)"), told.append)
    kept.look()
    assert kept.runs
    os.kill(kept.pid, signal.SIGKILL)
    _until(lambda: told, kept)
    kept.end()
    assert told == ["it ended (signal 9); again in 0 s"]


def test_an_end_takes_all_that_it_has_started(tmp_path, quick):
    lines = []
    code = (
        "import signal, subprocess, sys, time; signal.signal(15, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']).pid); time.sleep(100)"
    )
    kept = Kept(_program(tmp_path, code, on_line=lines.append), lambda _: None)
    _until(lambda: lines, kept)
    supervision._END_SECONDS = 0.5
    kept.end()
    assert not kept.runs
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(lines[0])) and psutil.Process(int(lines[0])).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_has_a_group_of_its_own_ends_with_it_too(tmp_path, quick):
    """Flower's server app has, and went on for hours after its SuperLink was told to end."""
    lines = []
    code = ("import subprocess, sys, time\n"
            "sleep = [sys.executable, '-c', 'import time; time.sleep(100)']\n"
            "print(subprocess.Popen(sleep, start_new_session=True).pid); time.sleep(100)")  # fmt: skip
    for how in ("told", "killed"):
        lines.clear()
        kept = Kept(_program(tmp_path, code, on_line=lines.append), lambda _: None)
        _until(lambda: lines, kept)
        kept._counted = 0.0
        kept.look()
        if how == "told":
            kept.end()
        else:
            os.kill(kept.pid, signal.SIGKILL)
            _until(lambda: not kept.runs, kept)
            kept.look()
            kept.end()
        child = int(lines[0])
        _until(lambda child=child: not psutil.pid_exists(child) or
               psutil.Process(child).status() == psutil.STATUS_ZOMBIE, _Nothing())  # fmt: skip


class _Nothing:
    def look(self) -> None:
        pass


def test_what_says_that_it_has_to_be_is_started_anew(tmp_path, quick):
    told, lines = [], []
    code = "import os, time; print(os.getpid()); time.sleep(0.3); print('I am stuck'); time.sleep(100)"
    kept = Kept(_program(tmp_path, code, on_line=lines.append, restart_on="am stuck"), told.append)
    _until(lambda: len(told) >= 2, kept)
    kept.end()
    numbers = [line for line in lines if line.isdigit()]
    assert len(set(numbers)) >= 2 and not psutil.pid_exists(int(numbers[0]))
    assert told[0] == "it is started anew, since it would answer no more as it is"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_does_not_outlive_who_keeps_it(tmp_path):
    """Killed at once, a keeper ends nothing itself; a program that stayed would hold the port."""
    code = (
        "import sys, time; from pathlib import Path; from common.supervision import Kept, Program\n"
        "command = (sys.executable, '-c', 'import time; time.sleep(100)')\n"
        f"kept = Kept(Program('it', lambda: command, {{}}, Path({str(tmp_path)!r}) / 'l'), print)\n"
        "kept.look(); print(kept.pid, flush=True); time.sleep(100)"
    )
    keeper = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    pid = int(keeper.stdout.readline())
    assert psutil.pid_exists(pid)
    keeper.kill()
    keeper.wait()
    keeper.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_that_is_not_there_is_one_line(tmp_path):
    kept = Kept(Program("it", lambda: ("/no/such/program",), {}, tmp_path / "l"), print)
    with pytest.raises(StorageError, match="/no/such/program: cannot be started"):
        kept.look()


def test_a_log_does_not_grow_without_bound(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(supervision, "_LOG_BYTES", 2000)
    lines = []
    kept = Kept(_program(tmp_path, "for n in range(2000): print('line', n)", on_line=lines.append), lambda _: None)
    _until(lambda: len(lines) >= 2000, kept)
    kept.end()
    sizes = [file.stat().st_size for file in (tmp_path / "log").iterdir()]
    assert len(sizes) == 4 and max(sizes) <= 2000
    assert "line 1999" in (tmp_path / "log" / "it").read_text()
