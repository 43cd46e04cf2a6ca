"""One record moves one gradient: exactness, sensitivity and independence of the clipped sum."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from client.privacy.grad_sample import (
    bytes_per_record,
    check_supported,
    clipped_gradient_sum,
    physical_batch_for,
)
from support.oracles import batch, diffusion_loss, looped_gradients, norms, one, randomised_net

SHAPES = [(28, 1, 2, True), (28, 1, 2, False), (28, 3, 2, True), (64, 1, 4, True), (64, 3, 4, True), (64, 3, 8, False)]
HUGE = 1e12


def _sum(net, x, y, draws, *, max_grad_norm=HUGE, physical_batch=64):
    """The clipped sum with fixed draws, which follow the records through the physical batches."""
    place = iter(range(0, len(y), physical_batch))

    def loss(part_x, part_y):
        start = next(place)
        part = slice(start, start + len(part_y))
        fixed = type(draws)(draws.t[part], draws.noise[part], draws.keep_label[part])
        return diffusion_loss(draws.t.shape[1]).losses(net, part_x, part_y, fixed)

    return clipped_gradient_sum(net, loss, x, y, max_grad_norm=max_grad_norm, physical_batch=physical_batch)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("size", "channels", "patch", "shift"), SHAPES)
def test_per_record_gradients_equal_a_loop_over_single_records(size, channels, patch, shift, dtype, tolerance, draws):
    net = randomised_net(size=size, channels=channels, patch=patch, dtype=dtype, shift=shift)
    x, y, made = batch(3, size=size, channels=channels, draws=draws, dtype=dtype)
    slow = looped_gradients(net, x, y, made)
    whole = _sum(net, x, y, made)
    torch.testing.assert_close(whole.norms, norms(slow), rtol=tolerance * 10, atol=0.0)
    for record in range(3):
        alone = _sum(net, x[record : record + 1], y[record : record + 1], one(made, record))
        for name, expected in slow.items():
            size_of = expected[record].abs().max().item()
            error = (alone.gradients[name] - expected[record]).abs().max().item()
            assert error <= tolerance * max(size_of, 1.0), name
    for name, expected in slow.items():
        assert expected.abs().max() > 0 or name == "label.weight", f"{name} is not tested by this batch"
        summed = expected.sum(dim=0)
        error = (whole.gradients[name] - summed).abs().max().item()
        assert error <= tolerance * 3 * max(expected.abs().max().item(), 1.0), name


def _flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize("max_grad_norm", [0.05, 1.0, 50.0])
def test_removing_any_record_moves_the_clipped_sum_by_at_most_the_clipping_norm(max_grad_norm):
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, made = batch(5, size=16, channels=1, draws=2, dtype=torch.float64)
    whole = _sum(net, x, y, made, max_grad_norm=max_grad_norm)
    moved = []
    for record in range(5):
        rest = [other for other in range(5) if other != record]
        fixed = type(made)(made.t[rest], made.noise[rest], made.keep_label[rest])
        without = _sum(net, x[rest], y[rest], fixed, max_grad_norm=max_grad_norm)
        moved.append((_flat(whole.gradients) - _flat(without.gradients)).norm().item())
        expected = min(max_grad_norm, whole.norms[record].item())
        assert moved[-1] == pytest.approx(expected, rel=1e-8)
    assert max(moved) <= max_grad_norm * (1 + 1e-9)


def test_changing_one_record_leaves_the_gradients_of_the_others_unchanged():
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, made = batch(4, size=16, channels=1, draws=2, dtype=torch.float64)
    changed = x.clone()
    changed[1] = -changed[1]
    before, after = _sum(net, x, y, made), _sum(net, changed, y, made)
    others = [0, 2, 3]
    torch.testing.assert_close(before.norms[others], after.norms[others], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(before.losses[others], after.losses[others], rtol=1e-12, atol=0.0)
    assert not torch.isclose(before.norms[1], after.norms[1], rtol=1e-6)


def test_draws_of_a_record_are_averaged_before_clipping():
    """Eight draws counted as eight records would move the sum by up to eight times the clipping norm."""
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, made = batch(1, size=16, channels=1, draws=8, dtype=torch.float64)
    clipped = _sum(net, x, y, made, max_grad_norm=0.5)
    assert _flat(clipped.gradients).norm().item() == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("physical_batch", [1, 2, 3])
def test_the_physical_batch_does_not_change_the_result(physical_batch):
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, made = batch(5, size=16, channels=1, draws=1, dtype=torch.float64)
    whole = _sum(net, x, y, made, max_grad_norm=1.0)
    split = _sum(net, x, y, made, max_grad_norm=1.0, physical_batch=physical_batch)
    torch.testing.assert_close(_flat(whole.gradients), _flat(split.gradients), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.norms, split.norms)


def test_an_empty_batch_gives_zeros():
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float32)
    x, y, made = batch(2, size=16, channels=1, draws=1, dtype=torch.float32)
    empty = _sum(net, x[:0], y[:0], made)
    assert _flat(empty.gradients).abs().sum() == 0
    assert set(empty.gradients) == {name for name, _ in net.named_parameters()}
    assert len(empty.norms) == len(empty.losses) == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_record_with_a_non_finite_gradient_adds_nothing_and_is_counted(poison):
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, made = batch(3, size=16, channels=1, draws=1, dtype=torch.float64)
    bad = x.clone()
    bad[1, 0, 3, 3] = poison
    rest = [0, 2]
    fixed = type(made)(made.t[rest], made.noise[rest], made.keep_label[rest])
    poisoned, clean = _sum(net, bad, y, made, max_grad_norm=1.0), _sum(net, x[rest], y[rest], fixed, max_grad_norm=1.0)
    assert poisoned.nonfinite == 1
    assert poisoned.losses[1] == 0
    torch.testing.assert_close(_flat(poisoned.gradients), _flat(clean.gradients), rtol=1e-9, atol=1e-12)


def test_parameters_can_be_trained_again_afterwards_even_after_an_error():
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError):
        clipped_gradient_sum(net, lambda x, y: 1 / 0, torch.zeros(1, 1, 16, 16), torch.zeros(1), max_grad_norm=1.0,
                             physical_batch=4)  # fmt: skip
    assert all(parameter.requires_grad for parameter in net.parameters())


class _WindowsAsRecords(nn.Module):
    """The mistake of stock window attention: windows folded into dim 0."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x.reshape(-1, 4)).reshape(x.shape[0], -1)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(("net", "reason"), [(_WindowsAsRecords(), "dim 0"), (_Twice(), "runs twice")])
