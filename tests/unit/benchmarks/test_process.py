"""A command under a limit: ended with all it started, and heard to the end."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks.utility import process as room
from benchmarks.utility.process import last_line, run_limited
from common.errors import StorageError

CHILD = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
REPORT = "open(sys.argv[1], 'w').write(str(p.pid))"


def python(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pid: int) -> bool:
    until = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch):
    monkeypatch.setattr(room, "_GRACE_SECONDS", 0.6)
    monkeypatch.setattr(room, "_LEFTOVER_SECONDS", 0.6)
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.02)


def test_a_command_is_heard_to_its_end(tmp_path):
    ticks: list[float] = []
    script = "import sys; print('first'); print('last', file=sys.stderr); sys.exit(3)"
    ended = run_limited(python(script), log=tmp_path / "a" / "log", limit_seconds=30, tick=ticks.append)
    assert ended.code == 3 and ticks and 0 < ended.seconds <= ticks[-1] < 30
    assert (tmp_path / "a" / "log").read_text().split() == ["first", "last"] or last_line(tmp_path / "a" / "log")


def test_a_second_command_adds_to_the_log(tmp_path):
    for word in ("one", "two"):
        run_limited(python(f"print('{word}')"), log=tmp_path / "log", limit_seconds=30, tick=lambda _: None)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert last_line(tmp_path / "log") == "two"
    assert last_line(tmp_path / "none") == ""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("stubborn", [False, True])
def test_at_its_limit_a_command_ends_with_all_it_started(tmp_path, stubborn):
    deaf = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)];"
    script = f"{deaf if stubborn else ''}{CHILD}; {REPORT}; time.sleep(60)"
    ended = run_limited(
        python(script, str(tmp_path / "pid")), log=tmp_path / "log", limit_seconds=1.5, tick=lambda _: None
    )
    assert ended.code is None and ended.seconds >= 1.5
    assert wait_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_what_a_finished_command_left_behind_is_ended(tmp_path):
    script = f"{CHILD}; {REPORT}"
    assert run_limited(
        python(script, str(tmp_path / "pid")), log=tmp_path / "log", limit_seconds=30, tick=lambda _: None
    ).code == 0  # fmt: skip
    assert wait_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_an_interruption_ends_the_command_and_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_TICK_SECONDS", 0.0)
    pid = tmp_path / "pid"

    def interrupt(_: float) -> None:
        if pid.exists() and pid.read_text() and is_running(int(pid.read_text())):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_limited(
            python(f"{CHILD}; {REPORT}; time.sleep(60)", str(pid)), log=tmp_path / "log", limit_seconds=30,
            tick=interrupt,
        )  # fmt: skip
    assert wait_gone(int(pid.read_text()))


def test_a_command_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(StorageError, match="no-such-command"):
        run_limited(["no-such-command"], log=tmp_path / "log", limit_seconds=1, tick=lambda _: None)
