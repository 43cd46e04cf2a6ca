"""Flower's own command, as the coordinator uses it: its JSON read, its failures said.

SPDX-License-Identifier: Apache-2.0

`flwr` ends with exit code 0 whatever happened; only what it prints tells.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from common.errors import FederationError
from common.text import printable
from server.deployment.folder import Deployment, command

_SECONDS = 60


def ask(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    """What `flwr ARGUMENTS` answers.

    Raises:
        FederationError: the SuperLink does not answer, or says no.
    """
    told = ask_or_hear(deployment, *arguments)
    if told.get("success") is not True:
        what = last_words(told)
        raise FederationError(
            f"Flower says: {what}", where=f"flwr {' '.join(arguments[:2])}",
            remedy=f"Are the services up? synthward deploy up {deployment.quoted}",
        )  # fmt: skip
    return told


def last_words(told: dict[str, Any]) -> str:
    """The last line of Flower's error: those before it say which SuperLink was asked."""
    lines = [printable(line).strip() for line in str(told.get("error-message") or "").splitlines()]
    return ([line for line in lines if line] or ["no answer"])[-1][:400]


def ask_or_hear(deployment: Deployment, *arguments: str) -> dict[str, Any]:
    """The same, failures as Flower tells them."""
    line = [str(command("flwr")), *arguments, "--format", "json"]
    try:
        result = subprocess.run(
            line, capture_output=True, text=True, check=False, env=deployment.environment(), cwd="/", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error-message": f"no answer within {_SECONDS} s"}
    try:
        told = json.loads(result.stdout[result.stdout.index("{") :])
    except ValueError:  # also where there is no JSON at all
        return {"error-message": (result.stderr or result.stdout).strip()}
    return told if isinstance(told, dict) else {}
