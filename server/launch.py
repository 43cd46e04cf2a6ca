"""The simulated sites of a run: their site files, and what their own command says before anything begins.

SPDX-License-Identifier: Apache-2.0

A site's command is another program, as in a deployment: no file of `server` imports `client` (docs/adr/0001).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict

from common.errors import DataError
from common.files import atomic_write
from common.study import Study
from common.supervision import QUIET

_QUIET_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_memory_monitor_refresh_ms": "0",
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
            "performance": {"threads": max(1, cores() // at_once(simulation.sites))},
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


def _site_command(*arguments: str) -> str:
    """Standard output of a `synthward-site` command.

    Raises:
        DataError: with the command's own one-line reason.
    """
    command = [sys.executable, "-m", "client.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if result.returncode != 0:
        line = (result.stderr.strip().splitlines() or [f"synthward-site {arguments[0]} failed"])[-1]
        raise DataError(line.removeprefix("error: "))
    return result.stdout


def cores() -> int:
    return os.cpu_count() or 1


def at_once(sites: int) -> int:
    """How many simulated sites work at the same time: as many as there are cores, each with its share of them."""
    return min(sites, cores())


def environment() -> dict[str, str]:
    """For the other processes: the same packages as this one, and nothing that lies in the working folder."""
    packages = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    return {**os.environ, **QUIET, **_QUIET_RAY, "PYTHONPATH": packages, "PYTHONSAFEPATH": "1"}


def site_files(run: Path) -> list[Path]:
    """The site files of a run's simulated sites, by their numbers."""
    return sorted((run / "sites").glob("site-*.toml"), key=lambda path: int(path.stem.partition("-")[2]))
