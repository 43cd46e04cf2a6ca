"""What docs/withdrawal.md says: from when on a withdrawn record gives nothing, and what cannot be undone."""

from __future__ import annotations

import gc
import weakref
from contextlib import closing

import numpy as np
import pytest

from client.privacy.ledger import Ledger
from client.service import SiteService
from client.site import Site
from common.protocol import EnrolReply, EnrolRequest, MomentsReply, MomentsRequest, Refusal, decode_answer, encode
from support.sites import approve, ask, make_npz_site
from support.studies import agreement, tiny_study

STUDY = tiny_study(privacy={"unit": "patient"})
ENROL = EnrolRequest(agreement=agreement(STUDY))
MOMENTS = MomentsRequest(agreement=agreement(STUDY), counts=[30.0, 30.0])
WITHDRAWN = 7


@pytest.fixture
def site(tmp_path):
    """A site of 30 patients with two images each, at which the study is approved."""
    path = make_npz_site(tmp_path)
    _write(tmp_path / "site-1.npz", lambda patients: np.ones(len(patients), bool))
    approve(Site.open(path, STUDY), STUDY)
    return path


def _write(file, keep):
    with np.load(file) as before:
        parts = dict(before)
    for part, first in (("train", 0), ("test", 1000)):
        patients = parts.get(f"{part}_groups", first + np.arange(len(parts[f"{part}_images"])) // 2)
        mine = keep(patients)
        parts |= {f"{part}_{name}": parts[f"{part}_{name}"][mine] for name in ("images", "labels")}
        parts[f"{part}_groups"] = patients[mine]
    np.savez(file, **parts)


def _withdraw(path):
    _write(path.with_suffix(".npz"), lambda patients: patients != WITHDRAWN)


def test_after_a_withdrawal_nothing_is_computed_until_the_study_is_approved_again_without_the_patient(site):
    first, counts = ask(site, ENROL)
    assert isinstance(first.body, EnrolReply)
    _withdraw(site)
    refused, _ = ask(site, MOMENTS)
    assert isinstance(refused.body, Refusal) and refused.body.kind == "Unavailable"
    with closing(Ledger.open(site.with_suffix(""))) as ledger:
        spent = ledger.spent(delta=1e-5, accountant="rdp")
    approve(Site.open(site, STUDY), STUDY)
    assert WITHDRAWN not in Site.open(site, STUDY).splits.train.patients
    again, _ = ask(site, MOMENTS)
    assert isinstance(again.body, MomentsReply)
    with closing(Ledger.open(site.with_suffix(""))) as ledger:
        assert ledger.spent(delta=1e-5, accountant="rdp")["train"] > spent["train"] > 0  # what was spent stays spent
    repeated, same = ask(site, ENROL)  # what was given before is given again, and nothing else
    assert isinstance(repeated.body, EnrolReply) and np.array_equal(same["counts"], counts["counts"])


def test_a_revoked_study_gets_not_even_what_it_was_given_before(site):
    service, request = SiteService(site), encode(ENROL, {})
    service.answer(request)
    _withdraw(site)
    with closing(Ledger.open(site.with_suffix(""))) as ledger:
        ledger.revoke(STUDY.sha256, by="Dr. T. Test")
    answer, _ = decode_answer(service.answer(request))
    assert isinstance(answer.body, Refusal) and answer.body.kind == "NotApproved"


def test_a_process_keeps_nothing_of_a_file_that_was_replaced(site):
    before = weakref.ref(Site.open(site, STUDY).splits.train)
    assert before() is not None and Site.open(site, STUDY).splits.train is before()
    _withdraw(site)
    Site.open(site, STUDY)
    gc.collect()
    assert before() is None
