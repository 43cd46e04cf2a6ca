"""What docs/withdrawal.md says: from when on a withdrawn record gives nothing, and what cannot be undone."""

from __future__ import annotations

import gc
import os
import weakref
from contextlib import closing

import numpy as np
import pytest

import client.service as service_module
from client.privacy.chain import Chain
from client.privacy.gate import Permit
from client.privacy.ledger import Ledger
from client.service import SiteService
from client.site import Site
from common.model.classifier import BiomarkerClassifier
from common.protocol import (
    EnrolReply,
    EnrolRequest,
    MomentsReply,
    MomentsRequest,
    Refusal,
    ValidateReply,
    ValidateRequest,
    decode_answer,
    encode,
)
from support.sites import approve, ask, gate_of, make_npz_site, write_images
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


def _revoke(path):
    with closing(Ledger.open(path.with_suffix(""))) as ledger:
        ledger.revoke(STUDY.sha256, by="Dr. T. Test")


def _approve_anew(path):
    approve(Site.open(path, STUDY), STUDY)


def _withdraw_in_place(path):
    """As a tool does that keeps size and time: one image is blanked where it lies."""
    file = path.with_suffix(".npz")
    before, data = file.stat(), bytearray(file.read_bytes())
    image = np.load(file)["train_images"][0].tobytes()
    at = bytes(data).index(image)
    data[at : at + len(image)] = bytes(len(image))
    with file.open("r+b") as there:
        there.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def _withdraw_and_approve(path):
    _withdraw(path)
    _approve_anew(path)


@pytest.mark.parametrize("stage", ["enrol", "moments"])
@pytest.mark.parametrize(
    ("meanwhile", "kind"),
    [(_revoke, "NotApproved"), (_withdraw, "Unavailable"), (_withdraw_and_approve, "NotApproved"),
     (lambda path: path.with_suffix(".npz").unlink(), "Unavailable")],
)  # fmt: skip
def test_an_answer_under_way_does_not_outlive_a_revocation_or_a_withdrawal(site, monkeypatch, stage, meanwhile, kind):
    """Before: it left, and lay in the store for a later approval."""
    request = {"enrol": ENROL, "moments": MOMENTS}[stage]
    noisy = Permit.noisy

    def later(permit, name, total):
        found = noisy(permit, name, total)  # all is computed, and not yet sealed
        meanwhile(site)
        return found

    monkeypatch.setattr(Permit, "noisy", later)
    answer, arrays = ask(site, request)
    assert isinstance(answer.body, Refusal) and answer.body.kind == kind
    assert arrays == {}
    assert not list((site.with_suffix("") / "replies").iterdir())
    with closing(Ledger.open(site.with_suffix(""))) as ledger:
        assert ledger.counts(STUDY.sha256) == (1, 0)  # it was computed: its cost stays counted


def test_a_file_that_was_only_touched_holds_no_answer_back(site, monkeypatch):
    noisy = Permit.noisy

    def later(permit, name, total):
        site.with_suffix(".npz").touch()
        return noisy(permit, name, total)

    monkeypatch.setattr(Permit, "noisy", later)
    assert isinstance(ask(site, ENROL)[0].body, EnrolReply)


def test_a_change_in_place_with_size_and_time_set_back_is_seen(site):
    """An uncompressed archive whose bytes are changed has a wrong checksum, so it is refused for one reason or two."""
    assert isinstance(ask(site, ENROL)[0].body, EnrolReply)
    _withdraw_in_place(site)
    answer, _ = ask(site, MOMENTS)
    assert isinstance(answer.body, Refusal) and answer.body.kind == "Unavailable"


def test_what_the_site_made_of_other_images_is_not_used_again(site):
    """The private reference and the optimizer's state are made of the records that were approved then."""
    with closing(Ledger.open(site.with_suffix(""))) as ledger:
        before = gate_of(Site.open(site, STUDY), STUDY, ledger=ledger)
        assert before.store.made_of(before.admit(), "reference") == before.store.made_of(before.admit(), "reference")
        _withdraw_and_approve(site)
        after = gate_of(Site.open(site, STUDY), STUDY, ledger=ledger)
        assert before.store.made_of(before.admitted, "adam") != after.store.made_of(after.admit(), "adam")


@pytest.mark.parametrize("request_of", ["stored", "refused", "new"])
def test_a_process_keeps_nothing_of_a_file_that_was_replaced(site, request_of):
    """Whatever is asked next, be it answered from the store or refused, the images are let go."""
    service = SiteService(site)
    service.answer(encode(ENROL, {}))
    before = weakref.ref(Site.open(site, STUDY).splits.train)
    assert before() is not None and Site.open(site, STUDY).splits.train is before()
    _withdraw(site)
    other = EnrolRequest(agreement=agreement(tiny_study(study={"seed": 77})))
    service.answer(encode({"stored": ENROL, "refused": other, "new": MOMENTS}[request_of], {}))
    gc.collect()
    assert before() is None


def test_to_approve_the_same_again_ends_no_answer_under_way(site, monkeypatch):
    noisy = Permit.noisy

    def later(permit, name, total):
        _approve_anew(site)
        return noisy(permit, name, total)

    monkeypatch.setattr(Permit, "noisy", later)
    assert isinstance(ask(site, ENROL)[0].body, EnrolReply)


