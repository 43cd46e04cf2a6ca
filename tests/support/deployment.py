"""A coordinator and hospitals on loopback, by their own commands and as separate processes, as real ones run them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from common.study_file import load_study
from server.checkpoints import RunFolder
from server.launch import write_site_files
from support.paths import REPOSITORY

SECONDS = 400.0


def why_not() -> str:
    """What this machine lacks for a deployment; empty when nothing."""
    found = shutil.which("nginx") or Path("/usr/sbin/nginx").exists()
    if " " in sys.prefix:
        return "Flower's SuperLink does not run from a path with a blank"
    return "" if found else "nginx is not installed (apt install nginx-light)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(program: str, *arguments: object, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run `synthward` or `synthward-site` to its end."""
    module = {"synthward": "server.cli", "synthward-site": "client.cli"}[program]
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False,
        timeout=seconds, env=environment(), cwd="/",
    )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "passive"}


def worked(result: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a command that has to have worked."""
    assert result.returncode == 0, (result.args, result.stdout, result.stderr)
    return result.stdout


@dataclass
class Running:
    """A command that goes on, and what it has written so far."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str, *, seconds: float = SECONDS) -> str:
        """All it has said, once that is in it."""
        wait(lambda: words in self.said(), f"{words!r} was not said", lambda: self.said()[-3000:], seconds=seconds)
        return self.said()

    def end(self, number: int = signal.SIGTERM, *, seconds: float = 60.0) -> int:
        """Signal it, and its exit code."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(seconds)


def wait(until: Callable[[], object], what: str, more: Callable[[], str] = str, *, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"{what} within {seconds:.0f} s\n{more()}"
        time.sleep(0.3)


@dataclass
class Party:
    """One hospital: its site file, its carrier's folder, and the two processes."""

    site: Path
    carrier: Path
    serve: Running | None = None
    carry: Running | None = None


@dataclass
class Loopback:
    """A whole deployment in one folder.

    Attributes:
        ended: all that was started; `close` ends it.
    """

    folder: Path
    study: Path
    hospitals: list[Party] = field(default_factory=list)
    started: list[Running] = field(default_factory=list)
    up: Running | None = None

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator"

    def start(self, module: str, *arguments: object, name: str, **also: str) -> Running:
        """Start a command; `also` are variables of its environment."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)], stdout=out, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env={**environment(), **also}, cwd="/", start_new_session=True,
            )  # fmt: skip
        self.started.append(Running(process, log))
        return self.started[-1]

    def begin(self) -> str:
        """Make the coordinator's folder; the invitation's fingerprint."""
        out = worked(command("synthward", "deploy", "init", self.coordinator, "--host", "localhost", "--listen",
                             "127.0.0.1", "--port", free_port(), "--superlink-port", free_port()))  # fmt: skip
        return fingerprint(out)

    def services(self, **also: str) -> Running:
        self.up = self.start("server.cli", "deploy", "up", self.coordinator, name="up", **also)
        self.up.wait_for("ready:")
        return self.up

    @property
    def port(self) -> int:
        """That hospitals reach."""
        invitation = json.loads((self.coordinator / "invitation.json").read_text())
        return int(invitation["coordinator"].rpartition(":")[2])

    def hospital(self, site: Path, said: str, *, through: int = 0) -> Party:
        """A hospital that has approved the study, serves its records, and whose carrier is admitted and runs.

        Args:
            through: another port of this machine by which its carrier goes.
        """
        worked(command("synthward-site", "init", site))
        worked(command("synthward-site", "approve", site, "--study", self.study, "--by", "Dr. A. Example"))
        party = self.join(site, said)
        if through:
            file = party.carrier / "carrier.toml"
            file.write_text(file.read_text().replace(f"localhost:{self.port}", f"localhost:{through}"))
        self.serve(party)
        self.carry(party)
        self.hospitals.append(party)
        return party

    def all_online(self, said: str, through: Mapping[str, int] | None = None) -> None:
        """Every hospital of the study: it serves, and its carrier is let in.

        Args:
            through: by name, as in `hospital`.
        """
        for site in self.site_files():
            self.hospital(site, said, through=(through or {}).get(site.stem, 0))
        for party in self.hospitals:
            assert party.carry is not None
            party.carry.wait_for("online:")

    def join(self, site: Path, said: str) -> Party:
        """A hospital whose carrier is admitted; nothing of it runs."""
        name, party = site.stem, Party(site, self.folder / f"{site.stem}-carrier")
        out = worked(command(
            "synthward-site", "join", party.carrier, "--invitation", self.coordinator / "invitation.json",
            "--fingerprint", said, "--name", name, "--socket", self.folder / "sockets" / f"{name}.sock",
        ))  # fmt: skip
        worked(command("synthward", "deploy", "admit", self.coordinator, party.carrier / f"{name}.pub", "--fingerprint",
                       fingerprint(out)))  # fmt: skip
        return party

    def serve(self, party: Party) -> None:
        sockets = self.folder / "sockets"
        name = f"{party.site.stem}-serve"
        party.serve = self.start("client.cli", "serve", party.site, "--sockets", sockets, name=name)
        party.serve.wait_for("ready:")

    def carry(self, party: Party, **also: str) -> None:
        party.carry = self.start("client.cli", "carry", party.carrier, name=f"{party.site.stem}-carry", **also)

    def site_files(self) -> list[Path]:
        """One for each site that the study simulates, with phantoms."""
        return write_site_files(self.folder / "sites", load_study(self.study), None)

    def run(self, *arguments: object) -> Running:
        return self.start("server.cli", "deploy", "run", self.coordinator, *arguments, name="run")

    def run_folder(self) -> Path:
        (run,) = (self.coordinator / "runs").iterdir()
        return run

    def folder_of_run(self) -> RunFolder | None:
        """The run's, once there is one."""
        found = list((self.coordinator / "runs").glob("*/plan.json"))
        return RunFolder(found[0].parent) if found else None

    def require_whole(self, folder: RunFolder, rounds: int) -> None:
        """See that the release verifies, and that no round is there twice or missing."""
        assert "as it was written" in worked(command("synthward", "verify", folder.path))
        last = folder.last_checkpoint()
        assert last is not None and [row.round for row in last.rows] == list(range(1, rounds + 1))

    def require_ledgers_equal_claim(self, folder: RunFolder) -> None:
        """See that every hospital's ledger is unbroken and holds exactly what the claim says of it."""
        claim = claimed(folder)
        for party in self.hospitals:
            assert "unbroken" in worked(command("synthward-site", "verify-ledger", party.site))
            told = claim[party.site.stem]
            assert told["basis"] == "ledger"
            assert spent(party) == {"train": told["epsilon_train"], "holdout": told["epsilon_holdout"]}

    def status(self) -> dict:
        return json.loads(worked(command("synthward", "deploy", "status", self.coordinator, "--json")))

    def superlink(self) -> int:
        """Its process."""
        own = [child for child in _children(self.up) if "flower-superlink" in " ".join(_line(child))]
        assert len(own) == 1, own
        return own[0]

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for running in reversed(self.started):
                with suppress(ProcessLookupError):
                    running.process.send_signal(number)
            for running in self.started:
                with suppress(subprocess.TimeoutExpired):
                    running.process.wait(40)


def claimed(folder: RunFolder) -> dict[str, dict]:
    """By site, what a run's claim says of it."""
    return {site["site"]: site for site in json.loads((folder.release / "claim.json").read_text())["sites"]}


def spent(party: Party, study: str = "") -> dict[str, float]:
    """By partition, what a hospital's ledger holds for a study, by SHA-256, or for the one that has cost something."""
    (account,) = json.loads(worked(command("synthward-site", "budget", party.site, "--json")))
    found = [
        row["epsilon"] for row in account["studies"]
        if (row["sha256"] == study if study else any(row["epsilon"].values()))
    ]  # fmt: skip
    assert len(found) <= 1, account
    return found[0] if found else {}


def rounds_of(folder: RunFolder | None) -> int:
    """Finished so far."""
    events = [] if folder is None else folder.events()
    return max((e["done"] for e in events if e["event"] == "step" and e["stage"] == "train"), default=0)


def server_app(folder: RunFolder) -> psutil.Process:
    """The process that works on a run.

    Raises:
        psutil.NoSuchProcess: there is none.
    """
    began = next((e for e in reversed(folder.events()) if e["event"] == "begin"), None)
    if began is None:
        raise psutil.NoSuchProcess(0)
    return psutil.Process(began["pid"])


def fingerprint(output: str) -> str:
    """The one that a command has printed."""
    found = re.search(r"fingerprint +((?:[0-9a-f]{4} ?){8})", output)
    assert found, output
    return found.group(1).strip()


def _children(running: Running | None) -> list[int]:
    assert running is not None
    return [child.pid for child in psutil.Process(running.process.pid).children()]


def _line(pid: int) -> list[str]:
    return psutil.Process(pid).cmdline()
