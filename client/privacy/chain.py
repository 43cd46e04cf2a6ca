"""The ledger's files: an append-only table whose every entry seals all before it, made once and never anew.

SPDX-License-Identifier: Apache-2.0

    ledger.sqlite   the entries (WAL, synchronous=FULL), each with the hash of all before it, so that an edited, missing
                    or inserted entry shows; and the fingerprints, whose hashes stand in the entries
    ledger.head     number and hash of the newest entry, so that entries cut off at the end show too
    ledger.key      32 random bytes, for the fingerprints; the first entry knows it again
    replies/        the stored answers

`create` is for `synthward-site init` alone. `open` makes nothing: what is missing, cut short or does not belong
together stops the site with one line, since a ledger that begins again at zero would forget every loss.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import quote

from client.privacy.fingerprints import packed_digest
from common.accounting import PrivacyLoss
from common.errors import CheckpointError, StorageError
from common.files import canonical_json, read_json, storage_error, write_json

Kind = Literal["begun", "reserved", "confirmed", "refused", "approved", "revoked"]
SQLITE, HEAD, KEY, REPLIES, LOG = "ledger.sqlite", "ledger.head", "ledger.key", "replies", "site.log"
HALF = ".restore-"  # begins the name of a folder that a restore was about to put in place
RESTORE = (
    "Until then nobody gets an answer. Restore the whole state folder (ledger.sqlite, ledger.head, ledger.key,"
    " replies) from one backup, then run synthward-site verify-ledger; see docs/site.md."
)
_FIRST_HASH = hashlib.sha256(b"synthward ledger").hexdigest()
_VERSION = 3
_WAIT_SECONDS, _LONG_SECONDS = 60, 900  # for another process that writes
_TRACES = (
    SQLITE,
    f"{SQLITE}-wal",
    HEAD,
    KEY,
    f"{REPLIES}/*.reply",
    "adam-*.safetensors",
    "reference-*.safetensors",
    f"{HALF}*",
)
_TABLES = {
    "entries": "number INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, study TEXT NOT NULL,"
    " body TEXT NOT NULL, hash TEXT NOT NULL",
    "fingerprints": "hash TEXT PRIMARY KEY, train BLOB NOT NULL, holdout BLOB NOT NULL",
}


class NoLedger(StorageError):
    """There is no ledger in the state folder."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        number: 1, 2, 3, ... without a gap.
        at: UTC, ISO 8601.
        study: the study's SHA-256; empty in the first entry.
        body: of "begun" the ledger's identity and its key's seal; of "reserved" the mechanism's parameters; of
            "confirmed" the reservation's number; of "refused" the rule, what was asked and what is allowed; of
            "approved" who, the plan and the data's digests; of "revoked" who.
        hash: SHA-256 over the hash before and this entry.
    """

    number: int
    at: str
    kind: Kind
    study: str
    body: dict[str, Any]
    hash: str

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Entry:
        number, at, kind, study, body, digest = row
        return cls(int(number), at, kind, study, json.loads(body), digest)

    @property
    def loss(self) -> PrivacyLoss:
        """Of a reservation."""
        return PrivacyLoss(self.body["noise_multiplier"], self.body["sample_rate"], self.body["steps"])


class Chain:
    """The entries and fingerprints in one state folder; made by `create` or `open`."""

    def __init__(self, state: Path, db: sqlite3.Connection, key: bytes) -> None:
        self.state, self.db, self.key = state, db, key

    @classmethod
    def create(cls, state: Path) -> None:
        """Make an empty ledger in a folder of its own, for this user alone.

        Raises:
            StorageError: there is one, or something that only one could have left; or the folder cannot be written.
        """
        found = _trace(state)
        if found:
            what = f"{found} is here already: this site has a ledger, or had one"
            raise StorageError(what, where=str(state), remedy=RESTORE)
        key = secrets.token_bytes(32)
        try:
            for folder in (state, state / REPLIES):
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(0o700)
            _write_new(state / KEY, key)  # whoever comes second fails here
            _write_new(state / SQLITE, b"")
            (state / LOG).touch(mode=0o600)
            (state / LOG).chmod(0o600)
            chain = cls(state, _connect(state / SQLITE), key)
            chain._fill()
            chain.close()
        except sqlite3.Error as error:
            raise StorageError(f"the ledger cannot be made ({error})", where=str(state)) from error
        except OSError as error:
            raise storage_error(error, state) from error

    @classmethod
    def open(cls, state: Path) -> Chain:
        """Open what `create` made; writes nothing.

        Raises:
            NoLedger: there is none.
            StorageError: it is damaged or incomplete, was changed, or does not belong to what lies beside it.
        """
        path = state / SQLITE
        try:
            beside = _beside(state)  # before the entries: another process may answer in between
            if not path.exists():
                _no_ledger(state)
            if path.stat().st_size == 0:  # SQLite would take it for a new one
                raise StorageError("the ledger is empty", where=str(path), remedy=RESTORE)
            key = (state / KEY).read_bytes() if (state / KEY).exists() else b""
            chain = cls(state, _connect(path), key)
        except OSError as error:
            raise storage_error(error, path) from error
        except sqlite3.Error as error:
            raise StorageError(f"the ledger cannot be read ({error})", where=str(path), remedy=RESTORE) from error
        problems = chain.problems() or chain.strangers(*beside)
        if problems:
            chain.close()
            raise StorageError(problems[0], where=str(path), remedy=RESTORE)
        return chain

    def close(self) -> None:
        self.db.close()

    def entries(self, where: str = "1", *values: object) -> list[Entry]:
        """Entries, oldest first; `where` is SQL."""
        rows = self.db.execute(f"SELECT * FROM entries WHERE {where} ORDER BY number", values)
        return [Entry.of(row) for row in rows]

    def head(self) -> tuple[int, str]:
        """(number, hash) of the newest entry."""
        row = self.db.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        return (0, _FIRST_HASH) if row is None else (int(row[0]), str(row[1]))

    def append(self, kind: Kind, study: str, body: dict[str, Any]) -> Entry:
        """Add an entry; inside `exclusive`."""
        number, previous = self.head()
        row = (number + 1, datetime.now(UTC).isoformat(timespec="seconds"), kind, study, canonical_json(body))
        row = (*row, _hash_after(previous, row))
        self.db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
        return Entry.of(row)

    def keep(self, train: bytes, holdout: bytes) -> str:
        """Add packed fingerprints, once, and return their hash, which an entry has to hold; inside `exclusive`."""
        digest = packed_digest(train, holdout)
        self.db.execute("INSERT OR IGNORE INTO fingerprints VALUES (?, ?, ?)", (digest, train, holdout))
        return digest

    def kept(self, digest: str) -> tuple[bytes, bytes]:
        """The packed fingerprints of a hash."""
        return self.db.execute("SELECT train, holdout FROM fingerprints WHERE hash = ?", (digest,)).fetchone()

    @contextmanager
    def exclusive(self, *, patient: bool = False) -> Iterator[None]:
        """Hold the write lock; commit at the end, or undo everything.

        Args:
            patient: wait long for it, since what is written would be lost otherwise.

        Raises:
            StorageError: the file cannot be written, or the head file is not this ledger's.
        """
        try:
            self.db.execute(f"PRAGMA busy_timeout={1000 * (_LONG_SECONDS if patient else _WAIT_SECONDS)}")
            self.db.execute("BEGIN IMMEDIATE")
            problem = self._head_problem()  # it may have been taken away since the ledger was opened
            if problem:
                raise StorageError(problem, where=str(self.state / SQLITE), remedy=RESTORE)
            yield
            number, newest = self.head()
            self.db.execute("COMMIT")
            # After the commit: a head that lags behind is harmless, one that runs ahead would look like a lost entry.
            write_json(self.state / HEAD, {"number": number, "hash": newest})
        except sqlite3.Error as error:
            self._rollback()
            raise StorageError(
                f"the ledger cannot be written ({error})", where=str(self.state / SQLITE),
                remedy="Free some space or end the other process; what is reserved stays counted.",
            ) from error  # fmt: skip
        except BaseException:
            self._rollback()
            raise

    def problems(self) -> list[str]:
        """What shows that entries or fingerprints were changed, removed or inserted; empty when all is well."""
        try:
            version = int(self.db.execute("PRAGMA user_version").fetchone()[0])
            if version != _VERSION:
                return [f"the ledger is of version {version}, which this version of synthward does not read"]
            head = self._head_problem()  # before the entries: another process may add one in between
            found = self._entry_problem() or self._key_problem() or head or self._fingerprint_problem()
        except sqlite3.Error as error:
            found = f"the ledger cannot be read ({error})"
        return [found] if found else []

    def _entry_problem(self) -> str:
        previous, expected = _FIRST_HASH, 0
        for expected, row in enumerate(self.db.execute("SELECT * FROM entries ORDER BY number"), start=1):
            *said, found = row
            sound = all(isinstance(part, str) for part in said[1:]) and found == _hash_after(previous, said)
            if not sound or said[0] != expected or (said[2] == "begun") != (expected == 1):
                return f"the ledger was changed at entry {expected}"
            previous = found
        return "" if expected else "the ledger has no entry"

    def _key_problem(self) -> str:
        known = self.entries("number = 1")[0].body.get("key") == _seal(self.key)
        return "" if known else f"{KEY} is missing or of another ledger"

    def _fingerprint_problem(self) -> str:
        wanted = {entry.body["fingerprints"] for entry in self.entries("kind = 'approved'")}
        rows = self.db.execute("SELECT hash, train, holdout FROM fingerprints").fetchall()
        sound = all(
            isinstance(train, bytes) and isinstance(holdout, bytes) and digest == packed_digest(train, holdout)
            for digest, train, holdout in rows
        )
        return "" if sound and {row[0] for row in rows} == wanted else "the ledger's fingerprints were changed"

    def strangers(self, replies: frozenset[str], states: frozenset[str]) -> list[str]:
        """Stored answers and training states that the ledger knows nothing of: it is older than they are.

        Args:
            replies, states: names of files, listed before the ledger was read.
        """
        reserved = self.db.execute(
            "SELECT DISTINCT study, json_extract(body, '$.request') FROM entries WHERE kind = 'reserved'"
        ).fetchall()
        unknown = sorted(replies - {f"{request}.reply" for _, request in reserved})
        studies = {study[:16] for study, _ in reserved}
        unknown += sorted(name for name in states if name.split("-")[1].removesuffix(".safetensors") not in studies)
        return [f"the ledger does not know {unknown[0]}: it is older than what lies beside it"] if unknown else []

    def _head_problem(self) -> str:
        """What is wrong with the head file, in words; empty when nothing is."""
        try:
            head = read_json(self.state / HEAD)
            number, newest = min(int(head["number"]), 2**62), str(head["hash"])
        except (CheckpointError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return f"the head file {HEAD} is missing or unreadable"
        row = self.db.execute("SELECT hash FROM entries WHERE number = ?", (number,)).fetchone() if number > 0 else None
        if row is None:
            return f"the ledger ends at entry {self.head()[0]}, but entry {number} was written"
        return "" if row[0] == newest else f"the ledger was changed at entry {number} or before"

    def _fill(self) -> None:
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("BEGIN IMMEDIATE")
        for table, columns in _TABLES.items():
            self.db.execute(f"CREATE TABLE {table} ({columns})")
            for what in ("update", "delete"):
                self.db.execute(
                    f"CREATE TRIGGER {table}_no_{what} BEFORE {what} ON {table}"
                    " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
                )
        self.append("begun", "", {"ledger": secrets.token_hex(16), "key": _seal(self.key)})
        number, newest = self.head()
        self.db.execute(f"PRAGMA user_version={_VERSION}")
        self.db.execute("COMMIT")
        write_json(self.state / HEAD, {"number": number, "hash": newest})

    def _rollback(self) -> None:
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")


def _connect(path: Path) -> sqlite3.Connection:
    """Of a file that is there: none is made."""
    uri = f"file:{quote(os.fsencode(path.resolve()))}?mode=rw"
    db = sqlite3.connect(uri, uri=True, timeout=_WAIT_SECONDS, isolation_level=None)
    db.execute("PRAGMA synchronous=FULL")
    return db


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, readable for its owner alone."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _hash_after(previous: str, said: Sequence[Any]) -> str:
    """The hash of an entry: over the hash before it and what it says, as it stands in the table."""
    return hashlib.sha256(canonical_json([previous, *said]).encode()).hexdigest()


def _seal(key: bytes) -> str:
    """By which a ledger knows its key again."""
    return hmac.digest(key, b"synthward ledger key", "sha256").hex()


def _trace(state: Path) -> str:
    """A file that only a ledger could have left, by name; or nothing."""
    return next((path.name for pattern in _TRACES for path in sorted(state.glob(pattern))), "")


def _beside(state: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the stored answers and of the training states."""
    replies = frozenset(path.name for path in state.glob(_TRACES[4]))
    return replies, frozenset(path.name for pattern in _TRACES[5:7] for path in state.glob(pattern))


def _no_ledger(state: Path) -> NoReturn:
    found = _trace(state)
    if found:
        raise StorageError(f"the ledger is gone: {found} is here, {SQLITE} is not", where=str(state), remedy=RESTORE)
    raise NoLedger(
        "there is no ledger here", where=str(state),
        remedy="A new site begins one with synthward-site init. If this site has answered before: mount or restore the"
        " whole state folder from backup (ledger.sqlite, ledger.head, ledger.key, replies); see docs/site.md.",
    )  # fmt: skip
