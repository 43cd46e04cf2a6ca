"""A study over the deployment's hospitals: submitted to Flower, followed, and taken up again when Flower loses it.

SPDX-License-Identifier: Apache-2.0

When a SuperLink is killed, Flower ends its runs for good. Nothing of a study is lost by that: its run folder has every
round, and the hospitals have what they answered. So the same folder is submitted again, as a new run of Flower's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from common import errors
from common.errors import CheckpointError, FederationError, StudyError, SynthwardError
from common.files import atomic_write
from common.study import Study
from common.supervision import since_boot
from common.text import printable
from server.checkpoints import RunFolder
from server.deployment.flower import ask, ask_or_hear, last_words
from server.deployment.folder import Deployment

_LOOK_SECONDS, _ASK_SECONDS = 1.0, 10.0
_START_SECONDS = 180.0  # from submission to the server app's first word
_MOST_LOSSES = 5  # one after another, without a step between them


def begin(deployment: Deployment, study: Study) -> RunFolder:
    """A new run folder for a study in which everything that it names was tried.

    Raises:
        StudyError: too few hospitals are admitted.
        SynthwardError: whatever stands in the study's way.
    """
    from common.accounting import plan_study

    admitted = _admitted(deployment)
    if admitted < study.federation.min_sites:
        raise StudyError(
            f"{study.federation.min_sites} sites needed, {admitted} admitted", where="federation.min_sites",
            remedy=f"Admit them: synthward deploy admit {deployment.quoted} NAME.pub --fingerprint ...",
        )  # fmt: skip
    return RunFolder.create(deployment.path / "runs", study, plan_study(study))


def carry_on(deployment: Deployment, folder: RunFolder, tell: Callable[[str], None]) -> None:
    """Bring a run to its end, from wherever it is; Flower's runs are started as often as that takes.

    Args:
        tell: shown each step, one line each.

    Raises:
        SynthwardError: what the server app ended with, or that Flower cannot run it.
    """
    if folder.finished:
        return
    watch = _Watch(folder)
    watch.skip()
    losses, steps = 0, watch.steps
    while not folder.finished:
        if watch.process() is None:
            if losses:
                tell("Flower lost the run: its process is gone; starting it again from its checkpoint")
            _start(deployment, folder, watch, tell)
        watch.follow(tell)
        losses = 0 if watch.steps > steps else losses + 1
        losses, steps = max(losses, 1), watch.steps
        if losses > _MOST_LOSSES:
            raise FederationError(
                f"Flower lost the run {losses} times without a step between", where=str(folder.path),
                remedy=f"Look at {deployment.path / 'state' / 'superlink.log'}.",
            )  # fmt: skip


def stop(deployment: Deployment, folder: RunFolder) -> None:
    """End a run's server app. What was finished is kept, and what was asked for is paid for.

    Raises:
        CheckpointError: it does not run.
        FederationError: Flower does not answer.
    """
    file = folder.path / "flower.toml"
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    number = re.match(r"# run (\d+)\n", text)
    if not alive(folder) or number is None:
        raise CheckpointError(
            "does not run", where=str(folder.path), remedy="`synthward deploy status` shows what does."
        )
    folder.event("stopped")  # first: who follows it would start it again
    ask(deployment, "stop", number.group(1), "here")


def alive(folder: RunFolder) -> bool:
    """Whether its server app lives, on this machine."""
    watch = _Watch(folder)
    watch.skip()
    return watch.process() is not None


def runs(deployment: Deployment) -> list[RunFolder]:
    """All runs, the newest last."""
    plans = (deployment.path / "runs").glob("*/plan.json")
    return [RunFolder(plan.parent) for plan in sorted(plans, key=lambda plan: plan.stat().st_mtime)]


def _admitted(deployment: Deployment) -> int:
    return len(list((deployment.path / "sites").glob("*.pub")))


def _start(deployment: Deployment, folder: RunFolder, watch: _Watch, tell: Callable[[str], None]) -> None:
    """Submit a run folder, and wait for its server app's first word.

    Raises:
        FederationError: there is none, and why.
    """
    file, settings = (
        folder.path / "flower.toml",
        tomli_w.dumps(
            {"run-dir": str(folder.path), "sites": _admitted(deployment), "admitted": str(deployment.path / "sites")}
        ),
    )
    atomic_write(file, settings.encode())
    number = _submitted(deployment, file, tell)
    atomic_write(file, f"# run {number}\n{settings}".encode())
    deadline, asked = time.monotonic() + _START_SECONDS, time.monotonic()
    while watch.process() is None and not watch.failure:
        time.sleep(_LOOK_SECONDS)
        watch.read(tell)
        if time.monotonic() > asked + _ASK_SECONDS:
            asked = time.monotonic()
            over = _over(deployment, number)
            if (over or asked > deadline) and watch.process() is None and not folder.finished:
                raise FederationError(
                    f"the server app did not begin ({over or f'no word within {_START_SECONDS:.0f} s'})",
                    where=str(folder.path), remedy=f"Look at {deployment.path / 'state' / 'superlink.log'}.",
                )  # fmt: skip
        if folder.finished:
            return


def _submitted(deployment: Deployment, file: Path, tell: Callable[[str], None]) -> str:
    """Flower's number for the run; waits for services that are starting."""
    deadline, told = time.monotonic() + _START_SECONDS, False
    while True:
        answer = ask_or_hear(deployment, "run", str(deployment.app), "here", "--run-config", str(file))
        if answer.get("success") is True:
            return str(answer["run-id"])
        what = last_words(answer)
        if time.monotonic() > deadline:
            raise FederationError(
                f"Flower does not take the run ({what})", where="flwr run",
                remedy=f"Are the services up? synthward deploy up {deployment.quoted}",
            )  # fmt: skip
        if not told:
            told = True
            tell(f"waiting for the SuperLink, {_START_SECONDS:.0f} s at most: {what}")
        time.sleep(_LOOK_SECONDS)


