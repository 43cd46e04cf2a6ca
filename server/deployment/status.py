"""What a coordinator sees of a deployment at one moment.

SPDX-License-Identifier: Apache-2.0

From Flower's list of nodes and the newest run's events alone; nothing is asked of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from common.errors import FederationError
from common.files import read_json
from common.text import printable
from server.checkpoints import RunFolder
from server.deployment import nodes
from server.deployment.certificates import days_left
from server.deployment.folder import Deployment
from server.deployment.studies import alive, finished, runs

_WARNINGS = 5


class CarrierStatus(BaseModel):
    """One admitted carrier.

    Attributes:
        state: Flower's word: registered (never seen), online, offline; or unknown.
    """

    name: str
    fingerprint: str
    state: str


class RunStatus(BaseModel):
    """One run.

    Attributes:
        state: finished, running, stopped, or failed.
        at: of its last event, UTC.
        stage, done, total: of the newest step.
        epsilon: by site, as last reported, of its train partition.
        heard: by site, when an answer of it was last taken.
        warnings: the newest.
        error: what it failed with.
    """

    folder: str
    state: str
    at: str = ""
    stage: str = ""
    done: int = 0
    total: int = 0
    epsilon: dict[str, float] = {}
    heard: dict[str, str] = {}
    warnings: list[str] = []
    error: str = ""


class Status(BaseModel):
    """The whole."""

    services: str
    certificate_days: int
    carriers: list[CarrierStatus]
    run: RunStatus | None


def status_of(deployment: Deployment) -> Status:
    """Look, and ask Flower which carriers are online."""
    try:
        states, services = nodes.online(deployment), "up"
    except FederationError:
        states, services = {}, "down: the SuperLink does not answer"
    carriers = [
        CarrierStatus(name=c.name, fingerprint=c.fingerprint, state=states.get(c.node, "unknown"))
        for c in nodes.carriers(deployment)
    ]
    newest = runs(deployment)[-1:]
    return Status(
        services=services, certificate_days=int(days_left(deployment.certificate)), carriers=carriers,
        run=run_status(newest[0]) if newest else None,
    )  # fmt: skip


def run_status(folder: RunFolder) -> RunStatus:
    """What a run's events say."""
    events = folder.events()
    found = RunStatus(folder=str(folder.path), state="finished" if finished(folder) else "stopped")
    if found.state != "finished" and alive(folder):
        found.state = "running"
    for event in events:
        found.at = str(event.get("at", ""))
        _take(found, event)
    if found.state == "finished" and (folder.path / "metrics.json").exists():  # validation has cost something, too
        found.epsilon = {**found.epsilon, **read_json(folder.path / "metrics.json")["epsilon"]["sites"]}
    if found.error and found.state == "stopped":
        found.state = "failed"
    return found


def _take(found: RunStatus, event: Mapping[str, Any]) -> None:
    kind = event.get("event")
    if kind == "begin":
        found.error, found.warnings = "", []
    elif kind == "stage":
        found.stage, found.done, found.total = str(event.get("stage", "")), 0, 0
    elif kind == "step":
        found.stage, found.done, found.total = str(event.get("stage", "")), int(event["done"]), int(event["total"])
        spent = event.get("epsilon")
        if isinstance(spent, dict):
            found.epsilon |= {str(site): float(value) for site, value in spent.items()}
        elif spent is not None and event.get("site"):
            found.epsilon[str(event["site"])] = float(spent)
        for site in event.get("accepted") or ([event["site"]] if event.get("site") else []):
            found.heard[str(site)] = str(event.get("at", ""))
    elif kind == "warning":
        found.warnings = [*found.warnings, printable(str(event.get("text", "")))][-_WARNINGS:]
    elif kind == "failed":
        found.error = printable(str(event.get("what", "")))


def table(found: Status) -> str:
    """For a terminal."""
    lines = [f"services     {found.services}", f"certificate  {found.certificate_days} days left", ""]
    lines += [f"{c.name:<24} {c.state:<11} {c.fingerprint}" for c in found.carriers] or ["no carrier is admitted yet"]
    run = found.run
    if run is None:
        return "\n".join([*lines, "", "no study was run yet"])
    step = f"  {run.done}/{run.total}" if run.total else ""
    lines += ["", f"study        {run.folder}", f"  {run.state:<10} {run.stage}{step}   last event {run.at[:19]} UTC"]
    for site, spent in sorted(run.epsilon.items()):
        lines.append(f"  {site:<24} epsilon {spent:.3f} so far   last answer {run.heard.get(site, '')[:19]}")
    lines += [f"  warning  {text}" for text in run.warnings]
    return "\n".join(lines + ([f"  error    {run.error}"] if run.error else []))
