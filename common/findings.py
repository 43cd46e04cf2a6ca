"""One thing that a `doctor` has looked at.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass

from common.text import printable


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is good, and what to do where it is not."""

    name: str
    good: bool
    what: str
    remedy: str = ""

    @property
    def line(self) -> str:
        mark = "ok   " if self.good else "AMISS"
        remedy = f". {self.remedy}" if self.remedy and not self.good else ""
        return printable(f"{mark}  {self.name:<12} {self.what}{remedy}")
