"""What strangers' classifiers make of a synthetic set: a panel of unlike ones, a learned two-sample test, and KID.

SPDX-License-Identifier: Apache-2.0

    python -m benchmarks.panel SET.npz... --real pneumoniamnist.npz [--part val] [--seeds 2]

SET.npz is a released set, or any file in the MedMNIST layout. Every classifier is trained on it alone and asked about
the real images of `--part`; the networks are shown shifted images and no other change. The headline is the median.

KID (Bińkowski et al. 2018) is taken in features of the convolutional network trained on the real train images; the
two-sample test is the same network told to tell synthetic from real train images, as many of each with the same class
mix, on halves it has not seen. Nothing here is private: it is for public sets.

Shapes: N images, C channels, S pixels a side, K classes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.utility.fidelity import kid
from benchmarks.utility.measure import alike
from common.images import to_unit
from common.model.plain_cnn import group_norm, plain_cnn
from common.model.timm_backbones import create_backbone

_STEPS, _BATCH, _RATE, _SHIFT = 300, 128, 2e-3, 2
_THUMBNAIL = 14
_MOST_COMPARED = 2000  # images on either side of KID and of the two-sample test
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Pictures:
    """x in [-1, 1] (N, C, S, S) and labels (N,)."""

    x: Tensor
    y: NDArray[np.int64]

    @classmethod
    def read(cls, path: Path, part: str) -> Pictures:
        """A partition of a file in the MedMNIST layout."""
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive[f"{part}_images"], archive[f"{part}_labels"].ravel().astype(np.int64)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return cls(to_unit(np.ascontiguousarray(images)), labels)


def convolutions(channels: int, classes: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """Three blocks of two 3×3 convolutions of 32, 64 and 128 channels; (features, last layer)."""
    return plain_cnn(channels, classes, widths=(32, 64, 128), norm=norm)


def trained(net: nn.Module, data: Pictures, *, seed: int, steps: int = _STEPS) -> nn.Module:
    """AdamW with a one-cycle rate; classes drawn evenly; shifts of up to two pixels."""
    rng = np.random.default_rng(seed)
    adam = torch.optim.AdamW(net.parameters(), lr=_RATE)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, _RATE, total_steps=steps)
    rows = [np.flatnonzero(data.y == kind) for kind in np.unique(data.y)]
    net.train()
    for _ in range(steps):
        chosen = np.concatenate([rng.choice(mine, _BATCH // len(rows)) for mine in rows])
        padded = F.pad(data.x[chosen], (_SHIFT,) * 4, mode="replicate")
        top, left = rng.integers(0, 2 * _SHIFT + 1, 2)
        side = data.x.shape[-1]
        x = padded[..., top : top + side, left : left + side]
        adam.zero_grad()
        F.cross_entropy(net(x), torch.from_numpy(data.y[chosen])).backward()
        adam.step()
        rate.step()
    return net.eval()


@torch.no_grad()
def _batched(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([net(part) for part in x.split(256)])


def _network(make: Callable[[Pictures, int], nn.Module]) -> Callable[[Pictures, int, Tensor, int], Scores]:
    def scores(data: Pictures, classes: int, x: Tensor, seed: int) -> Scores:
        torch.manual_seed(seed)
        return _batched(trained(make(data, classes), data, seed=seed), x).softmax(dim=1).double().numpy()

    return scores


def _linear(data: Pictures, classes: int, x: Tensor, seed: int) -> Scores:
    def thumbnails(images: Tensor) -> NDArray[np.float32]:
        return F.adaptive_avg_pool2d(images, _THUMBNAIL).flatten(1).numpy()

    scale = StandardScaler().fit(thumbnails(data.x))
    model = LogisticRegression(max_iter=1000, C=0.01, class_weight="balanced", random_state=seed)
    model.fit(scale.transform(thumbnails(data.x)), data.y)
    found = np.zeros((len(x), classes))
    found[:, model.classes_] = model.predict_proba(scale.transform(thumbnails(x)))
    return found


PANEL: dict[str, Callable[[Pictures, int, Tensor, int], Scores]] = {
    "logistic regression, thumbnails": _linear,
    "CNN, BatchNorm": _network(lambda data, k: convolutions(data.x.shape[1], k, nn.BatchNorm2d)),
    "CNN, GroupNorm": _network(lambda data, k: convolutions(data.x.shape[1], k, group_norm)),
    "small ViT": _network(lambda data, k: create_backbone(
        "test_vit3", channels=data.x.shape[1], classes=k, image_size=data.x.shape[-1])),
}  # fmt: skip


def utility(data: Pictures, real: Pictures, *, seeds: int) -> dict[str, tuple[float, float]]:
    """(AUC, macro F1) on the real images by classifier, means over seeds; several classes are averaged one by one."""
    classes, found = int(max(data.y.max(), real.y.max())) + 1, {}
    for name, scores_of in PANEL.items():
        figures = []
        for seed in range(seeds):
            scores = scores_of(data, classes, real.x, seed)
            auc = [roc_auc_score(real.y == kind, scores[:, kind]) for kind in range(classes)]
            figures.append((float(np.mean(auc)), float(f1_score(real.y, scores.argmax(axis=1), average="macro"))))
        found[name] = (statistics.mean(a for a, _ in figures), statistics.mean(f for _, f in figures))
    return found


def fidelity(data: Pictures, real: Pictures, *, seed: int = 0) -> tuple[float, float, float]:
    """(KID × 1000, accuracy and AUC of the two-sample test) against real train images of the same class mix."""
    rng, classes = np.random.default_rng(seed), int(real.y.max()) + 1
    theirs = rng.permutation(len(real.y))[: min(_MOST_COMPARED, len(data.y))]
    ours = alike(real.y[theirs], data.y, rng)
    torch.manual_seed(seed)
    judge = trained(convolutions(real.x.shape[1], classes, nn.BatchNorm2d), real, seed=seed)
    features = judge.get_submodule("0")
    distance = kid(*(_batched(features, x).double().numpy() for x in (real.x[theirs], data.x[ours])))
    both = Pictures(torch.cat([data.x[ours], real.x[theirs]]), np.repeat([0, 1], [len(ours), len(theirs)]))
    seen, asked = np.array_split(rng.permutation(len(both.y)), 2)
    twins = convolutions(real.x.shape[1], 2, nn.BatchNorm2d)
    scores = _batched(trained(twins, Pictures(both.x[seen], both.y[seen]), seed=seed), both.x[asked])
    synthetic = scores.softmax(dim=1)[:, 0].numpy()
    accuracy = float(((synthetic > 0.5) == (both.y[asked] == 0)).mean())
    return 1000 * distance, accuracy, float(roc_auc_score(both.y[asked] == 0, synthetic))


def main() -> None:
    """One table for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET.npz")
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--part", default="test", choices=("val", "test"))
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    real, train = Pictures.read(asked.real, asked.part), Pictures.read(asked.real, "train")
    for path in asked.sets:
        data = Pictures.read(path, "train")
        found = utility(data, real, seeds=asked.seeds)
        print(f"{path}\n{'':<34}{'AUC':>8}{'macro F1':>10}")
        for name, (auc, f1) in found.items():
            print(f"{name:<34}{auc:>8.3f}{f1:>10.3f}")
        for what, choose in (("median", statistics.median), ("worst", min), ("best", max)):
            print(
                f"{what:<34}{choose(a for a, _ in found.values()):>8.3f}{choose(f for _, f in found.values()):>10.3f}"
            )
        distance, accuracy, auc = fidelity(data, train)
        print(
            f"KID × 1000 {distance:.1f}; told from real train images: accuracy {accuracy:.3f}, AUC {auc:.3f}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
