"""What one unit can move in counts, moments and score histograms: adjacent data sets that a search finds.

Sums are compared in L2 with their own bound, and the bounds with the plan's sensitivity. The gate's noise is then
measured against noise_multiplier × that sensitivity. For gradients: `test_gradient_sensitivity.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.privacy.fingerprints import Fingerprints
from client.privacy.gate import Gate
from client.privacy.ledger import Ledger
from client.privacy.policy import SitePolicy
from client.privacy.randomness import NoiseSource
from client.privacy.store import Store
from common.accounting import plan_study
from common.bounded import BoundedSum, RunningSum, joined
from common.features import View, directions_of, feature_sums, features_of
from common.images import ImageSet, Units
from common.metrics import count_scores, l2_sensitivity, score_sum
from common.moments import SPREAD_CLIP_NORM, class_counts, class_sums, coordinates, spread_sums
from common.protocol import Agreement, SiteFacts
from support.studies import tiny_study

STUDY = tiny_study()
PLAN = plan_study(STUDY)
SIDE, CLASSES, BINS = STUDY.data.image_size, len(STUDY.data.classes), STUDY.validation.bins
SPACE = coordinates(SIDE, STUDY.data.channels, STUDY.moments.components, STUDY.symmetry)
UNITS = ("image", "patient")


@st.composite
def cohorts(draw):
    """1 to 7 patients of 1 to 4 images: noise, black, white or half-half; often one class has no image or one."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = sum(sizes)
    images = rng.integers(0, 256, (count, 1, SIDE, SIDE), dtype=np.uint8)
    for index, kind in enumerate(draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))):
        if kind < 3:
            images[index, :, : SIDE // (1 + kind // 2)] = 255 * (kind % 2)
    labels = np.zeros(count, dtype=np.int64)
    rare = draw(st.sampled_from(["none", "one", "some"]))
    if rare == "one":
        labels[draw(st.integers(0, count - 1))] = 1
    elif rare == "some":
        labels = rng.integers(0, CLASSES, count)
    if draw(st.booleans()):
        labels = CLASSES - 1 - labels
    return ImageSet(images, labels, np.repeat(np.arange(len(sizes)), sizes)), draw(st.integers(0, 1000)), rng


def _adjacent(case, unit):
    """Which images stay when one of the cohort's units goes: all of them, and all but its own."""
    images, which, _ = case
    keys = images.patients if unit == "patient" else np.arange(len(images))
    return np.ones(len(images), bool), keys != np.unique(keys)[which % len(np.unique(keys))]


def _moved(one: BoundedSum, other: BoundedSum) -> float:
    assert one.bound == other.bound  # no secret: noise does not follow it
    return math.hypot(*(float((one.parts[name] - other.parts[name]).norm()) for name in one.parts))


def _counts(images, unit):
    return class_counts(Units.of(images, unit), CLASSES)


def _evaluated(images, unit, *scores):
    """Both classifiers' score counts, as the evaluation releases them."""
    units = Units.of(images, unit)
    return joined(*(score_sum(units, each, BINS, name=f"classifier {i}") for i, each in enumerate(scores)))


@pytest.mark.parametrize("unit", UNITS)
@given(case=cohorts())
@settings(max_examples=150, deadline=None)
def test_one_unit_moves_the_class_counts_by_at_most_the_plans_sensitivity(unit, case):
    whole, rest = (_counts(case[0].select(keep), unit) for keep in _adjacent(case, unit))
    moved = _moved(whole, rest)
    assert moved <= whole.bound == PLAN["counts"].sensitivity
    assert unit == "patient" or moved == pytest.approx(whole.bound)  # so the bound is attained
    assert moved >= whole.bound / math.sqrt(CLASSES) * (1 - 1e-6)  # shares of a patient, spread evenly


@pytest.mark.parametrize("unit", UNITS)
@given(case=cohorts(), value=st.sampled_from([-1e200, -100.0, -3.0, 0.0, 3.0, 100.0, 1e200]))
@settings(max_examples=100, deadline=None)
def test_one_unit_moves_each_sum_of_the_class_moments_by_at_most_its_share_of_the_plans_sensitivity(unit, case, value):
    centres = np.full((CLASSES, SPACE.dimension), value)
    parts = [Units.of(case[0].select(keep), unit) for keep in _adjacent(case, unit)]
    bounds = []
    with np.errstate(over="ignore"):
        for make in (lambda u: class_sums(u, CLASSES, SPACE), lambda u: spread_sums(u, centres, SPACE)):
            whole, rest = (make(units) for units in parts)
            assert _moved(whole, rest) <= whole.bound
            bounds.append(whole.bound)
    assert PLAN["moments"].steps == PLAN["moments"].sample_rate == 1  # only then do parts add up by their squares
    assert 0.99 * PLAN["moments"].sensitivity < math.hypot(*bounds) <= PLAN["moments"].sensitivity


@pytest.mark.parametrize("unit", UNITS)
@given(case=cohorts(), size=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_one_unit_moves_the_features_by_at_most_the_plans_sensitivity(unit, case, size):
    features, many = features_of(STUDY), directions_of(STUDY)
    directions = size * np.random.default_rng(0).standard_normal((features.dimension, many))
    view = View(np.zeros(features.dimension, np.float32), directions.astype(np.float32))
    parts = [Units.of(case[0].select(keep), unit) for keep in _adjacent(case, unit)]
    whole, rest = (feature_sums(units, view.of(features.of(units.images.images)), CLASSES) for units in parts)
    assert whole.bound == pytest.approx(PLAN["features"].sensitivity)
    assert _moved(whole, rest) <= whole.bound
    assert unit == "patient" or size < 1 or _moved(whole, rest) == pytest.approx(whole.bound)


HOSTILE = (0.0, 0.5, 1.0, math.nan, math.inf, -1.0, 2.0, 1e-320)


@pytest.mark.parametrize("unit", UNITS)
@given(case=cohorts(), hostile=st.booleans())
@settings(max_examples=60, deadline=None)
def test_one_unit_moves_the_score_counts_of_both_classifiers_by_at_most_the_plans_sensitivity(unit, case, hostile):
    images, _, rng = case
    shape = (len(images), CLASSES)
    scores = [rng.choice(HOSTILE, shape) if hostile else rng.dirichlet([0.5] * CLASSES, len(images)) for _ in range(2)]
    keeps = _adjacent(case, unit)
    whole, rest = (_evaluated(images.select(keep), unit, *(each[keep] for each in scores)) for keep in keeps)
    assert whole.bound == pytest.approx(PLAN["evaluate"].sensitivity, rel=1e-12)
    assert _moved(whole, rest) <= whole.bound
    assert unit == "patient" or hostile or _moved(whole, rest) == pytest.approx(whole.bound)


@given(st.integers(2, 9), st.integers(2, 30), st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_one_record_moves_the_score_counts_of_any_number_of_classes_by_the_sensitivity(classes, bins, count, seed):
    """Scores at the ends, at the edges of bins and in ties; classes without a record among the labels."""
    rng = np.random.default_rng(seed)
    edges = 1 / (1 + np.exp(-np.linspace(-6, 6, bins + 1)))
    scores = rng.choice([0.0, 0.5, 1.0, *edges, *rng.random(3)], (count + 1, classes))
    labels = rng.integers(0, rng.integers(1, classes + 1), count + 1)
    keep = np.arange(count + 1) != rng.integers(0, count + 1)
    vectors = [count_scores(scores[k], labels[k], bins).vector() for k in (slice(None), keep)]
    assert np.linalg.norm(vectors[0] - vectors[1]) == pytest.approx(l2_sensitivity(classes))


def _climb(length, image, centres, rng, tries=400):
    """The longest row that changing rectangles of the image and blocks of the centres finds."""
    best = length(image, centres)
    for _ in range(tries):
        other, moved = image.copy(), centres.copy()
        if rng.random() < 0.5:
            (top, left), (height, width) = rng.integers(0, SIDE, 2), rng.integers(1, SIDE + 1, 2)
            other[..., top : top + height, left : left + width] = rng.choice([0, 127, 255, rng.integers(256)])
        else:
            moved[:, rng.integers(0, SPACE.dimension, 3)] += rng.normal() * 10.0 ** rng.integers(-2, 4)
        found = length(other, moved)
        if found > best:
            best, image, centres = found, other, moved
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_image_and_centres_that_a_search_finds_reach_the_bounds_and_no_further(seed, capsys):
    rng = np.random.default_rng(seed)
    image = rng.integers(100, 156, (1, 1, SIDE, SIDE), dtype=np.uint8)
    label = np.array([seed % CLASSES])
    nothing = Units.of(ImageSet(image[:0], label[:0]), "image")
    makes = {
        "means": lambda units, _: class_sums(units, CLASSES, SPACE),
        "squares": lambda units, centres: spread_sums(units, centres, SPACE),
    }
    for name, make in makes.items():
        empty = make(nothing, np.zeros((CLASSES, SPACE.dimension)))
        length = lambda x, c, make=make, empty=empty: _moved(make(Units.of(ImageSet(x, label), "image"), c), empty)
        worst = _climb(length, image, np.zeros((CLASSES, SPACE.dimension)), rng) / empty.bound
        with capsys.disabled():
            print(f"  worst found for {name}, seed {seed}: {worst:.6f} of the bound")
        assert 0.97 < worst <= 1


def test_an_image_as_the_unit_breaks_the_bound_for_patients_and_the_search_sees_it():
    """The twin: were sums over images released under the patient's bound, a patient of two would break it."""
    images = ImageSet(np.full((3, 1, SIDE, SIDE), 255, np.uint8), np.zeros(3, np.int64), np.array([0, 0, 1]))
    left = images.select(images.patients != 0)
    far = np.full((CLASSES, SPACE.dimension), -2 * SPREAD_CLIP_NORM)
    scores = np.array([[0.9, 0.1]] * 3)
    for one, other in (
        (_counts(images, "image"), _counts(left, "image")),
        (spread_sums(Units.of(images, "image"), far, SPACE), spread_sums(Units.of(left, "image"), far, SPACE)),
        (_evaluated(images, "image", scores), _evaluated(left, "image", scores[2:])),
    ):
        assert _moved(one, other) > 1.4 * one.bound


# --- the gate's noise -------------------------------------------------------------------------------------------------


def _gate(folder):
    """A gate with an approved study and a seeded source, without any image."""
    ledger = Ledger.create(folder)
    nothing = ImageSet(np.zeros((0, 1, SIDE, SIDE), np.uint8), np.zeros(0, np.int64))
    ledger.approve(STUDY, PLAN, Fingerprints.of(ledger.key, nothing, nothing), by="a test")
    facts = SiteFacts(name="site-1", phantoms=True, random_source="SEEDED")
    return Gate(facts=facts, agreement=Agreement(study=STUDY, plan=PLAN), request="ab" * 32, policy=SitePolicy(),
                ledger=ledger, source=NoiseSource(9), store=Store(folder), images=lambda _: None)  # fmt: skip


def _std_is(sample, expected):
    """Chi-square test at alpha 1e-6, two-sided; of 20,000 numbers a std 5 % off is seen with power > 0.9999."""
    statistic = float(np.square(sample).sum()) / expected**2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(sample))
    return low < statistic < high


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("name", [mechanism.name for mechanism in PLAN.mechanisms])
def test_the_gate_adds_noise_of_multiplier_times_sensitivity_and_the_test_can_fail(tmp_path, name, share):
    """A part of a release, of a smaller bound, has the noise of the whole; sampled records have no parts."""
    plan, gate = PLAN[name], _gate(tmp_path / "state")
    zeros = RunningSum({"zeros": (19_000,), "more": (10, 100)}, share * plan.sensitivity).total()
    with gate.spend(name) as permit:
        if share < 1 and plan.sample_rate < 1:
            with pytest.raises(ValueError, match="no part"):
                permit.noisy(name, zeros)
            return
        noisy = permit.noisy(name, zeros)
    sample = torch.cat([part.flatten() for part in noisy.tensors.values()]).numpy()
    expected = plan.noise_multiplier * plan.sensitivity
    assert _std_is(sample, expected)
    for wrong in (0.95, 1.05, 2 / 3, math.sqrt(1 / 2), math.sqrt(2), share if share < 1 else 1.1):
        assert not _std_is(sample, wrong * expected)
