"""The one place where private gradients are computed: Opacus's per record, clipped and summed in float64.

SPDX-License-Identifier: Apache-2.0

B records (the study's privacy unit) of a Poisson batch. Opacus's hooks give each record's float32 gradient; its norm is
taken, and the sum over records made, in float64 from those very numbers (`common/bounded.py`). So one record moves the
sum by no more than the clipping norm, whatever network, weights or images: rounding inside the network changes what a
record's gradient is, not how far it reaches. The gradients of the others stay as they are to the last bit when a record
goes: every record is computed at a place of its own in batches of one size (`client/privacy/places.py`), and places
that nobody has add nothing. Nothing here raises, and no shape depends on, what a record holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.privacy.places import at_places, own_places
from common import loss_curve
from common.bounded import BoundedSum, RunningSum, joined
from common.images import to_unit
from common.model.record_rule import Loss, RecordGradients, Rows, refuse_inexact

Draw = Callable[[Tensor, Tensor], Rows]  # pixels in [-1, 1] (B, ...), labels (B, ...) -> rows of the loss
_TRIED = 5  # random records on which a network is tried
_MOST = 16  # records of a physical batch: of more places, more stay empty (137 records: 226 places; in 32s, 291)


class PrivateGradients:
    """Clipped gradient sums of one network.

    Args:
        net: its parameters that require a gradient are trained; they may change between sums, in place.
        loss: entry b is made from row b alone.
        draw: adds the randomness of a loss to pixels and labels; drawn afresh for each physical batch.
        max_grad_norm: C, the bound of a sum.
        loss_part: whether the clipped loss is summed too, as part "loss" (1,), within C (`common/loss_curve.py`).
        physical_batch: records whose gradients are in memory at once (`physical_batch_for`).
    """

    def __init__(
        self, net: nn.Module, loss: Loss, draw: Draw, *, max_grad_norm: float, physical_batch: int,
        loss_part: bool = False,
    ) -> None:  # fmt: skip
        self._net, self._loss, self._draw, self._physical = net, loss, draw, physical_batch
        self._norm, self._loss_part = max_grad_norm, loss_part
        self._hooked = RecordGradients(net)
        self._choice = np.random.default_rng()  # of places: no secret, but no matter of the records either
        self.left_out = 0  # records whose gradient was not finite, over all sums: for the site's own eyes

    def clipped_sum(self, images: NDArray[Any], labels: NDArray[np.int64]) -> BoundedSum:
        """The sum over B records of their clipped gradients, by parameter name, and "loss" where it is asked for.

        Args:
            images: uint8, or floats as the network takes them, (B, ...); B may be 0.
            labels: (B, ...).
        """
        shapes = {name: tuple(p.shape) for name, p in self._hooked.parameters.items()}
        bound = loss_curve.gradient_norm(self._norm) if self._loss_part else self._norm
        gradients = RunningSum(shapes, bound)
        curve = RunningSum({"loss": (1,)}, loss_curve.LOSS_SHARE * self._norm) if self._loss_part else None
        for places in own_places(len(labels), self._physical, self._choice):
            taken = torch.from_numpy(places >= 0)
            # At an empty place is a black image of the first class, whose gradient is cut off.
            pixels, classes = at_places(images, places), at_places(labels, places)
            losses = self._loss(self._net, *self._draw(_pixels(pixels), torch.from_numpy(classes)))
            gradients.add({name: rows[taken] for name, rows in self._hooked.of(losses).items()})
            if curve is not None:
                kept = losses.detach()[taken, None].clamp(0.0, loss_curve.LARGEST_LOSS)
                curve.add({"loss": kept.double() * loss_curve.scale(self._norm)})
        self.left_out += gradients.left_out
        return joined(gradients.total(), curve.total()) if curve is not None else gradients.total()

    def close(self) -> None:
        """Take the hooks away; the network is as it was."""
        self._hooked.close()


def _pixels(images: NDArray[Any]) -> Tensor:
    return to_unit(images) if images.dtype == np.uint8 else torch.from_numpy(images)


def physical_batch_for(
    net: nn.Module, loss: Loss, draw: Draw, *, record: tuple[int, ...], label: tuple[int, ...], memory_mb: int,
    name: str, where: str, draws: int = 1,
) -> int:  # fmt: skip
    """One size for every physical batch: no more records than `memory_mb` hold.

    The network is tried first, on random records, so that this may raise.

    Args:
        record, label: shapes of one record's images and labels.
        name, where: of the network, for the message.
        draws: entries of dim 0 that a record is to the network.

    Raises:
        StudyError: gradients per record are not exact for this network.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(_TRIED, *record, generator=generator) * 2 - 1
    rows = draw(pixels, torch.zeros(_TRIED, *label, dtype=torch.int64))
    refuse_inexact(net, loss, rows, name=name, where=where)
    return max(1, min(_MOST, memory_mb * 1_000_000 // bytes_per_record(net, loss, rows, draws=draws)))


def bytes_per_record(net: nn.Module, loss: Loss, rows: Rows, *, draws: int) -> int:
    """Bytes that one record needs in memory: what autograd keeps, a gradient for each draw, and float64 in between."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = loss(net.train(), *(r[:1] for r in rows))
    trained = [p for p in net.parameters() if p.requires_grad]
    numbers, largest = sum(p.numel() for p in trained), max(p.numel() for p in trained)
    del losses
    return 3 * sum(kept.values()) + 4 * numbers * (1 + draws) + 20 * largest
