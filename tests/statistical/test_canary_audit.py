"""One-run canary audit of the shipped training step: what an attack proves stays below what is claimed.

So that the audit is known to see: with clipping off, or with a quarter of the noise, it proves more than is claimed.
The bound errs upwards with probability at most 5 % a run by its theorem; seeds are fixed. Power: with these canaries
the broken copies were caught for each of 5 seeds (run `python tests/statistical/test_canary_audit.py`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import client.privacy.gate as gate_module
import client.stages.train as train_module
from support.canaries import Attack, audit

# All records in one step: what can be proven comes near to what is claimed. Sampled steps: as a study runs.
FULL = {"sample_rate": 1.0, "steps": 1}
SAMPLED = {"sample_rate": 0.25, "steps": 40}
# To prove more than 8, over 9,000 guesses have to be right and m·delta has to be small beside 1: hence 1e-7 there.
CASES = {
    "epsilon 1, one full step": (1.0, 1e-5, FULL, Attack(20_000, 500, 500)),
    "epsilon 8, one full step": (8.0, 1e-7, FULL, Attack(60_000, 9_000, 9_000)),
    "epsilon 1, 40 sampled steps": (1.0, 1e-5, SAMPLED, Attack(20_000, 500, 0)),
    "epsilon 8, 40 sampled steps": (8.0, 1e-7, SAMPLED, Attack(120_000, 18_000, 0)),
}
SLOW = {"epsilon 8, one full step", "epsilon 8, 40 sampled steps"}
cases = pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES])


def _quarter_of_the_noise(patch):
    original = gate_module.gaussian_release
    patch.setattr(
        gate_module, "gaussian_release",
        lambda total, *, noise_multiplier, **rest: original(total, noise_multiplier=noise_multiplier / 4, **rest),
    )  # fmt: skip


def _no_clipping(patch):
    original = train_module.clipped_gradient_sum
    patch.setattr(
        train_module, "clipped_gradient_sum",
        lambda *given, max_grad_norm, **rest: original(*given, max_grad_norm=1e9, **rest),
    )  # fmt: skip


def _audit(folder, case, seed=1):
    epsilon, delta, plan, attack = CASES[case]
    return audit(folder, attack, epsilon=epsilon, delta=delta, seed=seed, **plan)


@pytest.mark.statistical
@cases
def test_the_attack_proves_less_than_is_claimed(tmp_path, case):
    found = _audit(tmp_path, case)
    assert found.proven < found.claimed <= CASES[case][0]
    assert found.accuracy > 0.5  # it is an attack: it does better than chance


@pytest.mark.statistical
@cases
@pytest.mark.parametrize("breakage", [_quarter_of_the_noise, _no_clipping])
def test_a_broken_copy_is_caught(tmp_path, monkeypatch, case, breakage):
    breakage(monkeypatch)
    found = _audit(tmp_path, case)
    assert found.proven > found.claimed


def main() -> None:
    """Print the figures for docs/privacy.md, over seeds."""
    for case in CASES:
        for name, breakage in (("shipped", None), ("noise / 4", _quarter_of_the_noise), ("no clipping", _no_clipping)):
            rows = []
            for seed in range(1, 6):
                with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                    if breakage:
                        breakage(patch)
                    rows.append(_audit(Path(folder), case, seed))
            proven = " ".join(f"{row.proven:.2f}" for row in rows)
            print(f"{case:<30} {name:<12} claimed {rows[0].claimed:.2f}  proven {proven}", flush=True)


if __name__ == "__main__":
    main()
