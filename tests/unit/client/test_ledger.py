"""The ledger: never under-counts, never passes a ceiling, outlives every process."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import client.privacy.ledger as ledger_module
from client.privacy.fingerprints import Fingerprints
from client.privacy.ledger import Ceiling, Ledger, NoLedger
from common.accounting import MechanismPlan, StudyPlan, epsilon_of
from common.errors import BudgetError, PolicyRefusal, StorageError
from support.studies import tiny_study

PLAN = MechanismPlan(
    name="train", partition="train", noise_multiplier=1.5, sample_rate=0.1, steps=10, releases=6, sensitivity=1.0
)
EVALUATE = MechanismPlan(
    name="evaluate", partition="holdout", noise_multiplier=3.0, sample_rate=1.0, steps=1, releases=1, sensitivity=1.0
)
WHOLE = StudyPlan(mechanisms=(PLAN, EVALUATE))
WIDE = Ceiling(50.0, 1e-5, "rdp")
FIRST, SECOND = tiny_study(), tiny_study(study={"name": "second"})


def _reserve(ledger, plan=PLAN, study="s", request="r", study_ceiling=WIDE, ceiling=WIDE):
    return ledger.reserve(
        plan, study=study, request=request, study_ceiling=study_ceiling, ceiling=ceiling, approval=None
    )


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.create(tmp_path / "state")
    yield ledger
    ledger.close()


def _data(train, holdout, digest="d"):
    """Fingerprints of made-up images: _data("ab", "cd") has two in train and two in the holdout."""
    sides = (frozenset(f"i{image:0>15}".encode() for image in side) for side in (train, holdout))
    return Fingerprints(*sides, digest)


def _approve(ledger, study=FIRST, data=None, by="Dr. A"):
    return ledger.approve(study, WHOLE, data or _data("ab", "cd"), by=by)


def _spent(ledger, study=None):
    return ledger.spent(delta=1e-5, accountant="rdp", study=study)


def test_crash_between_reserve_and_confirm_counts_as_spent(ledger):
    _reserve(ledger)
    ledger.close()  # the process ends here
    again = Ledger.open(ledger.state)
    assert _spent(again)["train"] == epsilon_of([PLAN.loss], delta=1e-5, accountant="rdp")
    assert again.counts("s") == (1, 0)


def test_spending_composes_over_restarts_as_one_run_would(ledger):
    for number in range(4):
        again = Ledger.open(ledger.state)
        with closing(again), again.confirming(*_reserve(again, request=str(number)), study="s", approval=None):
            pass
    whole = PLAN.loss._replace(steps=40)
    assert _spent(ledger)["train"] == epsilon_of([whole], delta=1e-5, accountant="rdp")


def test_losses_of_every_kind_are_all_composed_exactly(ledger):
    plans = [PLAN, PLAN.model_copy(update={"noise_multiplier": 4.1234567890123457}), PLAN, EVALUATE,
             PLAN.model_copy(update={"sample_rate": 1 / 3}), PLAN.model_copy(update={"steps": 7})]  # fmt: skip
    for number, plan in enumerate(plans):
        _reserve(ledger, plan, study="st"[number % 2], request=str(number))
    for study in (None, "s", "t"):
        mine = [plan for number, plan in enumerate(plans) if study in (None, "st"[number % 2])]
        for partition in ("train", "holdout"):
            steps = {}
            for loss in ledger.losses(partition, study=study):
                steps[loss[:2]] = steps.get(loss[:2], 0) + loss.steps
            wanted = {}
            for plan in mine:
                if plan.partition == partition:
                    wanted[plan.loss[:2]] = wanted.get(plan.loss[:2], 0) + plan.steps
            assert steps == wanted


def test_refused_request_leaves_ledger_unchanged(ledger):
    _reserve(ledger)
    before = _spent(ledger)
    tight = Ceiling(before["train"] + 0.01, 1e-5, "rdp")
    with pytest.raises(BudgetError, match="ceiling"):
        _reserve(ledger, ceiling=tight)
    with pytest.raises(BudgetError, match="this study"):
        _reserve(ledger, study_ceiling=tight)
    assert _spent(ledger) == before
    assert ledger.counts("s") == (1, 0)


def test_the_sites_ceiling_holds_over_all_studies(ledger):
    _reserve(ledger, study="first")
    one = _spent(ledger)["train"]
    with pytest.raises(BudgetError, match="of the site"):
        _reserve(ledger, study="second", ceiling=Ceiling(one * 1.05, 1e-5, "rdp"))


def test_no_more_releases_than_planned(ledger):
    for _ in range(PLAN.releases):
        _reserve(ledger)
    with pytest.raises(BudgetError, match="all 6 planned releases"):
        _reserve(ledger)


def test_partitions_are_counted_apart(ledger):
    _reserve(ledger)
    _reserve(ledger, EVALUATE)
    spent = _spent(ledger)
    assert spent["holdout"] < spent["train"]
    assert spent["holdout"] > 0


@pytest.mark.parametrize("table", ["entries", "fingerprints"])
def test_rows_cannot_be_changed_or_deleted(ledger, table):
    _approve(ledger)
    with closing(sqlite3.connect(ledger.state / "ledger.sqlite")) as db:
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET hash = 'x'"):
            with pytest.raises(sqlite3.DatabaseError, match="append-only"):
                db.execute(statement)


def _change(state, *statements):
    """As somebody with the file in hand would: the triggers are no obstacle."""
    with closing(sqlite3.connect(state / "ledger.sqlite")) as db:
        for table in ("entries", "fingerprints"):
            for what in ("update", "delete"):
                db.execute(f"DROP TRIGGER {table}_no_{what}")
        for statement in statements:
            db.execute(statement)
        db.commit()


@pytest.mark.parametrize(
    ("statement", "finding"),
    [("UPDATE entries SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE number = 4", "changed at entry 4"),
     ("UPDATE entries SET at = '2020-01-01T00:00:00+00:00' WHERE number = 1", "changed at entry 1"),
     ("UPDATE entries SET body = 'no json' WHERE number = 2", "changed at entry 2"),
     ("UPDATE entries SET body = replace(body, '1.5', '9.5') WHERE kind = 'approved'", "changed at entry 2"),
     ("DELETE FROM entries WHERE number = 2", "changed at entry 2"),
     ("DELETE FROM entries WHERE number >= 5", "ends at entry 4, but entry 5 was written"),
     ("DELETE FROM entries", "no entry"),
     ("INSERT INTO entries SELECT 6, at, kind, study, body, hash FROM entries WHERE number = 5", "changed at entry 6"),
     ("UPDATE fingerprints SET train = holdout, holdout = train", "fingerprints were changed"),
     ("UPDATE fingerprints SET train = 'text'", "fingerprints were changed"),
     ("DELETE FROM fingerprints", "fingerprints were changed"),
     ("INSERT INTO fingerprints VALUES ('x', x'00', x'00')", "fingerprints were changed"),
     ("DROP TABLE fingerprints", "cannot be read"), ("DROP TABLE entries", "cannot be read"),
     ("PRAGMA user_version=99", "of version 99"), ("PRAGMA user_version=2", "of version 2")],
)  # fmt: skip
def test_an_edited_missing_or_inserted_row_shows_and_the_site_spends_nothing_more(ledger, statement, finding):
    _approve(ledger)
    for number in range(3):
        _reserve(ledger, request=str(number))
    ledger.close()
    Ledger.open(ledger.state).close()
    _change(ledger.state, statement)
    with pytest.raises(StorageError, match=finding) as stopped:
        Ledger.open(ledger.state)
    assert "Restore the whole state folder" in stopped.value.remedy


@given(st.data())
@settings(max_examples=40)
def test_no_changed_file_is_taken_for_another_history(data):
    """Whatever bytes of the three files are changed: either they are refused, or every loss is still there."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        with closing(Ledger.create(state)) as ledger:
            _approve(ledger)
            _reserve(ledger)
            before = [entry.hash for entry in ledger.entries()]
        path = state / data.draw(st.sampled_from(["ledger.sqlite", "ledger.head", "ledger.key"]))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["cut", "flip", "fill"]))
        if change == "cut":
            content = content[:at]
        elif change == "flip":
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            piece = data.draw(st.binary(min_size=1, max_size=64))
            content[at : at + len(piece)] = piece
        path.write_bytes(content)
        try:
            with closing(Ledger.open(state)) as again:
                assert [entry.hash for entry in again.entries()] == before
                assert _spent(again)["train"] == epsilon_of([PLAN.loss], delta=1e-5, accountant="rdp")
        except StorageError:
            pass


