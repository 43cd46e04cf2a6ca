"""A folder that is there whole, or not at all: written beside its place, and then put there in one step.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import storage_error

_UMASK = os.umask(0o077)
os.umask(_UMASK)  # it can be read in no other way


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder `.NAME.partial` to write into, which becomes `target` where the block ends well.

    A kill leaves the partial one, which is no release to anybody; the next try begins by removing it. Whatever is at
    `target` stays there until that step.

    Raises:
        StorageError: it cannot be written, or put in its place.
    """
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (partial, *partial.rglob("*")):
            with suppress(OSError):  # some file systems have no modes
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)  # it is there to be given away
        _exchange(partial, target)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    before = target.parent / f".{target.name}.before"
    shutil.rmtree(before, ignore_errors=True)
    target.rename(before)
    partial.rename(target)
    shutil.rmtree(before, ignore_errors=True)
