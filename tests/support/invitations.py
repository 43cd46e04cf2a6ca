"""Invitations for tests, signed as a coordinator signs them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.invitation import Invitation, Way, public_half

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def invitation(key: Ed25519PrivateKey = KEY, **fields: Any) -> Invitation:
    """One that differs from a usual one in these fields."""
    usual = {"coordinator": "coordinator.example.org:8443", "certificate": PEM, "bundles": ("0" * 64,), "number": 1}
    return Way(**{**usual, "signer": public_half(key), **fields}).signed(key)
