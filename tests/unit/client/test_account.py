"""What the hospital is shown is what the ledger holds."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

import client.account as account_module
from client.account import account_of, budget_table
from client.privacy.fingerprints import Fingerprints
from client.privacy.ledger import Ceiling, Ledger
from client.privacy.policy import SitePolicy
from common.accounting import MechanismPlan, StudyPlan, epsilon_of
from support.studies import tiny_study


def _plan(name, partition, noise, rate, steps, releases):
    return MechanismPlan(name=name, partition=partition, noise_multiplier=noise, sample_rate=rate, steps=steps,
                         releases=releases, sensitivity=1.0)  # fmt: skip


TRAIN = _plan("train", "train", 1.5, 0.1, 10, 60)
COUNTS = _plan("counts", "train", 4.0, 1.0, 1, 1)
EVALUATE = _plan("evaluate", "holdout", 3.0, 1.0, 1, 2)
WHOLE = StudyPlan(mechanisms=(COUNTS, TRAIN, EVALUATE))
FIRST, SECOND = tiny_study(study={"name": "first"}), tiny_study(study={"name": "second"})
DATA = Fingerprints(frozenset({b"i1"}), frozenset({b"i2"}), "digest")
WIDE = Ceiling(100.0, 1e-5, "rdp")
POLICY = SitePolicy(accountant="rdp", max_epsilon=12.0)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.create(tmp_path / "state")
    ledger.approve(FIRST, WHOLE, DATA, by="Dr. A")
    for plan in (COUNTS, TRAIN, TRAIN, EVALUATE):
        numbers = ledger.reserve(plan, study=FIRST.sha256, request="r", study_ceiling=WIDE, ceiling=WIDE, approval=None)
        if plan is not EVALUATE:
            with ledger.confirming(*numbers, study=FIRST.sha256, approval=None):
                pass
    ledger.revoke(FIRST.sha256, by="Dr. B")
    ledger.approve(SECOND, WHOLE, DATA, by="Dr. A")
    ledger.refused(SECOND, stage="enrol", rule="policy.max_epsilon", asked="99", allowed="8",
                   what="epsilon 99 asked, 8 allowed")  # fmt: skip
    yield ledger
    ledger.close()


def test_the_figures_are_those_of_the_accountant_and_unfinished_answers_count(ledger):
    account = account_of("h", ledger, POLICY)
    first, second = account.studies
    train = epsilon_of([COUNTS.loss, TRAIN.loss, TRAIN.loss], delta=1e-5, accountant="rdp")
    holdout = epsilon_of([EVALUATE.loss], delta=1e-5, accountant="rdp")
    assert account.epsilon == first.epsilon == {"train": train, "holdout": holdout}
    assert account.left == pytest.approx(12.0 - max(train, holdout))
    by_name = {stage.name: stage for stage in first.stages}
    assert (by_name["train"].asked, by_name["train"].finished, by_name["train"].steps) == (2, 2, 20)
    assert (by_name["evaluate"].asked, by_name["evaluate"].finished) == (1, 0)
    assert by_name["evaluate"].epsilon == holdout
    assert [d.kind for d in first.decisions] == ["approved", "revoked"]
    assert not first.approved
    assert second.approved
    assert second.stages == ()
    assert second.refusals[0].rule == "policy.max_epsilon"
    assert account.newest_hash == ledger.head()[1]


def test_the_curve_grows_ends_at_the_whole_and_is_short(ledger):
    for _ in range(40):
        ledger.reserve(TRAIN, study=FIRST.sha256, request="r", study_ceiling=WIDE, ceiling=WIDE, approval=None)
    account = account_of("h", ledger, POLICY)
    assert len(account.curve) == account_module.MOST_POINTS
    values = [point.epsilon["train"] for point in account.curve]
    assert values == sorted(values)
    assert account.curve[-1].epsilon == account.epsilon
    assert account.curve[-1].reservation == 44
    assert [band[1] for band in account.bands] == ["counts", "train", "evaluate", "train"]
    assert [band[2:] for band in account.bands] == [(1, 1), (2, 3), (4, 4), (5, 44)]


def test_the_table_and_the_json_say_the_same(ledger):
    account = account_of("h", ledger, POLICY)
    table = budget_table(account)
    assert "of 12 (delta 1e-05, RDP)" in table
    assert f"{account.left:.3f} left" in table
    assert f"first  {FIRST.sha256[:12]}  revoked" in table
    assert "1 asked and not finished: counted all the same" in table
    assert "1 refused" in table
    assert max(map(len, table.splitlines())) <= 110
    value = json.loads(json.dumps(account.to_json()))
    assert value["studies"][0]["stages"][1]["asked"] == 2
    assert value["epsilon"]["train"] == account.epsilon["train"]
    assert value["left"] == account.left


def test_an_empty_ledger_has_spent_nothing(tmp_path):
    with closing(Ledger.create(tmp_path / "state")) as empty:
        account = account_of("h", empty, POLICY)
    assert account.epsilon == {"train": 0.0, "holdout": 0.0}
    assert account.curve == account.studies == ()
    assert account.left == 12.0
