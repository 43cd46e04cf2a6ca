"""What `approve` does: everything that a site can say no to is said here, at the site, before anything is spent.

SPDX-License-Identifier: Apache-2.0

The data are opened and checked, the policy is asked in full, and it is looked whether the whole study would fit under
every ceiling and whether a record would be counted twice. What is then written into the ledger, the plan with its noise
and the digest of the data, is what a request has to match. So nothing that a request is answered depends on a record.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.privacy.fingerprints import in_words
from client.privacy.ledger import Approval, Ledger
from client.privacy.policy import SitePolicy
from client.registry import Registry
from client.site import Site
from common.accounting import PrivacyLoss, StudyPlan, epsilon_of
from common.errors import BudgetError, DataError, PolicyRefusal, Refused, StorageError
from common.files import sha256_file
from common.mechanisms import PARTITIONS, Partition
from common.study import Study

_LOOK = (
    "Export the images again; `synthward-site check SITE.toml --study STUDY.toml --picture FILE.png` shows the most"
    " unusual ones."
)
MOST_NAME = 200  # characters of who approves
MOST_STUDIES = 64  # that are counted to say how many more a ceiling allows


@dataclass(frozen=True)
class Verdict:
    """Whether a study may run at a site.

    Attributes:
        refusals: every rule that says no, in order.
        before, after: epsilon of all studies on each partition, at the policy's delta, now and at this study's end.
        more: how many further studies like this one the ceiling allows after it; `MOST_STUDIES` = that many or more.
        warnings: one line each, for the site's own screen.
        approval: the one in force, or None.
        same_images: whether it was given for the images that are there now.
    """

    refusals: tuple[Refused, ...]
    before: dict[Partition, float]
    after: dict[Partition, float]
    more: int
    warnings: tuple[str, ...]
    approval: Approval | None
    same_images: bool

    @property
    def possible(self) -> bool:
        return not self.refusals


def approve(site: Site, ledger: Ledger, study: Study, plan: StudyPlan, *, by: str) -> tuple[Approval, Verdict]:
    """Let a study ask this site for what its plan says, of the records that are there now.

    Args:
        by: name and role of who decides.

    Raises:
        Refused: the first rule that says no; nothing is written.
        StorageError: ledger or list of ledgers cannot be read or written, or this ledger is a copy or an older one.
    """
    name = clean_name(by)
    registry = Registry(site.config.registry)
    with registry.locked():  # or two sites could each approve the same records at the same moment
        registry.place(site.config.name, ledger)
        verdict = judge(site, ledger, study, plan)
        for refusal in verdict.refusals:
            raise refusal
        approval = ledger.approve(study, plan, site.fingerprints(ledger.key), by=name)
        registry.place(site.config.name, ledger)
    return approval, verdict


def judge(site: Site, ledger: Ledger, study: Study, plan: StudyPlan) -> Verdict:
    """Hold a study against a site's policy, ledger and data; spends and writes nothing."""
    policy = site.config.policy
    before: dict[Partition, float] = {p: _together(policy, ledger.losses(p)) for p in PARTITIONS}
    others: dict[Partition, list[PrivacyLoss]] = {p: _others(ledger, study, p) for p in PARTITIONS}
    after: dict[Partition, float] = {p: _together(policy, [*others[p], *plan.losses(p)]) for p in PARTITIONS}
    refusals: list[Refused] = list(policy.refusals(study, plan, site.cohort))
    refusals += _not_meant(site)
    refusals += [_over(p, after[p], policy) for p in PARTITIONS if after[p] > policy.max_epsilon]
    twice, warnings = _counted_twice(site, ledger, study)
    approval = ledger.approval(study.sha256)
    return Verdict(
        (*refusals, *_own_as_public(site, study), *twice), before, after,
        0 if refusals else _more(policy, others, plan),
        (*_named_alike(ledger, study), *_unit_warnings(site, study), *site.cohort.warnings(study),
         *site.report.warnings, *site.content.warnings, *warnings),
        approval, approval is not None and approval.data == site.fingerprints(ledger.key).digest,
    )  # fmt: skip


def require_meant(site: Site) -> None:
    """See that the images are pictures at all.

    Raises:
        PolicyRefusal: their pixels cannot be meant.
    """
    for refusal in _not_meant(site):
        raise refusal


def _not_meant(site: Site) -> list[PolicyRefusal]:
    return [PolicyRefusal(what, where="data", remedy=_LOOK) for what in site.content.refusals]


def clean_name(by: str) -> str:
    """A person's name as it can be printed and compared: NFC, single spaces.

    Raises:
        DataError: fewer than two letters, too long, or anything that cannot be printed (control characters,
            surrogates, invisible marks).
    """
    spaced = "".join(" " if unicodedata.category(c) == "Zs" else c for c in unicodedata.normalize("NFC", by))
    text = " ".join(part for part in spaced.split(" ") if part)
    if not text.isprintable():
        raise DataError("a character that cannot be printed", where="--by", remedy="Write the name in plain letters.")
    if sum(c.isalpha() for c in text) < 2 or len(text) > MOST_NAME:
        raise DataError(
            "fewer than two letters" if len(text) <= MOST_NAME else f"over {MOST_NAME} characters", where="--by",
            remedy="Give name and role of who decides.",
        )  # fmt: skip
    return text


