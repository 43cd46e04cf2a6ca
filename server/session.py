"""What every stage works with: the study, its plan, the run folder, the sites and what they have said.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from common.errors import FederationError
from common.protocol import Agreement, Arrays
from server.checkpoints import RunFolder
from server.federation.collect import B, Collected, Screen, collect
from server.federation.members import Member
from server.federation.screening import Shapes, largest_sum_norm, most_units, screen_arrays, screen_norm
from server.federation.sites import Requests, SiteGroup
from server.progress import Progress

_AGAIN_SECONDS = 10.0  # between two questions to a site that cannot be reached


@dataclass
class Session:
    """One run in this process.

    Attributes:
        members: by node, the sites that are enrolled.
        known: by node, the names of sites that took part in an earlier process of this run.
        hoped: how many sites there may be at best; they are waited for a little longer.
    """

    agreement: Agreement
    folder: RunFolder
    group: SiteGroup
    progress: Progress
    members: dict[int, Member] = field(default_factory=dict)
    known: dict[int, str] = field(default_factory=dict)
    hoped: int = 0

    def online(self) -> list[int]:
        """Nodes of the sites, once enough are online.

        Raises:
            FederationError: too few are.
        """
        before = self.folder.result("enrol") or {}
        self.known = {site["node"]: name for name, site in before.items() if "node" in site}
        # Simulated sites all come up, and admitted carriers are hoped for; then the quorum is enough.
        simulated = len(list((self.folder.path / "sites").glob("site-*.toml")))
        least = simulated or self.agreement.study.federation.min_sites
        return self.group.wait_for(
            least, hoped=self.hoped, known=self.known,
            on_wait=lambda missing, left: self.progress.wait("online", f"waiting, {left:.0f} s at most: {missing}"),
        )  # fmt: skip

    def ask(
        self, step: str, requests: Requests, body: type[B], screen: Screen[B], *, may_run_out: bool = False
    ) -> Collected:
        """Ask the sites, tell the coordinator who is left out and why, and stop cleanly where too few are left.

        Args:
            step: how the question is called in messages.
            requests, body, screen: as in `collect`.
            may_run_out: too few answers are no error where a site says that its budget is used up.

        Raises:
            FederationError: fewer usable answers than federation.min_sites; names every missing site and why.
        """
        collected = self._collected(step, requests, body, screen)
        for site, reason in collected.reasons.items():
            if step == "canary":  # it has given nothing yet, so it is nothing for the report
                self.progress.wait(step, f"{site} left out: {reason}")
            else:
                self.progress.warn(f"{step}: {site} left out: {reason}", site=site)
        least, present = self.agreement.study.federation.min_sites, len(collected.accepted)
        others = len(collected.reasons) - len(collected.exhausted)  # that may answer another time
        if present < least and not (may_run_out and present + others < least):
            why = "; ".join(f"{site}: {reason}" for site, reason in sorted(collected.reasons.items()))
            raise FederationError(
                f"{present} usable answers in '{step}', {least} needed ({why or 'no site answered'})",
                where="federation.min_sites",
                remedy="Put the sites right and go on with the run; nothing that was saved is lost.",
            )  # fmt: skip
        return collected

    def _collected(self, step: str, requests: Requests, body: type[B], screen: Screen[B]) -> Collected:
        """The answers; while there are too few, sites that cannot be reached are asked again, for as long as the study
        waits for an answer. A site that is back sends what it has stored: nothing is paid for twice."""
        federation = self.agreement.study.federation
        deadline = time.monotonic() + federation.timeout_seconds
        collected = collect(self.group, self.members, requests, body, screen, known=self.known)
        least = federation.min_sites
        while len(collected.accepted) < least <= len(collected.accepted) + len(collected.unreachable):
            left = deadline - time.monotonic() - _AGAIN_SECONDS
            if left < _AGAIN_SECONDS:  # a question that nobody waits for could still be paid for
                break
            for site in collected.unreachable.values():
                why = collected.reasons[site]
                self.progress.wait(step, f"waiting for {site}, {left + _AGAIN_SECONDS:.0f} s at most: {why}")
            time.sleep(_AGAIN_SECONDS)
            again = {node: requests[node] for node in collected.unreachable}
            collected = collect(self.group, self.members, again, body, screen,
                                known=self.known, before=collected, seconds=left)  # fmt: skip
        return collected

    def ask_sums(self, step: str, requests: Requests, body: type[B], shapes: Shapes) -> Arrays:
        """Noisy sums of all sites that answer the one question of a mechanism of the train partition.

        Args:
            step: the mechanism's name.
            requests, body: as in `collect`.
            shapes: of the sums, float64.

        Returns:
            The sums by name, with "counts" (K,), the sites' noisy ones, and "noise_std" (1,), the noise of each number.

        Raises:
            FederationError: as `ask` does.
        """
        plan, counts_std = self.agreement.plan[step], self.agreement.plan["counts"].noise_std
        numbers = sum(math.prod(shape) for shape in shapes.values())

        def screen(node: int, _body: B, arrays: Arrays) -> None:
            screen_arrays(arrays, expected=shapes, dtype="float64")
            units = most_units(self.members[node].counts, counts_std)
            largest = largest_sum_norm(
                units=units, sensitivity=plan.sensitivity, noise_std=plan.noise_std, numbers=numbers
            )
            screen_norm(arrays, largest=largest, what="sums")

        self.progress.stage(step, f"asking {len(self.members)} sites for private class {step}")
        accepted = self.ask(step, requests, body, screen).accepted
        counts = np.sum([np.maximum(self.members[answer.node].counts, 1.0) for answer in accepted], axis=0)
        total = {name: np.sum([answer.arrays[name] for answer in accepted], axis=0) for name in shapes}
        return {**total, "counts": counts, "noise_std": np.array([math.sqrt(len(accepted)) * plan.noise_std])}
