"""What a site keeps in its state folder of its own answers: sealed bytes, and what a study has made of noisy numbers.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

from client.privacy.chain import REPLIES
from client.privacy.ledger import Approval
from common.errors import ReplyError, StorageError
from common.files import atomic_write
from common.protocol import decode_answer


class Store:
    """Of one state folder."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def answer(self, request: str) -> bytes | None:
        """The sealed answer that a request has had before.

        Raises:
            StorageError: the file is damaged.
        """
        path = self._answer(request)
        if not path.exists():
            return None
        data = path.read_bytes()
        try:
            decode_answer(data)
        except ReplyError as error:  # a file that was cut is no answer
            raise StorageError(
                "a stored answer is damaged", where=str(path), remedy="Restore it from backup."
            ) from error
        return data

    def keep_answer(self, request: str, data: bytes) -> None:
        """Keep a sealed answer."""
        atomic_write(self._answer(request), data)

    def made_of(self, approval: Approval, what: str) -> Path:
        """Where something lies that an approved study has made here: of other images it is another file."""
        return self._state / f"{what}-{approval.study[:16]}-{approval.data[:16]}.safetensors"

    def _answer(self, request: str) -> Path:
        return self._state / REPLIES / f"{request}.reply"
