"""What a coordinator gives every hospital so that its carrier finds the way, and how both compare what they hold.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from pathlib import Path
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import DataError
from common.files import canonical_json

ADDRESS = r"^(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"
SIGNER = r"^[0-9a-f]{64}$"
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}"
_MOST_BYTES = 100_000
_PURPOSE = b"synthward invitation\n"  # a signature of something else is none of an invitation


class Way(BaseModel):
    """The way to a coordinator; nothing of it is secret, but who replaces it on its way stands between the two.

    Attributes:
        coordinator: host and port of the proxy.
        certificate: of the coordinator's own authority, PEM.
        bundles: SHA-256 of the app bundles that a carrier is to answer to.
        number: larger in every later invitation, so that nobody can bring an old one back.
        signer: the coordinator's Ed25519 key, public half, in hex.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    coordinator: Annotated[str, Field(pattern=ADDRESS, max_length=260)]
    certificate: Annotated[
        str, Field(pattern=r"^-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n$")
    ]
    bundles: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...], Field(min_length=1, max_length=100)
    ]
    number: Annotated[int, Field(ge=1, lt=1 << 31, strict=True)]
    signer: Annotated[str, Field(pattern=SIGNER)]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._said())

    def signed(self, key: Ed25519PrivateKey) -> Invitation:
        """With the signature of `signer`'s private half (RFC 8032)."""
        return Invitation(**self.model_dump(), signature=key.sign(_PURPOSE + self._said()).hex())

    def _said(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", include=set(Way.model_fields))).encode()


class Invitation(Way):
    """A way that its coordinator has signed: who has heard the first one's fingerprint need not hear the next one's."""

    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    def require_signature(self, *, where: str) -> None:
        """Hold the signature against what the invitation says.

        Raises:
            DataError: it is not `signer`'s.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.signer))
            key.verify(bytes.fromhex(self.signature), _PURPOSE + self._said())
        except (InvalidSignature, ValueError) as error:
            remedy = "It was changed on its way; ask the coordinator for it again."
            raise DataError("its signature does not fit what it says", where=where, remedy=remedy) from error


def public_half(key: Ed25519PrivateKey) -> str:
    """In hex, as `Way.signer` has it."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def load_invitation(path: Path) -> Invitation:
    """Read an invitation that is signed by the key it names.

    Raises:
        DataError: it is none, or its signature does not fit.
    """
    remedy = "Ask the coordinator for invitation.json again."
    try:
        require_file(path)
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path), remedy=remedy) from error
    try:
        if len(data) > _MOST_BYTES:
            raise ValueError("too large")
        invitation = Invitation.model_validate(json.loads(data))
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise DataError(f"not an invitation: {field}", where=str(path), remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise DataError("not an invitation", where=str(path), remedy=remedy) from error
    invitation.require_signature(where=str(path))
    return invitation


def require_file(path: Path) -> None:
    """Refuse what a reader could wait at for ever.

    Raises:
        OSError: it is not there, or no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def fingerprint(data: bytes) -> str:
    """The first 128 bits of SHA-256 in eight groups, as two people read it to each other by telephone."""
    digits = hashlib.sha256(data).hexdigest()[:32]
    return " ".join(digits[at : at + 4] for at in range(0, 32, 4))


def require_same(said: str, own: str, *, where: str, remedy: str) -> None:
    """Hold a fingerprint that somebody heard against the one computed here; blanks, dashes and case do not count.

    Raises:
        DataError: they differ.
    """
    plain = re.sub(r"[\s:-]", "", said).lower()
    if plain != own.replace(" ", ""):
        # Which it is stays unsaid: it is to be heard, not copied from here.
        raise DataError("the fingerprint is not the one given", where=where, remedy=remedy)
