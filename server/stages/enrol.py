"""Enrol: learn which sites take part, and their noisy class counts.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from common.errors import ReplyError
from common.messages import EnrolReply, EnrolRequest
from server.federation.screening import screen_arrays
from server.session import Member, Session


def enrol(session: Session) -> None:
    """Ask every node that is online; safe to repeat, since a site answers the same request from its store.

    Raises:
        FederationError: fewer usable sites than federation.min_sites.
    """
    study = session.agreement.study
    nodes = session.group.wait_for(_expected(session))
    session.progress.stage("enrol", f"{len(nodes)} sites are online; asking for private class counts")
    request = EnrolRequest(agreement=session.agreement)
    answers = session.group.ask(dict.fromkeys(nodes, request))
    reasons = session.excuses(answers)
    for node, reply in sorted(answers.replies.items()):
        if not isinstance(reply, EnrolReply):
            continue
        try:
            screen_arrays(reply.arrays, expected={"counts": (len(study.data.classes),)}, dtype="float64")
            if any(member.site == reply.site for member in session.members.values()):
                raise ReplyError(f"a second site calls itself '{reply.site}'", where="reply")
        except ReplyError as error:
            reasons[reply.site] = error.what
            continue
        counts = [round(float(count), 1) for count in reply.arrays["counts"]]
        session.members[node] = Member(node, reply.site, counts, reply.phantoms, reply.random_source, reply.spent)
    for site, reason in reasons.items():
        session.progress.warn(f"{site}: {reason}", site=site)
    session.require(len(session.members), reasons, "enrol")
    session.members = dict(sorted(session.members.items(), key=lambda item: item[1].site))
    for member in session.members.values():
        session.progress.step(
            "enrol", len(session.members), len(session.members),
            f"{member.site}: about {member.weight:.0f} training records (noisy), epsilon {member.spent.train:.2f}",
            site=member.site, counts=member.counts, epsilon=member.spent.train,
        )  # fmt: skip
    # Sites of an earlier process stay in the record: what they gave is in the model, so the claim must name them.
    ever = session.folder.result("enrol") or {}
    now = {m.site: {"phantoms": m.phantoms, "random_source": m.random_source} for m in session.members.values()}
    session.folder.keep_result("enrol", {**ever, **now})


def _expected(session: Session) -> int:
    """Simulated sites all come up; in a deployment the quorum is enough."""
    simulated = len(list((session.folder.path / "sites").glob("site-*.toml")))
    return simulated or session.agreement.study.federation.min_sites
