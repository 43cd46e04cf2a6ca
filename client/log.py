"""The site's own log: the whole story of what went wrong, for the site's eyes, in one form whoever writes.

SPDX-License-Identifier: Apache-2.0

    2026-01-02T03:04:05+00:00 DataError: images.npz: no such file      when, what kind, in one line
        Traceback ...                                                  the rest, indented

Indented, since text of a request must not pass for a line of ours; `server/site_logs.py` reads the heads of simulated
sites. Where the log cannot be written, on a full disk for one, the head goes to standard error.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from common.errors import Refused, StorageError
from common.files import append_line
from common.text import printable

NAME = "site.log"
MOST_BYTES = 10_000_000  # who asks in vain without end must not fill the disk
_MOST_TOLD = 4000  # characters of one error
_MOST_IN_HEAD = 400
_MOST_SAID = 100  # lines elsewhere while the log cannot be written, each once: the disk may be the same
_said = set[tuple[Path, str]]()


def write_error(state: Path, error: BaseException, *, doing: str = "") -> None:
    """Keep an error with its traceback; never raises, since a log that cannot be written is no reason for a second one.

    Args:
        state: the site's folder.
        doing: what failed, where its kind does not say it.
    """
    words = " ".join(str(error).split()) or "no words"
    head = f"{doing} failed: {words}" if doing else words
    story = "" if isinstance(error, Refused) else "".join(traceback.format_exception(error))
    _write(state, type(error).__name__, head, story[-_MOST_TOLD:])


def write_note(state: Path, text: str) -> None:
    """Keep one line for the site to look at; never raises."""
    _write(state, "Note", text, "")


def _write(state: Path, kind: str, head: str, story: str) -> None:
    head = f"{kind}: {printable(head)[:_MOST_IN_HEAD]}"
    try:
        _append(state / NAME, head, story)
    except Exception as error:  # a full disk, above all: then the reason is nowhere, unless whoever serves reads it
        if (state, head) not in _said and len(_said) < _MOST_SAID:
            _said.add((state, head))
            with suppress(Exception):
                print(printable(f"warning: {error} It would say: {head}"), file=sys.stderr, flush=True)


def _append(log: Path, head: str, story: str) -> None:
    if log.is_symlink() or (log.exists() and not log.is_file()):  # a pipe would hold us up for good
        raise StorageError("no plain file, so it is not written to", where=str(log), remedy="Put it away.")
    if log.exists() and log.stat().st_size > MOST_BYTES:
        log.replace(log.with_suffix(".log.1"))
        log.touch(mode=0o600)
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(log, "\n    ".join([f"{stamp} {head}", *map(printable, story.splitlines())]))