def test_a_missing_head_file_shows_also_to_a_process_that_has_the_ledger_open(ledger):
    _reserve(ledger)
    (ledger.state / "ledger.head").unlink()
    with pytest.raises(StorageError, match="head file ledger.head is missing"):
        Ledger.open(ledger.state)
    with pytest.raises(StorageError, match="head file ledger.head is missing"):
        _reserve(ledger)
    assert ledger.counts("s") == (1, 0)


def test_a_head_file_that_lags_behind_after_a_crash_is_sound(ledger):
    _reserve(ledger)
    behind = (ledger.state / "ledger.head").read_bytes()
    _reserve(ledger)
    (ledger.state / "ledger.head").write_bytes(behind)  # killed between the commit and the head file
    assert Ledger.open(ledger.state).counts("s") == (2, 0)


def _tree(folder):
    """Every file; SQLite's own lock file, and its log while it is empty, say nothing."""
    files = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
    return {name: data for name, data in files.items() if not name.endswith("-shm") and (data or name[-4:] != "-wal")}


@pytest.mark.parametrize(
    ("loss", "finding"),
    [(lambda state: shutil.rmtree(state), "there is no ledger here"),
     (lambda state: [p.unlink() for p in state.glob("ledger.*")], "gone: r.reply is here"),
     (lambda state: (state / "ledger.sqlite").unlink(), "gone: ledger.head is here"),
     (lambda state: [(state / f"ledger.{end}").unlink() for end in ("sqlite", "head")], "gone: ledger.key is here"),
     (lambda state: (state / "ledger.sqlite").write_bytes(b""), "the ledger is empty"),
     (lambda state: os.truncate(state / "ledger.sqlite", 4096), "cannot be read"),
     (lambda state: os.truncate(state / "ledger.sqlite", 100), "cannot be read"),
     (lambda state: (state / "ledger.sqlite").write_bytes(b"no database, certainly not one" * 99), "cannot be read"),
     (lambda state: (state / "ledger.key").unlink(), "ledger.key is missing or of another ledger"),
     (lambda state: (state / "ledger.key").write_bytes(b"k" * 32), "ledger.key is missing or of another ledger"),
     (lambda state: (state / "ledger.head").unlink(), "head file ledger.head is missing"),
     (lambda state: (state / "ledger.head").write_text('{"number": 1e999, "hash": 3}'), "missing or unreadable"),
     (lambda state: (state / "replies" / "other.reply").touch(), "does not know other.reply"),
     (lambda state: (state / "adam-0123456789abcdef.safetensors").touch(), "does not know adam-0123456789abcdef"),
     (lambda state: (state / "reference-0123456789abcdef.safetensors").touch(), "does not know reference-")],
)  # fmt: skip
def test_a_lost_or_foreign_part_of_the_state_stops_the_site_and_nothing_is_written(ledger, loss, finding):
    _reserve(ledger)
    ledger.close()
    state = ledger.state
    (state / "replies" / "r.reply").touch()
    (state / "adam-s.safetensors").touch()
    Ledger.open(state).close()
    loss(state)
    before = _tree(state.parent)
    with pytest.raises(StorageError, match=finding) as stopped:
        Ledger.open(state)
    assert "estore" in stopped.value.remedy
    assert _tree(state.parent) == before
    if state.exists() and any(state.iterdir()):
        with pytest.raises(StorageError, match="this site has a ledger, or had one"):
            Ledger.create(state)
        assert _tree(state.parent) == before


