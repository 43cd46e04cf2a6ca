"""Enrol: learn which sites take part, and their noisy class counts.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from common.protocol import Arrays, EnrolReply, EnrolRequest
from server.federation.members import Member
from server.federation.screening import LARGEST_COUNT, screen_arrays, screen_norm
from server.session import Session


def enrol(session: Session, nodes: list[int]) -> None:
    """Ask the nodes that are online; safe to repeat, since a site answers the same request from its store.

    Raises:
        FederationError: fewer usable sites than federation.min_sites.
    """
    classes = len(session.agreement.study.data.classes)
    session.progress.stage("enrol", f"asking {len(nodes)} sites for private class counts")

    def screen(_node: int, _body: EnrolReply, arrays: Arrays) -> None:
        screen_arrays(arrays, expected={"counts": (classes,)}, dtype="float64")
        screen_norm(arrays, largest=LARGEST_COUNT, what="counts")

    request = EnrolRequest(agreement=session.agreement)
    collected = session.ask("enrol", {node: (request, {}) for node in nodes}, EnrolReply, screen)
    for answer in sorted(collected.accepted, key=lambda answer: answer.site.name):
        counts = [round(float(count), 1) for count in answer.arrays["counts"]]
        session.members[answer.node] = Member(answer.node, answer.site, counts, answer.spent)
    for member in session.members.values():
        session.progress.step(
            "enrol", len(session.members), len(session.members),
            f"{member.name}: about {member.weight:.0f} training records (noisy), epsilon {member.spent.train:.2f}",
            site=member.name, counts=member.counts, epsilon=member.spent.train,
        )  # fmt: skip
    _warn_of_delta(session)
    _keep_for_the_claim(session)


def _warn_of_delta(session: Session) -> None:
    """A delta near one over the records of a site is hardly a promise; the site's own check knows the exact number."""
    most, delta = max(member.weight for member in session.members.values()), session.agreement.study.privacy.delta
    if delta > 0.1 / most:
        session.progress.warn(f"delta {delta:g} is over a tenth of one over the largest site's records (about "
                              f"{most:.0f}, noisy): it should be far smaller")  # fmt: skip


def _keep_for_the_claim(session: Session) -> None:
    """Sites of an earlier process stay in the record, and so does what they then said of themselves: what they gave is
    in the model, so the claim must tell of it."""
    ever = session.folder.result("enrol") or {}
    for member in session.members.values():
        before = ever.get(member.name, {"phantoms": True, "random_source": member.facts.random_source})
        sources = {*before["random_source"].split("; "), member.facts.random_source}
        ever[member.name] = {
            "phantoms": before["phantoms"] and member.facts.phantoms, "random_source": "; ".join(sorted(sources)),
            "node": member.node,
        }  # fmt: skip
    session.folder.keep_result("enrol", ever)
