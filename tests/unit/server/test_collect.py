"""The door into the server: a site may send anything; that site alone is left out, by name, and what it may have spent
is claimed."""

from __future__ import annotations

import copy
import json
import re
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ReplyError
from common.files import pack_arrays
from common.protocol import EnrolReply, EnrolRequest, MomentsReply, Refusal, TrainReply, Unreachable, encode
from server.federation.collect import collect
from server.federation.screening import LARGEST_COUNT, screen_arrays, screen_norm
from support.answers import ScriptedSites, answer, facts, head_of, member, spent, spoilt_arrays, with_head
from support.studies import agreement

REQUEST = EnrolRequest(agreement=agreement())


def _screen(_node, _body, arrays):
    screen_arrays(arrays, expected={"counts": (2,)}, dtype="float64")
    screen_norm(arrays, largest=LARGEST_COUNT, what="counts")


def _collect(by_node, members=None, body=EnrolReply, screen=_screen):
    requests = {node: (REQUEST, {}) for node in by_node}
    return collect(ScriptedSites(by_node).group, members or {}, requests, body, screen)


def _members(*numbers):
    return {number: member(number) for number in numbers}


def _left_out(data):
    """(what was collected, member) of site 2 when it sends this; sites 1 and 3 are honest and are always taken."""
    members = _members(1, 2, 3)
    found = _collect({1: answer(1), 2: data, 3: answer(3)}, members)
    assert [a.site.name for a in found.accepted if a.node != 2] == ["site-1", "site-3"]
    assert set(found.reasons) <= {"site-2"}
    return found, members[2]


def test_honest_answers_are_taken_with_their_arrays_and_what_was_spent_is_booked():
    members = _members(1, 2)
    found = _collect({1: answer(1, spent=spent(2.0, 1.0)), 2: answer(2)}, members)
    assert list(found.arrays) == ["site-1", "site-2"]
    assert found.arrays["site-1"]["counts"].tolist() == [40.0, 30.0]
    assert found.reasons == {}
    assert (members[1].spent.train, members[1].spent.holdout) == (2.0, 1.0)
    assert not members[1].open_question


def test_a_ledger_never_shrinks():
    members = _members(1)
    _collect({1: answer(1, spent=spent(3.0))}, members)
    _collect({1: answer(1, spent=spent(0.5))}, members)
    assert members[1].spent.train == 3.0


@pytest.mark.parametrize("kind", list(spoilt_arrays()))
def test_a_wrong_array_is_named_and_leaves_the_question_open(kind):
    found, site = _left_out(answer(2, arrays={"counts": spoilt_arrays()[kind]}))
    assert "counts" in found.reasons["site-2"]
    assert site.open_question


@pytest.mark.parametrize("arrays", [{}, {"other": np.zeros(2)}, {"counts": np.zeros(2), "more": np.zeros(1)}])
def test_missing_and_unknown_arrays_are_named(arrays):
    found, _ = _left_out(answer(2, arrays=arrays))
    assert "wrong names" in found.reasons["site-2"]