@pytest.mark.parametrize(("meanwhile", "kind"), [(_revoke, "NotApproved"), (_withdraw, "Unavailable")])
@pytest.mark.parametrize("stored", [False, True])
def test_a_sealed_answer_that_has_not_left_is_held_back(site, monkeypatch, meanwhile, kind, stored):
    """Before: the site's own work beside it, or a wait for the machine's list, could take hours after the last look."""
    if stored:
        ask(site, ENROL)
    note = SiteService._note

    def later(service, config, ledger):
        note(service, config, ledger)
        meanwhile(site)

    monkeypatch.setattr(SiteService, "_note", later)
    answer, arrays = ask(site, ENROL)
    assert isinstance(answer.body, Refusal) and answer.body.kind == kind and arrays == {}


def test_images_that_change_while_the_ledger_is_waited_for_are_seen(site, monkeypatch):
    confirming = Ledger.confirming

    def later(ledger, *reservations, **rest):
        if reservations:
            _withdraw(site)
        return confirming(ledger, *reservations, **rest)

    monkeypatch.setattr(Ledger, "confirming", later)
    answer, _ = ask(site, ENROL)
    assert isinstance(answer.body, Refusal) and answer.body.kind == "Unavailable"


def test_a_stored_answer_whose_process_died_before_it_left_is_not_sent_after_a_withdrawal(site, monkeypatch):
    """Nobody knows whether it left; of the same images it is sent, and costs nothing anew."""

    def killed(*_):
        raise MemoryError

    append = Chain.append
    monkeypatch.setattr(
        Chain, "append", lambda self, kind, *rest: (kind == "confirmed" and killed()) or append(self, kind, *rest)
    )
    ask(site, ENROL)
    monkeypatch.undo()
    assert list((site.with_suffix("") / "replies").iterdir())
    assert isinstance(ask(site, ENROL)[0].body, EnrolReply)
    _withdraw_and_approve(site)
    answer, arrays = ask(site, ENROL)
    assert isinstance(answer.body, Refusal) and answer.body.kind == "BudgetError" and arrays == {}


def test_what_was_answered_before_is_repeated_only_while_the_images_are_those_approved(site):
    first = ask(site, ENROL)
    _withdraw(site)
    assert isinstance(ask(site, ENROL)[0].body, Refusal)
    _approve_anew(site)
    again = ask(site, ENROL)
    assert again[0] == first[0] and np.array_equal(again[1]["counts"], first[1]["counts"])


def test_nothing_is_paid_for_other_images_and_no_reference_is_used_of_them(tmp_path, monkeypatch):
    """Validation pays twice: for the reference, and for the histograms. A withdrawal between them ends it."""
    study = tiny_study()
    path = make_npz_site(tmp_path)
    approve(Site.open(path, study), study)
    data = study.data
    fresh = BiomarkerClassifier.fit(Site.open(path, study).splits.train, classes=2, channels=data.channels,
                                    config=study.validation, seed=1)  # fmt: skip
    request = ValidateRequest(agreement=agreement(study), expected_reference_batch=6.0)
    confirming = Permit.confirming

    def later(permit):
        entered = confirming(permit)
        if "reference" in permit._plans:
            write_images(tmp_path / "site-1.npz", train=59, holdout=30, size=16, seed=1)
        return entered

    monkeypatch.setattr(Permit, "confirming", later)
    answer, _ = ask(path, request, fresh.state())
    assert isinstance(answer.body, Refusal) and answer.body.kind == "Unavailable"
    monkeypatch.undo()
    state = path.with_suffix("")
    assert not list(state.glob("reference-*"))
    with closing(Ledger.open(state)) as ledger:
        assert ledger.counts(study.sha256) == (1, 0)  # the reference; the histograms were not begun
    approve(Site.open(path, study), study)
    answer, arrays = ask(path, request, fresh.state())
    assert isinstance(answer.body, ValidateReply) and set(arrays) == {"synthetic"}  # its budget is spent


def test_a_site_file_that_cannot_be_read_frees_the_images_and_is_logged(site):
    service = SiteService(site)
    service.answer(encode(ENROL, {}))
    before = weakref.ref(Site.open(site, STUDY).splits.train)
    site.write_text("no = [toml")
    answer, _ = decode_answer(service.answer(encode(ENROL, {})))
    assert answer.body.kind == "Unavailable"
    gc.collect()
    assert before() is None
    assert (
        "not valid TOML" in (site.with_suffix("") / "site.log").read_text()
        or "TOML" in (site.with_suffix("") / "site.log").read_text()
    )


def test_a_withdrawal_before_anything_was_computed_costs_nothing(site, monkeypatch):
    enrol = service_module.STAGES["enrol"]

    def later(*arguments):
        _withdraw(site)
        return enrol(*arguments)

    monkeypatch.setitem(service_module.STAGES, "enrol", later)
    answer, _ = ask(site, ENROL)
    assert isinstance(answer.body, Refusal) and answer.body.kind == "Unavailable"
    with closing(Ledger.open(site.with_suffix(""))) as ledger:
        assert ledger.counts(STUDY.sha256) == (0, 0)
