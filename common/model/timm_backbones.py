"""Biomarker classifier networks by name, without BatchNorm and without any download.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, C channels, H×W pixels, K classes.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
from typing import Any

import torch
from torch import nn

from common.errors import StudyError
from common.model.plain_cnn import plain_cnn

PLAIN = "plain_cnn"  # ours; timm's small networks are made for larger images, and see less in small ones
_PLAIN_WIDTHS = (16, 32, 64)
_MISSING_OP = "torchvision::nms"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept_alive: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it
_MAX_GROUPS = 8
_SMALLEST_SIDE = 28  # px; below it some stages would have less than one position left


def import_timm() -> Any:
    """Import timm, also where torchvision's compiled operators do not fit the installed torch.

    Raises:
        RuntimeError, ImportError: timm fails for any other reason than the missing torchvision operators.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if _MISSING_OP not in str(error) or _kept_alive:
            raise
    # A torchvision wheel built for CUDA cannot load its operators beside a CPU torch, and then fails at import when it
    # registers shape rules for operators that were never defined. timm calls none of them: names are enough.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept_alive.append(library)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]  # half-imported modules would hide the second attempt
    return importlib.import_module("timm")


def create_backbone(name: str, *, channels: int, classes: int, image_size: int) -> nn.Module:
    """A freshly initialised classifier (N, C, H, W) in [-1, 1] -> logits (N, K): `PLAIN`, or a network of timm's.

    In timm's, every BatchNorm becomes a GroupNorm, because a batch statistic lets one record move another record's
    gradient: with it there is no per-record clipping (Abadi et al. 2016, section 3), and images smaller than 28 px are
    first enlarged by a whole factor, each pixel repeated. No weights are ever fetched; initial ones use torch's global
    generator.

    Raises:
        StudyError: timm does not know `name`, or the network cannot take such images.
    """
    if name == PLAIN:
        return plain_cnn(channels, classes, widths=_PLAIN_WIDTHS)
    timm = import_timm()
    known: list[str] = timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        remedy = f"Nearest names: {', '.join(near)}." if near else "timm.list_models() lists the names."
        raise StudyError(f"timm knows no model '{name}'", where="validation.backbone", remedy=remedy)
    factor = max(1, math.ceil(_SMALLEST_SIDE / image_size))
    sized: dict[str, Any] = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    try:
        try:
            net = timm.create_model(name, img_size=image_size * factor, **sized)
        except TypeError:  # convolutional networks take no size
            net = timm.create_model(name, **sized)
        net = _Enlarged(not_in_place(with_group_norms(net)), factor)
        with torch.no_grad():
            shape = tuple(net.eval()(torch.zeros(2, channels, image_size, image_size)).shape)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise _unusable(name, f"fails on {channels}×{image_size}×{image_size} images ({error})") from error
    if shape != (2, classes):
        raise _unusable(name, f"gives {shape} instead of (2, {classes})")
    return net.train()


def with_group_norms(net: nn.Module) -> nn.Module:
    """Replace each BatchNorm in place by a GroupNorm (Wu & He 2018) of the largest divisor of its channels up to 8.

    timm's GroupNorm with an activation folded in is taken apart: for `nn.GroupNorm` itself, Opacus has a formula; for
    others it differentiates record by record, which takes twice the time of the whole network.
    """
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            groups = max(g for g in range(1, _MAX_GROUPS + 1) if module.num_features % g == 0)
            norm = _group_norm(module, groups, module.num_features)
        elif isinstance(module, nn.GroupNorm) and isinstance(getattr(module, "act", None), nn.Module):
            norm = _group_norm(module, module.num_groups, module.num_channels)
        else:
            continue
        if not path:
            return norm
        parent, _, leaf = path.rpartition(".")
        setattr(net.get_submodule(parent), leaf, norm)
    return net


def not_in_place(net: nn.Module) -> nn.Module:
    """Let activations make new tensors: per-record gradients need what a layer was given, unchanged."""
    for module in net.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False
    return net


def _group_norm(norm: nn.modules.batchnorm._BatchNorm | nn.GroupNorm, groups: int, width: int) -> nn.Module:
    group_norm = nn.GroupNorm(groups, width, eps=norm.eps)
    if norm.affine:  # keeps timm's initial values, among them zeros that start a residual branch closed
        group_norm.weight.data.copy_(norm.weight.data)
        group_norm.bias.data.copy_(norm.bias.data)
    # timm folds dropout and activation into its norms; a bare GroupNorm would lose both.
    extras = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(group_norm, *extras) if extras else group_norm


class _Enlarged(nn.Module):
    """Enlarges images by a whole factor, each pixel repeated, before the network."""

    def __init__(self, net: nn.Module, factor: int) -> None:
        super().__init__()
        self.net = net
        self.factor = factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.factor > 1:
            images = images.repeat_interleave(self.factor, dim=2).repeat_interleave(self.factor, dim=3)
        return self.net(images)


def _unusable(name: str, what: str) -> StudyError:
    return StudyError(f"timm model '{name}' {what}", where="validation.backbone", remedy="Choose another timm model.")
