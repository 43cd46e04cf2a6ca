"""The protocol: what is encoded is what is decoded, and nothing malformed or ill-typed gets through."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ReplyError
from common.protocol import (
    MAX_HEAD_BYTES,
    Answer,
    EnrolRequest,
    Refusal,
    SiteFacts,
    Spent,
    TrainReply,
    TrainRequest,
    bounded_arrays,
    decode_answer,
    decode_arrays,
    decode_request,
    encode,
    identity,
)
from support.studies import agreement, tiny_study

FACTS = SiteFacts(name="site-1", phantoms=False, random_source="aes")
ANSWER = Answer(site=FACTS, spent=Spent(train=1.0, holdout=0.0, reserved=2, confirmed=2), body=TrainReply(round=3))
REQUEST = TrainRequest(agreement=agreement(), round=1, expected_batch=12.5)


def _bytes(value=1.0):
    return encode(REQUEST, {"w": np.full((2, 3), value, np.float32)})


def _with_head(data: bytes, change) -> bytes:
    """The message with its head changed by `change` (a function of the parsed JSON)."""
    start = len(b"SYNW2\n")
    length = int.from_bytes(data[start : start + 8], "big")
    head = json.loads(data[start + 8 : start + 8 + length])
    change(head)
    text = json.dumps(head).encode()
    return data[:start] + len(text).to_bytes(8, "big") + text + data[start + 8 + length :]


def test_a_request_survives_the_wire_with_its_agreement():
    back, rest = decode_request(_bytes())
    assert back.agreement.study.sha256 == REQUEST.agreement.study.sha256
    assert back.agreement.plan == REQUEST.agreement.plan
    assert (back.stage, back.round, back.expected_batch) == ("train", 1, 12.5)
    np.testing.assert_array_equal(decode_arrays(rest, "request")["w"], np.full((2, 3), 1.0, np.float32))
    assert encode(back, decode_arrays(rest, "request")) == _bytes()


def test_what_is_of_the_machine_is_not_sent():
    local = tiny_study(federation={"timeout_seconds": 7.0}, simulation={"sites": 5})
    sent, _ = decode_request(encode(EnrolRequest(agreement=agreement(local))))
    assert sent.agreement.study.sha256 == local.sha256 == tiny_study().sha256
    assert sent.agreement.study.federation.timeout_seconds != 7.0
    assert encode(EnrolRequest(agreement=agreement(local))) == encode(EnrolRequest(agreement=agreement()))


def test_an_answer_survives_the_wire():
    back, rest = decode_answer(encode(ANSWER, {"w": np.ones(4, np.float32)}))
    assert back == ANSWER
    np.testing.assert_array_equal(decode_arrays(rest, "reply")["w"], np.ones(4))


def test_the_same_request_has_the_same_identity_and_any_other_byte_another():
    assert identity(_bytes()) == identity(_bytes())
    assert identity(_bytes()) != identity(_bytes(1.0000001))


def test_an_answer_is_not_taken_for_a_request():
    with pytest.raises(ReplyError):
        decode_request(encode(Answer(site=FACTS, spent=None, body=Refusal(kind="k", what="w"))))
    with pytest.raises(ReplyError):
        decode_answer(encode(EnrolRequest(agreement=agreement())))


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head["spent"].update(train="x"),
        lambda head: head["spent"].update(train=True),
        lambda head: head["spent"].update(train=-1.0),
        lambda head: head["spent"].update(train=float("nan")),
        lambda head: head["spent"].update(reserved=1.5),
        lambda head: head["site"].update(name=["a"]),
        lambda head: head["site"].update(name="two words\n"),
        lambda head: head["site"].update(phantoms="no"),
        lambda head: head["body"].update(round="3"),
        lambda head: head["body"].update(loss="abc"),
        lambda head: head["body"].update(stage="pickle"),
        lambda head: head.update(extra=1),
        lambda head: head.pop("site"),
        lambda head: head.update(body=None),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_never_turned_into_another(change):
    with pytest.raises(ReplyError, match="malformed reply"):
        decode_answer(_with_head(encode(ANSWER), change))


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.update(expected_batch=0.0),
        lambda head: head.update(expected_batch="12"),
        lambda head: head.update(round=0),
        lambda head: head["agreement"]["study"]["network"].update(depths=[2] * 5),
        lambda head: head["agreement"]["study"]["network"].update(depths=[10**9, 2]),
        lambda head: head["agreement"]["study"]["network"].update(width=10**6),
        lambda head: head["agreement"]["study"]["training"].update(rounds=10**9),
        lambda head: head["agreement"]["plan"]["mechanisms"][0].update(noise_multiplier=-1.0),
        lambda head: head["agreement"]["plan"].update(mechanisms=head["agreement"]["plan"]["mechanisms"] * 10),
        lambda head: head["agreement"].pop("plan"),
    ],
)
def test_a_request_whose_numbers_have_no_bound_is_refused_while_it_is_read(change):
    with pytest.raises(ReplyError, match="malformed request"):
        decode_request(_with_head(_bytes(), change))


def test_a_head_that_claims_to_be_huge_is_not_read():
    data = _bytes()
    start = len(b"SYNW2\n")
    for length in (MAX_HEAD_BYTES + 1, 2**63, len(data)):
        with pytest.raises(ReplyError):
            decode_request(data[:start] + length.to_bytes(8, "big") + data[start + 8 :])
    nested = b"[" * 50_000
    with pytest.raises(ReplyError):
        decode_request(data[:start] + len(nested).to_bytes(8, "big") + nested)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_some_whole_message(data):
    good = bytearray(_bytes())
    where = data.draw(st.integers(0, len(good) - 1))
    good[where] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        request, rest = decode_request(bytes(good[:cut]))
        decode_arrays(rest, "request")
    except ReplyError:
        return
    assert request.agreement.study.sha256


@pytest.mark.parametrize(
    ("array", "fits"),
    [
        (np.array([1.0, -5.0], np.float32), True), (np.array([5.0001]), False), (np.array([np.nan]), False),
        (np.array([np.inf], np.float32), False), (np.array([], np.float32), True), (np.array([1]), False),
        (np.array(["a"]), False),
    ],
)  # fmt: skip
def test_arrays_are_bounded_numbers_or_refused(array, fits):
    assert bounded_arrays({"a": array}, 5.0) == fits
