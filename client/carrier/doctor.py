"""What a hospital's carrier needs, looked at in seconds; each finding with its remedy.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import psutil
from cryptography import x509

from client.carrier.folder import Carrier
from common.findings import Finding
from common.reach import reach

_LEAST_DISK_GB, _LEAST_MEMORY_GB, _FEW_DAYS = 2.0, 1.0, 30
_AHEAD_SECONDS, _BEHIND_SECONDS = 2.0, 30.0  # well before Flower refuses its signatures (common/reach.py)


def findings(carrier: Carrier) -> Iterator[Finding]:
    """One after another; none stops the others."""
    config = carrier.config
    yield Finding("versions", True, f"synthward {version('synthward')}, Flower {version('flwr')}")
    yield Finding("key", True, f"{config.name}, fingerprint {carrier.fingerprint}")
    yield _authority(carrier)
    free = shutil.disk_usage(carrier.path).free / 1e9
    yield Finding("disk", free > _LEAST_DISK_GB, f"{free:.0f} GB free", "Free some space.")
    memory = psutil.virtual_memory().available / 1e9
    yield Finding("memory", memory > _LEAST_MEMORY_GB, f"{memory:.0f} GB free", "End other programs.")
    found = reach(config.coordinator, carrier.authority.read_text(errors="replace"))
    yield Finding("coordinator", not found.problem, found.problem or f"{config.coordinator} {found.told}", found.remedy)
    if found.status:
        told = f"{found.clock:+.0f} s to the coordinator's"
        yield Finding("clock", -_AHEAD_SECONDS < found.clock < _BEHIND_SECONDS, told, "Set it (NTP).")
    yield _site(carrier)


def _authority(carrier: Carrier) -> Finding:
    remedy = "Join again with the coordinator's newest invitation."
    try:
        certificate = x509.load_pem_x509_certificate(carrier.authority.read_bytes())
    except ValueError:
        return Finding("authority", False, "not a certificate", remedy)
    days = (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)
    return Finding("authority", days > _FEW_DAYS, f"good for {days:.0f} days", remedy)


def _site(carrier: Carrier) -> Finding:
    path, remedy = carrier.config.socket, "Run as the site's user: synthward-site serve SITE.toml --sockets FOLDER"
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except PermissionError:
            return Finding("site", False, f"{path} may not be opened by this user", "Put it into the socket's group.")
        except OSError as error:
            return Finding("site", False, f"{path} does not answer ({error.strerror or error})", remedy)
    return Finding("site", True, f"{path} answers")
