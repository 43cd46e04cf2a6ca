"""The noise: its scale, its distribution, and a test that fails when the scale is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from client.privacy.mechanism import gaussian_release
from client.privacy.randomness import NoiseSource

COUNT = 40_000


def _std_is(sample, expected):
    """Two-sided test of the standard deviation at alpha 1e-6; rejects 2/3 and 3/2 of it with power > 0.9999."""
    statistic = (len(sample) - 1) * np.var(sample, ddof=1) / expected**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(sample) - 1)
    return low < statistic < high


@pytest.mark.parametrize("scale", [2 / 3, 1.0, 3 / 2])
def test_noise_has_the_standard_deviation_sigma_times_sensitivity_and_the_test_can_fail(scale):
    out = gaussian_release(
        {"a": torch.zeros(COUNT // 2), "b": torch.zeros(2, COUNT // 4)},
        noise_multiplier=1.7 * scale, sensitivity=0.4, source=NoiseSource(seed=5),
    )  # fmt: skip
    sample = torch.cat([out["a"], out["b"].flatten()]).numpy()
    assert _std_is(sample, 1.7 * 0.4) == (scale == 1.0)


@pytest.mark.parametrize("seed", [None, 11])
def test_both_sources_are_standard_normal_in_body_and_tails(seed):
    sample = NoiseSource(seed).normal(COUNT)
    assert stats.kstest(sample, "norm").pvalue > 1e-6
    assert abs(sample.mean()) < 6 / math.sqrt(COUNT)
    beyond = np.mean(np.abs(sample) > 3)
    assert 0.0015 < beyond < 0.0040  # 0.0027 expected


def _same_law(a, b):
    """Two-sample tests at alpha 1e-6 each: Kolmogorov-Smirnov, first four moments, tails beyond 3.

    At 400,000 numbers each, another scale by 1.5 % or a kurtosis of 3.1 is seen with power > 0.99.
    """
    n, limit = len(a), stats.norm.ppf(1 - 5e-7)
    if stats.ks_2samp(a, b).pvalue < 1e-6:
        return False
    for power, variance in ((1, 1.0), (2, 2.0), (3, 15.0), (4, 96.0)):  # Var(x^k) of a standard normal
        if abs(np.mean(a**power) - np.mean(b**power)) > limit * math.sqrt(2 * variance / n):
            return False
    beyond = [int(np.sum(np.abs(sample) > 3)) for sample in (a, b)]
    return stats.binomtest(beyond[0], sum(beyond), 0.5).pvalue > 1e-6


def _one_draw_short(source, count):
    """A sum of four draws of which one was forgotten, scaled as if it were there."""
    return source._box_muller(3 * count).reshape(3, count).sum(axis=0) / 2


def _four_uniforms(source, count):
    """Nearly normal to the eye: the right mean and variance, tails that end at 3.5."""
    return (source.uniform(4 * count).reshape(4, count).sum(axis=0) - 2) * math.sqrt(3)


def test_the_seeded_and_the_cryptographic_source_have_the_same_law_and_the_test_can_fail():
    n = 400_000
    reference = np.random.default_rng(7).standard_normal(n)
    assert _same_law(NoiseSource().normal(n), NoiseSource(seed=2).normal(n))
    assert _same_law(NoiseSource().normal(n), reference)
    for broken in (_one_draw_short, _four_uniforms, lambda s, c: 1.015 * s.normal(c)):
        assert not _same_law(broken(NoiseSource(seed=3), n), reference)


def test_what_is_released_has_no_bits_below_a_millionth_of_the_noise():
    total = {"a": torch.rand(5000, generator=torch.Generator().manual_seed(1)) / 3}
    out = gaussian_release(total, noise_multiplier=1.3, sensitivity=0.7, source=NoiseSource(seed=5))["a"].numpy()
    grid = 2.0 ** (math.floor(math.log2(1.3 * 0.7)) - 20)
    assert np.array_equal(out, np.round(out / grid) * grid)
    assert 0.5e-6 < grid / (1.3 * 0.7) < 1e-6
    assert len(np.unique(out)) > 4900


def test_the_default_source_never_repeats_and_says_what_it_is():
    assert not np.array_equal(NoiseSource().normal(8), NoiseSource().normal(8))
    assert np.array_equal(NoiseSource(3).normal(8), NoiseSource(3).normal(8))
    assert "SEEDED" in NoiseSource(3).name
    assert "SEEDED" not in NoiseSource().name


def test_poisson_sampling_takes_each_record_with_the_sample_rate():
    source = NoiseSource(seed=1)
    sizes = [int(source.poisson_mask(500, 0.1).sum()) for _ in range(400)]
    assert stats.binomtest(sum(sizes), 500 * 400, 0.1).pvalue > 1e-6
    assert abs(np.var(sizes) - 45) < 20  # a fixed batch size would have variance 0
    assert source.poisson_mask(7, 1.0).all()


@pytest.mark.parametrize("bad", [{"noise_multiplier": 0.0}, {"sensitivity": 0.0}, {"noise_multiplier": float("nan")}])
def test_no_release_without_noise(bad):
    settings = {"noise_multiplier": 1.0, "sensitivity": 1.0, **bad}
    with pytest.raises(ValueError, match="positive"):
        gaussian_release({"a": torch.zeros(3)}, **settings, source=NoiseSource(1))