WRONG_HEADS = {
    "spent.train": "x", "spent.holdout": None, "spent.reserved": 1.5, "spent.confirmed": True, "spent": None,
    "site": None, "site.name": "no such name!", "site.phantoms": 1, "site.random_source": "x" * 501,
    "body.stage": "moments", "body": "enrol", "body.loss": "abc", "spent.more": 1, "spent.train.": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("where", list(WRONG_HEADS))
def test_a_wrong_type_in_the_head_drops_that_site_and_no_other(where):
    head, rest = head_of(answer(2))
    *path, last = where.rstrip(".").split(".")
    place = head
    for step in path:
        place = place[step]
    place[last] = WRONG_HEADS[where]
    found, site = _left_out(with_head(head, rest))
    assert found.reasons["site-2"]
    assert site.open_question and site.spent == spent()


@pytest.mark.parametrize(
    "data", [b"", b"x" * 100, answer(2)[:40], answer(2)[:-3], b"SYNW2\n" + b"\xff" * 8, b"SYNW2\n"]
)
def test_bytes_that_are_no_answer_drop_the_site(data):
    found, site = _left_out(data)
    assert "malformed" in found.reasons["site-2"]
    assert site.open_question


def test_silence_and_failure_are_reasons_and_leave_the_question_open():
    found, site = _left_out("no answer before the deadline")
    assert re.fullmatch(
        r"no answer before the deadline; last heard of at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", found.reasons["site-2"]
    )
    assert found.unreachable == {2: "site-2"}
    assert site.open_question


def test_the_last_contact_of_a_silent_site_is_its_last_answer():
    members = _members(1, 2)
    members[1].heard = members[2].heard = datetime(2026, 1, 2, 3, 4, 5)
    found = _collect({1: answer(1), 2: "no answer from its carrier (Flower error 2)"}, members)
    assert found.reasons["site-2"].endswith("(Flower error 2); last heard of at 2026-01-02 03:04:05")
    assert members[1].heard > members[2].heard
    body = Unreachable(carrier="hospital-b", what="its process does not answer (UNAVAILABLE)", again=True)
    found = _collect({1: answer(1), 2: answer(2, body, {}, site=None, spent=None)}, members)
    assert found.reasons["site-2"].endswith("(UNAVAILABLE); last heard of at 2026-01-02 03:04:05")
    assert found.unreachable == {2: "site-2"}


@pytest.mark.parametrize("changes", [{}, {"site": None, "spent": None}, {"spent": spent(8.5)}])
def test_a_site_that_says_no_was_heard_whatever_else_it_says(changes):
    """A carrier's word, or bytes of another one's site, are not its."""
    site = member(2)
    site.heard = datetime(2026, 1, 2)
    _collect({2: answer(2, REFUSAL.model_copy(update={"kind": "Unavailable"}), {}, **changes)}, {2: site})
    assert (site.heard > datetime(2026, 1, 2)) == ("spent" not in changes or changes["spent"] is None)
    site.heard = datetime(2026, 1, 2)
    for silent in (b"x", answer(1), "no answer"):
        _collect({2: silent}, {2: site})
    assert site.heard == datetime(2026, 1, 2)


def test_what_can_never_be_answered_is_not_asked_again():
    """Before: a request over the site's max_message_mb, and a record of something else, were asked again and again."""
    body = Unreachable(carrier="hospital-b", what="the request is larger than the site reads", again=False)
    found, site = _left_out(answer(2, body, {}, site=None, spent=None))
    assert found.unreachable == {} and site.open_question
    assert _left_out(b"")[0].unreachable == {}


def test_a_site_of_an_earlier_process_is_called_by_its_name_then():
    requests = {node: (REQUEST, {}) for node in (1, 2, 3)}
    sites = ScriptedSites({1: answer(1), 2: "no answer", 3: "no answer"}).group
    found = collect(sites, {}, requests, EnrolReply, _screen, known={2: "hospital-b"})
    assert list(found.reasons) == ["hospital-b (node 2, as it was known before)", "node 3"]


def test_an_answer_to_another_question_is_dropped():
    for body in (MomentsReply(), TrainReply(round=1)):
        found, _ = _left_out(answer(2, body))
        assert "another question" in found.reasons["site-2"]


def test_an_answer_under_another_sites_name_is_dropped_and_books_nothing_there():
    members = _members(1, 2)
    found = _collect({1: answer(1), 2: answer(1, spent=spent(7.0))}, members)
    assert found.reasons == {"site-2": "an answer from 'site-1'"}
    assert members[1].spent.train == 1.0


def test_a_site_that_changes_what_it_says_of_itself_is_dropped():
    found, _ = _left_out(answer(2, site=facts(2).model_copy(update={"phantoms": False})))
    assert "other things of itself" in found.reasons["site-2"]


def test_two_nodes_of_one_name_do_not_both_enrol():
    found = _collect({1: answer(1), 2: answer(1), 3: answer(3)})
    assert [(a.node, a.site.name) for a in found.accepted] == [(1, "site-1"), (3, "site-3")]
    assert found.reasons == {"node 2": "a second site calls itself 'site-1'"}


def test_a_site_that_says_it_spent_more_than_the_study_may_is_dropped():
    found, site = _left_out(answer(2, spent=spent(8.0000001)))
    assert "more than the study may" in found.reasons["site-2"]
    assert site.open_question
    assert _left_out(answer(2, spent=spent(8.0)))[0].reasons == {}


REFUSAL = Refusal(kind="BudgetError", what="over the ceiling 8 of the site", remedy="Ask there.")


def test_a_refusal_is_told_in_the_sites_words_and_what_it_spent_is_booked():
    found, site = _left_out(answer(2, REFUSAL, {}, spent=spent(5.0)))
    assert found.reasons == {"site-2": "refused (BudgetError) over the ceiling 8 of the site. Ask there."}
    assert found.exhausted == ["site-2"]
    assert site.spent.train == 5.0 and not site.open_question


def test_another_plan_at_the_site_is_no_used_up_budget():
    found, _ = _left_out(answer(2, REFUSAL.model_copy(update={"rule": "plan"}), {}))
    assert found.exhausted == [] and "BudgetError" in found.reasons["site-2"]


def test_a_refusal_that_does_not_say_what_was_spent_leaves_the_question_open():
    found, site = _left_out(answer(2, REFUSAL.model_copy(update={"kind": "NotApproved"}), {}, site=None, spent=None))
    assert "NotApproved" in found.reasons["site-2"]
    assert found.exhausted == []
    assert site.open_question


def test_a_site_that_does_not_enrol_is_named_by_itself_but_not_by_anothers_name():
    named = _collect({1: answer(1), 2: answer(2, REFUSAL, {})})
    assert list(named.reasons) == ["site-2"]
    borrowed = _collect({1: answer(1), 2: answer(1, REFUSAL, {})})
    assert list(borrowed.reasons) == ["node 2"]
    assert list(_collect({4: b""}).reasons) == ["node 4"]


def test_a_sites_words_are_one_printable_line():
    rude = REFUSAL.model_copy(update={"what": "\x1b[2J\x07 gone\nerror: all lost\u202e" + "x" * 400})
    reason = _left_out(answer(2, rude, {}))[0].reasons["site-2"]
    assert reason.isprintable() and len(reason) <= 300
    long_name = _left_out(answer(2, arrays={"\x1b[2J" + "n" * 5000: np.zeros(1)}))[0].reasons["site-2"]
    assert long_name.isprintable() and len(long_name) <= 300


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=20)
    | st.sampled_from(["", "x", "site-1", "1", -1, 1e300, 0.1, "enrol", "refusal", {"stage": "refusal"}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def _paths(tree, before=()):
    yield before
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield from _paths(value, (*before, key))


@st.composite
def _heads(draw):
    """The head of an honest answer or refusal with a value replaced, removed or added anywhere."""
    sent = draw(st.sampled_from([answer(2), answer(2, REFUSAL, {}), answer(2, TrainReply(round=1))]))
    head, rest = head_of(sent)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in _paths(head) if path]
        if not paths:
            break
        *path, last = draw(st.sampled_from(paths))
        place = head
        for step in path:
            place = place[step]
        change = draw(st.sampled_from(["set", "remove", "add"]))
        if change == "set":
            place[last] = draw(JUNK)
        elif change == "remove":
            del place[last]
        else:
            place[draw(st.text(max_size=8))] = draw(JUNK)
    return with_head(copy.deepcopy(head), rest)


DTYPES = ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "uint64", "bool", "complex64"]


