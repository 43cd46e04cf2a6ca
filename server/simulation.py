"""One study on one machine: processes of simulated sites and one of Flower's engine, watched and ended together.

SPDX-License-Identifier: Apache-2.0

The same two apps run as in a deployment. Whatever ends one of the processes ends the run within seconds, in one line
that says how to go on; nothing is lost by it, since every stage keeps what it has (`server/checkpoints.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil

from common import errors
from common.errors import DataError, FederationError, StorageError, SynthwardError
from common.files import read_json
from common.text import printable
from server.checkpoints import RunFolder
from server.engine import OUTCOME
from server.launch import at_once, environment, site_files
from server.site_logs import SiteLogs

LOG = "engine.log"
_LONGEST_BASE = 27  # characters of the folder for sockets: a socket's whole path may have 107, and Ray adds 80
_LOOK_SECONDS, _GRACE_SECONDS = 0.2, 3.0
_LONGEST_WORDS = 200
_MOST_STARTS = 3  # of processes that died, in one run
# Of Ray; without one the engine would ask in vain, all sites or those whose messages the lost worker had carried.
_DAEMONS = ("raylet", "gcs_server", "ray::ClientAppActor")
_END_SECONDS = 20.0  # for an engine that ends its daemons itself, as it does last of all


def simulate(folder: RunFolder) -> None:
    """Run the study of `folder` to its release.

    Raises:
        SynthwardError: as the pipeline raises them.
        FederationError: the engine ended, or a process of sites too often, with its own last words.
        Stopped: we were told to stop. By then every process that was started here is gone.
    """
    run = folder.path.resolve()
    sites = site_files(run)
    with _machine(run) as machine, ExitStack() as stack:
        serving, logs = _Serving(machine, sites, stack), SiteLogs(sites)
        with _engine(machine, run, len(sites)) as engine:
            _watch(engine, serving, logs, folder)
        _pass_on(machine, engine)


@dataclass(frozen=True)
class _Machine:
    """What the other processes are started with.

    Attributes:
        scratch: folder for sockets, of a short path without blanks.
        python: the interpreter, by such a path.
    """

    scratch: Path
    python: str
    environment: dict[str, str]

    @contextmanager
    def started(self, name: str, arguments: list[str], log: Path, *, stdout: TextIO | int) -> Iterator[_Process]:
        """A process that ends when the block ends, or this process does; signals of the terminal do not reach it."""
        with log.open("w") as errors:
            popen = subprocess.Popen(
                [self.python, "-m", *arguments], stdin=subprocess.PIPE, stdout=stdout, stderr=errors, text=True,
                start_new_session=True, env=self.environment, cwd=self.scratch,
            )  # fmt: skip
            process = _Process(name, popen, log)
            try:
                yield process
            finally:
                process.end()


@dataclass(frozen=True)
class _Process:
    """A process that was started here.

    Attributes:
        name: what it is called in messages.
        log: what it writes to standard error.
        family: what it has started, as far as it was seen: some of it outlives a parent that dies.
        daemons: those of `family` that it cannot do without, and their names.
        named: what bore such a name at the last look: between fork and exec a child has its parent's.
        read: bytes of its log that `news` has told, the one entry of a list.
    """

    name: str
    popen: subprocess.Popen[str]
    log: Path
    family: set[psutil.Process] = field(default_factory=set)
    daemons: dict[psutil.Process, str] = field(default_factory=dict)
    named: dict[psutil.Process, str] = field(default_factory=dict)
    read: list[int] = field(default_factory=lambda: [0])

    def look(self) -> None:
        """Remember what it has started by now."""
        if self.popen.poll() is None:  # else its number may be another process's by now
            with suppress(psutil.Error):
                self.family.update(psutil.Process(self.popen.pid).children(recursive=True))
        named = dict[psutil.Process, str]()
        for process in self.family:
            with suppress(psutil.Error):
                name = process.name()
                if not _lives(process):
                    continue
                if name.startswith(_DAEMONS):
                    named[process] = name
                else:
                    self.daemons.pop(process, None)
        self.daemons.update((process, name) for process, name in named.items() if process in self.named)
        self.named.clear()
        self.named.update(named)

    def lost(self) -> str | None:
        """Name of a daemon that it has started and that is gone, while it lives itself."""
        for daemon, name in self.daemons.items():
            if not _lives(daemon):
                return name
        return None

    def news(self) -> list[str]:
        """Whole lines of its log since the last time."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(self.read[0])
            text, end, _ = file.read().rpartition(b"\n")
            self.read[0] += len(text + end)
            return [printable(line) for line in text.decode(errors="replace").split("\n")]
        return []

    def last_words(self) -> str:
        """The last line of its log, and how it ended."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        code = self.popen.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        said = printable((lines or [""])[-1])[:_LONGEST_WORDS]
        return f"{how}: {said}" if said else how

    def end(self) -> None:
        """End it at once: it can be killed at any moment without losing anything."""
        self.look()
        self.popen.kill()  # first, or it would tell at length what becomes of them
        _kill(list(self.family))
        with suppress(OSError):
            self.popen.communicate()


def _watch(engine: _Process, serving: _Serving, logs: SiteLogs, folder: RunFolder) -> None:
    """Wait for the engine's end, while its daemons and the sites' processes live; show what only the sites' logs say.

    Args:
        folder: of the run: once its release is out, the engine may take its time.

    Raises:
        FederationError: a daemon of the engine is gone, and the engine does not end by itself.
        SynthwardError: of the sites' processes.
    """
    lost_since: float | None = None
    while True:
        ended = engine.popen.poll() is not None
        for warning in (*(f"warning: {site}'s own log: {said}" for site, said in logs.news()), *serving.warnings()):
            print(warning, file=sys.stderr, flush=True)
        if ended:
            return
        engine.look()
        lost = engine.lost()
        lost_since = None if lost is None else lost_since or time.monotonic()
        if lost_since is not None and time.monotonic() - lost_since > _END_SECONDS and not folder.finished:
            raise FederationError(f"the simulation engine's own process '{lost}' ended", where=str(engine.log))
        try:
            serving.look()
        except SynthwardError:
            if engine.popen.poll() is not None:  # it needed them no more
                return
            raise
        time.sleep(_LOOK_SECONDS)


def _pass_on(machine: _Machine, engine: _Process) -> None:
    """Raise the error that the engine's process ended with, if there was one."""
    outcome = machine.scratch / OUTCOME
    if not outcome.exists():
        raise FederationError(f"the simulation engine ended ({engine.last_words()})", where=str(engine.log))
    told = read_json(outcome)
    if told:
        kind: type[SynthwardError] = getattr(errors, told.pop("kind"))
        raise kind(told.pop("what"), **told)


