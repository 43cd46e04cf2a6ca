"""Exact per-record clipping by book-keeping: one backward pass, every record's own gradient norm.

SPDX-License-Identifier: Apache-2.0

B records, T tokens (any axes between record and channels, flattened), i inputs, o outputs of a layer.
A layer's per-record gradient follows from its input a and the gradient g of its output: for a Linear it is
sum over t of g_t a_tᵀ. Norms come first, the clipped sum after (Bu et al. 2022, "Differentially private optimization
on large model at small cost", section 3), so per-record gradients of the whole network never stand in memory.
Exactness is shown by tests against a loop over single records, not by reading: tests/unit/client/test_grad_sample.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.model.layers import RelativePositionBias

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> one loss a record (B,)


@dataclass(frozen=True)
class ClippedSum:
    """A batch after clipping.

    Attributes:
        gradients: by parameter name, the sum over records of min(1, C / norm) × gradient.
        losses: (B,), one a record; a record that was left out has 0.
        norms: (B,), L2 over all parameters before clipping; exact, so it never leaves the site.
        nonfinite: records left out because loss or gradient was not finite.
    """

    gradients: dict[str, Tensor]
    losses: Tensor
    norms: Tensor
    nonfinite: int


@dataclass
class _Captured:
    """Input and output gradient of one layer in one pass, and which of its parameters are trained."""

    inputs: Tensor
    trained: frozenset[str]
    output_gradient: Tensor | None = None


@dataclass
class _Tape:
    layers: dict[str, _Captured] = field(default_factory=dict)


def check_supported(net: nn.Module) -> None:
    """Check that every parameter belongs to a layer whose per-record gradient is known exactly.

    Raises:
        ValueError: names the first module that is not supported, or a parameter that two modules share.
    """
    seen: set[int] = set()
    for name, module in net.named_modules():
        own = list(module.parameters(recurse=False))
        if own and type(module) not in (nn.Linear, nn.Embedding, RelativePositionBias):
            raise ValueError(f"'{name}' ({type(module).__name__}) has no exact per-record gradient here")
        if any(id(parameter) in seen for parameter in own):
            raise ValueError(f"'{name}' shares a parameter with another module")
        seen.update(id(parameter) for parameter in own)


@contextmanager
def _recording(net: nn.Module, records: int) -> Iterator[_Tape]:
    """Record input and output gradient of each layer that is trained; parameters take no part in autograd meanwhile."""
    check_supported(net)
    tape, handles = _Tape(), []
    wanted = {name: p.requires_grad for name, p in net.named_parameters()}

    def hook_for(name: str, trained: frozenset[str]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in tape.layers:
                raise RuntimeError(f"'{name}' runs twice in one pass: its gradient would not split by record")
            if output.shape[0] != records or inputs[0].shape[0] != records:
                raise RuntimeError(f"'{name}' does not keep the record in dim 0 ({tuple(output.shape)})")
            if not output.requires_grad:
                output.requires_grad_()
            captured = tape.layers[name] = _Captured(inputs[0].detach(), trained)
            output.register_hook(lambda gradient: setattr(captured, "output_gradient", gradient.detach()))

        return hook

    try:
        for name, module in net.named_modules():
            trained = frozenset(own for own, p in module.named_parameters(recurse=False) if p.requires_grad)
            if trained:
                handles.append(module.register_forward_hook(hook_for(name, trained)))
        net.requires_grad_(False)
        yield tape
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(wanted[name])


def clipped_gradient_sum(
    net: nn.Module, per_record_loss: LossFunction, x: Tensor, y: Tensor, *, max_grad_norm: float, physical_batch: int,
    records: int | None = None,
) -> ClippedSum:  # fmt: skip
    """Sum over records of the clipped gradient of each record's loss, in the parameters that require a gradient.

    Removing one record changes the sum by at most `max_grad_norm` in L2, over all parameters together.

    Args:
        per_record_loss: (x, y) -> (B,), entry b depending on record b alone.
        x: (B, ...), y: (B,); B may be 0.
        max_grad_norm: C > 0.
        physical_batch: most records in memory at once; does not change the result but by rounding.
        records: only the first `records` rows are records; the others fill the last physical batch and add nothing.
            Rounding depends on the size of a batch, and with weights that an enemy chose, rounding is no small thing:
            fill to a fixed size (`filled`), and no record can move another's gradient by being there.

    Raises:
        ValueError: a module is not supported.
        RuntimeError: a module runs twice, or does not keep the record in dim 0.
    """
    check_supported(net)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters() if p.requires_grad}
    losses, norms, left_out = [], [], 0
    for start in range(0, len(y), physical_batch):
        part = slice(start, start + physical_batch)
        rows = len(y[part])
        real = torch.arange(start, start + rows) < (len(y) if records is None else records)
        with _recording(net, rows) as tape:
            loss = per_record_loss(x[part], y[part])
            loss.sum().backward()
        squares = torch.zeros(rows, dtype=x.dtype)
        for name, captured in tape.layers.items():
            squares += _square_norms(net.get_submodule(name), captured)
        good = torch.isfinite(squares) & torch.isfinite(loss.detach()) & real
        norm = squares.sqrt()
        factors = torch.where(good, (max_grad_norm / norm).clamp(max=1.0), 0.0)
        for name, captured in tape.layers.items():
            for parameter, value in _weighted_sum(net.get_submodule(name), captured, factors, good).items():
                total[f"{name}.{parameter}" if name else parameter] += value
        losses.append(torch.where(good, loss.detach(), 0.0)[real])
        norms.append(norm[real])
        left_out += int((~good & real).sum())
    empty = x.new_zeros(0)
    return ClippedSum(total, torch.cat([empty, *losses]), torch.cat([empty, *norms]), left_out)


def _gradient(captured: _Captured) -> Tensor:
    if captured.output_gradient is None:  # the loss does not depend on this layer
        raise RuntimeError("a layer's output has no gradient: every layer must take part in the loss")
    return captured.output_gradient


def _square_norms(module: nn.Module, captured: _Captured) -> Tensor:
    """Squared norm of each record's gradient of the module's parameters, (B,)."""
    g = _gradient(captured)
    if isinstance(module, RelativePositionBias):
        return _bias_gradients(module, g).square().flatten(1).sum(dim=1)
    if isinstance(module, nn.Embedding):  # draws of the same class add up before the norm
        same = captured.inputs[:, :, None] == captured.inputs[:, None, :]  # (B, K, K)
        return ((g @ g.transpose(1, 2)) * same).sum(dim=(1, 2))
    assert isinstance(module, nn.Linear)
    a, g = _tokens(captured.inputs), _tokens(g)  # (B, T, i), (B, T, o)
    bias = g.sum(dim=1).square().sum(dim=1) if "bias" in captured.trained else torch.zeros(len(g), dtype=g.dtype)
    if "weight" not in captured.trained:
        return bias
    tokens, i, o = a.shape[1], a.shape[2], g.shape[2]
    if tokens * (i + o) < i * o:  # the cheaper of two ways to the same number
        squares = ((a @ a.transpose(1, 2)) * (g @ g.transpose(1, 2))).sum(dim=(1, 2)).clamp(min=0.0)
    else:
        squares = (g.transpose(1, 2) @ a).square().sum(dim=(1, 2))
    return squares + bias


def _weighted_sum(module: nn.Module, captured: _Captured, factors: Tensor, good: Tensor) -> dict[str, Tensor]:
    """Sum over records of factor × gradient, by the module's parameter names."""
    g = _gradient(captured)
    weight = factors.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
    if not bool(good.all()):  # 0 × NaN is NaN: a record that is left out must be cut, not scaled
        g = torch.where(good.view_as(weight), g, 0.0)
    g = g * weight
    if isinstance(module, RelativePositionBias):
        return {"table": _bias_gradients(module, g).sum(dim=0)}
    if isinstance(module, nn.Embedding):
        total = torch.zeros_like(module.weight)
        return {"weight": total.index_add_(0, captured.inputs.flatten(), g.flatten(0, 1))}
    assert isinstance(module, nn.Linear)
    flat = g.reshape(-1, g.shape[-1])  # (B·T, o)
    out = {"bias": flat.sum(dim=0)} if "bias" in captured.trained else {}
    if "weight" not in captured.trained:
        return out
    a = captured.inputs
    if not bool(good.all()):
        a = torch.where(good.view(-1, *[1] * (a.dim() - 1)), a, 0.0)
    return {**out, "weight": flat.T @ a.reshape(-1, a.shape[-1])}