def test_a_ledger_restored_from_an_older_backup_shows_by_the_answers_beside_it(ledger, tmp_path):
    shutil.copytree(ledger.state, tmp_path / "backup")
    _reserve(ledger, request="newer")
    ledger.close()
    for name in ("ledger.sqlite", "ledger.head"):
        shutil.copy(tmp_path / "backup" / name, ledger.state / name)
    Ledger.open(ledger.state).close()  # with no answer left, nothing in the folder can show it
    (ledger.state / "replies" / "newer.reply").touch()
    with pytest.raises(StorageError, match="older than what lies beside it"):
        Ledger.open(ledger.state)


def test_only_an_absent_ledger_is_told_apart(tmp_path):
    with pytest.raises(NoLedger, match="mount or restore the whole state folder"):
        Ledger.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_file_is_for_its_owner_alone_whoevers_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with closing(Ledger.create(tmp_path / "state")) as ledger:
            _reserve(ledger)
            modes = {path.name: path.stat().st_mode & 0o777 for path in [ledger.state, *ledger.state.rglob("*")]}
    finally:
        os.umask(before)
    assert {modes.pop("state"), modes.pop("replies")} == {0o700}
    assert {"ledger.sqlite", "ledger.head", "ledger.key", "site.log", "ledger.sqlite-wal"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_an_approval_pins_plan_and_data_until_it_is_revoked(ledger):
    assert ledger.approval(FIRST.sha256) is None
    _approve(ledger, by="Dr. A", data=_data("ab", "cd", digest="first data"))
    with closing(Ledger.open(ledger.state)) as again:
        approval = again.approval(FIRST.sha256)
    assert (approval.by, approval.plan, approval.data, approval.name) == ("Dr. A", WHOLE, "first data", "tiny")
    _approve(ledger, data=_data("abe", "cd", digest="more data"))
    assert ledger.approval(FIRST.sha256).data == "more data"
    assert [approval.study for approval in ledger.approvals()] == [FIRST.sha256]
    ledger.revoke(FIRST.sha256, by="Dr. B")
    ledger.revoke(FIRST.sha256, by="Dr. B")  # of what is not approved, nothing
    assert ledger.approval(FIRST.sha256) is None
    assert ledger.approvals() == []
    assert [entry.kind for entry in ledger.entries()] == ["begun", "approved", "approved", "revoked"]


@pytest.mark.parametrize(("train", "holdout"), [("cb", "ad"), ("abc", "d"), ("b", "acd")])
@pytest.mark.parametrize("how", ["spent", "still approved", "spent, then revoked"])
def test_a_record_that_changes_sides_between_two_studies_is_refused(ledger, train, holdout, how):
    _approve(ledger, FIRST, _data("ab", "cd"))
    if how != "still approved":
        _reserve(ledger, study=FIRST.sha256)
    if how == "spent, then revoked":
        ledger.revoke(FIRST.sha256, by="Dr. A")
    before = ledger.head()
    with pytest.raises(PolicyRefusal, match="on the other side .* study tiny .*Put them back"):
        _approve(ledger, SECOND, _data(train, holdout))
    assert ledger.head() == before
    assert ledger.approval(SECOND.sha256) is None


def test_the_same_study_cannot_be_approved_anew_with_records_on_the_other_side_once_it_has_spent(ledger):
    _approve(ledger, FIRST, _data("ab", "cd"))
    _approve(ledger, FIRST, _data("cd", "ab"))  # a mistake that was seen in time
    _reserve(ledger, study=FIRST.sha256)
    with pytest.raises(PolicyRefusal, match="4 images on the other side"):
        _approve(ledger, FIRST, _data("ab", "cd"))


def test_records_may_come_and_go_between_studies_and_an_approval_without_cost_binds_nobody(ledger):
    _approve(ledger, FIRST, _data("ab", "cd"))
    _reserve(ledger, study=FIRST.sha256)
    _approve(ledger, SECOND, _data("ae", "cdf"))
    _reserve(ledger, study=SECOND.sha256)
    unused = tiny_study(study={"name": "unused"})
    _approve(ledger, unused, _data("agh", "c"))
    ledger.revoke(unused.sha256, by="Dr. A")
    _approve(ledger, tiny_study(study={"name": "fourth"}), _data("a", "cgh"))


def test_a_record_on_both_sides_of_one_study_is_refused(ledger):
    with pytest.raises(PolicyRefusal, match="1 image in train and in the holdout at once"):
        _approve(ledger, data=_data("abc", "cd"))
    assert [entry.kind for entry in ledger.entries()] == ["begun"]


def test_refusals_are_written_of_approved_studies_only_and_cannot_fill_the_disk(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "MOST_REFUSALS", 3)
    studies = [tiny_study(study={"seed": seed}) for seed in range(30)]
    for study in studies:
        ledger.refused(study, rule="approval")
    assert [entry.kind for entry in ledger.entries()] == ["begun"]
    for study in studies[:2]:
        _approve(ledger, study)
        for _ in range(5):
            ledger.refused(study, rule="policy.max_epsilon", asked="9", allowed="8")
    assert [entry.kind for entry in ledger.entries()].count("refused") == 3
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
        ledger = Ledger.create(tmp_path / str(at))
        real, granted = ledger.chain.db, 0
        ledger.chain.db = _Failing(real, at, after)
        try:
            number = _reserve(ledger)
            granted = 1
            with ledger.confirming(*number, study="s", approval=None):
                pass
            ended = True
        except StorageError:
            ended = False
        real.close()
        with closing(Ledger.open(ledger.state)) as again:
            assert granted <= again.counts("s")[0] <= 1
            assert again.counts("s")[1] <= again.counts("s")[0]
        if ended:
            reached = at
            break
    assert 10 < reached < 40  # every statement was hit once, and then none was left


def _race(state: str, ceiling: float, queue) -> None:
    ledger = Ledger.open(Path(state))
    try:
        _reserve(ledger, ceiling=Ceiling(ceiling, 1e-5, "rdp"))
        queue.put("won")
    except BudgetError:
        queue.put("lost")


def _begin(state: str, _: float, queue) -> None:
    try:
        Ledger.create(Path(state)).close()
        queue.put("won")
    except StorageError:
        queue.put("lost")


def _two(target, state, ceiling=0.0):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=target, args=(str(state), ceiling, queue)) for _ in range(2)]
    for racer in racers:
        racer.start()
    results = [queue.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(60)
    return sorted(results)


def test_two_processes_on_one_ledger_cannot_both_pass_the_ceiling(ledger):
    ceiling = epsilon_of([PLAN.loss], delta=1e-5, accountant="rdp") * 1.05  # room for exactly one
    assert _two(_race, ledger.state, ceiling) == ["lost", "won"]
    assert ledger.counts("s") == (1, 0)


def test_two_processes_cannot_both_begin_a_ledger(tmp_path):
    assert _two(_begin, tmp_path / "state") == ["lost", "won"]
    assert json.loads((tmp_path / "state" / "ledger.head").read_text())["number"] == 1
    Ledger.open(tmp_path / "state").close()
