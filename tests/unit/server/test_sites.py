"""Who is missing when a run waits for sites to come online, and what Flower may do with a question."""

from __future__ import annotations

from typing import cast

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from common.errors import FederationError
from common.protocol import EnrolRequest
from common.wire import to_record
from server.deployment.nodes import admitted_nodes
from server.federation import sites as module
from server.federation.sites import SiteGroup
from support.studies import agreement


class _Online:
    """Nodes that come online one after another, one at each look."""

    def __init__(self, *nodes, looks=None):
        self.nodes, self.looks = list(nodes), looks

    def get_node_ids(self):
        if self.looks is None:
            return self.nodes
        self.looks += 1
        return self.nodes[: self.looks]


def _group(grid, seconds=0.3):
    return SiteGroup(cast(Grid, grid), timeout_seconds=seconds)


def test_it_waits_until_enough_are_there_in_a_fixed_order(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    nodes = _group(_Online(9, 3, 5, looks=0), 60).wait_for(2, known={}, on_wait=lambda *_: None)
    assert nodes == [3, 9]


def test_a_site_that_took_part_before_and_is_not_online_is_named_while_it_waits_and_at_the_end(monkeypatch):
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.0)
    told = []
    with pytest.raises(FederationError, match="1 of 2 sites are online; not online: hospital-b after"):
        _group(_Online(3)).wait_for(2, known={3: "hospital-a", 8: "hospital-b"}, on_wait=lambda *row: told.append(row))
    assert told[0][0] == "1 of 2 sites are online; not online: hospital-b"
    assert 0 < told[0][1] <= 0.3


def test_those_that_are_hoped_for_are_waited_for_a_little_and_the_quorum_is_enough_then(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    told = []
    monkeypatch.setattr(module, "_TELL_SECONDS", 0.0)
    late = _group(_Online(3, 5, 9, looks=3), 60)
    assert late.wait_for(2, hoped=3, known={}, on_wait=lambda *row: told.append(row)) == [3, 5, 9]
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.2)
    assert _group(_Online(3, 5), 60).wait_for(2, hoped=3, known={}, on_wait=lambda *row: told.append(row)) == [3, 5]
    assert told[-1][0] == "2 of 3 sites are online" and told[-1][1] <= 0.2


def test_where_no_name_is_known_the_number_is_said():
    with pytest.raises(FederationError, match="0 of 2 sites are online after 0 s"):
        _group(_Online()).wait_for(2, known={}, on_wait=lambda *_: None)


def test_nodes_that_flower_lets_in_and_the_deployment_does_not_know_are_not_asked(tmp_path):
    for name, text in (("a", "3\n"), ("b", "9\n"), ("c", "half a num")):
        (tmp_path / f"{name}.node").write_text(text)
    group = SiteGroup(cast(Grid, _Online(3, 5, 9)), timeout_seconds=0.3, admitted=lambda: admitted_nodes(tmp_path))
    assert group.wait_for(2, known={}, on_wait=lambda *_: None) == [3, 9]
    (tmp_path / "b.node").unlink()  # dismissed meanwhile
    with pytest.raises(FederationError, match="1 of 2 sites are online"):
        group.wait_for(2, known={}, on_wait=lambda *_: None)


class _Flower:
    """A grid that does with the message to each node what a test says: an error, a record, or no id at all."""

    def __init__(self, by_node):
        self.by_node, self.replies = by_node, {}

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            what = self.by_node[message.metadata.dst_node_id]
            if what == "dropped":  # as the engine in one process does
                continue
            number = "" if what == "unregistered" else str(message.metadata.dst_node_id)  # as the SuperLink does
            message.metadata.__dict__["_message_id"] = number
            numbers.append(number)
            if isinstance(what, int):
                self.replies[number] = Message(Error(code=what, reason="x"), reply_to=message)
            elif isinstance(what, bytes):  # the reason of an exception at the node
                self.replies[number] = Message(Error(code=2, reason=what.decode()), reply_to=message)
            elif isinstance(what, RecordDict):
                self.replies[number] = Message(what, reply_to=message)
        return numbers

    def pull_messages(self, numbers):
        return [self.replies.pop(number) for number in list(numbers) if number in self.replies]


def test_whatever_flower_does_with_a_message_every_node_has_an_answer_or_a_reason(monkeypatch):
    """Before: two nodes that were gone ended the run with KeyError, a message that was too large with ValueError."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    answers = {1: to_record(b"yes"), 2: "unregistered", 3: "unregistered", 4: "dropped", 5: "silent", 6: 2, 7: 99,
               8: RecordDict()}  # fmt: skip
    request = (EnrolRequest(agreement=agreement()), {})
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    returned = _group(_Flower(answers), 60).ask(dict.fromkeys(answers, request), seconds=0.2)
    assert returned.answers == {1: b"yes", 8: b""}
    for node in (2, 3):
        assert returned.failures[node] == "Flower did not take the message: its SuperNode is gone"
    assert returned.hopeless == {4: "Flower did not take the message: it is too large for it"}
    assert returned.failures[5] == "no answer before the deadline"
    assert "its client app failed (Flower error 2)" in returned.failures[6]
    assert "it failed (Flower error 99)" in returned.failures[7]
    assert set(returned.answers) | set(returned.failures) | set(returned.hopeless) == set(answers)


def test_what_our_own_carrier_refuses_is_said_in_its_words_and_not_asked_again(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    said = (
        "<class 'common.errors.DataError'>:<'carrier.toml: bundles: x does not answer to app bundle 12\x1b[2J. Ask.'>"
    )
    other = "<class 'ValueError'>:<'/srv/secret'>"
    request = (EnrolRequest(agreement=agreement()), {})
    returned = _group(_Flower({1: said.encode(), 2: other.encode()}), 60).ask(dict.fromkeys((1, 2), request))
    assert returned.hopeless == {
        1: "no answer from its carrier: carrier.toml: bundles: x does not answer to app bundle 12 [2J. Ask."
    }
    assert returned.failures == {2: "no answer from its carrier: its client app failed (Flower error 2)"}
