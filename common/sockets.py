"""The local socket between a site's process and the carrier of its answers: its address, and who may listen there.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from common.errors import StorageError
from common.locks import held

_PATIENCE_SECONDS = 2.0
LONGEST = 107  # bytes of a socket's path (Linux, unix(7))


def address_of(path: Path) -> str:
    """As gRPC reads it: a URI, in which `#`, `?` and `%` mean something."""
    return f"unix:{quote(os.fsencode(path.absolute()))}"


@contextmanager
def taken(path: Path) -> Iterator[None]:
    """Take a socket's path for this process until the block ends; makes its folder. Only a lock settles who of two that
    begin at the same moment has it: one that bound a second later would take the first one's place unseen, and one site
    would get the requests of another.

    Raises:
        StorageError: the path is too long, it cannot be written, something else lies there, or a process has it.
    """
    length = len(os.fsencode(path.absolute()))
    if length > LONGEST:
        raise StorageError(f"a socket's path of {length} bytes, {LONGEST} at most", where=str(path),
                           remedy="Give a folder with a shorter path.")  # fmt: skip
    try:
        _make_folder(path.parent)
    except OSError as error:
        raise unusable(path, error) from error
    busy = _taken_already(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(path.with_name(f".{path.name}.lock"), busy=busy))
        except StorageError as error:
            raise error if error is busy else unusable(path, error.what) from error
        _require_free(path)
        yield


def _make_folder(folder: Path) -> None:
    """For this user and its group: the carrier has to find the socket, whatever the umask hides from others."""
    for missing in reversed([path for path in (folder, *folder.absolute().parents) if not path.exists()]):
        missing.mkdir(exist_ok=True)
        missing.chmod(0o750)


def unusable(path: Path, error: object) -> StorageError:
    """What a site is told that cannot make its socket."""
    return StorageError(f"cannot listen there ({error})", where=str(path),
                        remedy="Give a --sockets folder that this user may write to.")  # fmt: skip


def _require_free(path: Path) -> None:
    """See that nobody listens there who holds no lock; a socket that is left of a process that died is none."""
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
        except (TimeoutError, BlockingIOError):
            pass  # somebody is there, and busy
        except OSError:
            return
    raise _taken_already(path)


def _taken_already(path: Path) -> StorageError:
    return StorageError(
        "another process answers there already", where=str(path),
        remedy="End it, rename the site file (a socket is called like it), or give another folder.",
    )  # fmt: skip
