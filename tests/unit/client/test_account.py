"""What the hospital is shown is what the ledger holds."""

from __future__ import annotations

import json

import pytest

import client.account as account_module
from client.account import account_of, budget_table
from client.privacy.ledger import Ceiling, Ledger
from client.privacy.policy import SitePolicy
from common.accounting import MechanismPlan, epsilon_of

TRAIN = MechanismPlan("train", "train", 1.5, 0.1, 10, 60, 1.0)
COUNTS = MechanismPlan("counts", "train", 4.0, 1.0, 1, 1, 1.0)
EVALUATE = MechanismPlan("evaluate", "holdout", 3.0, 1.0, 1, 2, 2.0)
WIDE = Ceiling(100.0, 1e-5, "rdp")
POLICY = SitePolicy(accountant="rdp", max_epsilon=12.0)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.note("approved", "aa" * 32, by="Dr. A", name="first", epsilon=8.0)
    for plan in (COUNTS, TRAIN, TRAIN, EVALUATE):
        numbers = ledger.reserve(plan, study="aa" * 32, request="r", study_ceiling=WIDE, ceiling=WIDE)
        if plan is not EVALUATE:
            ledger.confirm(*numbers)
    ledger.note("revoked", "aa" * 32, by="Dr. B", name="first")
    ledger.note("refused", "bb" * 32, name="second", stage="enrol", rule="policy.max_epsilon", asked="99", allowed="8",
                what="epsilon 99 asked, 8 allowed")  # fmt: skip
    return ledger


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
    assert second.stages == ()
    assert second.refusals[0].rule == "policy.max_epsilon"
    assert account.newest_hash == ledger.head()[1]


def test_the_curve_grows_ends_at_the_whole_and_is_short(ledger):
    for _ in range(40):
        ledger.reserve(TRAIN, study="aa" * 32, request="r", study_ceiling=WIDE, ceiling=WIDE)
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
    assert "first  aaaaaaaaaaaa  revoked" in table
    assert "1 asked and not finished: counted all the same" in table
    assert "1 refused" in table
    assert max(map(len, table.splitlines())) <= 110
    value = json.loads(json.dumps(account.to_json()))
    assert value["studies"][0]["stages"][1]["asked"] == 2
    assert value["epsilon"]["train"] == account.epsilon["train"]
    assert value["left"] == account.left


def test_an_empty_ledger_has_spent_nothing(tmp_path):
    account = account_of("h", Ledger(tmp_path / "ledger.sqlite"), POLICY)
    assert account.epsilon == {"train": 0.0, "holdout": 0.0}
    assert account.curve == account.studies == ()
    assert account.left == 12.0
