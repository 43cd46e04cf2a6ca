"""The privacy unit: however many images a patient has, it counts once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.images import ImageSet, Units, to_unit
from common.metrics import l2_sensitivity, score_sum
from common.moments import class_counts
from support.oracles import Engine, diffusion_loss, flat, losses, randomised_net

CLASSES = 3


@st.composite
def cohorts(draw):
    """Images of 1 to 8 patients with 1 to 9 images each, in any order, rare classes included."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    patients = rng.permutation(np.repeat(np.arange(len(sizes)) * 7 - 3, sizes))
    labels = rng.choice(CLASSES, len(patients), p=rng.dirichlet([0.3] * CLASSES))
    return ImageSet(rng.integers(0, 256, (len(patients), 1, 4, 4), dtype=np.uint8), labels, patients), rng


def _without(images, patient):
    return images.select(images.patients != patient)


def _moved(whole, rest):
    return np.linalg.norm(np.concatenate([(whole.parts[name] - rest.parts[name]).numpy() for name in whole.parts]))


@given(cohorts())
@settings(max_examples=80, deadline=None)
def test_every_image_is_in_one_unit_and_a_patient_moves_counts_by_at_most_one(case):
    images, _ = case
    units = Units.of(images, "patient")
    assert sorted(np.concatenate(units.members).tolist()) == list(range(len(images)))
    assert len(units) == len(np.unique(images.patients))
    whole = class_counts(units, CLASSES)
    assert float(whole.parts["counts"].sum()) == pytest.approx(len(units))
    assert whole.bound == 1
    for patient in np.unique(images.patients):
        assert _moved(whole, class_counts(Units.of(_without(images, patient), "patient"), CLASSES)) <= 1


@given(cohorts())
@settings(max_examples=40, deadline=None)
def test_a_patient_moves_the_score_counts_by_no_more_than_one_image_would(case):
    images, rng = case
    scores = rng.dirichlet([0.5] * CLASSES, len(images))

    def counted(keep):
        return score_sum(Units.of(images.select(keep), "patient"), scores[keep], 6, name="scores")

    whole = counted(np.ones(len(images), dtype=bool))
    assert whole.bound == l2_sensitivity(CLASSES)
    for patient in np.unique(images.patients):
        assert _moved(whole, counted(images.patients != patient)) <= whole.bound


@given(cohorts(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_draws_range_over_the_chosen_patients_images_and_no_others(case, most):
    images, rng = case
    units = Units.of(images, "patient")
    chosen = rng.random(len(units)) < 0.5
    picked, labels = units.draw(chosen, most, rng)
    assert picked.shape == (chosen.sum(), most, 1, 4, 4)
    assert labels.shape == (chosen.sum(), most)
    for row, unit in enumerate(np.flatnonzero(chosen)):
        own = {images.images[i].tobytes() for i in units.members[unit]}
        drawn = [image.tobytes() for image in picked[row]]
        assert set(drawn) <= own
        assert len(set(drawn)) >= min(most, len(own))  # none is drawn twice before all are


def test_where_the_image_is_the_unit_every_image_counts_by_itself():
    images = ImageSet(np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 0, 2, 1]), np.array([5, 5, 5, 5]))
    units = Units.of(images, "image")
    assert len(units) == 4
    assert class_counts(units, 3).parts["counts"].tolist() == pytest.approx([2, 1, 1])
    assert units.draw(np.array([True, False, True, False]), 8, np.random.default_rng(0))[0].shape == (2, 1, 1, 2, 2)


def test_patients_that_are_not_known_cannot_be_protected():
    images = ImageSet(np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int64))
    with pytest.raises(DataError, match="the patient of each image is not known"):
        Units.of(images, "patient")


def test_a_patients_gradient_is_the_mean_over_its_images_and_is_clipped_once():
    """The private gradient of two chosen patients equals a loop over single patients and images, in float64."""
    net = randomised_net(size=16, channels=1, dtype=torch.float64)
    rng = np.random.default_rng(2)
    images = ImageSet(
        rng.integers(0, 256, (7, 1, 16, 16), dtype=np.uint8), np.arange(7) % 3, np.array([0] * 5 + [1] * 2)
    )
    picked, labels = Units.of(images, "patient").draw(np.array([True, True]), 5, rng)
    x, y = to_unit(picked).double(), torch.from_numpy(labels)
    draws = diffusion_loss(5).draw(2, (1, 16, 16), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    made = (x, y, draws.sigma, draws.noise, draws.keep_label)

    expected, lengths = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64), []
    for patient in range(2):
        each = [losses(net, *(r[patient : patient + 1, k : k + 1] for r in made)).sum() for k in range(5)]
        gradients = torch.autograd.grad(torch.stack(each).mean(), list(net.parameters()))
        named = dict(zip((name for name, _ in net.named_parameters()), gradients, strict=True))
        whole = torch.cat([named[name].flatten() for name in sorted(named)])
        lengths.append(float(whole.norm()))
        expected += whole * min(1.0, 0.5 / lengths[-1])
    assert min(lengths) > 0.5  # both are clipped
    engine = Engine(net, losses, max_grad_norm=0.5, physical_batch=2)
    torch.testing.assert_close(flat(engine.sum(made)), expected, rtol=1e-8, atol=1e-9)
    engine.gradients.close()