@st.composite
def _array_answers(draw):
    names = draw(st.lists(st.sampled_from(["counts", "loss", "", "\x00", "n" * 300]), max_size=3, unique=True))
    arrays = {}
    for name in names:
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        value = draw(st.sampled_from([0.0, 1.0, -1e300, 1e300, np.inf, np.nan, 1e9]))
        with np.errstate(all="ignore"):
            arrays[name] = np.full(shape, value).astype(draw(st.sampled_from(DTYPES)))
    return answer(2, arrays=arrays)


@st.composite
def _flipped(draw):
    data = bytearray(answer(2))
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@settings(max_examples=300)
@given(data=_heads() | _array_answers() | _flipped() | st.binary(max_size=200))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_no_answer_ends_the_study_and_none_that_is_taken_is_wrong(data):
    found, site = _left_out(data)
    taken = [a for a in found.accepted if a.node == 2]
    assert len(taken) + len(found.reasons) == 1
    if taken:
        counts = taken[0].arrays["counts"]
        assert (counts.dtype, counts.shape, list(taken[0].arrays)) == (np.float64, (2,), ["counts"])
        assert float(np.linalg.norm(counts)) <= LARGEST_COUNT
        assert taken[0].site == facts(2)
    else:
        assert next(iter(found.reasons.values())).isprintable()
    assert site.spent.train <= 8.0
    unknown = _collect({1: answer(1), 2: data})  # before anybody is enrolled
    assert unknown.accepted[0].site == facts(1)
    assert len(unknown.accepted) + len(unknown.reasons) == 2