def chosen(ledger: Ledger, *, sha256: str | None, name: str | None) -> Approval:
    """The one approval in force with that SHA-256 (or its first digits) or that name.

    Raises:
        DataError: none, or more than one.
    """
    everything = ledger.approvals()
    if sha256 is None:
        found = [approval for approval in everything if approval.name == name]
    else:
        found = [approval for approval in everything if sha256 and approval.study.startswith(sha256.lower())]
    if len(found) == 1:
        return found[0]
    given = (name if sha256 is None else sha256[:12]) or "?"
    raise DataError(
        f"study {given} is not approved here" if not found else f"{given} fits {len(found)} approved studies",
        where=str(ledger.state),
        remedy=f"Approved are: {', '.join(f'{a.study[:12]} ({a.name})' for a in everything) or 'none'}.",
    )  # fmt: skip


def _others(ledger: Ledger, study: Study, partition: Partition) -> list[PrivacyLoss]:
    """The losses of all other studies: what was reserved, and the whole plan of those that are approved still."""
    promised = {a.study: a.plan for a in ledger.approvals() if a.study != study.sha256}
    reserved = [entry.loss for entry in ledger.entries() if entry.kind == "reserved" and entry.study != study.sha256
                and entry.study not in promised and entry.body["partition"] == partition]  # fmt: skip
    return [*reserved, *(loss for plan in promised.values() for loss in plan.losses(partition))]


def _own_as_public(site: Site, study: Study) -> list[Refused]:
    """A public set is read without noise: it must not be this site's own file. A copy in another file is not seen."""
    path = getattr(site.config.data, "path", None)
    if path is None or study.pretrain.sha256 is None or sha256_file(path) != study.pretrain.sha256:
        return []
    return [PolicyRefusal(
        "the study's public set is this site's own file, so its images would be used without any noise",
        where="pretrain.sha256", remedy="Do not take part; tell the coordinator.",
    )]  # fmt: skip


def _together(policy: SitePolicy, losses: Sequence[PrivacyLoss]) -> float:
    return epsilon_of(losses, delta=policy.max_delta, accountant=policy.accountant)


def _over(partition: Partition, epsilon: float, policy: SitePolicy) -> BudgetError:
    return BudgetError(
        f"the whole study would bring the {partition} records to epsilon {epsilon:.3f}, over the ceiling"
        f" {policy.max_epsilon:g} of the site", where="policy.max_epsilon", asked=f"{epsilon:.3f}",
        allowed=f"{policy.max_epsilon:g}",
        remedy="Ask the coordinator for a study that costs less, or revoke an approved one that will not run.",
    )  # fmt: skip


def _more(policy: SitePolicy, others: dict[Partition, list[PrivacyLoss]], plan: StudyPlan) -> int:
    """How many further studies of this size fit after this one: doubled until it is too many, then halved."""

    def fits(studies: int) -> bool:
        try:
            return all(
                _together(policy, [*others[p], *(loss._replace(steps=loss.steps * studies) for loss in plan.losses(p))])
                <= policy.max_epsilon
                for p in PARTITIONS
            )
        except BudgetError:  # too much for the accountant is too much
            return False

    least, most = 1, 2
    while most <= MOST_STUDIES and fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least - 1


def _counted_twice(site: Site, ledger: Ledger, study: Study) -> tuple[list[Refused], list[str]]:
    """What would count a record in two accounts: on two sides, or in another ledger of this machine."""
    refusals: list[Refused] = []
    warnings: list[str] = []
    try:
        ledger.require_sides(site.fingerprints(ledger.key), study.sha256)
    except PolicyRefusal as refusal:
        refusals.append(refusal)
    registry = Registry(site.config.registry)
    for known in registry.others(ledger):
        try:
            with closing(Ledger.open(Path(known.state))) as other:
                ours = site.fingerprints(other.key)
                shared = frozenset[bytes]().union(*(ours.shared(before) for _, before in other.held()))
        except StorageError as error:
            refusals.append(PolicyRefusal(
                f"the ledger of site {known.site} at {known.state} cannot be read ({error.what}), so nobody knows"
                " whether these images are counted there", where="ledger.elsewhere",
                remedy=f"Bring it back; if that site is gone for good, take its row out of {registry.path}.",
            ))  # fmt: skip
            continue
        if shared:
            refusals.append(PolicyRefusal(
                f"counted in the ledger of site {known.site} at {known.state} already: {in_words(shared)}",
                where="ledger.elsewhere",
                remedy="Approve the study at that site, leave them out here, or revoke there what has spent nothing.",
            ))  # fmt: skip
    return refusals, warnings


def _named_alike(ledger: Ledger, study: Study) -> list[str]:
    """Whoever approves a corrected study file has two approvals, and both may spend."""
    alike = [
        before for before in ledger.approvals() if before.name == study.study.name and before.study != study.sha256
    ]
    return [
        f"a study of this name is approved already, with other settings; it may go on asking until that is taken back:"
        f" synthward-site revoke SITE.toml --sha256 {approval.study[:12]} --by NAME"
        for approval in alike
    ]


def _unit_warnings(site: Site, study: Study) -> list[str]:
    patients = site.splits.train.patients
    if study.privacy.unit == "patient" or patients is None:
        return []
    most = int(np.unique(patients, return_counts=True)[1].max())
    return [f"patients are known here, and the study protects single images: a patient's own loss grows with the number"
            f" of their images, which is up to {most}"]  # fmt: skip
