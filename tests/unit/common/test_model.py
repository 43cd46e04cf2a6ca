"""The network, its loss and its samplers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common.model.diffusion import DiffusionLoss, NoiseSchedule
from common.model.layers import from_windows, shift_mask, to_windows
from common.model.samplers import sample
from common.model.swin_unet import SwinUNet
from common.study import DataConfig, GenerationConfig, NetworkConfig

DATA = DataConfig(image_size=28, channels=1, classes=("a", "b"))


def _net(network=NetworkConfig(), data=DATA):
    torch.manual_seed(0)
    net = SwinUNet(network, data)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def test_the_default_network_has_under_a_million_parameters():
    assert 100_000 < sum(p.numel() for p in SwinUNet(NetworkConfig(), DATA).parameters()) < 1_000_000


@pytest.mark.parametrize(
    ("size", "channels", "patch", "window"), [(28, 1, 2, 7), (28, 3, 4, 7), (64, 3, 4, 8), (32, 1, 2, 5)]
)
def test_the_output_has_the_shape_of_the_input(size, channels, patch, window):
    data = DataConfig(image_size=size, channels=channels, classes=("a", "b", "c"))
    depths = (1,) if (size // patch) % 2 else (1, 1)
    net = _net(NetworkConfig(patch_size=patch, width=8, depths=depths, heads=(2,) * len(depths), window=window), data)
    x = torch.randn(2, 3, channels, size, size)
    assert net(x, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)).shape == x.shape


def test_time_and_class_change_the_prediction_and_draws_do_not_touch_each_other():
    net = _net()
    x, t, y = torch.randn(1, 2, 1, 28, 28), torch.tensor([[5, 5]]), torch.tensor([[0, 0]])
    base = net(x, t, y)
    for changed in (net(x, torch.tensor([[5, 700]]), y), net(x, t, torch.tensor([[0, 2]]))):
        torch.testing.assert_close(changed[:, 0], base[:, 0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed[:, 1], base[:, 1], atol=1e-3)


def test_windows_are_put_back_where_they_came_from():
    x = torch.arange(2 * 3 * 64 * 5, dtype=torch.float32).view(2, 3, 64, 5)
    for shift in (0, 2):
        assert torch.equal(from_windows(to_windows(x, 8, 4, shift), 8, 4, shift), x)


def test_the_shift_mask_separates_exactly_the_tokens_from_across_the_seam():
    """By hand: side 4, window 2, shift 1: the last window holds the four corners, none of which are neighbours."""
    mask = shift_mask(4, 2, 1)
    assert (mask[0] == 0).all()
    assert ((mask[3] == 0) == torch.eye(4, dtype=torch.bool)).all()


def test_information_crosses_window_borders_with_shifted_windows_only():
    def reach(depth):
        data = DataConfig(image_size=16, channels=1, classes=("a", "b"))
        net = _net(NetworkConfig(patch_size=2, width=8, depths=(depth,), heads=(2,), window=4), data)
        x, zero = torch.zeros(1, 1, 1, 16, 16), torch.zeros(1, 1, dtype=torch.int64)
        moved = x.clone()
        moved[..., 0, 0] = 3.0
        return (net(moved, zero, zero) - net(x, zero, zero)).abs()[0, 0, 0]

    plain, shifted = reach(1), reach(2)
    assert plain[:8, :8].max() > 1e-3
    assert plain[8:, :].max() < 1e-6
    assert shifted[8:12, :8].max() > 1e-4


def test_the_cosine_schedule_falls_from_signal_to_noise():
    bars = NoiseSchedule(1000).alphas_bar
    assert bars[0] > 0.9999
    assert bars[-1] < 1e-4
    assert (bars[1:] < bars[:-1]).all()
    middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert bars[499].item() == pytest.approx(middle, rel=1e-6)


def test_a_network_that_predicts_nothing_has_loss_of_at_most_one_and_the_right_answer_has_loss_zero():
    schedule = NoiseSchedule(100)
    loss = DiffusionLoss(schedule, 64, 0.1, 2)
    x, y = torch.rand(4, 1, 16, 16) * 2 - 1, torch.zeros(4, dtype=torch.int64)
    draws = loss.draw(4, (1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    class Zero(nn.Module):
        def forward(self, x, t, y):
            return torch.zeros_like(x)

    clean = x

    class Oracle(nn.Module):
        def forward(self, noisy, t, labels):
            return schedule.velocity(clean[:, None], draws.noise, draws.t)

    assert 0.3 < loss.losses(Zero(), x, y, draws).mean().item() < 1.0
    assert loss.losses(Oracle(), x, y, draws).max() < 1e-12
    assert loss.losses(Zero(), x, y, draws).shape == (4,)


def test_labels_are_dropped_to_the_null_class_at_the_stated_rate():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, t, y):
            seen.append(y)
            return x

    loss = DiffusionLoss(NoiseSchedule(10), 50, 0.25, 7)
    loss(Spy(), torch.zeros(40, 1, 8, 8), torch.ones(40, dtype=torch.int64), generator=torch.Generator().manual_seed(1))
    assert set(seen[0].unique().tolist()) == {1, 7}
    assert (seen[0] == 7).double().mean().item() == pytest.approx(0.25, abs=0.04)


class _GaussianNet(nn.Module):
    """The exact prediction of the velocity for data N(mean, std²) in every pixel; another mean for each class."""

    def __init__(self, schedule, means, std):
        super().__init__()
        self.schedule, self.means, self.std = schedule, torch.tensor(means), std

    def forward(self, x, t, y):
        a = self.schedule.alphas_bar[t][..., None, None, None]
        mean = self.means[y][..., None, None, None]
        noise = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * self.std**2 + 1 - a)
        x0 = mean + a.sqrt() * self.std**2 * (x - a.sqrt() * mean) / (a * self.std**2 + 1 - a)
        return (a.sqrt() * noise - (1 - a).sqrt() * x0).float()


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 250), ("ddim", 50), ("dpm-solver++", 20)])
def test_each_sampler_draws_from_a_known_distribution_when_the_network_is_exact(sampler, steps):
    schedule = NoiseSchedule(1000)
    net = _GaussianNet(schedule, [0.2, -0.3, 0.0], 0.15)
    labels = torch.tensor([0, 1]).repeat_interleave(60)
    images = sample(
        net, labels, null_label=2, shape=(1, 8, 8), schedule=schedule, generator=torch.Generator().manual_seed(0),
        config=GenerationConfig(sampler=sampler, steps=steps, images=120),
    )  # fmt: skip
    assert images.shape == (120, 1, 8, 8)
    for label, mean in ((0, 0.2), (1, -0.3)):
        part = images[labels == label]
        assert part.mean().item() == pytest.approx(mean, abs=0.015)
        assert part.std().item() == pytest.approx(0.15, rel=0.1)
    assert images.min() >= -1
    assert images.max() <= 1


def test_guidance_pushes_away_from_the_unconditional_mean():
    schedule = NoiseSchedule(1000)
    net = _GaussianNet(schedule, [0.2, -0.2, 0.0], 0.1)
    labels = torch.zeros(40, dtype=torch.int64)

    def mean(guidance):
        config = GenerationConfig(steps=20, guidance=guidance, images=40)
        return sample(net, labels, null_label=2, shape=(1, 8, 8), schedule=schedule, config=config,
                      generator=torch.Generator().manual_seed(0)).mean().item()  # fmt: skip

    assert mean(2.0) > mean(0.0) + 0.1


def test_the_same_seed_gives_the_same_images():
    net, schedule = _net(NetworkConfig(width=8, heads=(2, 2), depths=(1, 1))), NoiseSchedule(50)

    config = GenerationConfig(steps=4, images=2)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(
            net, torch.tensor([0, 1]), null_label=2, shape=(1, 28, 28), schedule=schedule, config=config,
            generator=generator,
        )  # fmt: skip

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_min_snr_weighs_each_draw_by_its_capped_signal_to_noise():
    """A network that is wrong by 1 everywhere: the loss is the weight itself, min(SNR, 5) / (SNR + 1)."""
    schedule = NoiseSchedule(100)
    plain = DiffusionLoss(schedule, 4, 0.0, 2)
    weighted = DiffusionLoss(schedule, 4, 0.0, 2, weighting="min-snr")
    x = torch.zeros(3, 1, 8, 8)
    draws = plain.draw(3, (1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    wanted = schedule.velocity(x[:, None], draws.noise, draws.t)
    wrong = lambda *_: wanted + 1.0
    snr = schedule.alphas_bar[draws.t] / (1 - schedule.alphas_bar[draws.t])
    expected = (snr.clamp(max=5.0) / (snr + 1)).mean(dim=1)
    torch.testing.assert_close(plain.losses(wrong, x, torch.zeros(3, dtype=torch.int64), draws), torch.ones(3))
    got = weighted.losses(wrong, x, torch.zeros(3, dtype=torch.int64), draws)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    assert (expected < 1).all()
