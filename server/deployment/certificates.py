"""The deployment's own certificate authority, and the certificate that the coordinator shows to hospitals.

SPDX-License-Identifier: Apache-2.0

One authority for each deployment, trusted by nobody but its hospitals' carriers (RFC 5280; P-384, SHA-384).
"""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import DataError
from common.files import atomic_write

_AUTHORITY_DAYS, _SERVER_DAYS = 3650, 397
_BEFORE = timedelta(hours=1)  # clocks differ


def make_authority(key_file: Path, certificate_file: Path, *, name: str) -> None:
    """Write a new authority's key (mode 0600) and certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _named(f"synthward authority of {name}")
    builder = _builder(subject, subject, key.public_key(), days=_AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    atomic_write(key_file, _pem(key))
    atomic_write(certificate_file, _signed(builder, key))


def make_server_certificate(authority_key: Path, authority: Path, key_file: Path, file: Path, *, host: str) -> None:
    """Write a new key and a certificate for `host` and for this machine itself.

    Args:
        host: a name, or an IP address.
    """
    remedy = "Put both back from a backup."
    try:
        signer = serialization.load_pem_private_key(authority_key.read_bytes(), None)
        issuer = x509.load_pem_x509_certificate(authority.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise DataError("the authority's key or certificate cannot be read", where=str(authority_key),
                        remedy=remedy) from error  # fmt: skip
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != issuer.public_key():
        raise DataError("is not the key of authority.crt", where=str(authority_key), remedy=remedy)
    key = ec.generate_private_key(ec.SECP384R1())
    names = dict.fromkeys((host, "localhost", "127.0.0.1"))
    builder = _builder(_named(host), issuer.subject, key.public_key(), days=_SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    known = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(known, critical=False)
    atomic_write(key_file, _pem(key))
    atomic_write(file, _signed(builder, signer))


def days_left(file: Path) -> float:
    """Until a certificate expires; negative when it has.

    Raises:
        DataError: it cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError("not a certificate", where=str(file), remedy="Put it back from a backup.") from error
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE).not_valid_after(now + timedelta(days=days))
    )  # fmt: skip


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
