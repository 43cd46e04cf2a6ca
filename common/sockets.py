"""The local socket between a site's process and the carrier of its answers: its address, and whether it is free.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from urllib.parse import quote

from common.errors import StorageError

_PATIENCE_SECONDS = 2.0
LONGEST = 107  # bytes of a socket's path (Linux, unix(7))


def address_of(path: Path) -> str:
    """As gRPC reads it: a URI, in which `#`, `?` and `%` mean something."""
    return f"unix:{quote(os.fsencode(path.absolute()))}"


def require_free(path: Path) -> None:
    """See that a socket can be made there; one that is left of a process that died is none.

    Raises:
        StorageError: the path is too long, something else lies there, or a process answers there already: a new one
            would take its place unseen, and one site would get the requests of another.
    """
    length = len(os.fsencode(path.absolute()))
    if length > LONGEST:
        raise StorageError(f"a socket's path of {length} bytes, {LONGEST} at most", where=str(path),
                           remedy="Give a folder with a shorter path.")  # fmt: skip
    try:
        there = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return  # nothing is there, or it cannot be seen: whether it can be made will show
    if not there:
        raise StorageError("is no socket", where=str(path), remedy="Move it away, or give another folder.")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PATIENCE_SECONDS)
        try:
            probe.connect(str(path))
        except PermissionError as error:
            raise StorageError("a socket of another user", where=str(path), remedy="Give another folder.") from error
        except TimeoutError:
            pass  # somebody is there, and busy
        except OSError:
            return
    raise StorageError(
        "another process answers there already", where=str(path),
        remedy="End it, rename the site file (a socket is called like it), or give another folder.",
    )  # fmt: skip
