"""The ledger: never under-counts, never passes a ceiling, outlives every process."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from client.privacy.ledger import Ceiling, Ledger
from common.accounting import MechanismPlan, epsilon_of
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
        ledger.confirm(_reserve(ledger, request=str(number)))
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
    for statement in ("DELETE FROM reservations", "UPDATE reservations SET steps = 0"):
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
