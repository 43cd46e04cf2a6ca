"""Keyed fingerprints: which images and patients stood on which side of a study, without keeping an image.

SPDX-License-Identifier: Apache-2.0

A fingerprint is an HMAC-SHA256 under the site's own key, which never leaves the site, cut to 16 bytes. Without the key
it says nothing, so that a stolen ledger tells nobody whose images were used. Equal pixels give equal fingerprints, and
nothing else does: an image that was exported anew at another size is another image here, and only its patient tells.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from common.images import ImageSet

_SIZE = 16  # bytes, the first of which says what it is of
_IMAGE, _PATIENT = b"i", b"p"
_NAMES = {_IMAGE: "image", _PATIENT: "patient"}


@dataclass(frozen=True)
class Fingerprints:
    """Both partitions of a site's data.

    Attributes:
        train, holdout: 16 bytes for each image and, where they are known, for each patient.
        digest: of all rows of both partitions with their labels, whatever their order; hex.
    """

    train: frozenset[bytes]
    holdout: frozenset[bytes]
    digest: str

    @classmethod
    def of(cls, key: bytes, train: ImageSet, holdout: ImageSet) -> Fingerprints:
        """The fingerprints of two partitions under a site's key."""
        parts, rows = [], []
        for side, images in ((b"train", train), (b"holdout", holdout)):
            marks: set[bytes] = set()
            for image, patient, label in _rows(key, images):
                marks |= {image} if patient is None else {image, patient}
                rows.append(b"|".join((side, image, patient or b"", str(label).encode())))
            parts.append(frozenset(marks))
        digest = hmac.digest(key, b"data" + b"\n".join(sorted(rows)), "sha256").hex()
        return cls(parts[0], parts[1], digest)

    def packed(self) -> tuple[bytes, bytes]:
        """Both sides as bytes, for the ledger."""
        return b"".join(sorted(self.train)), b"".join(sorted(self.holdout))

    @classmethod
    def unpacked(cls, train: bytes, holdout: bytes, digest: str) -> Fingerprints:
        """What `packed` made."""
        sides = [frozenset(s[i : i + _SIZE] for i in range(0, len(s), _SIZE)) for s in (train, holdout)]
        return cls(sides[0], sides[1], digest)

    @property
    def on_both_sides(self) -> frozenset[bytes]:
        """What stands in train and in holdout at once."""
        return self.train & self.holdout

    def changed_sides(self, other: Fingerprints) -> frozenset[bytes]:
        """What stands here on one side and in `other` on the other."""
        return (self.train & other.holdout) | (self.holdout & other.train)

    def shared(self, other: Fingerprints) -> frozenset[bytes]:
        """What stands in both, on whatever side."""
        return (self.train | self.holdout) & (other.train | other.holdout)


def packed_digest(train: bytes, holdout: bytes) -> str:
    """SHA-256 over packed sides, hex: what a ledger's entry holds of them."""
    return sha256(len(train).to_bytes(8, "big") + train + holdout).hexdigest()


def in_words(marks: frozenset[bytes]) -> str:
    """How many images and patients, for the site's own screen: "2 images and 1 patient"."""
    counts = [(sum(mark.startswith(kind) for mark in marks), name) for kind, name in _NAMES.items()]
    return " and ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in counts if n)


def _rows(key: bytes, images: ImageSet) -> Iterator[tuple[bytes, bytes | None, int]]:
    shape = repr(images.images.shape[1:]).encode()  # the same bytes in another shape are another image
    patients = [None] * len(images) if images.patients is None else images.patients.tolist()
    for image, patient, label in zip(images.images, patients, images.labels.tolist(), strict=True):
        mark = None if patient is None else _mark(key, _PATIENT, str(patient).encode())
        yield _mark(key, _IMAGE, shape + image.tobytes()), mark, label


def _mark(key: bytes, kind: bytes, what: bytes) -> bytes:
    return kind + hmac.digest(key, kind + what, "sha256")[: _SIZE - 1]