def _over(deployment: Deployment, number: str) -> str:
    """How Flower says that a run ended; empty while it does not say so."""
    for row in ask_or_hear(deployment, "list", "here", "--run-id", number).get("runs", []):
        status = str(row.get("status", ""))
        if status.startswith("finished"):
            return f"{status} {row.get('details', '')}".strip()
    return ""


@dataclass
class _Watch:
    """What a run's events say of its server app.

    Attributes:
        steps: lines of progress so far, over all its processes.
        failure: the error that the newest process ended with, or that it was stopped.
    """

    folder: RunFolder
    steps: int = 0
    failure: SynthwardError | None = None
    _read: int = 0
    _process: psutil.Process | None = field(default=None)

    def skip(self) -> None:
        """Take in what was written before; an error of then is no error of now."""
        self.read(lambda _line: None)
        self.failure = None

    def process(self) -> psutil.Process | None:
        """The server app's, as far as the events were read, where it lives."""
        found = self._process
        try:
            alive = found is not None and found.is_running() and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # it ends just now
            alive = False
        return found if alive else None

    def follow(self, tell: Callable[[str], None]) -> None:
        """Show its steps until its process is gone.

        Raises:
            SynthwardError: what it ended with.
        """
        while self.process() is not None and not self.folder.finished:
            self.read(tell)
            time.sleep(_LOOK_SECONDS)
        self.read(tell)
        self._process = None
        if self.failure is not None:
            raise self.failure

    def read(self, tell: Callable[[str], None]) -> None:
        """Take in the events since the last time."""
        events = self.folder.events()
        for event in events[self._read :]:
            self._take(event)
            line = line_of(event)
            if line:
                tell(line)
        self._read = len(events)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "begin":
            self.failure, self._process = None, _process(event)
        elif kind == "step":
            self.steps += 1
        elif kind == "failed":
            self.failure = _error(event)
        elif kind == "stopped":
            self.failure = FederationError("was stopped by `synthward deploy stop`", where=str(self.folder.path))


def _process(event: dict[str, Any]) -> psutil.Process | None:
    """The process that wrote an event, unless it is gone: its number may be another one's by now."""
    try:
        process = psutil.Process(int(event["pid"]))
        return process if abs(since_boot(process.pid) - float(event["since_boot"])) < 1.0 else None
    except (KeyError, TypeError, ValueError, psutil.Error):
        return None


def _error(event: dict[str, Any]) -> SynthwardError:
    kind = getattr(errors, str(event.get("error")), FederationError)
    kind = kind if isinstance(kind, type) and issubclass(kind, SynthwardError) else FederationError
    what, where, remedy = (printable(str(event.get(key, ""))) for key in ("what", "where", "remedy"))
    return kind(what or "it failed", where=where, remedy=remedy)


def line_of(event: dict[str, Any]) -> str:
    """An event as the coordinator sees it; empty where it is nothing to see."""
    at, kind = str(event.get("at", ""))[11:19], event.get("event")
    if kind == "step":
        return f"{at}  {event.get('stage', ''):<9} {event.get('done')}/{event.get('total')}  {event.get('text', '')}"
    if kind in ("stage", "wait"):
        return f"{at}  {event.get('stage', ''):<9} {event.get('text', '')}"
    if kind == "warning":
        return f"{at}  {'warning':<9} {event.get('text', '')}"
    return ""
