"""The canary at a site: zeros for an approved study, nothing reserved, nothing of a record."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from client.service import SiteService
from client.site import Site, load_site_config
from common.protocol import CanaryRequest, decode_answer, decode_arrays, encode
from support.sites import approve, make_npz_site, write_images
from support.studies import agreement, tiny_study

STUDY = tiny_study()


def _ask(path, numbers=1000, study=STUDY):
    request = CanaryRequest(agreement=agreement(study), numbers=numbers)
    return SiteService(path).answer(encode(request, {"zeros": np.zeros(5, np.float32)}))


@pytest.fixture
def path(tmp_path):
    path = make_npz_site(tmp_path)
    approve(Site.open(path, STUDY), STUDY)
    return path


def test_it_is_answered_with_zeros_and_spends_and_keeps_nothing(path):
    with closing(load_site_config(path).ledger()) as ledger:
        before = ledger.entries()
    answer, rest = decode_answer(_ask(path))
    assert answer.body.stage == "canary" and answer.site.name and answer.spent.reserved == 0
    arrays = decode_arrays(rest, "reply")
    assert list(arrays) == ["zeros"] and arrays["zeros"].shape == (1000,) and not arrays["zeros"].any()
    with closing(load_site_config(path).ledger()) as ledger:
        assert ledger.entries() == before
    assert not list((load_site_config(path).state / "replies").glob("*"))


def test_other_records_give_the_same_bytes(tmp_path):
    answers = set()
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = make_npz_site(folder, seed=seed)
        approve(Site.open(path, STUDY), STUDY)
        answers.add(_ask(path))
    assert len(answers) == 1


def test_a_study_that_nobody_approved_gets_the_refusal_of_every_other_question(path):
    answer, rest = decode_answer(_ask(path, study=tiny_study(study={"name": "other"})))
    assert (answer.body.stage, answer.body.kind) == ("refusal", "NotApproved")
    assert not decode_arrays(rest, "reply")


def test_no_request_makes_the_site_fill_its_memory(path):
    most = load_site_config(path).performance.max_message_mb << 18
    answer, _ = decode_answer(_ask(path, numbers=most + 1))
    assert answer.body.stage == "refusal" and "larger than this site sends" in answer.body.what


def test_images_that_are_not_those_that_were_approved_show_before_anything_is_spent(path):
    write_images(path.with_suffix(".npz"), train=60, holdout=30, size=16, seed=7)
    answer, _ = decode_answer(_ask(path))
    assert (answer.body.stage, answer.body.kind) == ("refusal", "Unavailable")
