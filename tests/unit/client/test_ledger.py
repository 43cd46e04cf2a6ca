"""The ledger: never under-counts, never passes a ceiling, outlives every process."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

import client.privacy.ledger as ledger_module
from client.privacy.ledger import Ceiling, Ledger
from common.accounting import MechanismPlan, PrivacyLoss, epsilon_of
from common.errors import BudgetError, StorageError

PLAN = MechanismPlan("train", "train", 1.5, 0.1, 10, 6, 1.0)
WIDE = Ceiling(50.0, 1e-5, "rdp")


def _reserve(ledger, plan=PLAN, study="s", request="r", study_ceiling=WIDE, ceiling=WIDE):
    return ledger.reserve(plan, study=study, request=request, study_ceiling=study_ceiling, ceiling=ceiling)


def _spent(ledger, study=None):
    return ledger.spent(delta=1e-5, accountant="rdp", study=study)


def test_crash_between_reserve_and_confirm_counts_as_spent(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger)
    ledger.close()  # the process ends here
    again = Ledger(tmp_path / "ledger.sqlite")
    assert _spent(again)["train"] == epsilon_of([PLAN.loss], delta=1e-5, accountant="rdp")
    assert again.counts("s") == (1, 0)


def test_spending_composes_over_restarts_as_one_run_would(tmp_path):
    for number in range(4):
        ledger = Ledger(tmp_path / "ledger.sqlite")
        ledger.confirm(*_reserve(ledger, request=str(number)))
        ledger.close()
    whole = MechanismPlan("train", "train", 1.5, 0.1, 40, 1, 1.0)
    assert _spent(Ledger(tmp_path / "ledger.sqlite"))["train"] == epsilon_of([whole.loss], delta=1e-5, accountant="rdp")


def test_refused_request_leaves_ledger_unchanged(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger)
    before = _spent(ledger)
    tight = Ceiling(before["train"] + 0.01, 1e-5, "rdp")
    with pytest.raises(BudgetError, match="ceiling"):
        _reserve(ledger, ceiling=tight)
    with pytest.raises(BudgetError, match="this study"):
        _reserve(ledger, study_ceiling=tight)
    assert _spent(ledger) == before
    assert ledger.counts("s") == (1, 0)


def test_the_sites_ceiling_holds_over_all_studies(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger, study="first")
    one = _spent(ledger)["train"]
    with pytest.raises(BudgetError, match="of the site"):
        _reserve(ledger, study="second", ceiling=Ceiling(one * 1.05, 1e-5, "rdp"))


def test_no_more_releases_than_planned(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for _ in range(PLAN.releases):
        _reserve(ledger)
    with pytest.raises(BudgetError, match="all 6 planned releases"):
        _reserve(ledger)


def test_partitions_are_counted_apart(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger)
    _reserve(ledger, MechanismPlan("evaluate", "holdout", 3.0, 1.0, 1, 1, 1.0))
    spent = _spent(ledger)
    assert spent["holdout"] < spent["train"]
    assert spent["holdout"] > 0


def test_rows_cannot_be_changed_or_deleted(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger)
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    for statement in ("DELETE FROM entries", "UPDATE entries SET body = '{}'"):
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            db.execute(statement)
    db.close()


def test_a_file_that_is_no_ledger_is_refused_in_one_line(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database, certainly not one" * 100)
    with pytest.raises(StorageError, match=r"ledger\.sqlite: the ledger cannot be opened"):
        Ledger(path)


def test_a_ledger_of_a_newer_version_is_not_touched(tmp_path):
    Ledger(tmp_path / "ledger.sqlite").close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StorageError, match="newer version"):
        Ledger(tmp_path / "ledger.sqlite")


def _change(path, *statements):
    """As somebody with the file in hand would: the triggers are no obstacle."""
    db = sqlite3.connect(path)
    for statement in ("DROP TRIGGER entries_no_update", "DROP TRIGGER entries_no_delete", *statements):
        db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("statement", "finding"),
    [("UPDATE entries SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE number = 3", "changed at entry 3"),
     ("UPDATE entries SET at = '2020-01-01T00:00:00+00:00' WHERE number = 1", "changed at entry 1"),
     ("UPDATE entries SET body = 'no json' WHERE number = 2", "changed at entry 2"),
     ("DELETE FROM entries WHERE number = 2", "changed at entry 2"),
     ("DELETE FROM entries WHERE number >= 4", "ends at entry 3, but entry 4 was written"),
     ("INSERT INTO entries SELECT 5, at, kind, study, body, hash FROM entries WHERE number = 4", "changed at entry 5")],
)  # fmt: skip
def test_an_edited_missing_or_inserted_entry_shows_and_the_site_spends_nothing_more(tmp_path, statement, finding):
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    for number in range(4):
        _reserve(ledger, request=str(number))
    ledger.close()
    Ledger(path).close()
    _change(path, statement)
    with pytest.raises(StorageError, match=finding):
        Ledger(path)


def test_a_missing_head_file_shows(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger)
    (tmp_path / "ledger.head").unlink()
    with pytest.raises(StorageError, match="head file ledger.head is missing"):
        Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(StorageError, match="head file ledger.head is missing"):
        _reserve(ledger)


def test_a_head_file_that_lags_behind_after_a_crash_is_sound(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    _reserve(ledger)
    behind = (tmp_path / "ledger.head").read_bytes()
    _reserve(ledger)
    (tmp_path / "ledger.head").write_bytes(behind)  # killed between the commit and the head file
    assert Ledger(tmp_path / "ledger.sqlite").counts("s") == (2, 0)


VERSION_1 = """
CREATE TABLE reservations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, study TEXT NOT NULL, mechanism TEXT NOT NULL,
    request TEXT NOT NULL, partition TEXT NOT NULL, noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL,
    steps INTEGER NOT NULL, sensitivity REAL NOT NULL);
