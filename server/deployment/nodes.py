"""The carriers that a deployment lets in: each by a key whose fingerprint two people have compared.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from common.errors import DataError, FederationError
from common.files import atomic_write
from common.invitation import NAME, fingerprint, require_file, require_same
from server.deployment.flower import ask, ask_or_hear
from server.deployment.folder import Deployment

_MOST_BYTES = 10_000
_IN_USE = "already in use"  # what Flower says of a key that is registered


@dataclass(frozen=True)
class Carrier:
    """One hospital's carrier, as the coordinator knows it.

    Attributes:
        node: Flower's number for it; empty until it is registered.
    """

    name: str
    fingerprint: str
    node: str


def admit(deployment: Deployment, file: Path, *, said: str) -> Carrier:
    """Let a carrier in, by its public key.

    Args:
        file: NAME.pub, as `synthward-site join` wrote it.
        said: the fingerprint that the hospital reads out.

    Raises:
        DataError: the file is no such key, the fingerprint differs, or name or key are taken.
    """
    name, key = file.stem, _public_key(file)
    if not re.fullmatch(NAME, name):
        raise DataError("a name of letters, digits, _ and - is needed", where=str(file), remedy="Rename it: NAME.pub")
    own = fingerprint(key)
    require_same(said, own, where=str(file), remedy="Do not admit it; ask the hospital by telephone what they sent.")
    for other in carriers(deployment):
        same_key, same_name = other.fingerprint == own, other.name == name
        if same_key != same_name:
            what = f"carrier {other.name} has this key already" if same_key else f"another carrier is called {name}"
            raise DataError(what, where=str(file), remedy="Let the hospital join anew under a name of its own.")
    atomic_write(deployment.path / "sites" / f"{name}.pub", key + b"\n")
    return Carrier(name, own, "")


def dismiss(deployment: Deployment, name: str) -> None:
    """Let a carrier in no longer; its key cannot be admitted again.

    Raises:
        DataError: there is none of that name.
        FederationError: the SuperLink does not answer.
    """
    found = next((carrier for carrier in carriers(deployment) if carrier.name == name), None)
    if found is None:
        raise DataError("no carrier of that name", where=name, remedy="`synthward deploy status` lists them.")
    for node in [found.node] if found.node else _nobodys(deployment):
        ask(deployment, "supernode", "unregister", node, "here")
    for file in (_file(deployment, name, "pub"), _file(deployment, name, "node")):
        file.unlink(missing_ok=True)


def carriers(deployment: Deployment) -> list[Carrier]:
    """All that are admitted, by name."""
    found = []
    for file in sorted((deployment.path / "sites").glob("*.pub")):
        found.append(Carrier(file.stem, fingerprint(_public_key(file)), _number(deployment, file.stem)))
    return found


def _number(deployment: Deployment, name: str) -> str:
    """A carrier's node, as it was kept; empty where it was not, or is damaged."""
    return _node(_file(deployment, name, "node"))


def _node(file: Path) -> str:
    text = file.read_bytes().decode(errors="replace").strip() if file.exists() else ""
    return text if text.isdecimal() else ""


def online(deployment: Deployment) -> dict[str, str]:
    """By node, the state that Flower says it is in.

    Raises:
        FederationError: the SuperLink does not answer.
    """
    return {str(row["node-id"]): str(row["status"]) for row in ask(deployment, "supernode", "list", "here")["nodes"]}


def _nobodys(deployment: Deployment) -> list[str]:
    """Nodes that Flower lets in and that no carrier's number stands for, as when a crash came before it was kept."""
    numbers = {carrier.node for carrier in carriers(deployment)}
    return [node for node, state in online(deployment).items() if state != "unregistered" and node not in numbers]


def register_admitted(deployment: Deployment, tell: Callable[[str], None]) -> None:
    """Tell the SuperLink of every admitted carrier that it does not know.

    Raises:
        FederationError: the SuperLink does not answer.
    """
    known = {node for node, state in online(deployment).items() if state != "unregistered"}
    for carrier in carriers(deployment):
        if carrier.node in known:
            continue
        file = _file(deployment, carrier.name, "pub")
        told = ask_or_hear(deployment, "supernode", "register", str(file), "here", "--name", carrier.name)
        if told.get("success") is True:
            atomic_write(_file(deployment, carrier.name, "node"), f"{told['node-id']}\n".encode())
        elif _IN_USE in str(told.get("error-message")):
            what = "Flower knows its key already, dismissed or under a number that was lost"
            run = f"synthward deploy dismiss {deployment.quoted} {carrier.name}"
            tell(f"warning: {carrier.name}: {what}; run: {run}; then let it join anew")
        else:
            tell(f"warning: {carrier.name} is not registered: {str(told.get('error-message')).strip()[-200:]}")


def register(deployment: Deployment, name: str) -> str:
    """The same, at once, because of one carrier; what it has to wait for, or nothing.

    Raises:
        FederationError: Flower does not take that one.
    """
    problems = list[str]()
    try:
        register_admitted(deployment, problems.append)
    except FederationError:
        return "the services are not up; it is let in when they start"
    if not _number(deployment, name):
        why = "; ".join(problem.removeprefix("warning: ") for problem in problems)
        raise FederationError(f"Flower does not let it in ({why})", where=name)
    return ""


def admitted_nodes(sites: Path) -> set[int]:
    """Flower's numbers of the carriers in a deployment's folder `sites`."""
    return {int(node) for file in sites.glob("*.node") if (node := _node(file))}


def _file(deployment: Deployment, name: str, ending: str) -> Path:
    return deployment.path / "sites" / f"{name}.{ending}"


def _public_key(file: Path) -> bytes:
    """In OpenSSH's form, without a comment.

    Raises:
        DataError: it is no key that Flower takes.
    """
    remedy = "Ask the hospital for the .pub file that `synthward-site join` wrote."
    try:
        require_file(file)
        with file.open("rb") as opened:
            key = load_ssh_public_key(opened.read(_MOST_BYTES))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(file), remedy=remedy) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError("not a public key in OpenSSH's form", where=str(file), remedy=remedy) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DataError("not an elliptic-curve key (ecdsa)", where=str(file), remedy=remedy)
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
