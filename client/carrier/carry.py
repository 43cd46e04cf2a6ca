"""Keeps Flower's SuperNode running at a hospital, and says in plain words how it stands with the coordinator.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from client.carrier.clientapp import NOT_LISTED, PROGRAMS, VARIABLE
from client.carrier.folder import Carrier
from common.errors import DataError
from common.files import atomic_write
from common.locks import held
from common.reach import reach
from common.supervision import QUIET, Kept, Program

_LOOK_SECONDS = 0.5
_ONLINE = re.compile(r"SuperNode ID: (\d+)")
# A SuperNode (Flower 1.41) that is told in the middle of a message that its run has ended keeps that message, and from
# then on sends each answer only when the next question has come: with one question at a time, none.
_BEHIND = "is not in `RUNNING` status. Ignoring"
_REFUSED, _LOST, _FOUND = "[code: 2004]", "Connection attempt failed", "Connection successful"


def carry(carrier: Carrier, stop: threading.Event, tell: Callable[[str], None]) -> None:
    """Run the SuperNode until `stop` is set; whenever it ends it is started again.

    Args:
        tell: shown what happens, one line each.

    Raises:
        DataError: it runs already, or Flower is not installed here.
        StorageError: its folder cannot be written.
    """
    busy = DataError("this carrier runs already", where=str(carrier.path), remedy="Stop that one first.")
    with held(carrier.path / "state.lock", busy=busy):
        kept = Kept(_program(carrier, tell), tell)
        try:
            while not stop.is_set():
                kept.look()
                stop.wait(_LOOK_SECONDS)
        finally:
            kept.end()


def _program(carrier: Carrier, tell: Callable[[str], None]) -> Program:
    config, state = carrier.config, carrier.path / "state"
    supernode = Path(sys.executable).parent / "flower-supernode"
    if not supernode.exists():
        raise DataError(f"no command flower-supernode beside {sys.executable}", remedy="Install synthward there.")
    node = f'site="{_quotable(config.socket)}" name="{config.name}"'

    def command() -> tuple[str, ...]:
        return (
            str(supernode), "--superlink", config.coordinator, "--root-certificates", str(carrier.authority),
            "--auth-supernode-private-key", str(carrier.key), "--node-config", node,
            "--host", "127.0.0.1", "--port", str(_free_port()),
        )  # fmt: skip

    news = _News(config.coordinator, tell)

    def why(lines: list[str]) -> str:
        news.forget()
        return _why(lines, carrier)

    return Program(
        "the SuperNode", command, _environment(carrier), state / "carrier.log", on_line=news, why=why,
        restart_on=_BEHIND,
    )  # fmt: skip


def _environment(carrier: Carrier) -> dict[str, str]:
    """Flower finds the programs that it starts for a run by their names: ours is found before each of its own."""
    ours = carrier.path / "state" / "bin"
    line = " ".join(map(shlex.quote, (sys.executable, "-P", "-m", "client.carrier.clientapp")))
    for name in PROGRAMS:  # a run says which it wants: `flwr-agentapp` runs code of the bundle, too
        program = ours / name
        atomic_write(program, f'#!/bin/sh\nexec {line} "$@"\n'.encode())
        program.chmod(0o700)
    path = os.pathsep.join([str(ours), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    packages = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return {
        **os.environ, **QUIET, "NO_COLOR": "1", "PATH": path, "PYTHONPATH": packages, VARIABLE: str(carrier.path),
        "FLWR_HOME": str(carrier.path / "state" / "flower"),
    }  # fmt: skip


def _quotable(path: Path) -> str:
    text = str(path)
    if '"' in text or "\\" in text or not text.isprintable():
        raise DataError("a path with a quote or backslash", where=f"carrier.toml: socket = {text!r}",
                        remedy="Serve the site's socket in another folder.")  # fmt: skip
    return text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _News:
    """Tells when the way to the coordinator is lost and found; Flower says so again and again."""

    def __init__(self, coordinator: str, tell: Callable[[str], None]) -> None:
        self._coordinator, self._tell, self._told = coordinator, tell, ""

    def __call__(self, line: str) -> None:
        if _ONLINE.search(line):
            self._say(f"online: {self._coordinator} let this carrier in")
        elif _FOUND in line:
            self._say(f"online again: {self._coordinator}")
        elif NOT_LISTED in line:
            self._say(f"refused an app bundle of {self._coordinator} that carrier.toml does not list")
        elif _LOST in line:
            self._say(f"waiting for {self._coordinator}: it does not answer")

    def forget(self) -> None:
        """What was told before the SuperNode ended is no longer so: it is told again."""
        self._told = ""

    def _say(self, words: str) -> None:
        if words != self._told:
            self._told = words
            self._tell(words)


def _why(lines: list[str], carrier: Carrier) -> str:
    """Why it ended, as far as that can be told from here."""
    found = reach(carrier.config.coordinator, carrier.authority.read_text(errors="replace"))
    if found.problem:
        return f"{found.problem}. {found.remedy}"
    if any(_REFUSED in line for line in lines):
        return (f"{carrier.config.coordinator} does not let it in: its key, fingerprint {carrier.fingerprint},"
                " is not admitted, or its last connection is not a minute old yet")  # fmt: skip
    return f"{carrier.path / 'state' / 'carrier.log'} says why"  # its words may be the coordinator's
