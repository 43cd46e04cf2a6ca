"""The closed form is the velocity of Gaussian images: against a dense calculation, and against samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.images import ImageSet
from common.model.diffusion import NoiseSchedule
from common.model.diffusion_model import DiffusionModel, cooled, initial_weights, load_model, with_prior
from common.model.gaussian import GaussianVelocity
from common.model.samplers import sample
from common.moments import coordinates, dct_basis
from common.prior import Prior
from common.study import GenerationConfig
from support.studies import tiny_study

SCHEDULE = NoiseSchedule(100)


def _prior(channels, classes=2, size=8, seed=0):
    """A prior with random means and a random covariance for each class."""
    space, rng = coordinates(size, channels, 3), np.random.default_rng(seed)
    d = space.dimension
    roots = rng.normal(size=(classes + 1, d, d)) / d
    public = Prior.public(space, classes)
    return Prior(space, rng.normal(size=(classes + 1, d)) * 0.3, roots @ roots.transpose(0, 2, 1), public.high)


def _dense(prior, label):
    """Mean and covariance of the pixels of a class, without any short cut."""
    space = prior.space
    size, channels = space.size, space.channels
    columns = []
    for index in range(channels * size**2):
        unit = np.zeros(channels * size**2)
        unit[index] = 1.0
        coefficients = unit.reshape(channels, size, size) / space.weights
        rows = dct_basis(size)
        columns.append(np.einsum("ec,eij->cij", space.colours, rows.T @ coefficients @ rows).ravel())
    to_pixels = np.stack(columns, axis=1)
    low = space.low.ravel()
    covariance, mean = np.diag(prior.high[label].ravel()), np.zeros(len(low))
    covariance[np.ix_(low, low)] = prior.covariances[label]
    mean[low] = prior.means[label]
    return to_pixels @ mean, to_pixels @ covariance @ to_pixels.T


@pytest.mark.parametrize("channels", [1, 3])
def test_the_velocity_is_that_of_the_best_linear_guess(channels):
    prior = _prior(channels)
    model = GaussianVelocity(prior, SCHEDULE)
    x = torch.randn(6, 2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([[0, 99], [5, 50], [20, 80], [99, 0], [40, 60], [90, 10]])
    y = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 0], [1, 1], [2, 2]])
    got = model(x, t, y).double().numpy()
    for b in range(6):
        for k in range(2):
            a = float(SCHEDULE.alphas_bar[t[b, k]])
            mean, covariance = _dense(prior, int(y[b, k]))
            flat = x[b, k].double().numpy().ravel()
            x0 = mean + np.sqrt(a) * covariance @ np.linalg.solve(
                a * covariance + (1 - a) * np.eye(len(mean)), flat - np.sqrt(a) * mean
            )
            noise = (flat - np.sqrt(a) * x0) / np.sqrt(1 - a)
            expected = np.sqrt(a) * noise - np.sqrt(1 - a) * x0
            np.testing.assert_allclose(got[b, k].ravel(), expected, atol=2e-3)


def test_a_record_and_a_draw_are_answered_alone():
    model = GaussianVelocity(_prior(1), SCHEDULE)
    x = torch.randn(4, 3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    t, y = torch.randint(100, (4, 3)), torch.randint(3, (4, 3))
    whole = model(x, t, y)
    torch.testing.assert_close(whole[2:3, 1:2], model(x[2:3, 1:2], t[2:3, 1:2], y[2:3, 1:2]), atol=1e-5, rtol=1e-4)


def test_before_training_the_model_draws_what_the_prior_describes():
    """Mean and variance of pixels over 600 samples of each class against the prior's own, to 6 standard errors."""
    study = tiny_study(data={"image_size": 8 + 8}, diffusion={"timesteps": 400})
    space = coordinates(16, 1, study.moments.components)
    d, rng = space.dimension, np.random.default_rng(3)
    public = Prior.public(space, 2)
    means = np.concatenate([rng.normal(size=(2, d)) * 0.1, np.zeros((1, d))])
    prior = Prior(space, means, public.covariances * 0.3, public.high * 0.3)
    model = load_model(study, with_prior(initial_weights(study), prior))
    labels = torch.arange(1200) % 2
    drawn = sample(
        model, labels, null_label=2, shape=(1, 16, 16), schedule=NoiseSchedule(400),
        config=GenerationConfig(sampler="dpm-solver++", steps=25), generator=torch.Generator().manual_seed(4), clip=9.0,
    ).double().numpy()  # fmt: skip
    for label in (0, 1):
        mean, covariance = _dense(prior, label)
        mine = drawn[labels.numpy() == label].reshape(600, -1)
        error = np.sqrt(np.diag(covariance) / 600)
        assert (np.abs(mine.mean(axis=0) - mean) < 6 * error + 0.01).all()
        assert mine.var(axis=0).sum() == pytest.approx(np.trace(covariance), rel=0.1)


