"""One-run canary audit of the shipped training step: what an attack proves stays below what is claimed.

So that the audit is known to see: with clipping off, or with a quarter of the noise, it proves more than is claimed.
A sound mechanism passes its claim with probability at most 5 % a run, by the theorem behind the bound; seeds are fixed.
Power: the law of the scores is known (a Gaussian, shifted by REACH times the steps that a canary was in), so it is
computed from simulated attacks; `python tests/statistical/test_canary_audit.py` prints all figures, over seeds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import client.privacy.gate as gate_module
import client.privacy.gradients as gradients_module
from common.bounded import RunningSum
from support.canaries import Case, attack, needed, simulated

# All records in one step: what can be proven comes near to what is claimed. Sampled steps: as a study runs.
# To prove more than 8, over 9,000 guesses have to be right and m·delta has to be small beside 1: hence 1e-7 there.
CASES = {
    "epsilon 1, one full step": Case(1.0, 1e-5, 1.0, 1, 20_000, 500, 500),
    "epsilon 8, one full step": Case(8.0, 1e-7, 1.0, 1, 60_000, 9_000, 9_000),
    "epsilon 1, 40 sampled steps": Case(1.0, 1e-5, 0.25, 40, 20_000, 500, 0),
    "epsilon 8, 40 sampled steps": Case(8.0, 1e-7, 0.25, 40, 120_000, 18_000, 0),
    "epsilon 1, Swin U-Net": Case(1.0, 1e-5, 1.0, 1, 20_000, 500, 500, "swin"),
    "epsilon 8, Swin U-Net": Case(8.0, 1e-7, 1.0, 1, 100_000, 10_000, 10_000, "swin"),
}
QUICK = {"epsilon 1, one full step", "epsilon 1, 40 sampled steps"}
cases = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
             for name, case in CASES.items()]
)  # fmt: skip
RUNS = 500  # all caught: the power is over 0.994 at 95 % confidence


def _quarter_of_the_noise(patch):
    original = gate_module.gaussian_release
    patch.setattr(
        gate_module, "gaussian_release",
        lambda total, *, noise_multiplier, **rest: original(total, noise_multiplier=noise_multiplier / 4, **rest),
    )  # fmt: skip


def _no_clipping(patch):
    class Unclipped(RunningSum):
        def add(self, rows):
            for name, part in rows.items():
                self._total[name] += part.double().sum(dim=0)

    patch.setattr(gradients_module, "RunningSum", Unclipped)


@cases
def test_the_attack_proves_less_than_is_claimed(tmp_path, case):
    correct = attack(tmp_path, case, seed=1)
    assert case.claimed <= case.epsilon
    assert case.proven(correct) < case.claimed
    # It is an attack, and what it finds is what this mechanism's law has it find, to within 5 standard deviations.
    law = simulated(case, runs=60, seed=2)
    assert correct > 0.5 * case.guesses
    assert abs(correct - law.mean()) < 5 * law.std(ddof=1)


@cases
@pytest.mark.parametrize("breakage", [_quarter_of_the_noise, _no_clipping])
def test_a_broken_copy_is_caught(tmp_path, monkeypatch, case, breakage):
    breakage(monkeypatch)
    assert case.proven(attack(tmp_path, case, seed=1)) > case.claimed


@cases
def test_a_quarter_of_the_noise_is_seen_with_a_power_over_99_percent(case):
    assert (simulated(case, noise=0.25, runs=RUNS, seed=3) >= needed(case)).all()


def main() -> None:
    """Print the figures for docs/privacy.md, over seeds."""
    for name, case in CASES.items():
        for what, breakage in (("shipped", None), ("noise / 4", _quarter_of_the_noise), ("no clipping", _no_clipping)):
            proven = []
            for seed in range(1, 6):
                with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                    if breakage:
                        breakage(patch)
                    proven.append(case.proven(attack(Path(folder), case, seed=seed)))
            figures = " ".join(f"{value:.2f}" for value in proven)
            print(f"{name:<28} {what:<12} claimed {case.claimed:.2f}  proven {figures}", flush=True)
        for noise in (1.0, 0.5, 0.25):
            seen = (simulated(case, noise=noise, runs=RUNS, seed=3) >= needed(case)).mean()
            print(f"{name:<28} noise × {noise:<4}  caught {seen:.3f} of {RUNS} simulated attacks", flush=True)


if __name__ == "__main__":
    main()
