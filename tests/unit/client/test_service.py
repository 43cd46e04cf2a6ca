"""The site's process: in which order a request is looked at, and what an answer says when it is a no."""

from __future__ import annotations

import stat
import threading
from contextlib import closing

import grpc
import numpy as np
import pytest

import client.service as service_module
from client.service import SiteService, serving
from client.site import Site, load_site_config
from common.errors import DataError, StorageError
from common.protocol import EnrolRequest, decode_answer, encode
from support.sites import approve, ask, make_npz_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()
REQUEST = EnrolRequest(agreement=agreement())


@pytest.fixture
def path(tmp_path):
    path = make_npz_site(tmp_path)
    approve(Site.open(path, STUDY), STUDY)
    return path


def test_an_answer_is_stored_once_and_sent_again_byte_for_byte(path):
    service = SiteService(path)
    first = service.answer(encode(REQUEST))
    stored = list((load_site_config(path).state / "replies").iterdir())
    assert [file.read_bytes() for file in stored] == [first]
    assert service.answer(encode(REQUEST)) == first
    assert decode_answer(first)[0].spent.reserved == 1


def test_a_policy_that_was_tightened_after_the_approval_is_asked_again(path):
    path.write_text(path.read_text().replace("[policy]", "[policy]\nmax_study_epsilon = 0.5"))
    answer, _ = ask(path, REQUEST)
    assert answer.body.kind == "PolicyRefusal"
    assert answer.body.rule == "policy.max_study_epsilon"
    assert (answer.body.asked, answer.body.allowed) == ("epsilon 8", "0.5")
    with closing(load_site_config(path).ledger()) as ledger:
        assert ledger.counts(STUDY.sha256) == (0, 0)
        assert ledger.entries()[-1].kind == "refused"


@pytest.mark.parametrize("error", [DataError("patient Doe", where="/images/doe.npz"), MemoryError("7 of 60"),
                                   StorageError("no space", where="/srv"), ZeroDivisionError("x")])  # fmt: skip
def test_the_text_of_an_error_that_may_speak_of_records_stays_at_the_site(path, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setitem(service_module.STAGES, "enrol", fails)
    data = SiteService(path).answer(encode(REQUEST))
    answer, _ = decode_answer(data)
    assert (answer.body.kind, answer.body.what) == ("Unavailable", "the site cannot answer now")
    for word in (b"Doe", b"doe.npz", b"7 of 60", b"/srv"):
        assert word not in data
    assert str(error).split(".")[0] in (load_site_config(path).state / "site.log").read_text()


def test_all_errors_that_are_no_refusal_give_the_same_bytes(path, monkeypatch):
    answers = set()
    for error in (DataError("a"), ValueError("b"), OSError("c"), RuntimeError("d")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setitem(service_module.STAGES, "enrol", fails)
        answers.add(SiteService(path).answer(encode(REQUEST)))
    assert len(answers) == 1


def test_a_refusal_after_approval_says_what_is_spent_and_one_before_does_not(path):
    asked, _ = ask(path, REQUEST)
    again = EnrolRequest(agreement=agreement(tiny_study(study={"seed": 77})))
    before, _ = ask(path, again)
    assert before.spent is None
    more, _ = ask(path, REQUEST.model_copy())  # the same bytes
    assert more == asked
    other = encode(REQUEST, {"pad": np.zeros(1, np.float32)})  # another request of the same stage
    refused, _ = decode_answer(SiteService(path).answer(other))
    assert refused.body.kind == "BudgetError"
    assert refused.spent.train == asked.spent.train


def test_a_site_without_a_ledger_does_not_say_that_it_is_ready(path, tmp_path):
    (load_site_config(path).state / "ledger.sqlite").rename(tmp_path / "gone")
    with pytest.raises(StorageError), serving([path], tmp_path / "s"):
        pytest.fail("it served")
    assert not (tmp_path / "s").exists() or not list((tmp_path / "s").glob("*.sock"))


def test_nobody_but_owner_and_group_may_connect(path, tmp_path):
    with serving([path], tmp_path / "s") as made:
        assert stat.S_IMODE(made[0].stat().st_mode) & 0o007 == 0


def test_two_processes_do_not_serve_one_site(path, tmp_path):
    again = serving([path], tmp_path / "b")
    with serving([path], tmp_path / "a"), pytest.raises(DataError, match="serves this site"):
        again.__enter__()


def test_two_sites_never_share_a_socket(tmp_path):
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(make_npz_site(tmp_path / name, "site").rename(tmp_path / name / "site.toml"))
    with pytest.raises(DataError, match="two site files are called site"), serving(paths, tmp_path / "s"):
        pass
    answers = pytest.raises(StorageError, match="another process answers there already")
    with serving(paths[:1], tmp_path / "s"), answers, serving(paths[1:], tmp_path / "s"):
        pass


def test_an_end_waits_for_the_answer_under_way_and_lets_no_other_begin(path, tmp_path, monkeypatch):
    """Before: the locks were free while it was computed, so another process could compute, and pay for, it again."""
    begun, go_on, called = threading.Event(), threading.Event(), []
    enrol = service_module.STAGES["enrol"]

    def slow(*arguments):
        called.append(1)
        begun.set()
        assert go_on.wait(60)
        return enrol(*arguments)

    monkeypatch.setitem(service_module.STAGES, "enrol", slow)
    serve = serving([path], tmp_path / "a")
    (socket,) = serve.__enter__()
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        ask_site = channel.unary_unary("/synthward.Site/Answer")
        first = ask_site.future(encode(REQUEST), timeout=60)
        assert begun.wait(60)
        second = ask_site.future(encode(REQUEST, {"pad": np.zeros(1, np.float32)}), timeout=60)
        ending = threading.Thread(target=serve.__exit__, args=(None, None, None))
        ending.start()
        with pytest.raises(grpc.RpcError):
            second.result()
        with pytest.raises(DataError, match="serves this site"):
            serving([path], tmp_path / "b").__enter__()
        go_on.set()
        assert decode_answer(first.result())[0].body.stage == "enrol"
        ending.join(60)
        assert not ending.is_alive()
    assert called == [1]
    with serving([path], tmp_path / "b"):
        pass
