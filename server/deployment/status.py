"""What a coordinator sees of a deployment at one moment.

SPDX-License-Identifier: Apache-2.0

From Flower's list of nodes and the newest run's events alone; nothing is asked of a site.
"""

from __future__ import annotations

from pydantic import BaseModel

from common.errors import FederationError
from common.files import read_json
from server.checkpoints import RunFolder
from server.deployment import nodes
from server.deployment.certificates import days_left
from server.deployment.folder import Deployment
from server.deployment.studies import alive, runs
from server.run_status import FAILED, FINISHED, RUNNING, STOPPED, RunStatus, told_by


class CarrierStatus(BaseModel):
    """One admitted carrier.

    Attributes:
        state: Flower's word: registered (never seen), online, offline; or unknown.
    """

    name: str
    fingerprint: str
    state: str


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
    state = FINISHED if folder.finished else RUNNING if alive(folder) else STOPPED
    found = told_by(folder.events(), folder=str(folder.path), state=state)
    if found.state == FINISHED:  # validation has cost something, too
        found.epsilon = {**found.epsilon, **read_json(folder.release / "metrics.json")["epsilon"]["sites"]}
    if found.error and found.state == STOPPED:
        found.state = FAILED
    return found


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
