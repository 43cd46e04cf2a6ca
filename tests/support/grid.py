"""Both Flower apps in one process: a Grid that hands each message to the real ClientApp and the real site service.

SPDX-License-Identifier: Apache-2.0

Sites can be silenced, made to crash, or have their answers tampered with, one line per test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from client.service import serving
from common.protocol import Answer, Arrays, decode_answer, decode_arrays, encode
from common.wire import from_record, to_record

Tamper = Callable[[bytes], bytes]


def tampered(change: Callable[[Answer, Arrays], tuple[Answer, Arrays]], *, stage: str) -> Tamper:
    """A tampering with the answers of one stage; others pass."""

    def tamper(data: bytes) -> bytes:
        answer, rest = decode_answer(data)
        if answer.body.stage != stage:
            return data
        arrays = {name: array.copy() for name, array in decode_arrays(rest, "reply").items()}
        return encode(*change(answer, arrays))

    return tamper


_live = ExitStack()  # one grid at a time: the one before stops serving, so that its sites can be served anew


class InProcessGrid(Grid):
    """Nodes 1 to n, each with the site file of its number, served on sockets as in a deployment."""

    def __init__(self, sites: list[Path]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        _live.close()
        folder = Path(_live.enter_context(tempfile.TemporaryDirectory(prefix="sw-")))
        self.sites = dict(enumerate(_live.enter_context(serving(sites, folder)), start=1))
        self.silent: set[int] = set()
        self.crashed: set[int] = set()
        self.tamper: dict[int, Tamper] = {}
        self.asked: list[str] = []
        self._answers: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = number = str(uuid4())
            numbers.append(number)
            node = message.metadata.dst_node_id
            self.asked.append(message.metadata.message_type)
            if node in self.silent:
                continue
            self._answers[number] = self._answer(node, message)
        return numbers

    def _answer(self, node: int, message: Message) -> Message:
        if node in self.crashed:
            return Message(Error(code=4, reason="the process died"), reply_to=message)
        context = Context(
            run_id=1, node_id=node, node_config={"site": str(self.sites[node])}, state=RecordDict(), run_config={}
        )
        reply = client_app(message, context)
        if node in self.tamper:
            reply.content = to_record(self.tamper[node](from_record(reply.content)))
        return reply

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(number) for number in list(message_ids) if number in self._answers]

    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...
