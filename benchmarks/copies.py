"""Is a synthetic set one of altered public images? How alike each of its images is to the nearest of these.

SPDX-License-Identifier: Apache-2.0

    python -m benchmarks.copies SET.npz... --real pneumoniamnist.npz --public PUBLIC.npz

Likeness is the correlation of thumbnails, whitened class by class, so that how bright, even or turned an image is does
not count, with public images carried to the class moments of the real train images: these are what the network learnt
from, but for noise. Beside the set stand what it should be like, real images, none of which is a copy of a public one;
and what it must not be like, copies: the carried images of one class beside those of all others, the same public image
among them. Turned and mirrored images count. Nothing here is private.

Shapes: N images, C channels, S pixels a side, K classes, d low coordinates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.panel import Pictures
from common.images import ImageSet, to_uint8, to_unit
from common.moments import Coordinates, coordinates
from common.npz import opened
from common.prior import Prior
from common.study import DataConfig
from server.synthesis.corpus import carried
from server.synthesis.public_set import read_public

_THUMBNAIL, _MOST = 14, 2000
_FLOOR = 1e-3  # of the largest variance: finer differences than that are drowned in it
_NOTHING = 1e-12  # a class of one image does not vary


def likeness(images: Pictures, others: Pictures) -> NDArray[np.float64]:
    """Largest correlation of each of N images with any of others, turned and mirrored in all eight ways, (N,)."""
    made = _whitened(others)  # turning exchanges pixels, so it may come after
    turned = [torch.rot90(x, turns, dims=(2, 3)) for x in (made, made.flip(-1)) for turns in range(4)]
    theirs = torch.cat(turned).flatten(1)
    found = [(part @ theirs.T).amax(dim=1) for part in _whitened(images).flatten(1).split(256)]
    return torch.cat(found).double().numpy()


def _whitened(images: Pictures) -> Tensor:
    """Thumbnails (N, C, s, s) less the mean of their class and whitened (ZCA) by its covariance, of norm 1, float32."""
    small = F.adaptive_avg_pool2d(images.x, min(_THUMBNAIL, images.x.shape[-1]))
    flat = small.flatten(1).double()
    for kind in np.unique(images.y):
        mine = torch.from_numpy(images.y == kind)
        apart = flat[mine] - flat[mine].mean(dim=0)
        values, vectors = torch.linalg.eigh(apart.T @ apart / len(apart))
        scale = (values.clamp(min=0) + _FLOOR * values.max() + _NOTHING).rsqrt()
        flat[mine] = apart @ (vectors * scale) @ vectors.T
    return (flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-9)).float().view(small.shape)


def copies(public: ImageSet, real: Pictures, components: int = 8) -> Pictures:
    """The public images (M, C, S, S) carried to each class's exact moments, K·M of them."""
    images, labels = to_uint8(real.x), real.y
    space = coordinates(images.shape[-1], images.shape[1], components)
    made = carried(public, _exact(images, labels, space))
    return Pictures(to_unit(made.images), made.labels)


def _exact(images: NDArray[np.uint8], labels: NDArray[np.int64], space: Coordinates) -> Prior:
    """The class moments of images that are nobody's secret."""
    low, high = space.of(images)
    kinds, variances = np.unique(labels), []
    for kind in kinds:
        variances.append(np.zeros(space.low.shape))
        variances[-1][~space.low] = high[labels == kind].var(axis=0)
    means = np.stack([low[labels == kind].mean(axis=0) for kind in kinds])
    floor = np.eye(space.dimension) * 1e-9
    covariances = np.stack([np.cov(low[labels == kind].T) + floor for kind in kinds])
    return Prior(
        space, means, covariances, np.stack(variances), np.bincount(labels, minlength=len(kinds)) / len(labels)
    )


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET.npz")
    parser.add_argument("--real", type=Path, required=True)
    parser.add_argument("--public", type=Path, required=True)
    asked = parser.parse_args()
    real = Pictures.read(asked.real, "train")
    schema = DataConfig(image_size=real.x.shape[-1], channels=1 if real.x.shape[1] == 1 else 3, classes=("a", "b"))
    with opened(asked.public) as archive:
        public = read_public(archive, asked.public, schema)
    made = copies(public, real)
    first = made.y == 0
    rows = {
        "real train images": (real, made),
        "copies: of one class, beside the others": (_rows(made, first), _rows(made, ~first)),
    }
    rows |= {str(path): (Pictures.read(path, "train"), made) for path in asked.sets}
    print(f"{'correlation with the nearest carried image':<44}{'median':>8}{'95 %':>8}{'99 %':>8}{'largest':>9}")
    rng = np.random.default_rng(0)
    for name, (x, others) in rows.items():
        found = likeness(_rows(x, rng.permutation(len(x.y))[:_MOST]), others)
        figures = "".join(f"{value:>8.3f}" for value in np.quantile(found, [0.5, 0.95, 0.99]))
        print(f"{name:<44}{figures}{found.max():>9.3f}", flush=True)


def _rows(images: Pictures, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Pictures:
    return Pictures(images.x[torch.from_numpy(rows)], images.y[rows])


if __name__ == "__main__":
    main()
