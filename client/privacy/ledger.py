"""A site's own durable account of every privacy loss: reserve, then compute, then confirm.

SPDX-License-Identifier: Apache-2.0

One SQLite file at the site (WAL, synchronous=FULL). Rows are only ever added. A reservation counts as spent from the
moment it is written, confirmed or not: a crash can waste budget but never hide a loss. The write lock is held from
reading the history to writing the reservation, so two processes cannot both pass the ceiling.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.accounting import PARTITIONS, MechanismPlan, Partition, PrivacyLoss, epsilon_of
from common.errors import BudgetError, StorageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS reservations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, study TEXT NOT NULL, mechanism TEXT NOT NULL,
    request TEXT NOT NULL, partition TEXT NOT NULL CHECK (partition IN ('train', 'holdout')),
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL, sensitivity REAL NOT NULL);
CREATE TABLE IF NOT EXISTS confirmations (
    reservation INTEGER PRIMARY KEY REFERENCES reservations(id), at TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON reservations
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON reservations
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Ceiling:
    """An upper bound that the composed losses must not pass."""

    epsilon: float
    delta: float
    accountant: str


class Ledger:
    """The account of one site, in one file.

    Raises:
        StorageError: the file cannot be opened, is not a ledger, or is of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise StorageError("the ledger is of a newer version", where=str(path), remedy="Update synthward.")
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"the ledger cannot be opened ({error})", where=str(path), remedy="Nothing was spent; check the file."
            ) from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
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

    def reserve(
        self, plan: MechanismPlan, *, study: str, request: str, study_ceiling: Ceiling, ceiling: Ceiling
    ) -> int:
        """Write the loss of one request of `plan` as spent, or refuse.

        Args:
            study: the study's SHA-256.
            request: the request's identity.
            study_ceiling: bounds this study's losses on the partition.
            ceiling: bounds the losses of all studies on the partition.

        Returns:
            The reservation's number, to confirm.

        Raises:
            BudgetError: the plan's releases are used up, or a ceiling would be passed; nothing is written.
            StorageError: the file cannot be written; nothing is reserved.
        """
        with self._exclusive():
            used = self._count(study, plan.name)
            if used >= plan.releases:
                raise BudgetError(
                    f"all {plan.releases} planned releases of '{plan.name}' are used up", where="ledger",
                    remedy="The stage ends here; its results so far stand.",
                )  # fmt: skip
            for bound, scope in ((study_ceiling, study), (ceiling, None)):
                losses = [*self.losses(plan.partition, study=scope), plan.loss]
                cost = epsilon_of(losses, delta=bound.delta, accountant=bound.accountant)
                if cost > bound.epsilon:
                    raise BudgetError(
                        f"'{plan.name}' would bring epsilon to {cost:.3f}, over the ceiling {bound.epsilon:g} of "
                        + ("this study" if scope else "the site"), where="ledger",
                        remedy="Nothing was spent; the site stops here.",
                    )  # fmt: skip
            row = (_now(), study, plan.name, request, plan.partition, plan.noise_multiplier, plan.sample_rate,
                   plan.steps, plan.sensitivity)  # fmt: skip
            cursor = self._db.execute(
                "INSERT INTO reservations (at, study, mechanism, request, partition, noise_multiplier, sample_rate,"
                " steps, sensitivity) VALUES (?,?,?,?,?,?,?,?,?)", row,
            )  # fmt: skip
            number = cursor.lastrowid
        if number is None:
            raise StorageError("the ledger gave no row number", where=str(self.path))
        return number

    def confirm(self, reservation: int) -> None:
        """Note that the reserved mechanism has run to its end."""
        with self._exclusive():
            self._db.execute("INSERT INTO confirmations (reservation, at) VALUES (?, ?)", (reservation, _now()))

    def losses(self, partition: Partition, *, study: str | None = None) -> list[PrivacyLoss]:
        """All losses on a partition, reserved or confirmed; of one study or of all."""
        rows = self._db.execute(
            "SELECT noise_multiplier, sample_rate, steps FROM reservations"
            " WHERE partition = ? AND (? IS NULL OR study = ?) ORDER BY id", (partition, study, study),
        )  # fmt: skip
        return [PrivacyLoss(float(sigma), float(q), int(steps)) for sigma, q, steps in rows]

    def spent(self, *, delta: float, accountant: str, study: str | None = None) -> dict[Partition, float]:
        """Epsilon spent so far on each partition."""
        return {
            partition: epsilon_of(self.losses(partition, study=study), delta=delta, accountant=accountant)
            for partition in PARTITIONS
        }

    def counts(self, study: str) -> tuple[int, int]:
        """(reserved, confirmed) requests of a study."""
        reserved = self._db.execute("SELECT COUNT(*) FROM reservations WHERE study = ?", (study,)).fetchone()[0]
        confirmed = self._db.execute(
            "SELECT COUNT(*) FROM confirmations c JOIN reservations r ON r.id = c.reservation WHERE r.study = ?",
            (study,),
        ).fetchone()[0]
        return int(reserved), int(confirmed)

    def _count(self, study: str, mechanism: str) -> int:
        row = self._db.execute(
            "SELECT COUNT(*) FROM reservations WHERE study = ? AND mechanism = ?", (study, mechanism)
        ).fetchone()
        return int(row[0])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
