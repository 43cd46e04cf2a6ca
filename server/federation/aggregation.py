"""Averaging of the sites' updates by their private counts, and the moving average of the weights.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.protocol import Arrays


def average(updates: Mapping[str, Arrays], counts: Mapping[str, float]) -> Arrays:
    """Mean of the updates weighted by noisy record counts (McMahan et al. 2017, algorithm 1).

    Args:
        updates: by site, arrays of the same names and shapes.
        counts: by site, the noisy number of records, at least 1 each.

    Returns:
        float64 arrays.
    """
    total = sum(counts[site] for site in updates)
    names = next(iter(updates.values()))
    return {
        name: sum(
            (update[name].astype(np.float64) * (counts[site] / total) for site, update in updates.items()),
            start=np.zeros(1),
        )
        for name in names
    }


def mean_gradient(sums: Mapping[str, Arrays], expected_batches: Mapping[str, float]) -> Arrays:
    """Noisy mean gradient over the records of all sites, from each one's noisy sum; float64.

    Args:
        expected_batches: by site, public estimate of the records in its sum.
    """
    total = sum(expected_batches[site] for site in sums)
    names = next(iter(sums.values()))
    return {name: np.sum([part[name].astype(np.float64) for part in sums.values()], axis=0) / total for name in names}


def moved(weights: Arrays, change: Arrays) -> Arrays:
    """The weights that a change moves; float64."""
    return {name: weights[name].astype(np.float64) + part for name, part in change.items()}


def within(weights: Arrays, largest: float) -> Arrays:
    """The weights as float32, none over `largest` in absolute value: what a site takes, and far from an overflow."""
    return {name: np.clip(array, -largest, largest).astype(np.float32) for name, array in weights.items()}


def moving_average(ema: Arrays, weights: Arrays, *, decay: float, steps: int, step: int) -> Arrays:
    """Exponential moving average, `steps` local steps further, ending at local step `step` (from 1).

    The decay is held down at first, as min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    """
    keep = min(decay, (1 + step) / (10 + step)) ** steps
    return {name: (keep * ema[name] + (1 - keep) * weights[name]).astype(np.float32) for name in weights}