def test_a_defect_of_our_own_is_not_taken_for_a_bad_site():
    def broken(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _collect({1: answer(1)}, screen=broken)


def test_the_tests_own_tools_make_what_encode_makes():
    head, rest = head_of(answer(2))
    assert with_head(json.loads(json.dumps(head)), rest) != b""
    assert rest == pack_arrays({"counts": np.array([40.0, 30.0])})
    assert head_of(encode(REQUEST))[0]["stage"] == "enrol"


def test_a_screen_names_what_it_finds():
    with pytest.raises(ReplyError, match="norm 5, over the bound 4"):
        screen_norm({"a": np.array([3.0]), "b": np.array([4.0])}, largest=4.0, what="sums")
    screen_norm({"a": np.array([3.0]), "b": np.array([4.0])}, largest=5.0, what="sums")
    with pytest.raises(ReplyError, match="over the bound"):
        screen_norm({"a": np.array([1e300])}, largest=1e200, what="sums")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_its_array(value):
    arrays = {"counts": np.array([3.0, value])}
    with pytest.raises(ReplyError, match="'counts' has values that are not finite"):
        screen_arrays(arrays, expected={"counts": (2,)}, dtype="float64")


def test_nobody_takes_the_name_of_another_node():
    """Whatever the order of the nodes: of the one that had it before, or that bears it in the same step."""
    requests = {node: (REQUEST, {}) for node in (5, 20)}
    sites = ScriptedSites({5: answer(2), 20: answer(2)}).group
    found = collect(sites, {}, requests, EnrolReply, _screen, known={20: "site-2"})
    assert [(a.node, a.site.name) for a in found.accepted] == [(20, "site-2")]
    assert "as another node's site did before" in found.reasons["node 5"]
    liar = answer(2, REFUSAL, {})
    found = collect(ScriptedSites({5: liar, 20: answer(2)}).group, {}, requests, EnrolReply, _screen)
    assert [a.node for a in found.accepted] == [20]
    assert list(found.reasons) == found.exhausted == ["node 5"]


def test_what_flower_never_takes_is_not_asked_again():
    found = collect(ScriptedSites({1: answer(1), 2: ReplyError("it is too large")}).group, {},
                    {1: (REQUEST, {}), 2: (REQUEST, {})}, EnrolReply, _screen)  # fmt: skip
    assert found.reasons == {"node 2": "it is too large"} and found.unreachable == {}
