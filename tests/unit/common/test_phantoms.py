"""Public phantoms: drawn from a seed, of all classes alike, of every modality."""

from __future__ import annotations

import numpy as np
import pytest

from common.phantoms import MODALITIES, public_phantoms
from common.study import DataConfig


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 3)])
def test_the_same_seed_draws_the_same_images_of_all_classes_alike(modality, size, channels):
    schema = DataConfig(image_size=size, channels=channels, classes=("a", "b", "c"))
    one, again, other = (public_phantoms(modality, schema, 90, seed=seed) for seed in (4, 4, 5))
    assert one.images.shape == (90, channels, size, size)
    assert np.bincount(one.labels).tolist() == [30, 30, 30]
    assert np.array_equal(one.images, again.images)
    assert not np.array_equal(one.images, other.images)
    assert one.images.std(axis=0).min() > 0  # no pixel is the same in all
