"""A run that is stopped, or one of whose processes dies, ends within seconds, says how to go on, and leaves nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from server.release.checksums import verify_checksums
from support.paths import REPOSITORY
from support.sites import write_images
from support.studies import tiny_toml

BEGUN = "train     1/"


def _as_from_a_terminal():
    """A shell's background job ignores SIGINT, and one under nohup SIGHUP; what they start would, too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class _Started:
    """`synthward run` of a tiny study with many rounds, under way in its first ones."""

    def __init__(
        self, folder: Path, *, python=sys.executable, until=BEGUN, rounds=60, data=None, log=None, **environment
    ):
        (folder / "tiny.toml").write_text(tiny_toml())
        self.folder, self.log = folder, log or folder / "log"
        command = [python, "-P", "-m", "server.cli", "run", "tiny.toml", "--out", "my runs"]
        command += ["--set", f"training.rounds={rounds}", *(("--data", data) if data else ())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_as_from_a_terminal,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip
        deadline = time.monotonic() + 240
        while until not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.1)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def run(self) -> Path:
        (run,) = (self.folder / "my runs").iterdir()
        return run

    @property
    def claim(self) -> dict:
        return json.loads((self.run / "release" / "claim.json").read_text())

    def go_on(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "server.cli", "run", "--resume", str(self.run)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=600,
                              env=environment)  # fmt: skip

    def one(self, words: str) -> psutil.Process:
        return next(process for process in self.family if words in " ".join([process.name(), *process.cmdline()]))

    def ended(self, *, within: float) -> str:
        """The last line, once all is over."""
        self.process.wait(within)
        assert psutil.wait_procs(self.family, timeout=within)[1] == []
        assert "Traceback" not in self.text
        return self.text.splitlines()[-1]

    def end(self) -> None:
        for process in self.family:
            if process.is_running():
                process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def started(tmp_path):
    runs = []

    def start(folder=tmp_path, **changes):
        runs.append(_Started(folder, **changes))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def test_ctrl_c_ends_a_run_and_the_printed_command_goes_on_with_it(started):
    run = started()
    os.killpg(run.process.pid, signal.SIGINT)
    line = run.ended(within=10)
    assert run.process.returncode == 130
    words = shlex.split(line.partition("Go on with: ")[2])
    assert words[:3] == ["synthward", "run", "--resume"] and (run.folder / words[3]).samefile(run.run)
    assert not (run.run / "release").exists()
    again = [sys.executable, "-P", "-m", "server.cli", *words[1:], "--set", "x=1"]  # the words are read, nothing runs
    said = subprocess.run(again, cwd=run.folder, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert "a resumed run keeps its study" in said.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_it_as_well(started, number, code):
    run = started()
    os.kill(run.process.pid, number)
    assert "Go on with: synthward run --resume" in run.ended(within=10)
    assert run.process.returncode == code


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_it(tmp_path):
    """A real one: the kernel sends SIGHUP, and from then on nothing can be written to it."""
    (tmp_path / "tiny.toml").write_text(tiny_toml())
    command = [sys.executable, "-P", "-m", "server.cli", "run", "tiny.toml", "--out", "runs"]
    command += ["--set", "training.rounds=60"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: (_as_from_a_terminal(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    text, deadline = "", time.monotonic() + 240
    while BEGUN not in text and time.monotonic() < deadline:
        if select.select([ours], [], [], 1.0)[0]:
            text += os.read(ours, 4096).decode(errors="replace")
    assert BEGUN in text, text
    family = psutil.Process(process.pid).children(recursive=True)
    os.close(ours)
    try:
        assert process.wait(10) == 129
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        for member in (process, *family):
            with contextlib.suppress(psutil.Error, OSError):
                member.kill()
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "plan.json").exists() and not (run / "release").exists()


@pytest.mark.slow
def test_it_ends_while_sites_still_approve(started):
    run = started(until="trying what the study names")
    time.sleep(3.0)
    run.family = psutil.Process(run.process.pid).children(recursive=True)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.ended(within=10) == "interrupted: nothing was begun"
    assert run.process.returncode == 143
    assert not (run.folder / "my runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("server.engine", "engine ended (signal 9"),
        ("raylet", "process 'raylet' ended"),
        ("gcs_server", ""),
        ("ray::ClientAppActor", "process 'ray::ClientAppActor"),
    ],
)
def test_an_engine_that_dies_ends_the_run_which_goes_on_later(started, victim, said):
    run = started()
    run.one(victim).kill()
    line = run.ended(within=15 if victim == "server.engine" else 45)
    assert run.process.returncode == 1
    assert line.startswith("error: ") and said in line and "synthward run --resume" in line
    done = run.go_on()
    assert done.returncode == 0, done.stderr
    assert verify_checksums(run.run / "release") == []


@pytest.mark.slow
def test_a_sites_process_that_dies_is_started_again_and_waited_for(started):
    run = started(rounds=8)
    run.one("client.cli").kill()
    assert run.process.wait(400) == 0, run.text
    assert "ended (signal 9" in run.text and "it is started again" in run.text
    assert verify_checksums(run.run / "release") == []


@pytest.mark.slow
def test_nothing_is_left_of_a_run_whose_own_process_is_killed(started):
    run = started()
    run.process.kill()
    run.process.wait()
    assert psutil.wait_procs(run.family, timeout=15)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["blank", "long", "shadowed", "bare"])
def test_it_begins_wherever_it_is_installed_and_whatever_lies_beside_it(started, tmp_path, place):
    """A blank in the environment's path, a long TMPDIR, files named as modules, no HOME and an ASCII terminal."""
    folder, python, changes = tmp_path / "My Projects", sys.executable, {}
    folder.mkdir()
    if place == "blank":
        (folder / ".venv").symlink_to(sys.prefix)
        python = str(folder / ".venv" / "bin" / Path(sys.executable).name)
    if place == "long":
        long = tmp_path / ("t" * 100)
        long.mkdir()
        changes = {"TMPDIR": str(long)}
    if place == "shadowed":
        for name in ("client", "common", "numpy", "random", "server", "json"):
            (folder / f"{name}.py").write_text("raise SystemExit('a file of the working folder was imported')\n")
    if place == "bare":
        changes = {"HOME": "", "LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}
    run = started(folder, python=python, **changes)
    os.kill(run.process.pid, signal.SIGTERM)
    run.ended(within=10)
    shutil.rmtree(run.run)


@pytest.mark.slow
def test_a_run_whose_images_were_exchanged_says_so_and_goes_on_when_they_are_back(started, tmp_path):
    """The sites answer nothing of other images than those that they approved; their owner reads why."""
    write_images(tmp_path / "own.npz", train=120, holdout=60, size=16, seed=1)
    run = started(data="own.npz")
    os.kill(run.process.pid, signal.SIGTERM)
    run.ended(within=10)
    own = (tmp_path / "own.npz").read_bytes()
    write_images(tmp_path / "own.npz", train=120, holdout=60, size=16, seed=2)
    stopped = run.go_on()
    assert stopped.returncode == 1
    assert "site-1's own log" in stopped.stderr and "the images are not those that were there" in stopped.stderr
    assert "Approve the study again, or put the images back" in stopped.stderr
    assert "synthward run --resume" in stopped.stderr.splitlines()[-1]
    (tmp_path / "own.npz").write_bytes(own)
    done = run.go_on()
    assert done.returncode == 0, done.stderr
    assert verify_checksums(run.run / "release") == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 60 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_during_a_run_is_named_and_the_run_goes_on_when_there_is_room(started, small_disk, tmp_path):
    run = started(small_disk, log=tmp_path / "log")
    filler = small_disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], stderr=subprocess.DEVNULL, check=False)
    line = run.ended(within=200)
    assert run.process.returncode == 1
    assert line.startswith("error: ") and "synthward run --resume" in line
    assert re.search("No space left on device|disk is full", run.text)
    filler.unlink()
    done = run.go_on()
    assert done.returncode == 0, done.stderr
    assert verify_checksums(run.run / "release") == []
    assert sum(claim["basis"] == "ledger" for claim in run.claim["sites"]) == 3