CREATE TABLE confirmations (reservation INTEGER PRIMARY KEY REFERENCES reservations(id), at TEXT NOT NULL);
CREATE TRIGGER no_change BEFORE UPDATE ON reservations BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON reservations BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
INSERT INTO reservations VALUES (1, '2026-01-01', 's', 'counts', 'r1', 'train', 4.1234567890123, 1.0, 1, 1.0);
INSERT INTO reservations VALUES (2, '2026-01-02', 's', 'train', 'r2', 'train', 1.5, 0.1, 10, 1.0);
INSERT INTO reservations VALUES (3, '2026-01-03', 't', 'evaluate', 'r3', 'holdout', 3.0, 1.0, 1, 2.0);
INSERT INTO confirmations VALUES (1, '2026-01-01');
INSERT INTO confirmations VALUES (3, '2026-01-03');
PRAGMA user_version=1;
"""


def test_a_ledger_of_version_1_keeps_every_loss(tmp_path):
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.executescript(VERSION_1)
    db.close()
    for _ in range(2):  # taken over once
        ledger = Ledger(tmp_path / "ledger.sqlite")
        assert ledger.losses("train") == [PrivacyLoss(4.1234567890123, 1.0, 1), PrivacyLoss(1.5, 0.1, 10)]
        assert ledger.losses("holdout", study="t") == [PrivacyLoss(3.0, 1.0, 1)]
        assert ledger.counts("s") == (2, 1)
        assert ledger.counts("t") == (1, 1)
        assert [entry.number for entry in ledger.entries()] == [1, 2, 3, 4, 5]
        ledger.close()


def test_refusals_are_written_but_cannot_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "MOST_REFUSALS", 3)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for _ in range(5):
        ledger.note("refused", "s", rule="policy.max_epsilon", asked="9", allowed="8")
    assert [entry.kind for entry in ledger.entries()] == ["refused"] * 3
    assert _spent(ledger) == {"train": 0.0, "holdout": 0.0}


class _Failing:
    """A connection that fails before or after its n-th statement, as a crash or a full disk there would."""

    def __init__(self, db, at, after):
        self._db, self._left, self._after = db, at, after

    def execute(self, *given):
        self._left -= 1
        if self._left == 0 and not self._after:
            raise sqlite3.OperationalError("disk I/O error")
        result = self._db.execute(*given)
        if self._left == 0:
            raise sqlite3.OperationalError("disk I/O error")
        return result

    def __getattr__(self, name):
        return getattr(self._db, name)


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_at_any_statement_leaves_a_sound_ledger_that_counts_whatever_was_granted(tmp_path, after):
    reached = 0
    for at in range(1, 40):
        folder = tmp_path / str(at)
        ledger = Ledger(folder / "ledger.sqlite")
        real, granted = ledger._db, 0
        ledger._db = _Failing(real, at, after)
        try:
            number = _reserve(ledger)
            granted = 1
            ledger.confirm(*number)
            ended = True
        except StorageError:
            ended = False
        real.close()
        again = Ledger(folder / "ledger.sqlite")
        assert granted <= again.counts("s")[0] <= 1
        assert again.counts("s")[1] <= again.counts("s")[0]
        again.close()
        if ended:
            reached = at
            break
    assert 10 < reached < 40  # every statement was hit once, and then none was left


def _race(path: str, ceiling: float, queue) -> None:
    ledger = Ledger(Path(path))
    try:
        _reserve(ledger, ceiling=Ceiling(ceiling, 1e-5, "rdp"))
        queue.put(True)
    except BudgetError:
        queue.put(False)


def test_two_processes_on_one_ledger_cannot_both_pass_the_ceiling(tmp_path):
    Ledger(tmp_path / "ledger.sqlite").close()
    ceiling = epsilon_of([PLAN.loss], delta=1e-5, accountant="rdp") * 1.05  # room for exactly one
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path / "ledger.sqlite"), ceiling, queue)) for _ in range(2)]
    for racer in racers:
        racer.start()
    won = [queue.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(60)
    assert sorted(won) == [False, True]
