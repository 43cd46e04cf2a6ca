"""Answers of made-up sites for the server's door, honest and otherwise, without a site or Flower behind them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from common.errors import ReplyError
from common.protocol import Answer, Arrays, EnrolReply, Reply, SiteFacts, Spent, encode
from server.federation.members import Member
from server.federation.sites import Requests, Returned, SiteGroup

_MAGIC = b"SYNW2\n"


class ScriptedSites:
    """Stands for a `SiteGroup`: each node gives the bytes, or the failure, that a test has written down."""

    def __init__(
        self,
        by_node: Mapping[int, bytes | str | ReplyError] | Callable[[Requests], Mapping[int, bytes | str | ReplyError]],
    ) -> None:
        self._by_node = by_node
        self.asked: list[Requests] = []
        self.seconds: list[float | None] = []

    def ask(self, requests: Requests, *, seconds: float | None = None) -> Returned:
        self.seconds.append(seconds)
        self.asked.append(requests)
        given = self._by_node(requests) if callable(self._by_node) else self._by_node
        answers = {node: said for node, said in given.items() if isinstance(said, bytes)}
        failures = {node: said for node, said in given.items() if isinstance(said, str)}
        failures |= {n: "no answer" for n in requests if n not in given}
        hopeless = {node: said.what for node, said in given.items() if isinstance(said, ReplyError)}
        return Returned(answers, failures, hopeless)

    def wait_for(self, count: int, **_: Any) -> list[int]:
        return list(range(1, count + 1))

    @property
    def group(self) -> SiteGroup:
        return cast(SiteGroup, self)


def facts(number: int) -> SiteFacts:
    return SiteFacts(name=f"site-{number}", phantoms=True, random_source="AES-CTR")


def spent(train: float = 1.0, holdout: float = 0.0) -> Spent:
    return Spent(train=train, holdout=holdout, reserved=1, confirmed=1)


def answer(number: int, body: Reply | None = None, arrays: Arrays | None = None, **changes: Any) -> bytes:
    """An honest answer of site `number`, with some fields of the envelope changed."""
    fields: dict[str, Any] = {"site": facts(number), "spent": spent(), "body": body or EnrolReply(), **changes}
    return encode(Answer(**fields), {"counts": np.array([40.0, 30.0])} if arrays is None else arrays)


def member(number: int, counts: list[float] | None = None) -> Member:
    return Member(number, facts(number), counts or [40.0, 30.0], spent())


def head_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(head, what follows it) of a message."""
    start = len(_MAGIC) + 8
    length = int.from_bytes(data[len(_MAGIC) : start], "big")
    return json.loads(data[start : start + length]), data[start + length :]


def with_head(head: Any, rest: bytes) -> bytes:
    """A message of any head at all."""
    text = json.dumps(head).encode()
    return _MAGIC + len(text).to_bytes(8, "big") + text + rest


def spoilt_arrays() -> dict[str, NDArray[Any]]:
    """One array for each way in which "counts", float64 (2,), can be wrong."""
    good = np.array([40.0, 30.0])
    return {
        "not finite": np.array([np.nan, 30.0]), "infinite": np.array([40.0, np.inf]), "vast": np.array([1e300, 30.0]),
        "float32": good.astype(np.float32), "int64": good.astype(np.int64), "bool": good > 35,
        "complex64": good.astype(np.complex64), "uint8": good.astype(np.uint8), "long": np.zeros(3),
        "short": np.zeros(1), "empty": np.zeros(0), "flat": np.zeros((2, 1)), "scalar": np.zeros(()),
    }  # fmt: skip
