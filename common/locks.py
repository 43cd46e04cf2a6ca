"""One lock for whatever only one process may do at a time: a file that is held, and let go when its holder dies.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import StorageError, SynthwardError
from common.files import storage_error


@contextmanager
def held(path: Path, *, busy: SynthwardError | None = None) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing and stays: who removed it could remove another one's.

    Args:
        busy: what is raised where another process holds it; None to wait for it.

    Raises:
        SynthwardError: `busy`.
        StorageError: the file cannot be made or locked, which says nothing of another process.
    """
    try:
        # No link: who may write to the folder could point it at a lock that somebody waits for.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise busy or _unusable(path, error) from error
        except OSError as error:
            raise _unusable(path, error) from error
        yield
    finally:
        os.close(lock)


def _unusable(path: Path, error: OSError) -> StorageError:
    plain = storage_error(error, path)
    return StorageError(f"cannot be locked ({plain.what})", where=plain.where, remedy=plain.remedy)
