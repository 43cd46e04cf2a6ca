"""Files of a bundle that somebody else may have made: only plain ones are opened, and never more than a bound is read.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import CheckpointError

MOST_FILES = 2_100_000  # a million images, as PNG and DICOM
_DEEPEST = 8
_PIECE = 1 << 20
ASK_ANEW = "Do not use this release; ask for it anew."
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


@dataclass
class Listing:
    """What lies in a folder.

    Attributes:
        sizes: bytes of each plain file, by its path in the folder.
        odd: what whatever is no plain file is, in words; none of it is ever opened.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)


def listing(folder: Path) -> Listing:
    """Every file in a folder; links are not followed.

    Raises:
        CheckpointError: more files than any release has.
        OSError: the folder cannot be read.
    """
    found, todo = Listing(), [(folder, "", 0)]
    while todo:
        place, prefix, depth = todo.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                name, mode = f"{prefix}{entry.name}", entry.stat(follow_symlinks=False)
                if stat.S_ISREG(mode.st_mode):
                    found.sizes[name] = mode.st_size
                elif not stat.S_ISDIR(mode.st_mode):
                    found.odd[name] = next((words for is_one, words in _KINDS if is_one(mode.st_mode)), "no file")
                elif depth >= _DEEPEST:
                    found.odd[name] = "a folder too deep"
                else:
                    todo.append((place / entry.name, f"{name}/", depth + 1))
                if len(found.sizes) + len(found.odd) + len(todo) > MOST_FILES:
                    raise CheckpointError("more files than any release has", where=str(folder), remedy=ASK_ANEW)
    return found


@contextmanager
def plain(path: Path) -> Iterator[BinaryIO]:
    """A plain file, open for reading.

    Raises:
        OSError: missing, a link, not readable, or no plain file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "no plain file", str(path))
    with os.fdopen(handle, "rb") as file:
        yield file


def read(path: Path, *, most: int) -> bytes:
    """The whole of a plain file.

    Raises:
        CheckpointError: it cannot be read, or has more than `most` bytes.
    """
    try:
        with plain(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=str(path), remedy=ASK_ANEW) from error
    if len(data) > most:
        raise CheckpointError(f"larger than the {most:,} bytes that it may have", where=str(path), remedy=ASK_ANEW)
    return data


def read_json(path: Path, *, most: int) -> Any:
    """JSON of a plain file.

    Raises:
        CheckpointError: as `read`; or it is no JSON.
    """
    data = read(path, most=most)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # RecursionError: of endless brackets
        raise CheckpointError("not JSON", where=str(path), remedy=ASK_ANEW) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a plain file, read in pieces.

    Raises:
        OSError: as `plain`.
    """
    digest = hashlib.sha256()
    with plain(path) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
