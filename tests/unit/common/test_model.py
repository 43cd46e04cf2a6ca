"""The network, its loss and its samplers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.model.diffusion import SIGMA_DATA, DiffusionLoss, Preconditioning
from common.model.diffusion_model import DiffusionModel, initial_weights, load_model
from common.model.layers import from_windows, shift_mask, to_windows
from common.model.samplers import SIGMA_MAX, SIGMA_MIN, noise_levels, sample
from common.model.swin_unet import SwinUNet
from common.study import DataConfig, GenerationConfig, NetworkConfig
from support.studies import tiny_study

DATA = DataConfig(image_size=28, channels=1, classes=("a", "b"))


def _net(network=NetworkConfig(width=8), data=DATA):
    torch.manual_seed(0)
    net = SwinUNet(network, data)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return net


def test_the_default_network_has_a_million_parameters_or_two():
    assert 500_000 < sum(p.numel() for p in SwinUNet(NetworkConfig(), DATA).parameters()) < 2_000_000


@pytest.mark.parametrize(
    ("size", "channels", "depths", "window"), [(28, 1, (0, 2, 2), 7), (64, 3, (0, 0, 2), 8), (32, 1, (2,), 5)]
)
def test_the_output_has_the_shape_of_the_input(size, channels, depths, window):
    data = DataConfig(image_size=size, channels=channels, classes=("a", "b", "c"))
    net = _net(NetworkConfig(width=8, depths=depths, heads=(2,) * len(depths), window=window), data)
    x = torch.randn(3, channels, size, size)
    assert net(x, torch.zeros(3), torch.zeros(3, dtype=torch.int64)).shape == x.shape


def test_a_new_network_answers_nothing_and_the_model_is_then_the_best_linear_guess():
    model = load_model(tiny_study(), initial_weights(tiny_study()))
    x, sigma, y = torch.randn(2, 1, 16, 16), torch.tensor([0.5, 3.0]), torch.zeros(2, dtype=torch.int64)
    assert not model(x, sigma, y).any()
    shrink = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
    torch.testing.assert_close(model.denoised(x, sigma, y), x * shrink[:, None, None, None])


def test_noise_level_and_class_change_the_answer_and_rows_do_not_touch_each_other():
    net = _net()
    x, level, y = torch.randn(2, 1, 28, 28), torch.tensor([0.1, 0.1]), torch.tensor([0, 0])
    base = net(x, level, y)
    for changed in (net(x, torch.tensor([0.1, -0.4]), y), net(x, level, torch.tensor([0, 2]))):
        torch.testing.assert_close(changed[0], base[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed[1], base[1], atol=1e-3)


def test_windows_are_put_back_where_they_came_from():
    x = torch.arange(3 * 64 * 5, dtype=torch.float32).view(3, 64, 5)
    for shift in (0, 2):
        assert torch.equal(from_windows(to_windows(x, 8, 4, shift), 8, 4, shift), x)


def test_the_shift_mask_separates_exactly_the_tokens_from_across_the_seam():
    """By hand: side 4, window 2, shift 1: the last window holds the four corners, none of which are neighbours."""
    mask = shift_mask(4, 2, 1)
    assert (mask[0] == 0).all()
    assert ((mask[3] == 0) == torch.eye(4, dtype=torch.bool)).all()


def test_only_the_chosen_parameters_are_trained():
    model = DiffusionModel(tiny_study())
    names = {which: set(model.set_trainable(which)) for which in ("all", "bias", "head")}
    assert names["all"] == {name for name, _ in model.named_parameters()}
    assert names["bias"] < names["all"]
    few = {"net.label.weight", "net.head.weight", "net.noise_in.bias", "net.down.0.blocks.0.norm1.weight"}
    assert few < names["bias"]
    assert not any(name.endswith(("conv1.weight", "qkv.weight", "table")) for name in names["bias"])
    assert names["head"] == {f"net.{layer}.{part}" for layer in ("head", "norm") for part in ("weight", "bias")}
    assert sum(p.requires_grad for p in model.parameters()) == len(names["head"])


def test_weights_of_another_study_are_refused():
    from common.errors import ReplyError

    weights = initial_weights(tiny_study())
    for wrong in (
        {k: v for k, v in weights.items() if k != "net.head.bias"},
        {**weights, "net.label.weight": weights["net.label.weight"][:-1]},
        {**weights, "net.embed.bias": weights["net.embed.bias"] * float("nan")},
    ):
        with pytest.raises(ReplyError):
            load_model(tiny_study(), wrong)


class _Exact(nn.Module):
    """The exact answer for data N(mean, std²) in every pixel; another mean for each class."""

    def __init__(self, means, std):
        super().__init__()
        self.means, self.std = torch.tensor(means), std

    def denoised(self, x, sigma, y):
        mean, sigma = self.means[y][:, None, None, None], sigma[:, None, None, None]
        return mean + self.std**2 / (self.std**2 + sigma**2) * (x - mean)

    def forward(self, x, sigma, y):
        by = Preconditioning.at(sigma)
        return (self.denoised(x, sigma, y) - by.skip * x) / by.out


def test_no_answer_has_loss_one_for_pixels_of_the_stated_spread_and_the_exact_answer_the_least():
    loss = DiffusionLoss(64, 0.0, 2)
    x = 0.1 + 0.5 * torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(8, dtype=torch.int64)
    draws = loss.draw(8, (1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    nothing = loss.losses(_Exact([0.0], SIGMA_DATA), x - 0.1, y, draws)
    assert nothing.shape == (8,)
    assert nothing.mean().item() == pytest.approx(1.0, rel=0.05)
    exact, off = (loss.losses(_Exact([mean], 0.5), x, y, draws).mean().item() for mean in (0.1, 0.4))
    assert exact < off - 0.01


def test_the_loss_is_edms_weighted_squared_error_of_the_clean_image():
    """Karras et al. 2022, eq. 8: weight (sigma² + s²) / (sigma s)², s = SIGMA_DATA."""
    model, loss = _Exact([0.3, -0.2, 0.0], 0.4), DiffusionLoss(3, 0.0, 2)
    x, y = torch.rand(4, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 0, 1])
    draws = loss.draw(4, (1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    expected = torch.zeros(4)
    for k in range(3):
        sigma = draws.sigma[:, k]
        clean = model.denoised(x + sigma[:, None, None, None] * draws.noise[:, k], sigma, y)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        expected += weight * (clean - x).square().mean(dim=(1, 2, 3)) / 3
    torch.testing.assert_close(loss.losses(model, x, y, draws), expected, rtol=1e-4, atol=1e-5)


def test_labels_are_dropped_to_the_null_class_at_the_stated_rate():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, sigma, y):
            seen.append(y)
            return x

    loss = DiffusionLoss(50, 0.25, 7)
    draws = loss.draw(40, (1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    loss.losses(Spy(), torch.zeros(40, 1, 8, 8), torch.ones(40, dtype=torch.int64), draws)
    assert set(seen[0].unique().tolist()) == {1, 7}
    assert (seen[0] == 7).double().mean().item() == pytest.approx(0.25, abs=0.04)


def test_noise_levels_fall_from_the_largest_to_the_smallest():
    levels = noise_levels(18)
    assert levels[0] == pytest.approx(SIGMA_MAX)
    assert levels[-1] == pytest.approx(SIGMA_MIN)
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))


def _sample(net, labels, config, seeds=None):
    return sample(
        net, labels, null_label=2, shape=(1, 8, 8), config=config, seeds=seeds or range(len(labels))
    )  # fmt: skip


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 250), ("heun", 20), ("dpm-solver++", 20)])
def test_each_sampler_draws_from_a_known_distribution_when_the_model_is_exact(sampler, steps):
    labels = torch.tensor([0, 1]).repeat_interleave(60)
    config = GenerationConfig(sampler=sampler, steps=steps, images=120, guidance=0)
    images = _sample(_Exact([0.2, -0.3, 0.0], 0.15), labels, config)
    assert images.shape == (120, 1, 8, 8)
    for label, mean in ((0, 0.2), (1, -0.3)):
        part = images[labels == label]
        assert part.mean().item() == pytest.approx(mean, abs=0.015)
        assert part.std().item() == pytest.approx(0.15, rel=0.1)
    assert images.min() >= -1
    assert images.max() <= 1


def test_guidance_pushes_away_from_the_unconditional_mean():
    net, labels = _Exact([0.2, -0.2, 0.0], 0.1), torch.zeros(40, dtype=torch.int64)

    def mean(guidance):
        return _sample(net, labels, GenerationConfig(steps=20, guidance=guidance, images=40)).mean().item()

    assert mean(2.0) > mean(0.0) + 0.1


def test_an_image_depends_on_its_own_seed_alone():
    net, config = _Exact([0.2, -0.2, 0.0], 0.1), GenerationConfig(steps=4, images=2, sampler="ancestral")
    both = _sample(net, torch.tensor([0, 1]), config, [5, 6])
    torch.testing.assert_close(_sample(net, torch.tensor([1]), config, [6])[0], both[1])
    assert not torch.equal(_sample(net, torch.tensor([1]), config, [7])[0], both[1])
