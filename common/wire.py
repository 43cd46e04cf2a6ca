"""Messages as Flower carries them: one config record with the message's bytes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from common.errors import ReplyError
from common.protocol import MAX_MESSAGE_BYTES

_RECORD, _KEY = "synthward", "message"


def to_record(data: bytes) -> RecordDict:
    """Wrap a message's bytes for Flower."""
    return RecordDict({_RECORD: ConfigRecord({_KEY: data})})


def from_record(record: RecordDict) -> bytes:
    """The message's bytes out of a Flower record.

    Raises:
        ReplyError: there is none, or it is too large.
    """
    part = record.get(_RECORD)
    data = part.get(_KEY) if isinstance(part, ConfigRecord) else None
    if not isinstance(data, bytes) or len(data) > MAX_MESSAGE_BYTES:
        raise ReplyError("no synthward message in the record", where="wire", remedy="Update both sides.")
    return data
