"""What a site permits, whatever a study or the coordinator asks.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pydantic import Field

from common.errors import PolicyRefusal
from common.study import Settings, Study


class SitePolicy(Settings):
    """The `[policy]` part of the site file; the hospital's own, never sent anywhere."""

    max_epsilon: float = Field(default=10.0, gt=0, description="ceiling over all studies on these records")
    max_delta: float = Field(default=1e-4, gt=0, lt=1)
    min_records: int = Field(default=20, ge=1, description="smallest train partition that may take part")
    allowed_studies: tuple[str, ...] = Field(default=(), description="SHA-256 of permitted studies; empty = any")

    def permit(self, study: Study, *, records: int) -> None:
        """Check a study against the policy, before any record is touched.

        Raises:
            PolicyRefusal: names the rule, what was asked and what is allowed.
        """
        if self.allowed_studies and study.sha256 not in self.allowed_studies:
            raise PolicyRefusal(
                f"study {study.sha256[:12]} is not among the permitted studies", where="policy.allowed_studies",
                remedy="The site's owner adds the study's SHA-256 to allowed_studies.",
            )  # fmt: skip
        if study.privacy.epsilon > self.max_epsilon:
            raise PolicyRefusal(
                f"epsilon {study.privacy.epsilon:g} asked, {self.max_epsilon:g} allowed", where="policy.max_epsilon",
                remedy="Lower privacy.epsilon in the study.",
            )  # fmt: skip
        if study.privacy.delta > self.max_delta:
            raise PolicyRefusal(
                f"delta {study.privacy.delta:g} asked, {self.max_delta:g} allowed", where="policy.max_delta",
                remedy="Lower privacy.delta in the study.",
            )  # fmt: skip
        if records < self.min_records:
            raise PolicyRefusal(
                "the site has fewer records than its policy asks for", where="policy.min_records",
                remedy="Take part with more records.",
            )  # fmt: skip
