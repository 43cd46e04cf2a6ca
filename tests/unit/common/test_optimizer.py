"""Adam is torch's: the steps of algorithm 1, kept between rounds as plain arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.optimizer import BETA1, BETA2, EPSILON, Adam, largest_update_norm


def _gradients(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(7, 5, generator=draws) * 10.0 ** (step % 7 - 3),
            "b": torch.randn(3, generator=draws).double(),
        }
        for step in range(count)
    ]


def _parameters(seed=1, requires_grad=False):
    draws = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=draws).requires_grad_(requires_grad) for n, s in (("w", (7, 5)), ("b", (3,)))}


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_steps_are_those_of_algorithm_1(requires_grad):
    """Kingma and Ba 2015, in float64; gradients over six orders of magnitude."""
    moved = _parameters(requires_grad=requires_grad)
    adam, gradients = Adam(moved, learning_rate=0.01), _gradients(60)
    expected = {name: p.detach().double() for name, p in _parameters().items()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for step, gradient in enumerate(gradients, start=1):
        adam.step(gradient)
        for name, p in expected.items():
            g = gradient[name].double()
            first[name] = BETA1 * first[name] + (1 - BETA1) * g
            second[name] = BETA2 * second[name] + (1 - BETA2) * g**2
            scale = (second[name] / (1 - BETA2**step)).sqrt() + EPSILON
            p -= 0.01 / (1 - BETA1**step) * first[name] / scale
    for name, p in expected.items():
        torch.testing.assert_close(moved[name].detach().double(), p, atol=1e-6, rtol=0)
        assert moved[name].grad is None


def test_an_optimizer_that_is_stopped_and_taken_up_makes_the_same_steps(tmp_path):
    whole, parts, gradients = _parameters(), _parameters(), _gradients(6)
    adam = Adam(whole, learning_rate=0.1)
    for gradient in gradients:
        adam.step(gradient)
        again = Adam(parts, learning_rate=0.1)
        again.restore(tmp_path / "kept.safetensors")
        again.step(gradient)
        again.save(tmp_path / "kept.safetensors")
    assert int(adam.state()["steps"][0]) == 6
    for name in whole:
        assert torch.equal(whole[name], parts[name])
        np.testing.assert_array_equal(adam.state()[f"second/{name}"], again.state()[f"second/{name}"])


def test_a_state_is_a_copy_and_one_that_does_not_fit_is_passed_over(tmp_path):
    adam, gradients = Adam(_parameters(), learning_rate=0.1), _gradients(2)
    kept = adam.state()
    adam.step(gradients[0])
    assert int(kept["steps"][0]) == 0
    assert not kept["first/w"].any()
    other = Adam({"w": torch.zeros(2), "b": torch.zeros(3)}, learning_rate=0.1)
    other.load(adam.state())
    assert int(other.state()["steps"][0]) == 0
    adam.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-3])
    fresh = Adam(_parameters(), learning_rate=0.1)
    fresh.restore(tmp_path / "cut")
    fresh.restore(tmp_path / "missing")
    assert int(fresh.state()["steps"][0]) == 0
    with pytest.raises(KeyError):
        fresh.load({name: part for name, part in kept.items() if name != "second/b"})


def test_no_step_is_longer_than_the_stated_bound():
    parameters = _parameters()
    adam, numbers = Adam(parameters, learning_rate=0.01), 7 * 5 + 3
    for gradient in _gradients(40, seed=2):
        before = {name: p.clone() for name, p in parameters.items()}
        adam.step(gradient)
        moved = sum(float((p - before[name]).square().sum()) for name, p in parameters.items()) ** 0.5
        assert moved <= largest_update_norm(parameters=numbers, steps=1, learning_rate=0.01) * (1 + 1e-6)
