"""What breaks the record rule is refused by name; what keeps it, passes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import StudyError
from common.model.record_rule import RecordGradients, refuse_inexact
from common.model.timm_backbones import create_backbone, import_timm
from support.oracles import losses, randomised_net, rows

pytestmark = pytest.mark.usefixtures("one_thread")


def _sums(net, x, _y):
    return net(x).flatten(1).sum(dim=1)


def _entropy(net, x, y):
    return nn.functional.cross_entropy(net(x), y, reduction="none")


def _refuse(net, x, loss=_sums):
    refuse_inexact(net, loss, (x, torch.arange(len(x)) % 2), name="this net", where="validation.backbone")


class _Windows(nn.Module):
    """Windows folded into dim 0, a record's one after another as stock attention does, or all first ones first."""

    def __init__(self, by_record: bool):
        super().__init__()
        self.layer, self.by_record = nn.Linear(4, 3), by_record

    def forward(self, x):
        windows = x.reshape(len(x), -1, 4)
        if not self.by_record:
            windows = windows.transpose(0, 1)
        out = self.layer(windows.flatten(0, 1)).tanh().unflatten(0, windows.shape[:2])
        return (out if self.by_record else out.transpose(0, 1)).flatten(1)


class _Square(nn.Module):
    """Folds so that the shapes still fit: records and tokens change places where there are as many of either."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1).square()


class _Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x - x.mean(dim=0))


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class _InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        out = self.layer(x)
        out += x
        return out


@pytest.mark.parametrize(
    ("net", "shape", "reason"),
    [
        (_Windows(False), (4, 8), "differ"), (_Square(), (4, 4, 4), "differ|dim 0"), (_Mixing(), (4, 4), "differ"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (4, 4), "BatchNorm"), (_Tied(), (4, 4), "share"),
        (_InPlace(), (4, 4), "in place"), (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), (4, 4), "differ"),
    ],
)  # fmt: skip
def test_a_network_that_breaks_the_rule_is_refused(net, shape, reason):
    with pytest.raises(StudyError, match=f"'this net' cannot be trained privately.*({reason})"):
        _refuse(net, torch.rand(*shape))


def test_windows_or_draws_that_follow_one_another_by_record_are_summed_back():
    _refuse(_Windows(True), torch.rand(4, 8))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224"])
def test_a_swin_of_timm_is_refused(name):
    timm = import_timm()
    net = timm.create_model(name, num_classes=2, in_chans=1, img_size=64, depths=(1, 1, 1, 1), embed_dim=24,
                            num_heads=(1, 2, 4, 8))  # fmt: skip
    with pytest.raises(StudyError, match="this net"):
        _refuse(net, torch.rand(4, 1, 64, 64), _entropy)


@pytest.mark.parametrize(
    "name", ["plain_cnn", "test_efficientnet_gn", "test_byobnet", "test_vit3", "test_efficientnet"]
)
def test_backbones_with_the_record_in_dim_0_pass(name):
    net = create_backbone(name, channels=1, classes=2, image_size=28)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    _refuse(net, torch.rand(4, 1, 28, 28), _entropy)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_the_shipped_network_passes():
    net = randomised_net(size=16, channels=1, dtype=torch.float32)
    made = rows(5, size=16, channels=1, draws=2)
    refuse_inexact(net, losses, made, name="net", where="network")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}])
def test_convolutions_in_groups_have_the_gradients_of_single_records(groups, settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, **settings), nn.Flatten())
    _refuse(net, torch.rand(4, 4, 9, 9), lambda net, x, _: net(x).square().sum(dim=1))


def test_a_parameter_that_takes_no_part_has_a_gradient_of_zero():
    net = nn.ModuleDict({"used": nn.Linear(4, 1), "idle": nn.Linear(4, 1)})
    hooked = RecordGradients(net)
    found = hooked.of(net["used"](torch.rand(3, 4))[:, 0])
    assert found["idle.weight"].shape == (3, 1, 4)
    assert not found["idle.weight"].any()
    assert found["used.weight"].any()
