"""Files that survive a crash: atomic writes, canonical JSON, tensors without pickle.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import CheckpointError, StorageError

# What numpy raises for an archive that is cut short, flipped somewhere or none at all
SPOILT = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def atomic_write(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either the old content or the new one, whatever happens.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old content is untouched.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def storage_error(error: OSError, path: Path) -> StorageError:
    """The one line for a failed write or read of `path`."""
    if error.errno in _FULL:
        return StorageError(
            f"no space left to write it ({error.strerror})",
            where=str(path),
            remedy="Free some space and try again, or go on; nothing that was saved is lost.",
        )
    return StorageError(str(error.strerror or error), where=str(path), remedy="Check the path and its permissions.")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: the same bytes for the same settings everywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically; NaN is refused, since it is not JSON."""
    atomic_write(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=str(path), remedy="Is this a run folder?") from error


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk; what a crash left of a line before stays a line of its own.

    Raises:
        StorageError: as for `atomic_write`.
    """
    try:
        with path.open("ab+") as file:
            cut = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                cut = file.read(1) != b"\n"
            file.write(("\n" * cut + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, path) from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def pack_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as safetensors bytes, names sorted: the same arrays give the same bytes."""
    return save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})


def unpack_arrays(data: bytes, *, where: str) -> dict[str, NDArray[Any]]:
    """Arrays from safetensors bytes.

    Raises:
        CheckpointError: not safetensors, or cut short.
    """
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})", where=where, remedy="Use an older checkpoint."
        ) from error