def test_only_the_chosen_parameters_are_trained_and_the_prior_never_is():
    model = DiffusionModel(tiny_study())
    names = {which: set(model.set_trainable(which)) for which in ("all", "modulation", "head")}
    assert names["head"] < names["modulation"] < names["all"]
    assert {name for name, _ in model.named_parameters()} - names["all"] == {"swin.label.weight"}
    told = DiffusionModel(tiny_study(privacy={"moments_share": 0.0}))
    assert set(told.set_trainable("modulation")) == names["modulation"] | {"swin.label.weight"}
    assert not any(name.startswith("prior.") for name in names["all"])
    assert {name for name in model.state_dict() if name.startswith("prior.")} == {
        "prior.means", "prior.vectors", "prior.values", "prior.high"
    }  # fmt: skip
    model.set_trainable("head")
    assert sum(p.requires_grad for p in model.parameters()) == len(names["head"])


@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_network_is_told_the_class_where_no_moments_tell_it_or_as_the_study_says(own, share):
    changes = {} if own is None else {"network": {"class_conditional": own}}
    study = tiny_study(privacy={"moments_share": share}, **changes)
    told = share == 0.0 if own is None else own
    assert study.class_conditional is told
    torch.manual_seed(1)
    model = DiffusionModel(study)
    for parameter in model.swin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(2, 1, 1, 16, 16), torch.zeros(2, 1, dtype=torch.int64)
    first, second = (
        model(x, t, torch.full((2, 1), label)) - model.prior(x, t, torch.full((2, 1), label)) for label in (0, 1)
    )
    assert bool(torch.allclose(first, second, atol=1e-4)) is not told


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_beside_moments_the_network_acts_at_the_nearly_clean_half_of_the_time_steps_only(share):
    study = tiny_study(privacy={"moments_share": share})
    assert study.network_steps == (100 if share == 0.0 else 50)
    assert tiny_study(network={"time_share": 0.2}).network_steps == 20
    model = DiffusionModel(study)
    for parameter in model.swin.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, y = torch.randn(2, 1, 1, 16, 16), torch.zeros(2, 1, dtype=torch.int64)
    for training in (True, False):
        model.train(training)
        rest = [
            float((model(x, t, y) - model.prior(x, t, y)).detach().abs().max())
            for t in (torch.full((2, 1), 49), torch.full((2, 1), 50))
        ]
        assert rest[0] > 0.01
        assert (rest[1] > 0.01) is (share == 0.0)


def test_cooled_weights_have_smaller_variances_and_all_else_as_it_was():
    weights = initial_weights(tiny_study())
    cool = cooled(weights, 0.7)
    for name, array in weights.items():
        factor = 0.7 if name in ("prior.values", "prior.high") else 1.0
        np.testing.assert_allclose(cool[name], array * np.float32(factor), rtol=1e-6)


def test_weights_of_another_study_are_refused():
    from common.errors import ReplyError

    weights = initial_weights(tiny_study())
    for wrong in (
        {k: v for k, v in weights.items() if k != "prior.high"},
        {**weights, "prior.means": weights["prior.means"][:-1]},
        {**weights, "prior.values": weights["prior.values"] * np.nan},
    ):
        with pytest.raises(ReplyError):
            load_model(tiny_study(), wrong)


def test_images_need_not_be_gaussian_for_the_start_to_be_of_use():
    """The closed form predicts less badly than no prediction, on images of two flat greys."""
    study = tiny_study()
    images = np.repeat(np.array([60, 190], np.uint8), 50)[:, None, None, None] * np.ones((1, 1, 16, 16), np.uint8)
    assert ImageSet(images, np.repeat([0, 1], 50)).images.shape == (100, 1, 16, 16)
    model = load_model(study, initial_weights(study))
    x0 = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    t, y = torch.full((100, 1), 50), torch.full((100, 1), 2)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    schedule = NoiseSchedule(study.diffusion.timesteps)
    wanted = schedule.velocity(x0, noise, t)
    with torch.no_grad():
        error = (model(schedule.add_noise(x0, noise, t), t, y) - wanted).square().mean()
    assert float(error) < 0.5 * float(wanted.square().mean())
