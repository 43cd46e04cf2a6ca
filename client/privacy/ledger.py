"""A site's own durable account of every privacy loss: reserve, then compute, then confirm.

SPDX-License-Identifier: Apache-2.0

One SQLite file at the site (WAL, synchronous=FULL). Entries are only ever added, and each carries the hash of all
before it, so that an edited, missing or inserted entry shows; a small file beside it holds the newest hash, so that
entries cut off at the end show too. A reservation counts as spent from the moment it is written, confirmed or not: a
crash can waste budget but never hide a loss. The write lock is held from reading the history to writing the
reservation, so two processes cannot both pass a ceiling.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from common.accounting import PARTITIONS, MechanismPlan, Partition, PrivacyLoss, epsilon_of
from common.errors import BudgetError, CheckpointError, StorageError
from common.files import read_json, write_json
from common.study import canonical_json

Kind = Literal["reserved", "confirmed", "refused", "approved", "revoked"]
MOST_REFUSALS = 1000  # of one study: a coordinator that asks in vain without end must not fill the disk
_FIRST_HASH = hashlib.sha256(b"synthward ledger").hexdigest()
_VERSION = 2
_SCHEMA = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, study TEXT NOT NULL,"
    " body TEXT NOT NULL, hash TEXT NOT NULL)",
    *(
        f"CREATE TRIGGER entries_no_{what} BEFORE {what} ON entries"
        " BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for what in ("update", "delete")
    ),
)
_VERSION_1 = (  # what version 1 kept, as entries of this version, in the order in which things happened
    "SELECT at, 'reserved', study, json_object('request', request, 'mechanism', mechanism, 'partition', partition,"
    " 'noise_multiplier', noise_multiplier, 'sample_rate', sample_rate, 'steps', steps, 'sensitivity', sensitivity),"
    " id FROM reservations ORDER BY id",
    "SELECT reservation, at FROM confirmations",
)


@dataclass(frozen=True)
class Ceiling:
    """An upper bound that the composed losses must not pass."""

    epsilon: float
    delta: float
    accountant: str


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        number: 1, 2, 3, ... without a gap.
        at: UTC, ISO 8601.
        study: the study's SHA-256.
        body: of "reserved" the mechanism's parameters; of "confirmed" the reservation's number; of "refused" the rule,
            what was asked and what is allowed; of "approved" and "revoked" who did it.
        hash: SHA-256 over the hash before and this entry.
    """

    number: int
    at: str
    kind: Kind
    study: str
    body: dict[str, Any]
    hash: str

    def hash_after(self, previous: str) -> str:
        """What `hash` has to be."""
        said = canonical_json([previous, self.number, self.at, self.kind, self.study, self.body])
        return hashlib.sha256(said.encode()).hexdigest()

    @property
    def loss(self) -> PrivacyLoss:
        """Of a reservation."""
        return PrivacyLoss(self.body["noise_multiplier"], self.body["sample_rate"], self.body["steps"])


