"""One study on one machine: simulated sites under Flower's own engine, with the same two apps as a deployment.

SPDX-License-Identifier: Apache-2.0

The apps are loaded by their names, as Flower does: no file of `server` imports `client` (docs/adr/0001).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict

from common.errors import DataError, FederationError, SynthwardError
from common.files import atomic_write
from common.study import Study
from server.checkpoints import RunFolder

SERVER_APP, CLIENT_APP = "server.app:app", "client.app:app"  # as in pyproject.toml; a test holds them together
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "UV_OFFLINE": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_WAIT_POLICY": "passive", "RAY_memory_monitor_refresh_ms": "0",
}  # fmt: skip


class SiteCheck(BaseModel):
    """What a simulated site's own command says of its data; shown to its owner, who runs the simulation.

    Attributes:
        units: privacy units (images or patients) in the train partition.
        train, holdout: images by class.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    units: int
    train: list[int]
    holdout: list[int]
    warnings: list[str]


def write_site_files(folder: Path, study: Study, data: Path | None) -> list[Path]:
    """Write one site file for each simulated site: shards of `data`, or phantoms when there is none.

    As far as its ledger knows each has a machine of its own, so an image that two hospitals have is counted at both.
    """
    simulation, privacy, files = study.simulation, study.privacy, []
    for index in range(simulation.sites):
        shard = {"shard_index": index, "shard_count": simulation.sites, "label_skew": simulation.label_skew,
                 "seed": study.study.seed}  # fmt: skip
        source: dict[str, Any] = (
            {"source": "npz", "path": str(data.resolve())} if data is not None
            else {"source": "phantoms", "modality": study.study.modality, "records": simulation.phantoms_per_site}
        )  # fmt: skip
        name = f"site-{index + 1}"
        site = {
            "name": name, "state": name, "registry": f"{name}.registry.json",
            "own_reference": data is not None and simulation.own_reference,
            "data": source | shard,
            "policy": {
                "max_epsilon": privacy.epsilon, "max_study_epsilon": privacy.epsilon, "max_delta": privacy.delta,
                "max_study_delta": privacy.delta, "accountant": privacy.accountant, "min_units": 2,
                "unit": "image" if privacy.unit == "image" else "patient where known",
            },
            "performance": {"threads": max(1, _cores() // _at_once(simulation.sites))},
        }  # fmt: skip
        path = folder / f"{name}.toml"
        atomic_write(path, f"# A simulated site, written by `synthward run`\n{tomli_w.dumps(site)}".encode())
        files.append(path)
    return files


def check_sites(study_file: Path, sites: list[Path]) -> list[SiteCheck]:
    """Have every simulated site begin its ledger and check its own data, in the sites' own commands.

    Raises:
        DataError: the first site that cannot take part, with its own one-line reason.
    """
    _site_command("init", *map(str, sites))
    output = _site_command("check", "--json", "--study", str(study_file), *map(str, sites))
    return [SiteCheck.model_validate(row) for row in json.loads(output)]


def approve(study_file: Path, sites: list[Path]) -> list[SiteCheck]:
    """The same, and have them approve the study, which checks it first.

    Raises:
        DataError: as `check_sites` does.
    """
    _site_command("init", *map(str, sites))
    by = "synthward run (simulated site)"
    output = _site_command("approve", "--json", "--by", by, "--study", str(study_file), *map(str, sites))
    return [SiteCheck.model_validate(row) for row in json.loads(output)]


def simulate(folder: RunFolder) -> None:
    """Run the study of `folder`: its simulated sites in processes of their own, Flower's engine in this one.

    Raises:
        SynthwardError: as the pipeline raises them.
        FederationError: the engine itself failed.
    """
    path = [entry for entry in sys.path if entry]  # the other processes see the same packages as this one
    os.environ |= {**_QUIET, "SYNTHWARD_RUN": str(folder.path.resolve()), "PYTHONPATH": os.pathsep.join(path)}
    with tempfile.TemporaryDirectory(prefix="sw-") as sockets, _site_processes(_sites(folder), Path(sockets)):
        os.environ["SYNTHWARD_SOCKETS"] = sockets
        _simulate(folder)


def _simulate(folder: RunFolder) -> None:
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    sites, cores = _sites(folder), _cores()
    try:
        run_simulation(
            server_app=_load(SERVER_APP), client_app=_load(CLIENT_APP), num_supernodes=len(sites),
            # A worker for each process of sites: it only carries bytes, since the work is done there.
            backend_config={
                "client_resources": {"num_cpus": cores // _at_once(len(sites)), "num_gpus": 0.0},
                "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False,
                              "logging_level": "ERROR"},
            },
        )  # fmt: skip
    except SynthwardError:
        raise
    except RuntimeError as error:
        raise FederationError(
            f"the simulation engine failed ({error})", remedy=f"Go on with `synthward run --resume {folder.path}`."
        ) from error


def _cores() -> int:
    return os.cpu_count() or 1


def _at_once(sites: int) -> int:
    """How many simulated sites work at the same time: as many as there are cores, each with its share of them."""
    return min(sites, _cores())


@contextmanager
def _site_processes(sites: list[Path], sockets: Path) -> Iterator[None]:
    """`synthward-site serve` for all simulated sites, dealt to processes; they end with this one, however it ends."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(_site_process(sites[number :: _at_once(len(sites))], sockets, number))
            for number in range(_at_once(len(sites)))
        ]
        for wait_until_ready in started:
            wait_until_ready()
        yield


@contextmanager
def _site_process(sites: list[Path], sockets: Path, number: int) -> Iterator[Callable[[], None]]:
    """One of them, starting; what it gives waits until it is ready."""
    command = [sys.executable, "-m", "client.cli", "serve", "--while-stdin", "--sockets", str(sockets)]
    command += map(str, sites)
    with (sockets / f"log-{number}").open("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

        def wait_until_ready() -> None:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("ready"):
                process.wait()
                log.seek(0)
                lines = log.read().strip().splitlines() or ["the sites' process did not start"]
                raise DataError(lines[-1].removeprefix("error: "))

        try:
            yield wait_until_ready
        finally:
            process.communicate()


def _site_command(*arguments: str) -> str:
    """Standard output of a `synthward-site` command.

    Raises:
        DataError: with the command's own one-line reason.
    """
    command = [sys.executable, "-m", "client.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_QUIET})
    if result.returncode != 0:
        line = (result.stderr.strip().splitlines() or [f"synthward-site {arguments[0]} failed"])[-1]
        raise DataError(line.removeprefix("error: "))
    return result.stdout


def _sites(folder: RunFolder) -> list[Path]:
    return sorted((folder.path / "sites").glob("site-*.toml"), key=lambda path: int(path.stem.partition("-")[2]))


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