def test_a_network_whose_gradients_do_not_split_by_record_is_refused(net, reason):
    with pytest.raises(RuntimeError, match=reason):
        clipped_gradient_sum(net, lambda x, y: net(x).sum(dim=1), torch.rand(3, 8 if reason == "dim 0" else 4),
                             torch.zeros(3), max_grad_norm=1.0, physical_batch=8)  # fmt: skip


@pytest.mark.parametrize("module", [nn.BatchNorm1d(4), nn.Conv2d(1, 1, 3), nn.LayerNorm(4)])
def test_layers_without_an_exact_rule_are_refused(module):
    with pytest.raises(ValueError, match="no exact per-record gradient"):
        check_supported(nn.Sequential(nn.Linear(4, 4), module))


def test_shared_parameters_are_refused():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    with pytest.raises(ValueError, match="shares a parameter"):
        check_supported(nn.Sequential(first, second))


def test_the_memory_setting_bounds_the_physical_batch():
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float32)
    x, y, made = batch(1, size=16, channels=1, draws=2, dtype=torch.float32)
    per_record = bytes_per_record(net, lambda a, b: diffusion_loss(2).losses(net, a, b, made), x, y)
    assert per_record > x.nbytes
    assert physical_batch_for(100, 9_000_000, 1000.0) == 11
    assert physical_batch_for(1, 100_000, 1000.0) == 10
    assert physical_batch_for(100_000, per_record, 100.0) == 130
    assert physical_batch_for(1, 10**12, 100.0) == 1


