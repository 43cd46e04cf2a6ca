"""What a deployment needs, looked at in seconds; each finding with its remedy.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version

import psutil

from common.errors import DataError, FederationError
from common.findings import Finding
from common.reach import reach
from server.deployment import nodes
from server.deployment.certificates import days_left
from server.deployment.folder import Deployment
from server.deployment.services import listens, nginx, reached

_LEAST_DISK_GB, _LEAST_MEMORY_GB, _FEW_DAYS = 5.0, 4.0, 30.0


def findings(deployment: Deployment) -> Iterator[Finding]:
    """One after another; none stops the others."""
    yield Finding("versions", True, f"synthward {version('synthward')}, Flower {version('flwr')}")
    yield _proxy_program()
    days = days_left(deployment.certificate)
    renew = f"Run: synthward deploy renew {deployment.quoted}"
    yield Finding("certificate", days > _FEW_DAYS, f"{days:.0f} days left", renew)
    free = shutil.disk_usage(deployment.path).free / 1e9
    yield Finding("disk", free > _LEAST_DISK_GB, f"{free:.0f} GB free", "Free some space.")
    memory = psutil.virtual_memory().available / 1e9
    yield Finding("memory", memory > _LEAST_MEMORY_GB, f"{memory:.0f} GB free", "End other programs.")
    yield _superlink(deployment)
    yield from _proxy(deployment)


def _proxy_program() -> Finding:
    try:
        found = nginx()
    except DataError as error:
        return Finding("nginx", False, error.what, error.remedy)
    told = subprocess.run([found, "-v"], capture_output=True, text=True, check=False).stderr.strip()
    return Finding("nginx", True, told.rpartition(": ")[2] or str(found))


def _superlink(deployment: Deployment) -> Finding:
    up = f"Run: synthward deploy up {deployment.quoted}"
    if not listens("127.0.0.1", deployment.addresses.superlink_port):
        return Finding("SuperLink", False, "not up", up)
    try:
        states = nodes.online(deployment)
    except FederationError as error:
        return Finding("SuperLink", False, error.what, up)
    admitted = nodes.carriers(deployment)
    absent = [carrier.name for carrier in admitted if states.get(carrier.node) != "online"]
    what = f"up, {len(admitted) - len(absent)} of {len(admitted)} carriers online"
    what += f"; not: {', '.join(absent)}" if absent else ""
    return Finding("SuperLink", not absent, what, "Ask these hospitals to run: synthward-site doctor")


def _proxy(deployment: Deployment) -> Iterator[Finding]:
    """As a hospital meets it: its own way in is open, and no other."""
    address, authority = f"localhost:{deployment.addresses.port}", deployment.authority.read_text(errors="replace")
    found = reach(address, authority, by=reached(deployment))
    yield Finding("proxy", not found.problem, found.problem or found.told, found.remedy)
    if not found.problem:
        control = reach(address, authority, path="/v1/control/list-nodes", by=reached(deployment))
        shut = control.status == 403
        what = "shut to hospitals" if shut else f"ANSWERS hospitals ({control.status})"
        yield Finding("control", shut, what, "End the services, and see who changed the proxy.")
