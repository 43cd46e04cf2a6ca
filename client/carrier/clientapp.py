"""Stands in the place of Flower's `flwr-clientapp`: no code that a coordinator ships runs at a hospital.

SPDX-License-Identifier: Apache-2.0

Flower would unpack the coordinator's bundle and run the client app in it. Here the bundle's SHA-256 is held against the
list in carrier.toml, nothing of it is unpacked, and what runs is the client app that this hospital installed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp as flower

from client.app import app
from client.carrier.folder import CarrierConfig, load_carrier
from common.errors import DataError

PROGRAMS = tuple(TASK_TYPE_TO_COMMAND.values())  # all that Flower starts for a run, by their names
NOT_LISTED = "does not answer to app bundle"
VARIABLE = "SYNTHWARD_CARRIER"  # the carrier's folder


def main() -> None:
    """Answer one message of Flower's, as `flwr-clientapp` does."""
    config = load_carrier(Path(os.environ[VARIABLE])).config
    replaced: dict[str, Callable[..., Any]] = {
        "install_from_fab": lambda content, **_: require_listed(content, config),
        "get_load_client_app_fn": lambda **_: _installed,
    }
    for name, ours in replaced.items():  # private to Flower: where an update has renamed them, nothing may run
        if not hasattr(flower, name):
            raise SystemExit(f"this version of Flower has no {name}: the carrier cannot keep its bundles out")
        setattr(flower, name, ours)
    flwr_clientapp()


def require_listed(bundle: bytes, config: CarrierConfig) -> None:
    """Refuse the runs of a bundle that the hospital does not list.

    Raises:
        DataError: it is not listed; Flower gives these words to the coordinator.
    """
    found = hashlib.sha256(bundle).hexdigest()
    if found not in config.bundles:
        raise DataError(f"{config.name} {NOT_LISTED} {found}", where="carrier.toml: bundles",
                        remedy="Send its hospital the new invitation.json.")  # fmt: skip


def _installed(*_: Any) -> ClientApp:
    return app


if __name__ == "__main__":
    main()