@pytest.mark.parametrize("fill", [True, False])
def test_with_hostile_weights_no_record_moves_the_others_where_batches_have_a_fixed_size(fill):
    """Weights far beyond any that training makes, as an enemy could send: rounding then depends on the batch's size.

    Without filling the test sees it: the sum moves by more than one record may.
    """
    threads, worst = torch.get_num_threads(), 0.0
    torch.set_num_threads(2)
    for seed in range(6):
        net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float32)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=10.0)
        x, y, draws = batch(6, size=16, channels=1, draws=1, dtype=torch.float32)
        loss = diffusion_loss(1)

        def total(keep):
            rows = torch.tensor(keep)
            size = 8 if fill else len(keep)
            padded = torch.cat([rows, torch.zeros(size - len(keep), dtype=torch.int64)])
            chosen = type(draws)(draws.t[padded], draws.noise[padded], draws.keep_label[padded])
            found = clipped_gradient_sum(
                net, lambda a, b: loss.losses(net, a, b, chosen), x[padded], y[padded], max_grad_norm=1.0,
                physical_batch=size, records=len(keep),
            )  # fmt: skip
            return torch.cat([g.flatten().double() for g in found.gradients.values()])

        whole = total(range(6))
        worst = max(worst, *(float((whole - total([r for r in range(6) if r != gone])).norm()) for gone in range(6)))
    torch.set_num_threads(threads)
    if not fill and worst <= 1 + 1e-5:
        pytest.skip("this processor rounds alike whatever the size of a batch, so there is nothing to see")
    assert (worst <= 1 + 1e-5) == fill


def test_rows_that_fill_a_batch_add_nothing():
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, draws = batch(3, size=16, channels=1, draws=1, dtype=torch.float64)
    loss = diffusion_loss(1)
    plain = clipped_gradient_sum(
        net, lambda a, b: loss.losses(net, a, b, draws), x, y, max_grad_norm=1.0, physical_batch=3
    )
    more = torch.tensor([0, 1, 2, 0, 0])
    again = type(draws)(draws.t[more], draws.noise[more], draws.keep_label[more])
    x = torch.cat([x, torch.full_like(x[:2], float("nan"))])
    with_fill = clipped_gradient_sum(
        net, lambda a, b: loss.losses(net, a, b, again), x, y[more], max_grad_norm=1.0, physical_batch=5, records=3
    )
    for name, value in plain.gradients.items():
        torch.testing.assert_close(with_fill.gradients[name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(with_fill.losses, plain.losses)
    assert len(with_fill.norms) == 3
    assert with_fill.nonfinite == 0


@pytest.mark.parametrize("chosen", [r"bias$", r"^head\.weight$", r"^head|bias$|^label", r"position|qkv\.weight"])
def test_of_chosen_parameters_norm_and_sum_are_those_of_the_loop_over_just_these(chosen):
    """The norm is that of what is trained; what is not, has no gradient and takes no part in the clipping."""
    net = randomised_net(size=16, channels=1, patch=2, dtype=torch.float64)
    x, y, made = batch(4, size=16, channels=1, draws=2, dtype=torch.float64)
    slow = {name: g for name, g in looped_gradients(net, x, y, made).items() if re.search(chosen, name)}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in slow)
    limit = float(norms(slow).median())
    clipped = _sum(net, x, y, made, max_grad_norm=limit)
    assert set(clipped.gradients) == set(slow)
    torch.testing.assert_close(clipped.norms, norms(slow), rtol=1e-9, atol=0.0)
    factors = (limit / norms(slow)).clamp(max=1.0)
    for name, expected in slow.items():
        wanted = (expected * factors.view(-1, *[1] * (expected.dim() - 1))).sum(dim=0)
        torch.testing.assert_close(clipped.gradients[name], wanted, rtol=1e-8, atol=1e-10)
    assert [p.requires_grad for _, p in net.named_parameters()] == [n in slow for n, _ in net.named_parameters()]