class Ledger:
    """The account of one site, in one file.

    Raises:
        StorageError: the file cannot be opened, is not a ledger, is of a newer version, or has been changed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._head = path, path.with_suffix(".head")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            version = self._version()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the ledger cannot be opened ({error})", where=str(path), remedy="Nothing was spent; check the file."
            ) from error
        if version > _VERSION:
            self.close()
            raise StorageError("the ledger is of a newer version", where=str(path), remedy="Update synthward.")
        if version < _VERSION:
            self._create()
        problems = self.problems()
        if problems:
            self.close()
            raise StorageError(
                problems[0], where=str(path),
                remedy="Nothing was spent. Restore ledger and head file, then run `synthward-site verify-ledger`.",
            )  # fmt: skip

    def close(self) -> None:
        self._db.close()

    def reserve(
        self, *plans: MechanismPlan, study: str, request: str, study_ceiling: Ceiling, ceiling: Ceiling
    ) -> tuple[int, ...]:
        """Write the loss of one request of each plan as spent, or refuse all.

        Args:
            study: the study's SHA-256.
            request: the request's identity.
            study_ceiling: bounds this study's losses on each partition.
            ceiling: bounds the losses of all studies on each partition.

        Returns:
            The reservations' numbers, to confirm.

        Raises:
            BudgetError: a plan's releases are used up, or a ceiling would be passed; nothing is written.
            StorageError: the file cannot be written; nothing may be computed.
        """
        numbers = []
        with self._exclusive():
            for plan in plans:
                self._require(plan, study, study_ceiling, ceiling)
                body = {"request": request, "mechanism": plan.name, "partition": plan.partition,
                        "noise_multiplier": plan.noise_multiplier, "sample_rate": plan.sample_rate,
                        "steps": plan.steps, "sensitivity": plan.sensitivity}  # fmt: skip
                numbers.append(self._append("reserved", study, body))
        return tuple(numbers)

    def confirm(self, *reservations: int) -> None:
        """Note that the reserved mechanisms have run to their end."""
        with self._exclusive():
            for number in reservations:
                study = self._db.execute("SELECT study FROM entries WHERE number = ?", (number,)).fetchone()[0]
                self._append("confirmed", study, {"reservation": number})

    def note(self, kind: Literal["refused", "approved", "revoked"], study: str, **body: str | float) -> None:
        """Write what was refused, or who approved or revoked a study."""
        with self._exclusive():
            if kind != "refused" or self._count(study, "refused") < MOST_REFUSALS:
                self._append(kind, study, dict(body))

    def approval(self, study: str) -> Entry | None:
        """The approval of a study, if it has one that was not revoked."""
        query = "SELECT * FROM entries WHERE study = ? AND kind IN ('approved', 'revoked') ORDER BY number DESC LIMIT 1"
        row = self._db.execute(query, (study,)).fetchone()
        return None if row is None or row[2] == "revoked" else _entry(row)

    def entries(self) -> list[Entry]:
        """Everything, oldest first."""
        return [_entry(row) for row in self._db.execute("SELECT * FROM entries ORDER BY number")]

    def losses(self, partition: Partition, *, study: str | None = None) -> list[PrivacyLoss]:
        """All losses on a partition, reserved or confirmed; of one study or of all."""
        query = "SELECT * FROM entries WHERE kind = 'reserved' AND (? IS NULL OR study = ?) ORDER BY number"
        found = [_entry(row) for row in self._db.execute(query, (study, study))]
        return [entry.loss for entry in found if entry.body["partition"] == partition]

    def spent(self, *, delta: float, accountant: str, study: str | None = None) -> dict[Partition, float]:
        """Epsilon spent so far on each partition."""
        return {
            partition: epsilon_of(self.losses(partition, study=study), delta=delta, accountant=accountant)
            for partition in PARTITIONS
        }

    def counts(self, study: str) -> tuple[int, int]:
        """(reserved, confirmed) requests of a study."""
        return self._count(study, "reserved"), self._count(study, "confirmed")

    def problems(self) -> list[str]:
        """What shows that entries were changed, removed or inserted; empty when all is well."""
        try:  # before the entries: another process may add one in between
            head = read_json(self._head)
            number, newest = int(head["number"]), str(head["hash"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            return [f"the head file {self._head.name} is missing or unreadable"]
        hashes = [_FIRST_HASH]
        for expected, row in enumerate(self._db.execute("SELECT * FROM entries ORDER BY number"), start=1):
            if not _sound(row, expected, hashes[-1]):
                return [f"the ledger was changed at entry {expected}"]
            hashes.append(row[-1])
        if not 0 <= number < len(hashes) or hashes[number] != newest:
            return [f"the ledger ends at entry {len(hashes) - 1}, but entry {number} was written"]
        return []

    def head(self) -> tuple[int, str]:
        """(number, hash) of the newest entry: whoever notes it down can later show that nothing before it changed."""
        row = self._db.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        return (0, _FIRST_HASH) if row is None else (int(row[0]), str(row[1]))

    def _require(self, plan: MechanismPlan, study: str, study_ceiling: Ceiling, ceiling: Ceiling) -> None:
        query = "SELECT COUNT(*) FROM entries WHERE study=? AND kind='reserved' AND json_extract(body,'$.mechanism')=?"
        if self._db.execute(query, (study, plan.name)).fetchone()[0] >= plan.releases:
            raise BudgetError(
                f"all {plan.releases} planned releases of '{plan.name}' are used up", where="ledger.releases",
                asked=str(plan.releases + 1), allowed=str(plan.releases),
                remedy="The stage ends here; its results so far stand.",
            )  # fmt: skip
        for bound, scope in ((study_ceiling, study), (ceiling, None)):
            losses = [*self.losses(plan.partition, study=scope), plan.loss]
            cost = epsilon_of(losses, delta=bound.delta, accountant=bound.accountant)
            if cost > bound.epsilon:
                raise BudgetError(
                    f"'{plan.name}' would bring epsilon to {cost:.3f}, over the ceiling {bound.epsilon:g} of "
                    + ("this study" if scope else "the site"), where="ledger.ceiling", asked=f"{cost:.3f}",
                    allowed=f"{bound.epsilon:g}", remedy="Nothing was spent; the site stops here.",
                )  # fmt: skip

    def _append(self, kind: Kind, study: str, body: dict[str, Any], at: str | None = None) -> int:
        number, previous = self.head()
        entry = Entry(number + 1, at or datetime.now(UTC).isoformat(timespec="seconds"), kind, study, body, "")
        row = (entry.number, entry.at, kind, study, canonical_json(body), entry.hash_after(previous))
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
        return entry.number

    def _count(self, study: str, kind: Kind) -> int:
        query = "SELECT COUNT(*) FROM entries WHERE study = ? AND kind = ?"
        return int(self._db.execute(query, (study, kind)).fetchone()[0])

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _create(self) -> None:
        """Make the tables; take over what an older version kept."""
        with self._exclusive():
            if self._version() >= _VERSION:  # another process was quicker
                return
            for statement in _SCHEMA:
                self._db.execute(statement)
            if self._version() == 1:
                rows, confirmed = (self._db.execute(query).fetchall() for query in _VERSION_1)
                numbers = {
                    old: self._append("reserved", study, json.loads(body), at) for at, _, study, body, old in rows
                }
                studies = {old: study for _, _, study, _, old in rows}
                for old, at in confirmed:
                    self._append("confirmed", studies[old], {"reservation": numbers[old]}, at)
            self._db.execute(f"PRAGMA user_version={_VERSION}")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the write lock; commit at the end, or undo everything."""
        try:
            if not self._head.exists():  # before the first entry: from then on a missing head file is a finding
                if self._version() == _VERSION and self.head()[0]:
                    raise StorageError(f"the head file {self._head.name} is missing", where=str(self.path))
                write_json(self._head, {"number": 0, "hash": _FIRST_HASH})
            self._db.execute("BEGIN IMMEDIATE")
            yield
            number, newest = self.head()
            self._db.execute("COMMIT")
            # After the commit: a head that lags behind is harmless, one that runs ahead would look like a lost entry.
            write_json(self._head, {"number": number, "hash": newest})
        except sqlite3.Error as error:
            self._rollback()
            raise StorageError(
                f"the ledger cannot be written ({error})", where=str(self.path),
                remedy="Free some space or end the other process; nothing was computed.",
            ) from error  # fmt: skip
        except BaseException:
            self._rollback()
            raise

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")


def compose(entries: Sequence[Entry], partition: Partition, *, delta: float, accountant: str) -> float:
    """Epsilon of the reservations among these entries on one partition."""
    losses = [e.loss for e in entries if e.kind == "reserved" and e.body["partition"] == partition]
    return epsilon_of(losses, delta=delta, accountant=accountant)


def _entry(row: tuple[Any, ...]) -> Entry:
    number, at, kind, study, body, digest = row
    return Entry(int(number), at, kind, study, json.loads(body), digest)


def _sound(row: tuple[Any, ...], expected: int, previous: str) -> bool:
    try:
        entry = _entry(row)
        return entry.number == expected and entry.hash == entry.hash_after(previous)
    except (ValueError, TypeError):
        return False
