"""The record rule: dim 0 of whatever meets a parameter is the record, and no record is seen in another's gradient.

SPDX-License-Identifier: Apache-2.0

Opacus's hooks take dim 0 of each layer's input as the record, and believe it. A network that folds windows into dim 0,
or keeps statistics of a batch, breaks the rule and (mostly) raises nothing; then nothing bounds what one record does to
a sum of clipped gradients. So every network is tried on random rows first, here at the site and there at the
coordinator: no record is needed to know it, and the answer may raise.

A record may be several entries of dim 0, one after another: its noise draws. B records. *Rows* are tensors (B, ...),
all that a loss needs of its records, the noise drawn for them included. A loss is (net, *rows) -> (B,), entry b made
from row b alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.conv import compute_conv_grad_sample
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from common.errors import StudyError
from common.model.layers import RelativePositionBias

Rows = tuple[Tensor, ...]
Loss = Callable[..., Tensor]
_CLOSE = 1e-6  # relative, in float64, where an honest gradient agrees to 1e-12
_USUAL = 3.0  # of a weight of a trained network
_SPREAD = 0.1  # of what is added to weights that begin at zero, behind which a gradient would hide


@register_grad_sampler(RelativePositionBias)
def _position_gradients(layer: RelativePositionBias, _: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per row, the gradient of the scores (R, G, A, N, N) summed over windows, put where the table was read."""
    summed = backprops.sum(dim=1).flatten(2).transpose(1, 2)  # (B, N·N, A)
    rows = backprops.new_zeros(len(backprops), *layer.table.shape)
    return {layer.table: rows.index_add_(1, layer.index.flatten(), summed)}


@register_grad_sampler(nn.Conv2d)
def _convolution_gradients(
    layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Opacus's own, but for convolutions in groups, of which it multiplies every pair of channels, and keeps few."""
    if layer.groups == 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return compute_conv_grad_sample(layer, activations, backprops)
    groups, b = layer.groups, len(backprops)
    patches = F.unfold(
        activations[0], layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    ).view(b, groups, -1, backprops[0, 0].numel())
    outward = backprops.reshape(b, groups, -1, patches.shape[-1])
    found: dict[Any, Tensor] = {}
    if layer.weight.requires_grad:
        found[layer.weight] = (outward @ patches.transpose(2, 3)).view(b, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = outward.sum(dim=3).flatten(1)
    return found


class RecordGradients:
    """Gradients per record of the parameters that require one, by Opacus's hooks; `close` takes the hooks away.

    Raises:
        NotImplementedError: a trained layer has buffers, which are state of a whole batch.
    """

    def __init__(self, net: nn.Module) -> None:
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self._hooks = GradSampleModule(net.train(), batch_first=True, loss_reduction="sum", strict=True)

    def of(self, losses: Tensor) -> dict[str, Tensor]:
        """By parameter name, (B, *shape): row b is the gradient of losses[b]; losses (B,) of one forward pass.

        Raises:
            ValueError: a layer does not have the record in dim 0; depends on shapes alone, not on records.
        """
        with warnings.catch_warnings():  # layers that meet pixels and labels first; attention that vmap does in a loop
            warnings.filterwarnings("ignore", message="Full backward hook is firing|There is a performance drop")
            losses.sum().backward()
        rows: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found = getattr(parameter, "grad_sample", None)
            if found is None:  # it took no part in the loss
                found = parameter.new_zeros(len(losses), *parameter.shape)
            if not isinstance(found, Tensor) or found.shape[1:] != parameter.shape or len(found) % len(losses):
                raise ValueError(f"'{name}' does not see the record in dim 0")
            rows[name] = found if len(found) == len(losses) else _by_record(found, len(losses))
        self._hooks.zero_grad(set_to_none=True)
        return rows

    def close(self) -> None:
        """Leave the network as it was before."""
        self._hooks.to_standard_module()


def _by_record(gradients: Tensor, records: int) -> Tensor:
    """(B·K, *shape), a record's K draws one after another, -> (B, *shape): their sum, the gradient of its loss."""
    return gradients.view(records, -1, *gradients.shape[1:]).sum(dim=1)


def refuse_inexact(net: nn.Module, loss: Loss, rows: Rows, *, name: str, where: str) -> None:
    """Compare gradients per record with a loop over single records, in float64, in batches of all rows and of two.

    Args:
        net: left as it is.
        rows: of at least three records, random; public.
        name, where: of the network, for the message.

    Raises:
        StudyError: the network breaks the record rule, or Opacus does not know one of its layers.
    """
    try:
        reason = _inexact(
            _randomised(net).double(), loss, tuple(r.double() if r.is_floating_point() else r for r in rows)
        )
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError) as error:
        in_place = "modified inplace" in str(error)
        reason = "it changes the output of a layer in place" if in_place else str(error)[:300]
    if reason:
        raise StudyError(
            f"'{name}' cannot be trained privately: {reason}", where=where,
            remedy="Choose another network; test_efficientnet_gn is one that can.",
        )  # fmt: skip


def _inexact(net: nn.Module, loss: Loss, rows: Rows) -> str:
    """Why the gradients are not those of single records; empty where they are."""
    if len(list(net.named_parameters())) != len(list(net.named_parameters(remove_duplicate=False))):
        return "two of its layers share a parameter"
    if wrong := ModuleValidator.validate(net.train(), strict=False):
        return str(wrong[0])
    trained = [p for p in net.parameters() if p.requires_grad]
    singles = [_flat_gradient(loss(net, *(r[b : b + 1] for r in rows)), trained) for b in range(len(rows[0]))]
    hooked = RecordGradients(net)
    for kept in (slice(None), slice(1, 3)):
        losses = loss(net, *(r[kept] for r in rows))
        found = torch.cat([part.flatten(1) for part in hooked.of(losses).values()], dim=1)
        wanted = torch.stack(singles[kept])
        if found.shape != wanted.shape or not bool(((found - wanted).norm(dim=1) <= _CLOSE * wanted.norm(dim=1)).all()):
            return "its gradients per record differ from those of the records alone"
    return ""


def _flat_gradient(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _randomised(net: nn.Module) -> nn.Module:
    """A copy whose weights are a little off, so that no layer that begins at zero hides the gradients behind it.

    Weights that are no weights of a trained network are replaced: a request's may be anything, and decide nothing here.
    """
    copied, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-_USUAL, _USUAL)
            parameter += _SPREAD * torch.randn(parameter.shape, generator=generator)
    return copied
