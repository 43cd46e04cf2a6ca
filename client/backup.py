"""A site's state in one file, and back: the way out when a disk is lost.

SPDX-License-Identifier: Apache-2.0

Copying the folder while `serve` answers gives pieces of two moments, which no command takes. A backup is made under the
ledger's write lock, by SQLite's own copy. What was spent after it no backup can know: `restore` says so, every time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

from client.privacy.ledger import Ledger
from common.errors import StorageError
from common.files import SPOILT, atomic_write, canonical_json, storage_error

_LAST = "backup.json"  # the SHA-256 of every file before it: a tar that was cut short may look whole
_LEFT_OUT = (
    "ledger.sqlite",
    "ledger.sqlite-wal",
    "ledger.sqlite-shm",
    "service.lock",
    _LAST,
)  # the first is copied by SQLite


def back_up(ledger: Ledger, file: Path) -> tuple[int, str]:
    """Write the whole state folder of an open ledger into a tar file, as it is at one moment.

    Returns:
        Number and hash of the newest entry in it.

    Raises:
        StorageError: the file is there already, or cannot be written; or the ledger cannot be read.
    """
    if file.exists():
        raise StorageError("is there already", where=str(file), remedy="Give a new name for every backup.")
    state, half = ledger.state, file.with_name(f".{file.name}.half")
    try:
        with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            with ledger.chain.exclusive(), tarfile.open(fileobj=out, mode="w") as tar:
                newest, sums = ledger.head(), dict[str, str]()
                sums["ledger.sqlite"] = _add(tar, "ledger.sqlite", _copied(state / "ledger.sqlite"))
                for path in sorted(p for p in state.rglob("*") if p.is_file() and not p.name.startswith(".")):
                    name = path.relative_to(state).as_posix()
                    if name not in _LEFT_OUT:
                        sums[name] = _add(tar, name, path.read_bytes())
                _add(tar, _LAST, canonical_json(sums).encode())
            out.flush()
            os.fsync(out.fileno())
        os.replace(half, file)
    except OSError as error:
        raise storage_error(error, file) from error
    finally:
        half.unlink(missing_ok=True)
    return newest


def restore(file: Path, state: Path) -> tuple[int, str, str]:
    """Put a backup back, into a folder that is not there or empty.

    Returns:
        Number, hash and time of the newest entry: what was spent after it nobody here knows.

    Raises:
        StorageError: the folder is not empty, or the file is no whole backup; nothing is left behind then.
    """
    if state.exists() and any(state.iterdir()):
        raise StorageError(
            "not empty", where=str(state),
            remedy="Move what is there away first, and keep it: it may know of losses that the backup does not.",
        )  # fmt: skip
    written = list[Path]()
    try:
        with tarfile.open(file) as tar:
            state.mkdir(parents=True, exist_ok=True, mode=0o700)
            members = tar.getmembers()
            if not members or members[-1].name != _LAST:
                raise StorageError("cut short, or no backup of a site", where=str(file), remedy="Use another one.")
            sums: dict[str, str] = json.loads(_read(tar, members.pop()))
            if sorted(sums) != sorted(member.name for member in members):
                raise StorageError("not the files that it lists", where=str(file), remedy="Use another one.")
            for member in members:
                written.append(_put(tar, member, state, sums[member.name]))
        with closing(Ledger.open(state)) as ledger:
            newest = ledger.entries()[-1]
            return newest.number, newest.hash, newest.at
    except (tarfile.TarError, *SPOILT, TypeError, StorageError) as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, StorageError):
            raise
        if isinstance(error, OSError) and not file.is_file():
            raise storage_error(error, file) from error
        raise StorageError("no whole backup of a site", where=str(file), remedy="Use another one.") from error


def _copied(path: Path) -> bytes:
    """The database as one file, without the journal that lies beside it."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source:
        return source.serialize()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> str:
    """Add a file; its SHA-256."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))
    return hashlib.sha256(data).hexdigest()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = tar.extractfile(member) if member.isfile() else None
    if source is None:
        raise StorageError(f"'{member.name[:80]}' in it is no file", where=str(tar.name), remedy="Use another one.")
    return source.read()


def _put(tar: tarfile.TarFile, member: tarfile.TarInfo, state: Path, digest: str) -> Path:
    """One file of it, where it was."""
    path, data = state / member.name, _read(tar, member)
    if os.path.isabs(member.name) or not path.resolve().is_relative_to(state.resolve()):
        raise StorageError(f"'{member.name[:80]}' in it is no place here", where=str(tar.name), remedy="Use another.")
    if hashlib.sha256(data).hexdigest() != digest:
        raise StorageError(f"'{member.name[:80]}' in it was changed", where=str(tar.name), remedy="Use another one.")
    path.parent.mkdir(exist_ok=True, mode=0o700)
    atomic_write(path, data)
    return path
