"""Messages: what is encoded is what is decoded, and nothing malformed gets through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ReplyError
from common.messages import (
    EnrolRequest,
    Refusal,
    Spent,
    TrainReply,
    TrainRequest,
    decode_reply,
    decode_request,
    encode,
    identity,
)
from support.studies import agreement


def _request(value=1.0):
    return TrainRequest(agreement(), round=1, expected_batch=12.5, arrays={"w": np.full((2, 3), value, np.float32)})


def test_a_request_survives_the_wire_with_its_agreement():
    back = decode_request(encode(_request()))
    assert isinstance(back, TrainRequest)
    assert back.agreement == agreement()
    assert back.expected_batch == 12.5
    np.testing.assert_array_equal(back.arrays["w"], _request().arrays["w"])


def test_a_reply_survives_the_wire():
    reply = TrainReply("site-1", 3, 0.5, Spent(1.0, 0.0, 2, 2), {"w": np.ones(4, np.float32)})
    back = decode_reply(encode(reply))
    assert isinstance(back, TrainReply)
    assert (back.site, back.round, back.loss, back.spent) == ("site-1", 3, 0.5, reply.spent)


def test_the_same_request_has_the_same_identity_and_any_other_byte_another():
    assert identity(encode(_request())) == identity(encode(_request()))
    assert identity(encode(_request())) != identity(encode(_request(1.0000001)))


def test_a_reply_is_not_taken_for_a_request():
    with pytest.raises(ReplyError):
        decode_request(encode(Refusal("s", "k", "w", "r")))
    with pytest.raises(ReplyError):
        decode_reply(encode(EnrolRequest(agreement())))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_as_some_whole_message(data):
    good = bytearray(encode(_request()))
    where = data.draw(st.integers(0, len(good) - 1))
    good[where] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        decode_request(bytes(good[:cut]))
    except ReplyError:
        return
