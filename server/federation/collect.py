"""The one door into the server: what the sites sent is read, checked and booked here, once, for every stage.

SPDX-License-Identifier: Apache-2.0

A site may send anything. Whatever it is, that site alone is left out of the step, by name and with the reason; no
answer of one site can end the study. Where a site was asked and gave no answer that could be read, its ledger may hold
more than it has reported: its question stays open, and the claim then states its whole planned cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from common.errors import ReplyError
from common.protocol import (
    Answer,
    Arrays,
    CanaryReply,
    EnrolReply,
    FeaturesReply,
    MomentsReply,
    Refusal,
    Reply,
    SiteFacts,
    Spent,
    TrainReply,
    Unreachable,
    ValidateReply,
    decode_answer,
    decode_arrays,
)
from common.text import printable
from server.federation.members import Member
from server.federation.sites import Requests, SiteGroup

B = TypeVar("B", CanaryReply, EnrolReply, MomentsReply, FeaturesReply, TrainReply, ValidateReply)
Screen = Callable[[int, B, Arrays], None]  # node, body, arrays; raises ReplyError
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Accepted:
    """One answer that may be used."""

    node: int
    site: SiteFacts
    spent: Spent
    arrays: Arrays


@dataclass(frozen=True)
class Collected:
    """The answers to one question; every node that was asked is in `accepted` or in `reasons`.

    Attributes:
        accepted: in the order of the nodes.
        reasons: by site (by node, where it has no name), why it is left out: one line of printable text.
        exhausted: sites that said no because their budget is used up.
        unreachable: nodes whose site, or whose carrier, gave no answer, and what it is called in `reasons`.
    """

    accepted: list[Accepted] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    exhausted: list[str] = field(default_factory=list)
    unreachable: dict[int, str] = field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, Arrays]:
        """The arrays by site."""
        return {answer.site.name: answer.arrays for answer in self.accepted}


def collect(
    group: SiteGroup, members: Mapping[int, Member], requests: Requests, body: type[B], screen: Screen[B], *,
    known: Mapping[int, str] | None = None, before: Collected | None = None, seconds: float | None = None,
) -> Collected:  # fmt: skip
    """Ask the sites, and take in what may be used.

    Args:
        members: those that are enrolled; what they spent is booked there.
        requests: by node, the question and its arrays.
        body: what the answers must be.
        screen: checks body and arrays of a node's answer.
        known: by node, the names of sites that took part in an earlier process of this run.
        before: what the same question brought, where it is asked again of some; it is added to.
        seconds: how long is waited; None for the study's own.
    """
    returned, collected, known = group.ask(requests, seconds=seconds), before or Collected(), known or {}
    called = {node: collected.unreachable.pop(node) for node in requests if node in collected.unreachable}
    for label in called.values():
        del collected.reasons[label]
    left_out = dict[int, tuple[Answer | None, str]]()
    for node in sorted(requests):
        member, answer, spent = members.get(node), None, None
        try:
            if node not in returned.answers:
                raise ReplyError(_silent({**returned.failures, **returned.hopeless}[node], member), where="reply")
            answer, rest = decode_answer(returned.answers[node])
            _check_sender(node, answer, member, requests, known)
            spent = answer.spent
            if isinstance(answer.body, Unreachable):
                raise ReplyError(_silent(answer.body.what, member), where="reply")
            if member is not None:
                member.heard = datetime.now()
            if not isinstance(answer.body, Refusal):
                collected.accepted.append(_accepted(node, answer, rest, member, collected, body, screen))
                if member is not None:
                    member.note(collected.accepted[-1].spent)
                continue
            reason = _refused(answer.body)
        except ReplyError as error:
            reason, spent = error.what, None
        left_out[node] = answer, _plain(reason)
        _book(member, spent)
    for node, (answer, reason) in left_out.items():  # now all are read: a name that another one bears is not believed
        silent, label = node in returned.failures, _label(node, members.get(node), answer, collected, known.get(node))
        label = called.get(node, label) if silent else label  # its carrier has said more of itself before
        collected.reasons[label] = reason
        if answer is not None and _exhausted(answer.body):
            collected.exhausted.append(label)
        if silent or (answer is not None and _again(answer.body)):
            collected.unreachable[node] = label
    collected.accepted.sort(key=lambda accepted: accepted.node)
    return collected


def _again(body: Reply) -> bool:
    """Whether the carrier thinks that the site may be reached another time."""
    return isinstance(body, Unreachable) and body.again


def _silent(why: str, member: Member | None) -> str:
    return why if member is None else f"{why}; last heard of at {member.heard:%Y-%m-%d %H:%M:%S}"


def _check_sender(
    node: int, answer: Answer, member: Member | None, requests: Requests, known: Mapping[int, str]
) -> None:
    """See that the answer is from the site that was asked, and that what it spent is possible."""
    name = None if answer.site is None else answer.site.name
    if name is not None and member is not None and name != member.name:
        raise ReplyError(f"an answer from '{name}'", where="reply")
    if name is not None and any(other != node and known.get(other) == name for other in requests):
        raise ReplyError(f"calls itself '{name}', as another node's site did before", where="reply")
    spent, ceiling = answer.spent, requests[node][0].agreement.study.privacy.epsilon
    if spent is not None and max(spent.train, spent.holdout) > ceiling:
        raise ReplyError("says that it spent more than the study may", where="reply")


def _accepted(
    node: int, answer: Answer, rest: bytes, member: Member | None, collected: Collected, body: type[B],
    screen: Screen[B],
) -> Accepted:  # fmt: skip
    if not isinstance(answer.body, body):
        raise ReplyError(f"an answer to another question ('{answer.body.stage}')", where="reply")
    if answer.site is None or answer.spent is None:
        raise ReplyError("does not say who it is and what it spent", where="reply")
    if member is not None and answer.site != member.facts:
        raise ReplyError("says other things of itself than when it enrolled", where="reply")
    if any(answer.site.name == other.site.name for other in collected.accepted):
        raise ReplyError(f"a second site calls itself '{answer.site.name}'", where="reply")
    arrays = decode_arrays(rest, "reply")
    screen(node, answer.body, arrays)
    return Accepted(node, answer.site, answer.spent, arrays)


def _refused(refusal: Refusal) -> str:
    return f"refused ({refusal.kind}) {refusal.what}. {refusal.remedy}"


def _exhausted(body: Reply) -> bool:
    """Whether a site's no means that its budget is used up; that another plan was approved there is another matter."""
    return isinstance(body, Refusal) and body.kind == "BudgetError" and body.rule != "plan"


def _book(member: Member | None, spent: Spent | None) -> None:
    """A site that says no, or fails half-way, may have spent: take its word where there is one."""
    if member is None:
        return
    if spent is None:
        member.open_question = True
    else:
        member.note(spent)


def _label(node: int, member: Member | None, answer: Answer | None, collected: Collected, before: str | None) -> str:
    """What a site that is left out is called; a name that another one bears is not believed.

    Args:
        before: what the node's site was called in an earlier process of this run.
    """
    if member is not None:
        return member.name
    taken = {*collected.reasons, *(other.site.name for other in collected.accepted)}
    said = answer.site.name if answer is not None and answer.site is not None else None
    if answer is not None and isinstance(answer.body, Unreachable):
        return f"{_plain(answer.body.carrier)} (node {node}, by its carrier)"  # the site itself has not said so
    if said is not None and said not in taken:
        return said
    return f"node {node}" if before is None or before in taken else f"{before} (node {node}, as it was known before)"


def _plain(text: str) -> str:
    """A site's words as one line that no terminal takes for a command."""
    return " ".join(printable(text[: 4 * _LONGEST_REASON]).split())[:_LONGEST_REASON]
