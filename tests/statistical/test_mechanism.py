"""The noise: its scale, its distribution, and a test that fails when the scale is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from client.privacy.mechanism import gaussian_release
from client.privacy.randomness import DRAWS, NoiseSource
from common.bounded import BoundedSum, RunningSum

COUNT = 40_000


def _sum(bound: float = 0.1, **rows: torch.Tensor) -> BoundedSum:
    """A sum of one row; zeros are zeros under any bound."""
    running = RunningSum({name: tuple(row.shape) for name, row in rows.items()}, bound)
    running.add({name: row[None] for name, row in rows.items()})
    return running.total()


def _std_is(sample, expected):
    """Two-sided test of the standard deviation at alpha 1e-6; rejects 2/3 and 3/2 of it with power > 0.9999."""
    statistic = (len(sample) - 1) * np.var(sample, ddof=1) / expected**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(sample) - 1)
    return low < statistic < high


@pytest.mark.parametrize("scale", [2 / 3, 1.0, 3 / 2])
def test_noise_has_the_standard_deviation_sigma_times_sensitivity_and_the_test_can_fail(scale):
    out = gaussian_release(
        _sum(a=torch.zeros(COUNT // 2), b=torch.zeros(2, COUNT // 4)),
        noise_multiplier=1.7 * scale, sensitivity=0.4, source=NoiseSource(seed=5),
    ).tensors  # fmt: skip
    sample = torch.cat([out["a"], out["b"].flatten()]).numpy()
    assert _std_is(sample, 1.7 * 0.4) == (scale == 1.0)


N = 1_000_000  # numbers of a sample in the tests of the law
LIMIT = stats.norm.ppf(1 - 5e-7)  # 4.9 standard errors: two-sided alpha 1e-6
MOMENTS = ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0))  # power k, E[x^k], Var(x^k)


def _is_standard_normal(sample):
    """Kolmogorov-Smirnov, four moments, and the tails beyond 3 and 4, at alpha 1e-6 each (7e-6 together).

    Power > 0.9999 at a million numbers for: a scale 1 % off (14 standard errors of the variance), a kurtosis 0.1 off
    (10 of the fourth moment), tails that end at 3.5 (63 numbers expected beyond 4, where none has probability e^-63).
    """
    n = len(sample)
    if stats.kstest(sample, "norm").pvalue < 1e-6:
        return False
    if any(abs(np.mean(sample**k) - mean) > LIMIT * math.sqrt(var / n) for k, mean, var in MOMENTS):
        return False
    beyond = [(int(np.sum(np.abs(sample) > edge)), 2 * stats.norm.sf(edge)) for edge in (3, 4)]
    return all(stats.binomtest(seen, n, chance).pvalue > 1e-6 for seen, chance in beyond)


def _same_law(a, b):
    """The same of two samples of equal size; the power is > 0.9999 for a scale 1.5 % off and tails that end at 3.5."""
    n = len(a)
    if stats.ks_2samp(a, b).pvalue < 1e-6:
        return False
    if any(abs(np.mean(a**k) - np.mean(b**k)) > LIMIT * math.sqrt(2 * var / n) for k, _, var in MOMENTS):
        return False
    beyond = [[int(np.sum(np.abs(sample) > edge)) for sample in (a, b)] for edge in (3, 4)]
    return all(stats.binomtest(x, x + y, 0.5).pvalue > 1e-6 for x, y in beyond)


def _draws(source, rows, count):
    """`rows` independent single draws for each of `count` numbers."""
    return np.stack([source._box_muller(count)[0] for _ in range(rows)])


BROKEN = {
    "0.97 of the scale": lambda source: 0.97 * source.normal(N),
    "1.5 % too much": lambda source: 1.015 * source.normal(N),
    "four draws, not divided": lambda source: _draws(source, 4, N).sum(axis=0),
    "four draws, one forgotten": lambda source: _draws(source, 3, N).sum(axis=0) / 2,
    "nothing beyond 3.5": lambda source: np.clip(source.normal(N), -3.5, 3.5),
    "four uniform numbers for four draws": lambda source: (
        (source.uniform(4 * N).reshape(4, N).sum(axis=0) - 2) * math.sqrt(3)
    ),
}  # the last two look normal to the eye


@pytest.fixture(scope="module")
def sound():
    """A sample of each source, and one of numpy's."""
    reference = np.random.default_rng(7).standard_normal(N)
    return {"aes": NoiseSource().normal(N), "seeded": NoiseSource(seed=2).normal(N), "numpy": reference}


@pytest.mark.parametrize("name", ["aes", "seeded", "numpy"])
def test_the_numbers_of_each_source_are_standard_normal(sound, name):
    assert _is_standard_normal(sound[name])


@pytest.mark.parametrize("pair", [("aes", "seeded"), ("aes", "numpy")])
def test_the_seeded_and_the_cryptographic_source_have_the_same_law(sound, pair):
    assert _same_law(*(sound[name] for name in pair))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_neither_standard_normal_nor_of_the_same_law(sound, name):
    sample = BROKEN[name](NoiseSource(seed=3))
    assert not _is_standard_normal(sample)
    assert not _same_law(sample, sound["aes"])


