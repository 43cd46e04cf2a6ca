"""A claim's figures worked out again from its own parameters, and held against its study.

SPDX-License-Identifier: Apache-2.0

What can be known without any site: that the mechanisms are the study's, what they cost by the accountant, that no site
says more, and that the claim and the metrics say the same. That a ledger told the truth cannot be known from it.
"""

from __future__ import annotations

import math

from common.accounting import LARGEST_NOISE, LEAST_NOISE, PrivacyLoss, epsilon_of
from common.claims import Claim, TuningClaim
from common.errors import BudgetError
from common.mechanisms import PARTITIONS, wanted
from common.study import Study
from server.release.metrics import Metrics

_TOLERANCE = 1e-3  # of another version of the accountant


def claim_problems(claim: Claim, study: Study, metrics: Metrics) -> list[str]:
    """What does not fit, one line each; an empty list where all does."""
    problems = _of_the_study(claim, study)
    told = metrics.epsilon
    if metrics.sha256 != study.sha256 or metrics.phantoms != claim.phantoms:
        problems.append("metrics.json is of another study than claim.json")
    figures = (told.ceiling, told.delta, told.max, told.sum, told.sites)
    if figures != (claim.epsilon_ceiling, claim.delta, claim.epsilon_max, claim.epsilon_sum,
                   {site.site: site.epsilon for site in claim.sites}):  # fmt: skip
        problems.append("metrics.json has other epsilons than claim.json")
    if len({site.site for site in claim.sites}) != len(claim.sites):
        problems.append("claim.json names a site twice")
    return problems or _of_the_mechanisms(claim)


def _of_the_study(claim: Claim, study: Study) -> list[str]:
    privacy = study.privacy
    if claim.study_sha256 != study.sha256:
        return ["claim.json is of another study than study.toml"]
    said = (claim.study, claim.unit, claim.delta, claim.epsilon_ceiling, claim.accountant, claim.trust_model,
            claim.public_sha256, claim.tuning)  # fmt: skip
    if said != (study.study.name, privacy.unit, privacy.delta, privacy.epsilon, privacy.accountant, privacy.trust,
                study.pretrain.sha256 or "", TuningClaim(**study.tuning.model_dump())):  # fmt: skip
        return ["claim.json promises something else than study.toml agreed on"]
    planned = [(m.name, m.partition, m.sample_rate(study), m.steps(study) * m.releases(study), m.sensitivity(study))
               for m in wanted(study)]  # fmt: skip
    claimed = [(m.name, m.partition, m.sample_rate, m.steps, m.sensitivity) for m in claim.mechanisms]
    if len(planned) != len(claimed) or any(
        ours[:2] != theirs[:2] or not all(map(math.isclose, ours[2:], theirs[2:]))
        for ours, theirs in zip(planned, claimed, strict=True)
    ):
        return ["claim.json has other mechanisms than study.toml asks for"]
    return []


def _of_the_mechanisms(claim: Claim) -> list[str]:
    """Each site's epsilon against what the mechanisms cost; they are known to be a study's, so that is bounded work."""
    problems = []
    if not all(LEAST_NOISE <= m.noise_multiplier <= LARGEST_NOISE for m in claim.mechanisms):
        return ["claim.json has a noise that no plan has"]
    for partition in PARTITIONS:
        losses = [PrivacyLoss(m.noise_multiplier, m.sample_rate, m.steps) for m in claim.mechanisms
                  if m.partition == partition]  # fmt: skip
        try:
            whole = epsilon_of(losses, delta=claim.delta, accountant=claim.accountant)
        except BudgetError as error:
            return [f"claim.json: {error.what}"]
        if whole > claim.epsilon_ceiling * (1 + _TOLERANCE):
            problems.append(f"the {partition} mechanisms of claim.json cost epsilon {whole:.4g}, over its ceiling")
        for site in claim.sites:
            said = site.epsilon_train if partition == "train" else site.epsilon_holdout
            if said > whole * (1 + _TOLERANCE) or (site.basis == "plan" and said < whole * (1 - _TOLERANCE)):
                problems.append(f"claim.json says epsilon {said:.4g} of {site.site}'s {partition} records, where its "
                                f"mechanisms cost {whole:.4g}")  # fmt: skip
    return problems
