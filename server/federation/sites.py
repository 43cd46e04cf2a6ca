"""The sites as the server sees them: ask all, wait with a deadline, sort the answers.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import FederationError, ReplyError
from common.messages import Refusal, Reply, Request, decode_reply, encode
from common.wire import from_record, to_record

MESSAGE_TYPES = {"enrol": "query.enrol", "moments": "query.moments", "train": "train", "validate": "evaluate"}
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Answers:
    """What came back to one question; every site that was asked is in exactly one of these.

    Attributes:
        replies: by node, well-formed answers (not yet screened).
        refusals: by node, a site's readable no.
        broken: by node, why a reply could not be read.
        silent: nodes that did not answer before the deadline.
    """

    replies: dict[int, Reply] = field(default_factory=dict)
    refusals: dict[int, Refusal] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)
    silent: list[int] = field(default_factory=list)


class SiteGroup:
    """All nodes of one run behind Flower's grid."""

    def __init__(self, grid: Grid, *, timeout_seconds: float) -> None:
        self._grid = grid
        self._timeout = timeout_seconds

    def wait_for(self, count: int, *, timeout_seconds: float = 120.0) -> list[int]:
        """Node ids once `count` nodes are online, in a fixed order.

        Raises:
            FederationError: fewer are online at the deadline.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= count:
                return nodes
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(nodes)} of {count} sites are online after {timeout_seconds:.0f} s",
                    where="federation.min_sites", remedy="Start the missing sites and resume the run.",
                )  # fmt: skip
            time.sleep(_POLL_SECONDS)

    def message(self, node: int, request: Request) -> Message:
        """The Flower message of a request."""
        return Message(
            content=to_record(encode(request)), dst_node_id=node, message_type=MESSAGE_TYPES[request.stage],
            ttl=self._timeout,
        )  # fmt: skip

    def ask(self, requests: Mapping[int, Request], *, on_answer: Callable[[int], None] | None = None) -> Answers:
        """Send one request a node and wait for the answers, at most `timeout_seconds`."""
        return self.sort(self.exchange([self.message(node, r) for node, r in requests.items()], on_answer), requests)

    def exchange(
        self, messages: Sequence[Message], on_answer: Callable[[int], None] | None = None
    ) -> dict[int, Message]:
        """Push messages and pull what comes back before the deadline, by node asked."""
        nodes = [message.metadata.dst_node_id for message in messages]
        waiting = dict(zip(self._grid.push_messages(messages), nodes, strict=True))
        deadline = time.monotonic() + self._timeout
        answered: dict[int, Message] = {}
        while waiting and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(list(waiting)):
                # A dead node's error carries another source: the message it answers tells whom we had asked.
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is None:
                    continue
                answered[node] = reply
                if on_answer is not None:
                    on_answer(node)
            if waiting:
                time.sleep(_POLL_SECONDS)
        return answered

    @staticmethod
    def sort(answered: Mapping[int, Message], asked: Mapping[int, Request]) -> Answers:
        """Decode each answer; whatever is malformed is named, never raised."""
        answers = Answers(silent=[node for node in asked if node not in answered])
        for node, message in answered.items():
            if message.has_error():
                answers.broken[node] = f"the site's process failed (Flower error {message.error.code})"
                continue
            try:
                reply = decode_reply(from_record(message.content))
                if isinstance(reply, Refusal):
                    answers.refusals[node] = reply
                elif reply.stage != asked[node].stage:
                    raise ReplyError(f"answered '{reply.stage}' to '{asked[node].stage}'", where="reply")
                else:
                    answers.replies[node] = reply
            except ReplyError as error:
                answers.broken[node] = error.what
        return answers