@contextmanager
def _engine(machine: _Machine, run: Path, sites: int) -> Iterator[_Process]:
    """`server/engine.py`, which shows its progress where this process has its messages."""
    words = ["server.engine", str(run), str(sites), str(at_once(sites)), str(machine.scratch)]
    with machine.started("the simulation engine", words, run / LOG, stdout=sys.stderr) as process:
        yield process


class _Serving:
    """`synthward-site serve` for all simulated sites, dealt to processes; one that dies is started again.

    As at a hospital: the server asks a site that cannot be reached again, and what it had answered is stored.
    """

    def __init__(self, machine: _Machine, sites: list[Path], stack: ExitStack) -> None:
        many = at_once(len(sites))
        self._machine, self._stack, self._again, self._warned = machine, stack, _MOST_STARTS, set[str]()
        self._mine = [sites[number::many] for number in range(many)]
        self._processes = [self._started(number) for number in range(many)]
        for process in self._processes:
            _wait_until_ready(process)

    def look(self) -> None:
        """Start a process that has ended again.

        Raises:
            FederationError: too often.
        """
        for number, process in enumerate(self._processes):
            if process.popen.poll() is None:
                continue
            what = f"{process.name} ended ({process.last_words()})"
            if self._again == 0:
                raise FederationError(what)
            self._again -= 1
            for warning in (*self.warnings(), f"warning: {what}; it is started again"):
                print(warning, file=sys.stderr, flush=True)
            self._processes[number] = self._started(number)
            _wait_until_ready(self._processes[number])

    def warnings(self) -> Iterator[str]:
        """What the processes warn of, each once: a site whose own log cannot be written has no other place."""
        for line in [line for process in self._processes for line in process.news()]:
            if line.startswith("warning: ") and line not in self._warned:
                self._warned.add(line)
                yield line

    def _started(self, number: int) -> _Process:
        mine, scratch = self._mine[number], self._machine.scratch
        words = ["client.cli", "serve", "--while-stdin", "--sockets", str(scratch), *map(str, mine)]
        name = f"the process of {' and '.join(path.stem for path in mine)}"
        started = self._machine.started(name, words, scratch / f"log-{number}", stdout=subprocess.PIPE)
        return self._stack.enter_context(started)


def _wait_until_ready(process: _Process) -> None:
    assert process.popen.stdout is not None
    if not process.popen.stdout.readline().startswith("ready"):
        process.popen.wait()
        words = process.last_words()
        raise DataError(words.partition("error: ")[2] or f"{process.name} did not start ({words})")


@contextmanager
def _machine(run: Path) -> Iterator[_Machine]:
    """The sockets' folder and all that goes with it; at the end no process that was started with it is left."""
    scratch = _scratch(run)
    try:
        variables = {"SYNTHWARD_RUN": str(run), "SYNTHWARD_SOCKETS": str(scratch), "TMPDIR": str(scratch)}
        if os.path.expanduser("~") in ("~", ""):  # Flower asks for a home, and this user has none
            variables["HOME"] = str(scratch)
        yield _Machine(scratch, _python(scratch), environment() | variables)
    finally:
        _sweep(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(scratch: Path) -> None:
    """End what is left of the engine: its daemons outlive a parent that dies."""
    left = list[psutil.Process]()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("SYNTHWARD_SOCKETS") == str(scratch):
                left.append(process)
    _kill(left)


def _lives(process: psutil.Process) -> bool:
    """Whether it is there and no zombie, whose name may be cut off."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=_GRACE_SECONDS)


def _scratch(run: Path) -> Path:
    """A new folder of a short path without blanks, on a disk of this machine.

    Raises:
        StorageError: there is no place for one.
    """
    for base in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", str(run)):
        if len(base) <= _LONGEST_BASE and not any(c.isspace() for c in base):
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="sw-", dir=base))
    raise StorageError(
        "no folder for sockets: neither it nor /tmp, /var/tmp and /dev/shm can be used", where="TMPDIR",
        remedy=f"Set TMPDIR to a folder whose path has no blanks and at most {_LONGEST_BASE} characters.",
    )  # fmt: skip


def _python(scratch: Path) -> str:
    """This interpreter, by a path without blanks: Ray cannot start its workers by one that has any."""
    if not any(c.isspace() for c in sys.executable):
        return sys.executable
    environment = scratch / "environment"
    environment.symlink_to(sys.prefix)
    return str(environment / Path(sys.executable).relative_to(sys.prefix))
