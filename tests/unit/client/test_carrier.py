"""The carrier says whose it is and what went wrong, whatever goes wrong, and nothing of a path."""

from __future__ import annotations

from threading import Event, Thread

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client.app as carrier
import client.service as service_module
from client.service import serving
from client.site import Site
from common.protocol import EnrolReply, EnrolRequest, Unreachable, decode_answer, encode
from common.wire import from_record, to_record
from support.sites import approve, make_npz_site
from support.studies import agreement, tiny_study

REQUEST = EnrolRequest(agreement=agreement())


@pytest.fixture(autouse=True)
def task(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def _relayed(content, **node_config):
    message = Message(content=content, dst_node_id=1, message_type="query.enrol", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m"
    context = Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})
    return decode_answer(from_record(carrier.relay(message, context).content))[0].body


@pytest.mark.parametrize(
    ("node_config", "named"),
    [({"site": "/nowhere/at/all/b.sock", "name": "hospital-b"}, "hospital-b"), ({"site": "/nowhere/b.sock"}, "b"),
     ({"site": 7, "name": 8}, "8"), ({"site": "\0"}, "\0"), ({"site": "x" * 5000}, "x" * 100),
     ({"site": ""}, "a carrier")],
)  # fmt: skip
def test_where_the_site_is_not_reached_its_carrier_says_so_by_its_name(node_config, named, monkeypatch):
    monkeypatch.delenv(carrier.SOCKETS_VARIABLE, raising=False)
    body = _relayed(to_record(encode(REQUEST)), **node_config)
    assert isinstance(body, Unreachable) and body.again
    assert body.carrier == named and "/nowhere" not in body.what


def test_a_carrier_without_a_site_says_what_is_not_set_and_not_a_number_of_flowers(monkeypatch):
    monkeypatch.delenv(carrier.SOCKETS_VARIABLE, raising=False)
    assert "no site given" in _relayed(to_record(encode(REQUEST)), name="hospital-b").what
    assert "its carrier failed (" in _relayed(RecordDict(), site="/nowhere/b.sock").what


def test_a_request_over_the_sites_limit_is_told_as_such_and_not_to_be_asked_again(tmp_path):
    """Before: it was "unreachable", and asked again until the deadline."""
    site = make_npz_site(tmp_path)
    site.write_text(site.read_text().replace("threads = 1", "threads = 1\nmax_message_mb = 1"))
    approve(Site.open(site, tiny_study()), tiny_study())
    with serving([site], tmp_path / "s") as (socket,):
        large = encode(REQUEST, {"pad": np.zeros(1 << 20, np.float32)})
        body = _relayed(to_record(large), site=str(socket), name="hospital-b")
        assert isinstance(body, Unreachable) and not body.again and "max_message_mb" in body.what
        assert isinstance(_relayed(to_record(encode(REQUEST)), site=str(socket)), EnrolReply)


def test_a_site_that_is_busy_is_not_told_as_a_request_that_is_too_large(tmp_path, monkeypatch):
    """Before: gRPC has one code for both, and the site was given up at once."""
    monkeypatch.setattr(service_module, "_WORKERS", 1)
    site = make_npz_site(tmp_path)
    approve(Site.open(site, tiny_study()), tiny_study())
    begun, go_on = Event(), Event()

    def slow(*_):
        begun.set()
        assert go_on.wait(60)
        raise MemoryError

    monkeypatch.setitem(service_module.STAGES, "enrol", slow)
    with serving([site], tmp_path / "s") as (socket,):
        first = Thread(target=_relayed, args=(to_record(encode(REQUEST)),), kwargs={"site": str(socket)})
        first.start()
        assert begun.wait(60)
        body = _relayed(to_record(encode(REQUEST)), site=str(socket))
        go_on.set()
        first.join()
    assert isinstance(body, Unreachable) and body.again and "RESOURCE_EXHAUSTED" in body.what