def _uncorrelated(a, b):
    """Neither the numbers nor their squares are correlated, at alpha 1e-6 each; n numbers show 10 / sqrt(n)."""
    limit = LIMIT / math.sqrt(len(a))
    return abs(np.mean(a * b)) < limit and abs(np.mean((a * a - 1) * (b * b - 1)) / 2) < limit


def test_numbers_that_have_a_pair_of_uniform_ones_in_common_are_independent_and_the_test_can_fail():
    source, quarter = NoiseSource(seed=4), N // 8
    first, second = source.normal(N).reshape(2, N // 2)
    for row in range(DRAWS):  # number c of the second half is made of the pairs 4c to 4c + 3, i of the first of i, ...
        for k in range(DRAWS):
            assert _uncorrelated(first[k::DRAWS], second[row * quarter : (row + 1) * quarter])
    one, _ = source._box_muller(quarter)
    other, _ = source._box_muller(quarter)
    assert not _uncorrelated(one, (one + 7 * other) / math.sqrt(50))
    assert not _uncorrelated(one, np.sign(other) * np.abs(one))  # uncorrelated, but not independent


class _Tape(NoiseSource):
    """A source whose words are given."""

    def __init__(self, words):
        super().__init__(seed=0)
        self.words = words

    def _words(self, count):
        assert count == len(self.words)
        return self.words.copy()


def _words_behind(numbers, count, words):
    """For each of `count` numbers, the set of words of the stream that it depends on."""
    base, behind = numbers(_Tape(words), count), [set() for _ in range(count)]
    for place in range(len(words)):
        changed = words.copy()
        changed[place] ^= np.uint64(3 << 61)
        for number in np.flatnonzero(numbers(_Tape(changed), count) != base):
            behind[number].add(place)
    return behind


def _of_two_pairs(source, count):
    """Sums of four draws, but of two pairs: r cos(a) + r sin(a) of one pair is a single draw, scaled."""
    return np.stack(source._box_muller(2 * count)).reshape(4, count).sum(axis=0) / 2


def _made_of_four_pairs(numbers, pairs):
    """Each of 40 numbers depends on 4 radii and 4 angles, and no two numbers on the same two of these pairs."""
    behind = _words_behind(numbers, 40, np.random.default_rng(5).integers(0, 2**64, 3 * pairs, dtype=np.uint64))
    common = max(len(behind[i] & behind[j]) for i in range(40) for j in range(i))
    return {len(places) for places in behind} == {8} and common <= 2


def test_each_number_is_made_of_four_pairs_of_which_no_other_number_has_two_and_the_test_can_fail():
    assert _made_of_four_pairs(NoiseSource.normal, pairs=80)
    assert not _made_of_four_pairs(_of_two_pairs, pairs=80)


def test_the_largest_number_is_26_7_and_a_draw_ends_where_a_mass_of_2_to_the_minus_128_is_left():
    largest = _Tape(np.zeros(3 * DRAWS, dtype=np.uint64)).normal(2)
    assert largest[0] == pytest.approx(2 * math.sqrt(2 * 129 * math.log(2)))
    assert 26.7 < largest[0] < 26.8
    assert np.array_equal(_Tape(np.full(3 * DRAWS, 2**64 - 1, dtype=np.uint64)).normal(2), [0.0, 0.0])  # not NaN
    added = (1 + math.exp(8)) * 1e8 * 2 * 2.0**-128  # the union bound of the docstring
    assert added < 2e-27
    assert (1 + math.exp(8)) * 1e8 * 2 * 2.0**-53 > 1e-5  # with 53 bits the bound would be above delta


def test_what_is_released_has_no_bits_below_a_millionth_of_the_noise():
    total = _sum(0.7, a=torch.rand(5000, generator=torch.Generator().manual_seed(1)) / 3)
    noisy = gaussian_release(total, noise_multiplier=1.3, sensitivity=0.7, source=NoiseSource(seed=5))
    out = noisy.tensors["a"].numpy()
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


@pytest.mark.parametrize("bad", [{"noise_multiplier": 0.0}, {"sensitivity": 0.0}, {"noise_multiplier": float("nan")},
                                 {"noise_multiplier": -1.0, "sensitivity": -1.0},
                                 {"sensitivity": math.inf}])  # fmt: skip
def test_no_release_without_noise(bad):
    settings = {"noise_multiplier": 1.0, "sensitivity": 1.0, **bad}
    with pytest.raises(ValueError, match="positive"):
        gaussian_release(_sum(a=torch.zeros(3)), **settings, source=NoiseSource(1))


def test_a_sum_whose_bound_is_over_the_sensitivity_gets_no_noise_that_would_be_too_little():
    for bound, fits in ((0.999, True), (1.0, True), (1.001, False)):
        total = _sum(bound, a=torch.zeros(3))
        if fits:
            gaussian_release(total, noise_multiplier=1.0, sensitivity=1.0, source=NoiseSource(1))
        else:
            with pytest.raises(ValueError, match="bound"):
                gaussian_release(total, noise_multiplier=1.0, sensitivity=1.0, source=NoiseSource(1))


def test_a_part_of_a_release_has_the_noise_of_the_whole():
    """Its bound is a tenth of the sensitivity; its noise is not."""
    total = _sum(0.1, a=torch.zeros(COUNT))
    out = gaussian_release(total, noise_multiplier=2.0, sensitivity=1.0, source=NoiseSource(seed=6))
    assert _std_is(out.tensors["a"].numpy(), 2.0)
