"""A bundle that is not what it should be gets nothing at a site but what the gate releases.

The bundle's code can do three things at a hospital: read files, connect to the site's socket, and send bytes there.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import grpc
import numpy as np
import pytest

from client import app as shipped
from client.privacy.ledger import Ledger
from client.service import METHOD, SERVICE, serving
from client.site import Site
from common.model.diffusion_model import initial_weights
from common.protocol import EnrolReply, EnrolRequest, Refusal, TrainRequest, decode_answer, encode
from support.sites import approve, make_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()
NOBODY = 65534


@pytest.fixture
def site():
    """The folder of a served site, and a way to send it bytes."""
    folder = Path(tempfile.mkdtemp(prefix="sw-"))
    folder.chmod(0o711)
    file = make_site(folder)
    file.chmod(0o600)
    approve(Site.open(file, STUDY), STUDY)
    with serving([file], folder / "sockets") as (path,):
        yield folder, path
    shutil.rmtree(folder)


def _send(path, data):
    with grpc.insecure_channel(f"unix:{path}") as channel:
        return decode_answer(channel.unary_unary(f"/{SERVICE}/{METHOD}")(data, timeout=60))[0].body


def _ledger(folder):
    return Ledger.open(folder / "site-1")


def _as_nobody(action):
    """Run `action` in a child that is another user, as the SuperNode is; its result as a number."""
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_reads_neither_site_file_nor_ledger_nor_answers_but_can_be_let_use_the_socket(site):
    folder, path = site
    assert isinstance(_send(path, encode(EnrolRequest(agreement=agreement()))), EnrolReply)
    private = [folder / "site-1.toml", folder / "site-1" / "ledger.sqlite", folder / "site-1" / "ledger.head"]
    assert all(file.exists() for file in private)

    def read_all():
        opened = 0
        for file in private:
            try:
                file.read_bytes()
                opened += 1
            except PermissionError:
                continue
        try:
            os.listdir(folder / "site-1")
            opened += 1
        except PermissionError:
            pass
        return opened

    def connect():
        with socket.socket(socket.AF_UNIX) as other:
            try:
                other.connect(str(path))
            except PermissionError:
                return 1
        return 0

    assert _as_nobody(read_all) == 0
    assert _as_nobody(connect) == 1  # not by default
    os.chown(path, -1, NOBODY)
    path.parent.chmod(0o711)
    assert _as_nobody(connect) == 0  # with the group that the operator gives


LESS = {"noise": ("noise_multiplier", 0.25), "releases": ("releases", 50), "sensitivity": ("sensitivity", 0.1),
        "steps": ("steps", 0.5), "rate": ("sample_rate", 0.5)}  # fmt: skip


def test_any_other_plan_than_the_one_that_was_approved_is_refused_and_costs_nothing(site):
    folder, path = site
    agreed, weights = agreement(), initial_weights(STUDY)
    for field, factor in LESS.values():
        value = getattr(agreed.plan["train"], field)
        train = agreed.plan["train"].model_copy(update={field: type(value)(value * factor)})
        assert train != agreed.plan["train"]
        changed = tuple(train if each.name == "train" else each for each in agreed.plan.mechanisms)
        wrong = agreed.model_copy(update={"plan": agreed.plan.model_copy(update={"mechanisms": changed})})
        reply = _send(path, encode(TrainRequest(agreement=wrong, round=1, expected_batch=9.0), weights))
        assert isinstance(reply, Refusal)
        assert (reply.kind, reply.rule) == ("BudgetError", "plan")
    assert _ledger(folder).counts(STUDY.sha256) == (0, 0)
    assert {entry.kind for entry in _ledger(folder).entries()} == {"begun", "approved", "refused"}


def test_asking_without_end_gets_what_the_study_may_have_and_no_more(site):
    folder, path = site
    agreed, answered = agreement(), 0
    for number in range(8):  # each differs in its bytes, so none is a repetition
        reply = _send(path, encode(EnrolRequest(agreement=agreed), {"nonce": np.array([number])}))
        answered += isinstance(reply, EnrolReply)
    assert answered == agreed.plan["counts"].releases == 1
    spent = _ledger(folder).spent(delta=STUDY.privacy.delta, accountant="rdp")
    assert max(spent.values()) <= STUDY.privacy.epsilon


def test_bytes_that_are_no_request_are_refused_and_the_site_lives_on(site):
    folder, path = site
    good = encode(EnrolRequest(agreement=agreement()))
    for data in (b"", b"x" * 1000, good[:50], good[:-3], good.replace(b"counts", b"c\xffunts")):
        reply = _send(path, data)
        assert isinstance(reply, Refusal)
    with grpc.insecure_channel(f"unix:{path}") as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary(f"/{SERVICE}/Ledger")(b"", timeout=20)
    assert isinstance(_send(path, good), EnrolReply)
    assert _ledger(folder).counts(STUDY.sha256) == (1, 1)


def test_what_is_shipped_speaks_to_the_method_that_the_service_has():
    assert f"/{SERVICE}/{METHOD}" == shipped.ANSWER


def test_two_processes_cannot_serve_one_site(site):
    folder, _ = site
    from common.errors import DataError

    with pytest.raises(DataError, match="another process serves this site"), serving([folder / "site-1.toml"], folder):
        pass
