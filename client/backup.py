"""A site's state in one file, and back: the way out when a disk is lost.

SPDX-License-Identifier: Apache-2.0

Copying the folder while `serve` answers gives pieces of two moments, which no command takes. A backup takes the ledger
by SQLite's own copy, and the files beside it as they were listed at that moment. What was spent after it no backup can
know: `restore` says so, every time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from client.privacy.chain import HALF as _HALF
from client.privacy.ledger import Entry, Ledger
from common.errors import StorageError
from common.files import SPOILT, atomic_write, canonical_json, storage_error

_LAST = "backup.json"  # the SHA-256 of every file before it: a tar that was cut short may look whole
_SQLITE, _HEAD = "ledger.sqlite", "ledger.head"
_LEFT_OUT = (f"{_SQLITE}-wal", f"{_SQLITE}-shm", "service.lock", _LAST)
_OTHER = "Use another one."
_OF_A_DISK = "lost+found"  # lies in every new one


def back_up(ledger: Ledger, file: Path) -> tuple[int, str]:
    """Write the whole state folder of an open ledger into a tar file, as it is at one moment.

    Returns:
        Number and hash of the newest entry in it.

    Raises:
        StorageError: the file is there already, or cannot be written; or the ledger cannot be read.
    """
    if file.exists():
        raise StorageError("is there already", where=str(file), remedy="Give a new name for every backup.")
    state, half, sums = ledger.state, file.with_name(f".{file.name}.{secrets.token_hex(4)}"), dict[str, str]()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with ledger.chain.exclusive():  # for this moment alone: whoever waits for it is answered late
            newest, database, head = ledger.head(), _copied(state / _SQLITE), (state / _HEAD).read_bytes()
            names = sorted(p.relative_to(state).as_posix() for p in state.rglob("*") if p.is_file())
        handle = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as out:
            with tarfile.open(fileobj=out, mode="w") as tar:
                sums[_SQLITE], sums[_HEAD] = _add(tar, _SQLITE, database), _add(tar, _HEAD, head)
                for name in names:
                    if name not in (_SQLITE, _HEAD, *_LEFT_OUT) and not Path(name).name.startswith("."):
                        sums[name] = _add(tar, name, (state / name).read_bytes())
                _add(tar, _LAST, canonical_json(sums).encode())
            out.flush()
            os.fsync(out.fileno())
        os.replace(half, file)
    except OSError as error:
        raise storage_error(error, file) from error
    finally:
        half.unlink(missing_ok=True)
    return newest


def restore(file: Path, state: Path, *, accept: Callable[[Ledger], None]) -> Entry:
    """Put a backup back, into a folder that is not there or empty.

    Args:
        accept: looks at the restored ledger before it takes its place, and raises where it must not.

    Returns:
        The newest entry: what was spent after it nobody here knows.

    Raises:
        StorageError: the folder is not empty, or the file is no whole backup, or `accept` says no; nothing is left
            behind then.
    """
    for left in state.glob(f"{_HALF}*"):  # of a restore that was killed: copies of a backup
        shutil.rmtree(left, ignore_errors=True)
    if state.exists() and any(path.name != _OF_A_DISK for path in state.iterdir()):
        raise StorageError(
            "not empty", where=str(state),
            remedy="Move what is there away first, and keep it: it may know of losses that the backup does not.",
        )  # fmt: skip
    there = state.exists()  # a mounted folder, or one in a folder of root's: nothing can be put beside it
    half = (state if there else state.parent) / f"{_HALF}{secrets.token_hex(4)}"
    try:
        half.mkdir(parents=True, mode=0o700)
        _unpack(file, half)
        with closing(Ledger.open(half)) as ledger:
            accept(ledger)
            newest = ledger.entries()[-1]
        if there:
            _move_up(half)
        else:
            half.rename(state)
        return newest
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, Path(str(error.filename or file))) from error
    except (tarfile.TarError, sqlite3.Error, *SPOILT, TypeError, IndexError) as error:
        raise StorageError("no whole backup of a site", where=str(file), remedy=_OTHER) from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _move_up(folder: Path) -> None:
    """Move what is in it into the folder that it lies in; the ledger last: without it no command takes the rest."""
    moved = list[Path]()
    try:
        folder.parent.chmod(0o700)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == _SQLITE):
            moved.append(path.rename(folder.parent / path.name))
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _unpack(file: Path, folder: Path) -> None:
    """Every file of a backup, each held against its checksum."""
    with tarfile.open(file) as tar:
        members = tar.getmembers()
        if not members or members[-1].name != _LAST:
            raise StorageError("cut short, or no backup of a site", where=str(file), remedy=_OTHER)
        sums: dict[str, str] = json.loads(_read(tar, members.pop()))
        if sorted(sums) != sorted(member.name for member in members):
            raise StorageError("not the files that it lists", where=str(file), remedy=_OTHER)
        for member in members:
            path, data = folder / member.name, _read(tar, member)
            if os.path.isabs(member.name) or not path.resolve().is_relative_to(folder.resolve()):
                raise StorageError(f"'{member.name[:80]}' in it is no place here", where=str(file), remedy=_OTHER)
            if hashlib.sha256(data).hexdigest() != sums[member.name]:
                raise StorageError(f"'{member.name[:80]}' in it was changed", where=str(file), remedy=_OTHER)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            atomic_write(path, data)


def _copied(path: Path) -> bytes:
    """The database as one file, without the journal that lies beside it."""
    with closing(sqlite3.connect(f"file:{quote(os.fsencode(path.resolve()))}?mode=ro", uri=True)) as source:
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
        raise StorageError(f"'{member.name[:80]}' in it is no file", where=str(tar.name), remedy=_OTHER)
    return source.read()
