"""The sites as the server reaches them: send each its question, wait with a deadline, hand back bytes.

SPDX-License-Identifier: Apache-2.0

Nothing is believed here: what the bytes say is read in `server/federation/collect.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.errors import FederationError, ReplyError
from common.protocol import Arrays, Request, encode
from common.text import printable
from common.wire import from_record, to_record

MESSAGE_TYPES = {
    "canary": "query.canary", "enrol": "query.enrol", "moments": "query.moments", "features": "query.features",
    "train": "train", "validate": "evaluate",
}  # fmt: skip
_FLOWER = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its client app cannot be loaded",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its client app failed",
    ErrorCode.MESSAGE_UNAVAILABLE: "the message is too old",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "it gave none in time",
    ErrorCode.NODE_UNAVAILABLE: "its SuperNode is gone",
    ErrorCode.INVALID_FAB: "its client app cannot be loaded",
    ErrorCode.CLIENT_APP_CRASHED: "its client app died",
}
_OURS = re.compile(r"common\.errors\.\w+'>:<'(.{1,400})'>", re.DOTALL)  # an error of our carrier's, as Flower wraps it
_POLL_SECONDS, _TELL_SECONDS, _PATIENCE_SECONDS = 0.2, 10.0, 120.0

Requests = Mapping[int, tuple[Request, Arrays]]  # by node


@dataclass(frozen=True)
class Returned:
    """What came back to one question; every node that was asked is in exactly one of these.

    Attributes:
        answers: by node, the answer's bytes, unread.
        failures: by node, why there are none; another time there may be.
        hopeless: by node, why there never will be.
    """

    answers: dict[int, bytes] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    hopeless: dict[int, str] = field(default_factory=dict)


class SiteGroup:
    """The nodes of one run behind Flower's grid.

    Args:
        admitted: the nodes that may take part, looked at anew each time; None for all that Flower lets in.
    """

    def __init__(
        self, grid: Grid, *, timeout_seconds: float, admitted: Callable[[], set[int]] | None = None
    ) -> None:  # fmt: skip
        self._grid = grid
        self._timeout = timeout_seconds
        self._admitted = admitted

    def _online(self) -> list[int]:
        nodes = set(self._grid.get_node_ids())
        return sorted(nodes if self._admitted is None else nodes & self._admitted())

    def wait_for(
        self, count: int, *, known: Mapping[int, str], on_wait: Callable[[str, float], None], hoped: int = 0
    ) -> list[int]:  # fmt: skip
        """Node ids once `count` nodes are online, in a fixed order; waits as long as for an answer.

        Args:
            hoped: how many there may be at best; for these it waits two minutes at most.
            known: by node, the names of sites that took part before.
            on_wait: called now and then with who is missing and how many seconds are left.

        Raises:
            FederationError: fewer are online at the deadline; says which of the known ones are not.
        """
        began = told = time.monotonic()
        deadline, patience = began + self._timeout, began + min(self._timeout, _PATIENCE_SECONDS)
        while True:
            nodes, now = self._online(), time.monotonic()
            if len(nodes) >= max(count, hoped) or (len(nodes) >= count and now > patience):
                return nodes
            absent = [known[node] for node in sorted(known) if node not in nodes]
            missing = f"{len(nodes)} of {max(count, hoped)} sites are online"
            missing += f"; not online: {', '.join(absent)}" if absent else ""
            if now > deadline:
                raise FederationError(
                    f"{missing} after {self._timeout:.0f} s", where="federation.min_sites",
                    remedy="Start the missing sites and resume the run.",
                )  # fmt: skip
            if now - told > _TELL_SECONDS:
                told = now
                on_wait(missing, (patience if len(nodes) >= count else deadline) - now)
            time.sleep(_POLL_SECONDS)

    def ask(self, requests: Requests, *, seconds: float | None = None) -> Returned:
        """Send each node its request and wait for the answers.

        Args:
            seconds: how long; None for the study's `timeout_seconds`.
        """
        seconds = self._timeout if seconds is None else seconds
        waiting, returned = dict[str, int](), Returned()
        for node, (request, arrays) in requests.items():
            # One by one: Flower gives no id for what is too large for it, and an empty one where the node is gone.
            numbers = list(self._grid.push_messages([_message(node, request, arrays, seconds)]))
            if not numbers:
                returned.hopeless[node] = "Flower did not take the message: it is too large for it"
            elif not numbers[0]:
                returned.failures[node] = "Flower did not take the message: its SuperNode is gone"
            else:
                waiting[numbers[0]] = node
        deadline = time.monotonic() + seconds
        while waiting and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(list(waiting)):
                # A dead node's error carries another source: the message it answers tells whom we had asked.
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    _keep(returned, node, reply)
            if waiting:
                time.sleep(_POLL_SECONDS)
        returned.failures.update(dict.fromkeys(waiting.values(), "no answer before the deadline"))
        return returned


def _message(node: int, request: Request, arrays: Arrays, seconds: float) -> Message:
    return Message(
        content=to_record(encode(request, arrays)), dst_node_id=node, message_type=MESSAGE_TYPES[request.stage],
        ttl=max(1.0, seconds),
    )  # fmt: skip


def _keep(returned: Returned, node: int, reply: Message) -> None:
    if reply.has_error():  # of Flower or its client app; the site's own process answers in its own words
        own = _OURS.search(reply.error.reason or "")
        if own is not None:  # it waits for its hospital, not for us
            returned.hopeless[node] = f"no answer from its carrier: {printable(own.group(1))}"
            return
        what = _FLOWER.get(reply.error.code, "it failed")
        returned.failures[node] = f"no answer from its carrier: {what} (Flower error {reply.error.code})"
        return
    try:
        returned.answers[node] = from_record(reply.content)
    except ReplyError:  # somebody is there, and says something else: read as nothing, which is no answer
        returned.answers[node] = b""
