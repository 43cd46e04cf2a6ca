"""The folder of a carrier: its key, whom it believes, and the socket that it carries to.

SPDX-License-Identifier: Apache-2.0

    carrier.toml       name, socket, coordinator, the app bundles that it answers to
    authority.crt      the coordinator's own certificate authority
    carrier.key        made here; never leaves
    NAME.pub           what the coordinator gets
    state/             Flower's files and the log
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tomli_w
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from pydantic import Field, StringConstraints

from common.errors import DataError, StorageError
from common.files import atomic_write, storage_error
from common.invitation import ADDRESS, NAME, SIGNER, Invitation, fingerprint
from common.settings import Settings, checked, read_toml

_TAKEN = {"coordinator", "bundles", "signer", "number"}
_HEAD = "# What this hospital's carrier believes. A bundle is an app of the coordinator's, by its SHA-256.\n"


class CarrierConfig(Settings):
    """carrier.toml.

    Attributes:
        name: what the coordinator calls this hospital; NAME.pub has it.
        socket: of `synthward-site serve`.
        coordinator: host:port.
        bundles: SHA-256 of the app bundles whose runs it answers to.
        signer: the coordinator's key, in hex; an invitation that it has signed needs no telephone.
        number: of the invitation that these come from.
    """

    name: Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
    socket: Path
    coordinator: Annotated[str, StringConstraints(pattern=ADDRESS, max_length=260)]
    bundles: Annotated[tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], ...], Field(min_length=1)]
    signer: Annotated[str, StringConstraints(pattern=rf"^$|{SIGNER}")] = ""
    number: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Carrier:
    """A carrier's folder that is there."""

    path: Path
    config: CarrierConfig

    @property
    def authority(self) -> Path:
        return self.path / "authority.crt"

    @property
    def key(self) -> Path:
        return self.path / "carrier.key"

    @property
    def public(self) -> Path:
        return self.path / f"{self.config.name}.pub"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public.read_bytes().strip())


def join(path: Path, invitation: Invitation, *, name: str, socket: Path) -> Carrier:
    """Make a carrier's folder, with a new key; where it is there, take in a newer invitation and keep the key.

    Raises:
        DataError: a name that cannot be used, or the folder is another carrier's.
        StorageError: it cannot be written.
    """
    path = path.absolute()
    given = {"name": name, "socket": socket.absolute(), **invitation.model_dump(include=_TAKEN)}
    config = checked(CarrierConfig, given, where="--", error=DataError)
    carrier = Carrier(path, config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            if not (path / "carrier.toml").exists() and (path / "carrier.key").exists():
                raise DataError("a `join` was cut off here", where=str(path), remedy="Remove this folder; join anew.")
            before = load_carrier(path)
            if before.config.name != name:
                raise DataError(f"this is the folder of carrier {before.config.name}", where=str(path),
                                remedy="Give another folder, or that name.")  # fmt: skip
        else:
            path.chmod(0o700)
            _make_key(carrier)
        atomic_write(carrier.authority, invitation.certificate.encode())
        atomic_write(path / "carrier.toml", (_HEAD + tomli_w.dumps(config.model_dump(mode="json"))).encode())
    except OSError as error:
        raise storage_error(error, path) from error
    return carrier


def require_next(carrier: Carrier, invitation: Invitation, *, where: str) -> None:
    """See that an invitation comes from the coordinator that this hospital has joined, and is no older one.

    Raises:
        DataError: somebody else signed it, or it is older; a fingerprint that is heard by telephone decides then.
    """
    remedy = "Ask the coordinator by telephone; give what they read out as --fingerprint."
    if invitation.signer != carrier.config.signer:
        raise DataError("is not signed by the coordinator that this carrier has joined", where=where, remedy=remedy)
    if invitation.number < carrier.config.number:
        raise DataError(f"is number {invitation.number}, older than what this carrier has ({carrier.config.number})",
                        where=where, remedy=remedy)  # fmt: skip


def load_carrier(path: Path) -> Carrier:
    """A carrier's folder.

    Raises:
        DataError: it is none.
        StorageError: others may read its key.
    """
    file = path.absolute() / "carrier.toml"
    if not file.is_file():
        remedy = "Give the folder that `synthward-site join` made."
        raise DataError("no carrier's folder (it has no carrier.toml)", where=str(path), remedy=remedy)
    raw = read_toml(file, what="carrier", error=DataError)
    carrier = Carrier(path.absolute(), checked(CarrierConfig, raw, where=f"{file}: ", error=DataError))
    for needed in (carrier.key, carrier.public, carrier.authority):
        if not needed.is_file():
            raise DataError("is missing", where=str(needed), remedy="Put it back, or join anew in another folder.")
    if carrier.key.stat().st_mode & 0o077:
        raise StorageError("others may read this key", where=str(carrier.key), remedy=f"chmod 600 {carrier.key}")
    try:
        private = load_ssh_private_key(carrier.key.read_bytes(), None)
        whole = private.public_key() == load_ssh_public_key(carrier.public.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        whole = False
    if not whole:
        raise DataError(f"is damaged, or not the key of {carrier.public.name}", where=str(carrier.key),
                        remedy="Put both back from a backup, or join anew in another folder.")  # fmt: skip
    return carrier


def _make_key(carrier: Carrier) -> None:
    key = ec.generate_private_key(ec.SECP384R1())  # Flower takes NIST curves only, in OpenSSH's form
    atomic_write(carrier.key, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    os.chmod(carrier.key, 0o600)
    atomic_write(carrier.public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
