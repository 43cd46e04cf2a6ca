"""Copies of public images are told from other images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.copies import copies, likeness
from benchmarks.panel import Pictures
from common.images import ImageSet, to_unit
from server.synthesis.public_set import ANY_CLASS


def _drawn(count, seed):
    """Smooth random images (count, 1, 16, 16), uint8."""
    rough = torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, size=16, mode="bicubic")
    return (smooth * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()


def _pictures(images, labels=None):
    return Pictures(to_unit(images), np.zeros(len(images), dtype=np.int64) if labels is None else labels)


def test_a_copy_is_one_whatever_its_brightness_contrast_and_side_and_another_image_is_none():
    public = _drawn(400, 1)
    altered = (public.astype(float) * 0.5 + 60).astype(np.uint8)
    altered = np.concatenate([altered[:200, :, :, ::-1], np.rot90(altered[200:], axes=(2, 3))])
    assert likeness(_pictures(altered), _pictures(public)).min() > 0.9
    assert np.median(likeness(_pictures(_drawn(400, 2)), _pictures(public))) < 0.8


def test_public_images_carried_to_real_moments_stay_copies_and_have_these_moments():
    public, real = _drawn(300, 1), _drawn(300, 2)
    pictures = _pictures((real.astype(float) * 0.6 + 30).astype(np.uint8), np.arange(300) % 2)
    made = copies(ImageSet(public, np.full(300, ANY_CLASS)), pictures, components=4)
    assert made.x.shape == (600, 1, 16, 16)
    for kind in (0, 1):
        assert made.x[made.y == kind].mean().item() == pytest.approx(
            pictures.x[pictures.y == kind].mean().item(), abs=0.02
        )
    assert np.median(likeness(made, _pictures(public))) > 0.95
