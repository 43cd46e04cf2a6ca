"""Every error a user can meet, as one tree: what went wrong, where, and the remedy.

SPDX-License-Identifier: Apache-2.0

    SynthwardError            exit code 2 unless said otherwise; printed as ONE line
    ├── StudyError            the study file: unknown key, value out of range, impossible plan
    ├── DataError             a site's images or labels cannot be used as they are
    ├── Refused               a site says no: which rule, what was asked, what is allowed
    │   ├── NotApproved       nobody at the site approved the study; said alike whatever the reason
    │   ├── BudgetError       the privacy budget does not allow it, or cannot be reached
    │   └── PolicyRefusal     the site's own policy forbids it
    ├── StorageError          a file cannot be written or read (disk full, no permission)
    ├── CheckpointError       a run folder or checkpoint is missing, damaged or of another study
    ├── ReplyError            a reply from a site failed the server's screening
    └── FederationError       too few sites answered (exit code 1: trying again may help)
"""

from __future__ import annotations


class SynthwardError(Exception):
    """Base of all errors that are shown to a user as one line.

    Args:
        what: what is wrong, with the offending value, without a full stop.
        where: file and field, for instance ``study.toml: training.rounds``.
        remedy: what the reader can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(what, where, remedy)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{head}. {self.remedy}" if self.remedy else head
        return " ".join(line.split())

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only fields survive a process border
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


def _rebuild(kind: type[SynthwardError], what: str, where: str, remedy: str) -> SynthwardError:
    return kind(what, where=where, remedy=remedy)


class StudyError(SynthwardError):
    """The study file cannot be used: bad key, bad value, impossible combination."""


class DataError(SynthwardError):
    """A site's images or labels cannot be used as they are."""


class Refused(SynthwardError):
    """A rule says no; `where` names the rule. Nothing leaves.

    Args:
        asked, allowed: the two values that do not fit, as text; empty where they would tell something about records.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "", asked: str = "", allowed: str = "") -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.asked = asked
        self.allowed = allowed


class NotApproved(Refused):
    """Nobody at the site approved the study, or somebody took it back."""


class BudgetError(Refused):
    """The privacy budget does not allow the step, or no setting can reach it."""


class PolicyRefusal(Refused):
    """The site's own policy forbids what was asked."""


class StorageError(SynthwardError):
    """A file cannot be written or read."""


class CheckpointError(SynthwardError):
    """A run folder or checkpoint is missing, damaged, or belongs to another study."""


class ReplyError(SynthwardError):
    """A reply from a site failed the server's screening."""


class FederationError(SynthwardError):
    """Too few sites answered in time."""

    exit_code = 1