def _bias_gradients(module: RelativePositionBias, g: Tensor) -> Tensor:
    """g (B, G, A, N, N) -> per-record gradient of the table (B, positions, A)."""
    summed = g.sum(dim=1).flatten(2).transpose(1, 2)  # (B, N·N, A)
    out = torch.zeros(g.shape[0], *module.table.shape, dtype=g.dtype)
    return out.index_add_(1, module.index.flatten(), summed)


def _tokens(x: Tensor) -> Tensor:
    """(B, ..., c) -> (B, T, c)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def bytes_per_record(net: nn.Module, per_record_loss: LossFunction, x: Tensor, y: Tensor) -> int:
    """Bytes that one record needs in memory, from a pass over the single record x (1, ...), y (1,)."""
    with _recording(net, 1) as tape:
        per_record_loss(x, y).sum().backward()
    held = sum(captured.inputs.nbytes + _gradient(captured).nbytes for captured in tape.layers.values())
    return 3 * held  # autograd's own copies and the temporaries of the norms; tests/unit holds this to be enough


def physical_batch_for(memory_mb: int, per_record: int, expected_batch: float) -> int:
    """One size for every batch of a round: room for nearly all Poisson batches, but no more than `memory_mb` hold.

    Args:
        expected_batch: public estimate of the records a step; never the true number.
    """
    room = math.ceil(expected_batch + 3.0 * math.sqrt(expected_batch))
    return max(1, min(room, memory_mb * 1_000_000 // max(1, per_record)))


def filled(rows: NDArray[Any], physical_batch: int) -> NDArray[Any]:
    """Rows (B, ...) with zeros after them, up to the next multiple of `physical_batch`."""
    missing = -len(rows) % physical_batch
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), dtype=rows.dtype)])
