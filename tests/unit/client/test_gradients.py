"""The private gradient: equal to a loop over single records, bounded, and untouched by who else is in the batch.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from client.privacy.gradients import PrivateGradients, bytes_per_record, physical_batch_for
from common.errors import StudyError
from common.loss_curve import LARGEST_LOSS, LOSS_SHARE, gradient_norm, scale
from support.oracles import Engine, clipped_loop, flat, looped_gradients, losses, norms, randomised_net, rows

SHAPES = [(28, 1, True), (28, 3, False), (32, 3, True), (32, 1, False)]
HUGE = 1e9


pytestmark = pytest.mark.usefixtures("one_thread")


def small(dtype=torch.float64):
    return randomised_net(size=16, channels=1, dtype=dtype)


def engine(net, *, max_grad_norm=HUGE, physical_batch=4, loss_part=False):
    return Engine(net, losses, max_grad_norm=max_grad_norm, physical_batch=physical_batch, loss_part=loss_part)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("size", "channels", "shift"), SHAPES)
def test_clipped_sums_equal_a_loop_over_single_records(size, channels, shift, dtype, tolerance, draws):
    net = randomised_net(size=size, channels=channels, dtype=dtype, shift=shift)
    made = rows(3, size=size, channels=channels, draws=draws, dtype=dtype)
    slow = looped_gradients(net, losses, made)
    for limit in (HUGE, float(norms(slow).median())):
        found = engine(net, max_grad_norm=limit, physical_batch=2)
        total, wanted = found.sum(made), clipped_loop(slow, limit)
        found.gradients.close()
        assert total.parts.keys() == wanted.keys()
        for name, expected in wanted.items():
            largest = max(float(expected.abs().max()), min(limit, 1.0))
            assert float((total.parts[name] - expected).abs().max()) <= 3 * tolerance * largest, name
            assert slow[name].any(), f"{name} is not tested by these records"


@pytest.mark.parametrize("max_grad_norm", [0.05, 1.0, 50.0])
def test_removing_any_record_moves_the_sum_by_its_clipped_gradient(max_grad_norm):
    net = small()
    made = rows(5, size=16, channels=1, draws=2, dtype=torch.float64)
    lengths, one = norms(looped_gradients(net, losses, made)), engine(net, max_grad_norm=max_grad_norm)
    whole = flat(one.sum(made))
    for gone in range(5):
        rest = tuple(r[torch.arange(5) != gone] for r in made)
        moved = float((whole - flat(one.sum(rest))).norm())
        assert moved == pytest.approx(min(max_grad_norm, float(lengths[gone])), rel=1e-8)
        assert moved <= max_grad_norm


def test_draws_of_a_record_are_averaged_before_clipping():
    """Eight draws counted as eight records would move the sum by up to eight times the clipping norm."""
    total = engine(small(), max_grad_norm=0.5).sum(rows(1, size=16, channels=1, draws=8, dtype=torch.float64))
    assert float(flat(total).norm()) == pytest.approx(0.5, rel=1e-8)


@pytest.mark.parametrize("physical_batch", [1, 2, 3, 9])
def test_the_physical_batch_does_not_change_the_sum_and_rows_that_fill_it_add_nothing(physical_batch):
    net, made = small(), rows(5, size=16, channels=1, draws=1, dtype=torch.float64)
    totals = []
    for size in (5, physical_batch):
        one = engine(net, max_grad_norm=1.0, physical_batch=size, loss_part=True)
        totals.append(flat(one.sum(made)))
        one.gradients.close()
    torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-12)


def test_an_empty_batch_gives_zeros_of_every_name():
    net = small()
    total = engine(net, loss_part=True).sum(rows(0, size=16, channels=1, draws=1, dtype=torch.float64))
    assert not flat(total).any()
    assert total.parts.keys() == {"loss", *(name for name, _ in net.named_parameters())}


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("place", ["pixel", "noise"])
def test_a_record_with_a_gradient_that_is_not_finite_adds_nothing_and_is_counted(poison, place):
    net, made = small(), rows(3, size=16, channels=1, draws=1, dtype=torch.float64)
    made[0 if place == "pixel" else 3][1].view(-1)[7] = poison
    one = engine(net, max_grad_norm=1.0, loss_part=True)
    found = one.sum(made)
    assert one.gradients.left_out == 1
    clean = one.sum(tuple(r[[0, 2]] for r in made))
    for name, part in clean.parts.items():
        if name != "loss" or math.isnan(poison):
            torch.testing.assert_close(found.parts[name], part, rtol=1e-9, atol=1e-12)
    assert float(found.parts["loss"]) <= float(clean.parts["loss"]) + LOSS_SHARE * 1.0
    assert torch.isfinite(flat(found)).all()


def test_gradient_and_loss_share_one_clipping_norm():
    net, made = small(), rows(3, size=16, channels=1, draws=2, dtype=torch.float64)
    with torch.no_grad():
        net.net.head.bias += 3.0  # losses over the largest that is told
    slow = looped_gradients(net, losses, made)
    total = engine(net, max_grad_norm=0.1, loss_part=True).sum(made)
    assert total.bound == pytest.approx(0.1, rel=1e-12)
    wanted = losses(net, *made).detach().clamp(0, LARGEST_LOSS).sum() * scale(0.1)
    assert float(total.parts["loss"]) == pytest.approx(float(wanted), rel=1e-8)
    assert total.parts["loss"].shape == (1,)
    wanted = clipped_loop(slow, gradient_norm(0.1))
    torch.testing.assert_close(total.parts["net.head.bias"], wanted["net.head.bias"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "chosen", [r"bias$", r"head\.weight$", r"head|bias$|label", r"position|qkv\.weight|conv1\.weight"]
)
def test_of_chosen_parameters_norm_and_sum_are_those_of_the_loop_over_just_these(chosen):
    net, made = small(), rows(4, size=16, channels=1, draws=2, dtype=torch.float64)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(re.search(chosen, name) is not None)
    slow = looped_gradients(net, losses, made)
    limit = float(norms(slow).median())
    total, wanted = engine(net, max_grad_norm=limit).sum(made), clipped_loop(slow, limit)
    assert total.parts.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(total.parts[name], expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("spread", [0.3, 10.0, 1e3])
def test_no_record_changes_anothers_gradient_by_being_there_even_by_a_bit(spread):
    """Six records, of which one goes: the others change places, and each still adds the same numbers."""
    net = small(torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=spread)
    made = rows(6, size=16, channels=1, draws=2)
    one = engine(net, max_grad_norm=1.0, physical_batch=4)
    alone = [flat(one.sum(tuple(r[b : b + 1] for r in made))) for b in range(6)]
    for gone in range(6):
        kept = [b for b in range(6) if b != gone]
        total = flat(one.sum(tuple(r[kept] for r in made)))
        torch.testing.assert_close(total, sum(alone[b] for b in kept), rtol=1e-12, atol=1e-14)


def test_closing_leaves_the_network_as_it_was():
    net = small()
    one = engine(net)
    one.sum(rows(2, size=16, channels=1, draws=1, dtype=torch.float64))
    one.gradients.close()
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in net.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in net.modules())
    PrivateGradients(net, losses, lambda x, y: (x, y), max_grad_norm=1.0, physical_batch=2).close()


# --- the physical batch -----------------------------------------------------------------------------------------------


def _fill(x, y):
    return x, y, *rows(len(y), size=16, channels=1, draws=2)[2:]


def _size(memory_mb, loss=losses):
    return physical_batch_for(
        small(torch.float32), loss, _fill, record=(1, 16, 16), label=(), memory_mb=memory_mb, name="net",
        where="network", draws=2,
    )  # fmt: skip


def test_memory_bounds_the_physical_batch():
    per_record = bytes_per_record(small(torch.float32), losses, rows(1, size=16, channels=1, draws=2), draws=2)
    net = small(torch.float32)
    assert per_record > 4 * sum(p.numel() for p in net.parameters())
    assert _size(100_000) == 16
    assert _size(10) == 10_000_000 // per_record > 1
    assert _size(0) == 1


def test_a_network_that_mixes_records_is_refused_before_any_record_is_seen():
    with pytest.raises(StudyError, match="'net' cannot be trained privately"):
        _size(100, loss=lambda net, *made: losses(net, made[0] + made[0].mean(dim=0), *made[1:]))


def test_uint8_images_are_scaled_as_everywhere():
    seen = []

    def draw(x, y):
        seen.append(x)
        return x, y

    net = nn.Linear(4, 2)
    one = PrivateGradients(net, lambda n, x, y: n(x).sum(dim=1), draw, max_grad_norm=1.0, physical_batch=3)
    one.clipped_sum(np.array([[0, 255, 0, 255]], dtype=np.uint8), np.zeros(1, dtype=np.int64))
    assert seen[0].shape == (3, 4)
    assert sorted(seen[0].tolist()) == [[-1.0] * 4, [-1.0] * 4, [-1.0, 1.0, -1.0, 1.0]]  # black where nobody is
