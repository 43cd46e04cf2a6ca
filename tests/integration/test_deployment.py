"""A whole study over Flower's own processes, as hospitals run it: each party a user of its own, with a home of its own.

Two hospitals (`synthward-site serve`), their carriers (`flower-supernode`) and the coordinator (`flower-superlink`,
`flwr run`), on loopback and without TLS, which is Flower's. Where the tests do not run as root they are skipped.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.datasets import good_arrays, write_npz
from support.paths import REPOSITORY
from support.studies import tiny_toml
from support.users import CARRIER, COORDINATOR, SHARED, SITE, environment, interpreter, owners, start, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "UV_OFFLINE": "1",
         "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}  # fmt: skip
HOSPITALS = ("hospital-a", "hospital-b")
DEADLINE = 400.0


class _Parties:
    """Homes and processes of all parties, in one folder that every user may enter."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack, self._logs = folder, stack, 0
        folder.chmod(0o755)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for script in Path(sys.executable).parent.glob("fl*"):  # the same commands, by an interpreter open to all
            own = self.bin / script.name
            own.write_text(f"#!{interpreter()}\n" + script.read_text().partition("\n")[2])
            own.chmod(0o755)

    def home(self, name: str, uid: int) -> Path:
        home = self.folder / name
        home.mkdir(mode=0o700)
        os.chown(home, uid, uid)
        return home

    def env(self, home: Path) -> dict[str, str]:
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        return environment(home, PATH=path, FLWR_HOME=str(home / ".flwr"), **QUIET)

    def run(self, uid: int, home: Path, *command: object) -> str:
        process = start(uid, *command, env=self.env(home), cwd=home)
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, (command, out.decode(), error.decode())
        return out.decode()

    def keep_running(self, uid: int, home: Path, *command: object, groups: tuple[int, ...] = ()) -> Path:
        """Start it until the test ends; its log."""
        log = self.folder / f"log-{self._logs}"
        self._logs += 1
        with log.open("wb") as out:
            process = start(uid, *command, env=self.env(home), cwd=home, groups=groups, stdout=out,
                            stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        self._stack.callback(_end, process)
        return log


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (15, 9):
        try:
            os.killpg(process.pid, number)
            process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(what: str, logs: list[Path], *, until) -> None:
    deadline = time.monotonic() + DEADLINE
    while not until():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}\n" + "\n".join(f"{log}: {log.read_text(errors='replace')[-3000:]}" for log in logs))
        time.sleep(0.5)


@pytest.fixture
def parties():
    folder = Path(tempfile.mkdtemp(prefix="sw-", dir="/tmp"))
    with ExitStack() as stack:
        yield _Parties(folder, stack)
    shutil.rmtree(folder)


def _hospital(parties: _Parties, name: str, seed: int) -> tuple[Path, Path]:
    """(home, socket) of a hospital that has approved the study and serves its images."""
    uid = SITE + 100 * seed
    home, sockets = parties.home(name, uid), parties.folder / f"sockets-{name}"
    sockets.mkdir()
    os.chown(sockets, uid, SHARED + 100 * seed)
    sockets.chmod(0o2710)
    write_npz(home / "images.npz", good_arrays(size=16, patients=True, seed=seed))
    (home / "study.toml").write_text(tiny_toml(privacy={"unit": "patient"}))
    for path in home.iterdir():
        os.chown(path, uid, uid)
    site = home / "site.toml"
    parties.run(uid, home, "-m", "client.cli", "init", site, "--name", name, "--data", "images.npz")
    site.write_text(site.read_text().replace("min_units = 50", "min_units = 5"))
    parties.run(uid, home, "-m", "client.cli", "approve", site, "--study", "study.toml", "--by", "Dr. A. Example")
    log = parties.keep_running(uid, home, "-m", "client.cli", "serve", site, "--sockets", sockets)
    _wait("serve did not begin", [log], until=lambda: "ready" in log.read_text())
    return home, sockets / "site.sock"


def _bundle(home: Path) -> Path:
    """The tree that the coordinator ships, as its own."""
    tree = home / "app"
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ("common", "server", "client", "configs"):
        shutil.copytree(REPOSITORY / part, tree / part, ignore=ignore)
    for part in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / part, tree / part)
    for path in (tree, *tree.rglob("*")):
        os.chown(path, COORDINATOR, COORDINATOR)
    return tree


def test_three_users_run_a_study_over_flowers_own_processes(parties):
    hospitals = [_hospital(parties, name, seed) for seed, name in enumerate(HOSPITALS)]
    coordinator = parties.home("coordinator", COORDINATOR)
    port = _free_port()
    logs = [parties.keep_running(
        COORDINATOR, coordinator, parties.bin / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port,
        "--health-server-address", f"127.0.0.1:{_free_port()}", "--database", "state.db",
        "--disable-runtime-dependency-installation",
    )]  # fmt: skip
    _wait("the SuperLink did not begin", logs, until=lambda: _listens(port))
    for number, (name, (_, path)) in enumerate(zip(HOSPITALS, hospitals, strict=True)):
        carrier = parties.home(f"carrier-{name}", CARRIER + 100 * number)
        logs.append(parties.keep_running(
            CARRIER + 100 * number, carrier, parties.bin / "flower-supernode", "--insecure",
            "--superlink", f"127.0.0.1:{port}",
            "--host", "127.0.0.1", "--node-config", f'site="{path}" name="{name}"', "--port", _free_port(),
            groups=(SHARED + 100 * number,),
        ))  # fmt: skip
    (coordinator / "study.toml").write_text(tiny_toml(privacy={"unit": "patient"}))
    (coordinator / ".flwr").mkdir(exist_ok=True)
    (coordinator / ".flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    tree, runs = _bundle(coordinator), coordinator / "runs"
    for path in (coordinator / "study.toml", coordinator / ".flwr", coordinator / ".flwr" / "config.toml"):
        os.chown(path, COORDINATOR, COORDINATOR)
    config = f'study="{coordinator / "study.toml"}" out="{runs}"'
    parties.run(COORDINATOR, coordinator, parties.bin / "flwr", "run", tree, "here", "--run-config", config)
    _wait("no release", logs, until=lambda: list(runs.glob("*/release/SHA256SUMS")))
    (run,) = runs.iterdir()
    assert "as it was written" in parties.run(COORDINATOR, coordinator, "-m", "server.cli", "verify", run)
    assert owners(runs) == {COORDINATOR}
    users = {home: uid for home in parties.folder.iterdir() if home.is_dir() and (uid := home.stat().st_uid) > SITE - 1}
    for number, (name, (home, _)) in enumerate(zip(HOSPITALS, hospitals, strict=True)):
        assert owners(home) == {SITE + 100 * number}
        assert name in (run / "release" / "claim.json").read_text()
        output = parties.run(SITE + 100 * number, home, "-m", "client.cli", "verify-ledger", home / "site.toml")
        assert "unbroken" in output
    assert len(set(users.values())) == 5
    for theirs, other in itertools.product(users, set(users.values())):
        if users[theirs] != other and not theirs.name.startswith("sockets"):
            look = start(other, "-c", LOOK, theirs, env=parties.env(theirs), cwd="/")
            assert look.wait(60) == 13, (theirs, other)


LOOK = """
import os, sys
try:
    os.listdir(sys.argv[1])
except PermissionError:
    sys.exit(13)
"""


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
