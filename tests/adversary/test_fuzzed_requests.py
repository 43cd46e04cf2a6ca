"""A site's `Answer` under mutated requests: no crash, no growth, no entry without cause.

300 requests in `make test`, 5,000 in `make test-all`.
"""

from __future__ import annotations

import json
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.service import STAGES, SiteService
from client.site import Site, load_site_config
from common.model.diffusion_model import initial_weights
from common.protocol import (
    CanaryReply,
    CanaryRequest,
    EnrolRequest,
    FeaturesRequest,
    MomentsRequest,
    Refusal,
    TrainRequest,
    ValidateRequest,
    decode_answer,
    decode_arrays,
    encode,
)
from support.sites import approve, make_npz_site
from support.studies import agreement, tiny_study

STUDY = tiny_study()
MAGIC = b"SYNW2\n"
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=20),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["", "../../x", "\x00", "\ud800", "1e309", "NaN", "é" * 50, 0, -0.0, 1e308]),
)  # fmt: skip


def _requests() -> list[bytes]:
    agreed = agreement()
    weights = initial_weights(STUDY)
    return [
        encode(CanaryRequest(agreement=agreed, numbers=7), {"zeros": np.zeros(9, np.float32)}),
        encode(EnrolRequest(agreement=agreed)),
        encode(MomentsRequest(agreement=agreed, counts=(30.0, 30.0))),
        encode(FeaturesRequest(agreement=agreed), {"centre": np.zeros(3, np.float32), "directions": np.ones((3, 2))}),
        encode(TrainRequest(agreement=agreed, round=1, expected_batch=12.0), weights),
        encode(ValidateRequest(agreement=agreed, expected_reference_batch=6.0), {"a": np.zeros(3, np.float32)}),
    ]


def _places(value, path=()):
    """Every path into a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def _changed(data, request: bytes) -> bytes:
    """The request with one to three places of its head replaced, removed or doubled, or its bytes damaged."""
    start = len(MAGIC) + 8
    length = int.from_bytes(request[len(MAGIC) : start], "big")
    head, rest = json.loads(request[start : start + length]), request[start + length :]
    for _ in range(data.draw(st.integers(0, 3))):
        path = data.draw(st.sampled_from(sorted(_places(head), key=repr)))
        if not path:
            continue
        target = head
        for key in path[:-1]:
            target = target[key]
        how = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove" and isinstance(target, dict):
            target.pop(path[-1])
        elif how == "add" and isinstance(target, dict):
            target[data.draw(st.text(max_size=5))] = data.draw(JUNK)
        else:
            target[path[-1]] = data.draw(JUNK)
    text = json.dumps(head).encode()
    out = bytearray(MAGIC + len(text).to_bytes(8, "big") + text + rest)
    for _ in range(data.draw(st.integers(0, 2))):
        out[data.draw(st.integers(0, len(out) - 1))] = data.draw(st.integers(0, 255))
    return bytes(out[: data.draw(st.sampled_from([len(out)] * 5 + [len(out) // 2, len(MAGIC) + 3, 0]))])


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A site with one approved study, whose stages are never reached: what is fuzzed is all that comes before them."""
    path = make_npz_site(tmp_path_factory.mktemp("site"))
    approve(Site.open(path, STUDY), STUDY)
    return SiteService(path)


def _fuzz(service, monkeypatch, tries):
    requests = _requests()

    def reached(site, gate, request, arrays):
        raise RuntimeError(f"{request.stage} was reached")

    for stage in STAGES:
        monkeypatch.setitem(STAGES, stage, reached)

    @settings(max_examples=tries, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def run(data):
        answer, rest = decode_answer(service.answer(_changed(data, data.draw(st.sampled_from(requests)))))
        if isinstance(answer.body, CanaryReply):  # what a canary brings is not read, so it may be anything
            assert not any(array.any() for array in decode_arrays(rest, "reply").values())
            return
        assert isinstance(answer.body, Refusal)
        assert answer.body.kind in {"NotApproved", "ReplyError", "BudgetError", "PolicyRefusal", "Unavailable"}
        assert "reached" not in answer.body.what  # the text of a foreign exception never leaves

    run()
    config = load_site_config(service.path)
    with closing(config.ledger()) as ledger:
        kinds = [entry.kind for entry in ledger.entries()]
        assert "reserved" not in kinds
        refused = [entry for entry in ledger.entries() if entry.kind == "refused"]
        assert all(entry.study == STUDY.sha256 for entry in refused)  # only for a study that somebody approved
        assert len(refused) <= 1000
    assert not list((config.state / "replies").glob("*"))


def test_mutated_requests_are_refused_and_leave_no_trace(service, monkeypatch):
    _fuzz(service, monkeypatch, 300)


@pytest.mark.slow
def test_many_mutated_requests_are_refused_and_leave_no_trace(service, monkeypatch):
    _fuzz(service, monkeypatch, 5000)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.binary(max_size=300))
def test_bytes_that_are_no_request_are_refused(service, junk):
    for data in (junk, MAGIC + junk, MAGIC + len(junk).to_bytes(8, "big") + junk):
        answer, _ = decode_answer(service.answer(data))
        assert answer.body.kind == "ReplyError"
        assert answer.spent is None
