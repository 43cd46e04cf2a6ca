"""What an attack on one run proves about epsilon, from below.

SPDX-License-Identifier: Apache-2.0

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run": of m canaries each is put in or left out
by a fair coin; an attacker sees what was released and guesses for r of them which it was. A mechanism that is
(epsilon, delta)-private bounds how often the guesses can be right.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom

_LARGEST = 50.0


def p_value(*, correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Bound on the probability of at least `correct` right guesses under (epsilon, delta)-privacy (theorem 5.2)."""
    truth = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, truth))
    masses = binom.pmf(np.arange(correct - 1, -1, -1), guesses, truth)  # of correct - 1, correct - 2, ..., 0
    alpha = float((np.cumsum(masses) / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, tail + 2.0 * canaries * delta * alpha)


def epsilon_lower_bound(*, correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Largest epsilon that the guesses rule out at this confidence; 0 when they rule out none.

    Args:
        correct: right guesses, 0 to `guesses`.
        guesses: r, fixed before the scores were seen, at most `canaries`.
        canaries: m.
        delta: of the claim.
        confidence: in (0, 1); a private mechanism passes the bound with probability at most 1 - confidence.

    Raises:
        ValueError: the three counts do not fit.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError("0 <= correct <= guesses <= canaries")

    def ruled_out(epsilon: float) -> bool:
        found = p_value(correct=correct, guesses=guesses, canaries=canaries, epsilon=epsilon, delta=delta)
        return found < 1.0 - confidence

    if not ruled_out(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
    return low
