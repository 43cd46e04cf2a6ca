"""The folder of a deployment: what the coordinator's services and commands find there, and how it is made.

SPDX-License-Identifier: Apache-2.0

    deployment.toml        host and ports
    authority.key, .crt    the deployment's own certificate authority
    signing.key            signs invitations, and so the bundles that they list
    server.key, .crt       what hospitals see
    app/, app.fab          what Flower ships, and the bundle whose hash hospitals list
    invitation.json        for every hospital
    sites/NAME.pub         admitted carriers
    runs/                  run folders
    state/                 the SuperLink's database, Flower's settings, the proxy's configuration, logs
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from pydantic import Field

from common.errors import DataError, StorageError
from common.files import atomic_write, storage_error, write_json
from common.invitation import Invitation, Way, load_invitation, public_half
from common.settings import Settings, checked, read_toml
from common.supervision import QUIET
from server.deployment.bundle import build, make_app
from server.deployment.certificates import make_authority, make_server_certificate

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_PATH = re.compile(r"[^\x00-\x1f\x7f\"'\\;{}$#]+")  # goes into the proxy's configuration, in quotes
_ANEW = "Put it back from a backup; or remove it, run `synthward deploy ship`, and tell hospitals the new fingerprint."
_PLAIN = {"NO_COLOR": "1", "COLUMNS": "200"}
Port = Annotated[int, Field(ge=1, le=65535)]


class Addresses(Settings):
    """deployment.toml.

    Attributes:
        host: what hospitals call this machine, a name or an IP address.
        listen: the address on which the proxy listens; 0.0.0.0 for all.
        port: of the proxy, the only one that hospitals need.
        superlink_port: on this machine only: Flower's control, which has no login, is there too.
    """

    host: str
    listen: str = "0.0.0.0"
    port: Port = 8443
    superlink_port: Port = 18443


@dataclass(frozen=True)
class Deployment:
    """A deployment's folder that is there."""

    path: Path
    addresses: Addresses

    @classmethod
    def create(cls, path: Path, addresses: Addresses) -> Deployment:
        """Make a new one, whole or not at all.

        Raises:
            DataError: an address or the path cannot be used.
            StorageError: the folder is there and not empty, or cannot be written.
        """
        path = path.absolute()
        _check(path, addresses)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise StorageError("exists already and is not empty", where=str(path),
                                   remedy="Give a new folder; or empty it, where an `init` was cut off.")  # fmt: skip
            path.chmod(0o700)
            for name in ("sites", "runs", "state"):
                (path / name).mkdir()
        except OSError as error:
            raise storage_error(error, path) from error
        made = cls(path, addresses)
        try:
            made._fill()
        except BaseException:
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise
        return made

    def _fill(self) -> None:
        make_authority(self.path / "authority.key", self.authority, name=self.addresses.host)
        self.renew()
        self.ship()
        self.write_flower_settings()
        settings = tomli_w.dumps(self.addresses.model_dump()).encode()
        atomic_write(self.path / "deployment.toml", settings)  # last: now it is one

    @classmethod
    def open(cls, path: Path) -> Deployment:
        """One that is there.

        Raises:
            DataError: it is none, or its settings cannot be used.
        """
        file = path.absolute() / "deployment.toml"
        if not file.is_file():
            raise DataError("no deployment's folder (it has no deployment.toml)", where=str(path),
                            remedy="Give the folder that `synthward deploy init` made.")  # fmt: skip
        raw = read_toml(file, what="deployment", error=DataError)
        addresses = checked(Addresses, raw, where=f"{file}: ", error=DataError)
        _check(path.absolute(), addresses)
        return cls(path.absolute(), addresses)

    def renew(self) -> None:
        """A new server certificate by the same authority, which is all that hospitals know."""
        files = (self.path / "authority.key", self.authority, self.path / "server.key", self.certificate)
        make_server_certificate(*files, host=self.addresses.host)

    def ship(self) -> str:
        """Copy the installed code into app/, bundle it and write the signed invitation; the bundle's SHA-256.

        Raises:
            DataError: authority.crt or signing.key is damaged; nothing is changed.
            StorageError: a file cannot be written, or the bundle cannot be built.
        """
        self._invitation("0" * 64)
        make_app(self.app)
        data, digest = build(self.app, command("flwr"), self.environment())
        atomic_write(self.path / "app.fab", data)
        write_json(self.path / "invitation.json", self._invitation(digest).model_dump(mode="json"))
        return digest

    def _invitation(self, bundle: str) -> Invitation:
        host = f"[{self.addresses.host}]" if ":" in self.addresses.host else self.addresses.host
        key = self._signing_key()
        try:
            return Way(
                coordinator=f"{host}:{self.addresses.port}", certificate=self.authority.read_text(), bundles=(bundle,),
                number=self._next_number(), signer=public_half(key),
            ).signed(key)  # fmt: skip
        except (OSError, ValueError) as error:  # pydantic's and that of bytes that are no text among them
            raise DataError("is not a certificate", where=str(self.authority),
                            remedy="Put it back from a backup.") from error  # fmt: skip

    def _next_number(self) -> int:
        before = self.path / "invitation.json"
        try:
            return load_invitation(before).number + 1 if before.exists() else 1
        except DataError as error:
            raise DataError("is damaged", where=str(before), remedy=_ANEW) from error

    def _signing_key(self) -> Ed25519PrivateKey:
        """The deployment's, made where there is none: hospitals then compare a fingerprint again.

        Raises:
            DataError: it is damaged.
        """
        file = self.path / "signing.key"
        if not file.exists():
            made = Ed25519PrivateKey.generate()
            atomic_write(file, made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        try:
            key = load_pem_private_key(file.read_bytes(), None)
        except (OSError, ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise DataError("is no signing key", where=str(file), remedy=_ANEW)
        return key

    def write_flower_settings(self) -> None:
        """Where Flower's own commands find the SuperLink."""
        link = {"address": f"127.0.0.1:{self.addresses.superlink_port}", "root-certificates": str(self.authority)}
        settings = {"superlink": {"default": "here", "here": link}}
        atomic_write(self.path / "state" / "flower" / "config.toml", tomli_w.dumps(settings).encode())

    @property
    def quoted(self) -> str:
        """Its path, as a shell takes it."""
        return shlex.quote(str(self.path))

    @property
    def app(self) -> Path:
        return self.path / "app"

    @property
    def authority(self) -> Path:
        return self.path / "authority.crt"

    @property
    def certificate(self) -> Path:
        return self.path / "server.crt"

    def environment(self) -> dict[str, str]:
        """For Flower's processes: its files in this folder, no telemetry, nothing downloaded."""
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        return {**os.environ, **QUIET, **_PLAIN, "FLWR_HOME": str(self.path / "state" / "flower"), "PATH": here}


def command(name: str) -> Path:
    """A command that is installed beside this Python.

    Raises:
        DataError: it is not.
    """
    found = Path(sys.executable).parent / name
    if not found.exists():
        raise DataError(f"no command {name} beside {sys.executable}", remedy="Install synthward there, with Flower.")
    return found


def _check(path: Path, addresses: Addresses) -> None:
    where, remedy = f"{path}: host", "Give the name or IP address by which hospitals reach this machine."
    try:
        ipaddress.ip_address(addresses.host)
    except ValueError:
        if not _HOST.fullmatch(addresses.host) or len(addresses.host) > 253:
            raise DataError(f"no name of a machine (got {addresses.host!r})", where=where, remedy=remedy) from None
    try:
        ipaddress.ip_address(addresses.listen)
    except ValueError:
        raise DataError(
            f"listen: no IP address (got {addresses.listen!r})", where=str(path), remedy="As 0.0.0.0."
        ) from None
    if addresses.port == addresses.superlink_port:
        raise DataError("port and superlink_port are the same", where=str(path), remedy="Give two.")
    if not _PATH.fullmatch(str(path)):
        raise DataError("a path with a quote, brace, semicolon, #, $ or backslash", where=str(path),
                        remedy="Give another folder: this one cannot stand in the proxy's configuration.")  # fmt: skip
