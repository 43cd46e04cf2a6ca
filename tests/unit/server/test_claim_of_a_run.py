"""What a run claims: what its sites' ledgers said last, or else the whole plan."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.accounting import epsilon_of
from common.protocol import SiteFacts, Spent
from server.checkpoints import RunFolder
from server.federation.members import Member
from server.session import Session
from server.stages.release import UNPROTECTED, claim_of
from support.reports import site_claim
from support.studies import agreement, tiny_study


def _member(number: int, *, phantoms: bool = False, source: str = "aes", open_question: bool = False) -> Member:
    facts = SiteFacts(name=f"site-{number}", phantoms=phantoms, random_source=source)
    spent = Spent(train=2.0, holdout=3.0, reserved=1, confirmed=1)
    return Member(number, facts, [1.0, 1.0], spent, open_question)


def _session(folder, *members: Member, unit: str = "image", gone: tuple[Member, ...] = ()) -> Session:
    """A session that has ended asking; what the claim reads of a run's folder is written as a run writes it.

    Args:
        gone: members of an earlier process of the run that are not there now.
    """
    study, run = tiny_study(privacy={"unit": unit}), RunFolder(folder)
    run.event("begin", study=study.sha256)
    run.event("stage", stage="release", text="")
    run.keep_result("enrol", {m.name: m.facts.model_dump(exclude={"name"}) for m in (*members, *gone)})
    return Session(agreement(study), run, cast(Any, None), cast(Any, SimpleNamespace()), {m.node: m for m in members})


def test_a_run_claims_what_the_ledgers_said_or_else_the_whole_plan(tmp_path):
    session = _session(tmp_path, _member(1), _member(2, open_question=True), unit="patient", gone=(_member(3),))
    claim, plan = claim_of(session), session.agreement.plan
    assert claim.unit == "patient"
    whole = {
        p: epsilon_of(plan.losses(p), delta=claim.delta, accountant=claim.accountant) for p in ("train", "holdout")
    }
    assert min(whole.values()) > 7
    assert claim.sites == (
        site_claim("site-1", 2.0, 3.0), site_claim("site-2", whole["train"], whole["holdout"], "plan"),
        site_claim("site-3", whole["train"], whole["holdout"], "plan"),
    )  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", claim.begun)
    assert claim.begun <= claim.ended
    assert claim.unprotected == UNPROTECTED
    assert claim.tuning.basis == "undeclared"
    assert {"opacus", "torch"} <= set(claim.libraries)


@pytest.mark.parametrize(("said", "claimed"), [((True, True), True), ((True, False), False), ((False, False), False)])
def test_only_a_run_whose_sites_all_said_so_is_one_of_phantoms(tmp_path, said, claimed):
    session = _session(tmp_path, *(_member(n, phantoms=each) for n, each in enumerate(said, start=1)))
    assert claim_of(session).phantoms is claimed


def test_one_site_with_seeded_noise_takes_the_promise_from_all(tmp_path):
    assert claim_of(_session(tmp_path, _member(1), _member(2))).protects
    assert not claim_of(_session(tmp_path, _member(1), _member(2, source="SEEDED, for tests"))).protects
