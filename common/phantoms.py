"""Pictures of drawn organs with a known biomarker: no picture shows a real person.

SPDX-License-Identifier: Apache-2.0

The biomarker (how many marks, how large) is drawn first, from the class alone; the picture is then drawn around it.
So a detector can be judged against the truth.

Shapes: B images of one batch, N images, P patients, M marks, H×W pixels. Pictures live on [-1, 1] × [-1, 1],
x to the right and y downwards; lengths are in half image sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.images import ImageSet
from common.study import DataConfig, Modality

Floats = NDArray[np.floating[Any]]

_SCANNERS = 8  # among public phantoms
_PUBLIC = 7919  # of their seed: no simulated site draws from the same stream
_BATCH = 128  # images drawn at a time: bounds memory at 128 px
_MARKS = 24
MODALITIES: tuple[Modality, ...] = ("radiology", "ophthalmology", "histopathology")
# optical density of the two stains in red, green, blue: a picture is exp(-density), as light is absorbed
_HAEMATOXYLIN = np.array([0.66, 0.72, 0.30], np.float32)
_EOSIN = np.array([0.12, 0.88, 0.42], np.float32)


@dataclass(frozen=True)
class _Batch:
    """What a painter needs: coordinates (B, H, W), and numbers that a patient's images share."""

    x: Floats
    y: Floats
    pixel: float  # side of a pixel
    body: Floats  # (B, 16) in [0, 1): anatomy
    place: Floats  # (B, M, 4) in [0, 1): where a mark is, and its shape
    count: NDArray[np.int64]  # (B,)
    radius: Floats  # (B,)

    def vary(self, column: int, low: float, high: float) -> Floats:
        """One anatomical number of each image between `low` and `high`: shape (B, 1, 1)."""
        return (low + (high - low) * self.body[:, column])[:, None, None]

    def mark(self, index: int) -> tuple[Floats, Floats, Floats]:
        """(there, radius, place) of mark `index`: (B, 1, 1) zero or one, (B, 1, 1), (B, 4, 1, 1)."""
        there = (index < self.count).astype(np.float32)[:, None, None]
        return there, self.radius[:, None, None], self.place[:, index, :, None, None]


def public_phantoms(modality: Modality, schema: DataConfig, images: int, *, seed: int) -> ImageSet:
    """Phantoms of all classes in equal shares, a patient each, from several scanners; the same seed, the same bytes."""
    rng = np.random.default_rng([seed, MODALITIES.index(modality), _PUBLIC])
    parts = []
    for labels in np.array_split(rng.permutation(np.arange(images) % len(schema.classes)), _SCANNERS):
        count, radius = draw_biomarkers(modality, labels, len(schema.classes), rng)
        drawn = paint(modality, schema, count, radius, np.arange(len(labels)), rng)
        parts.append(ImageSet(drawn, labels.astype(np.int64)))
    return ImageSet(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))


def draw_biomarkers(
    modality: Modality, labels: NDArray[np.int64], classes: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Marks of each patient and their radius, from the class alone: the class index scales both."""
    level = labels / (classes - 1)
    jitter, stretch = rng.random(len(labels)), rng.uniform(0.9, 1.1, len(labels))
    if modality == "radiology":
        count = 1 + (1.4 * level + jitter).astype(np.int64)
        radius = (0.16 + 0.07 * level) * stretch
    elif modality == "ophthalmology":
        count = 4 + (6 * level + 2 * jitter).astype(np.int64)
        radius = (0.055 + 0.02 * level) * stretch
    else:
        count = 6 + (8 * level + 2 * jitter).astype(np.int64)
        return count, (0.115 + 0.04 * level) * stretch
    return np.where(labels == 0, 0, count), radius


def paint(
    modality: Modality,
    schema: DataConfig,
    count: NDArray[np.int64],
    radius: NDArray[np.float64],
    patient_of: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Draw all images: uint8, shape (N, C, H, W)."""
    painter = {"radiology": _radiograph, "ophthalmology": _fundus, "histopathology": _tissue}[modality]
    patients, size, total = int(patient_of.max()) + 1, schema.image_size, len(patient_of)
    gain, noise = rng.uniform(0.88, 1.06), rng.uniform(0.012, 0.03)  # this site's scanner
    body = rng.random((patients, 16), dtype=np.float32)
    place = rng.random((patients, _MARKS, 4), dtype=np.float32)
    pose = rng.uniform(-1, 1, (total, 4)).astype(np.float32)
    exposure = rng.uniform(0.88, 1.12, total).astype(np.float32)
    out = np.empty((total, schema.channels, size, size), dtype=np.uint8)
    for start in range(0, total, _BATCH):
        rows = slice(start, min(start + _BATCH, total))
        who = patient_of[rows]
        x, y = _coordinates(size, pose[rows])
        batch = _Batch(x, y, 2 / size, body[who], place[who], count[rows], radius[rows].astype(np.float32))
        picture = painter(batch)
        if picture.shape[1] == 3 and schema.channels == 1:
            picture = np.tensordot(np.array([0.3, 0.59, 0.11], np.float32), picture, axes=(0, 1))[:, None]
        grain = rng.standard_normal(picture.shape, dtype=np.float32)
        picture = picture * (gain * exposure[rows])[:, None, None, None] + noise * grain
        out[rows] = np.clip(picture * 255, 0, 255).round().astype(np.uint8)  # one channel spreads over three
    return out


def _coordinates(size: int, pose: Floats) -> tuple[Floats, Floats]:
    """Pixel centres as the patient lies: a small shift, turn and zoom for each image; (B, H, W) each."""
    line = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = line[None, None, :], line[None, :, None]
    shift_x, shift_y, turn, zoom = (pose[:, i, None, None] for i in range(4))
    cos, sin = np.cos(0.07 * turn) * (1 + 0.05 * zoom), np.sin(0.07 * turn) * (1 + 0.05 * zoom)
    return cos * x - sin * y + 0.05 * shift_x, sin * x + cos * y + 0.05 * shift_y


def _soft(distance: Floats, width: float) -> Floats:
    """1 inside (distance below 0), 0 outside, a ramp of `width` between: an edge without steps."""
    return np.clip(0.5 - distance / np.float32(width), 0, 1)


def _ellipse(u: Floats, v: Floats, a: Floats | float, b: Floats | float) -> Floats:
    """Roughly the signed distance to the ellipse with half axes `a` and `b`."""
    return (np.sqrt((u / a) ** 2 + (v / b) ** 2) - 1) * np.minimum(a, b)


def _bump(u: Floats, v: Floats, radius: Floats | float) -> Floats:
    return np.exp(-(u * u + v * v) / (2 * radius * radius))


def _waves(batch: _Batch, column: int, pitch: float) -> Floats:
    """A patient's own smooth texture, about -1 to 1: three crossing waves."""
    total = np.zeros_like(batch.x)
    for k in range(3):
        phase = batch.vary(column + k, 0, 2 * np.pi)
        angle = phase * 3 + 2.1 * k
        total += np.sin(pitch * (1 + 0.4 * k) * (np.cos(angle) * batch.x + np.sin(angle) * batch.y) + phase)
    return total / 3


def _radiograph(batch: _Batch) -> Floats:
    """Chest radiograph, frontal: (B, 1, H, W). Marks are opacities in the lungs."""
    x, y, pixel = batch.x, batch.y, batch.pixel
    edge = max(0.09, 1.2 * pixel)
    wide, tall = batch.vary(0, 0.27, 0.33), batch.vary(1, 0.56, 0.68)
    chest = _soft(_ellipse(x, y - 0.35, batch.vary(2, 0.90, 1.02), 1.25), 0.2)
    neck = _soft(np.maximum(np.abs(x) - 0.26, y + 0.5), 0.2)
    picture = 0.03 + np.maximum(chest, 0.8 * neck) * (0.60 + 0.05 * _waves(batch, 8, 3.0))

    lungs = np.zeros_like(x)
    for side in (-1.0, 1.0):
        u = side * x - 0.44 - 0.10 * (y + 0.1)  # lungs lean outwards at the base
        lung = _soft(_ellipse(u, y + 0.02, wide * (1.0 + 0.25 * y), tall), edge)
        dome = y - batch.vary(3, 0.46, 0.56) - (0.06 if side > 0 else 0.0) - 0.5 * u * u
        lungs += lung * _soft(dome, edge)
    picture -= lungs * batch.vary(4, 0.34, 0.46)
    ribs = np.sin(batch.vary(5, 15, 18) * (y - 0.28 * (np.abs(x) - 0.35) ** 2 * 2 + 0.25 * np.abs(x)))
    picture += lungs * 0.055 * np.clip(ribs, -0.3, 1)
    clavicle = np.abs(y + 0.60 + 0.18 * (np.abs(x) - 0.2)) - 0.035
    picture += 0.10 * chest * _soft(clavicle, max(0.05, pixel)) * (np.abs(x) > 0.1) * (np.abs(x) < 0.75)

    spine = _soft(np.abs(x) - 0.13 - 0.03 * np.sin(3 * y), 0.12) * chest
    picture += 0.13 * spine
    heart = _soft(_ellipse(x - 0.15, y - 0.28, batch.vary(6, 0.28, 0.37), batch.vary(7, 0.25, 0.31)), edge)
    picture = np.maximum(picture, (0.66 + 0.08 * spine) * heart + picture * (1 - heart))

    for index in range(int(batch.count.max(initial=0))):
        there, radius, place = batch.mark(index)
        side = np.where((place[:, 0] < 0.5) ^ (index % 2 == 1), -1.0, 1.0).astype(np.float32)
        across = 0.46 + 0.18 * (place[:, 1] - 0.5)
        down = -0.32 + 0.26 * (index % 3) + 0.34 * place[:, 2]
        squash = 0.85 + 0.3 * place[:, 3]
        u, v = (x - side * across) * squash, (y - down) / squash
        patchy = 0.85 + 0.25 * np.sin(9 * u + 25 * place[:, 1]) * np.sin(11 * v)
        cloud = there * np.minimum(0.08 + lungs, 1) * np.minimum(1.1 * patchy * _bump(u, v, radius * 0.8), 0.9)
        picture += cloud * np.maximum(0.70 - picture, 0)  # fluid fills air; it does not add to bone
    return np.clip(picture, 0, 0.95)[:, None].astype(np.float32)


def _fundus(batch: _Batch) -> Floats:
    """Retinal fundus photograph: (B, 3, H, W). Marks are exudates and haemorrhages, in turn."""
    x, y, pixel = batch.x, batch.y, batch.pixel
    side = np.where(batch.body[:, 0] < 0.5, -1.0, 1.0).astype(np.float32)[:, None, None]
    along = x * side + batch.vary(1, 0.42, 0.52)  # from the disc towards the macula
    down = y - batch.vary(2, -0.06, 0.06)
    rim = np.sqrt(x * x + y * y)
    light = (1.02 - 0.38 * rim * rim) * (1 + 0.06 * _waves(batch, 8, 4.0)) * batch.vary(3, 0.9, 1.05)
    hue = batch.vary(4, 0.9, 1.12)
    picture = np.stack([0.80 * light, 0.37 * light * hue, 0.17 * light * hue], axis=1)

    macula = _bump(along - 0.62, down - 0.03, 0.15)
    picture *= 1 - 0.38 * macula[:, None]

    vessels = np.zeros_like(x)
    wiggle = 0.035 * np.sin(batch.vary(5, 5, 8) * down + batch.vary(6, 0, 6)) + 0.02 * np.sin(9 * along)
    for curve, width, strength in ((0.42, 0.040, 1.0), (0.85, 0.024, 0.7), (-0.30, 0.032, 0.9), (-0.9, 0.022, 0.6)):
        bow = curve * batch.vary(7, 0.85, 1.2)
        slope = 2 * down / bow
        distance = np.abs(along + wiggle - down * down / bow) / np.sqrt(1 + slope * slope)
        reach = np.sqrt(along * along + down * down)
        thin = width * (1.1 - 0.45 * np.minimum(reach, 1.5))
        cover = np.minimum(1, 2 * thin / pixel)  # a vessel thinner than a pixel tints it in proportion
        vessels = np.maximum(vessels, strength * cover * _soft(distance - thin, pixel))
    picture *= 1 - vessels[:, None] * np.array([0.38, 0.62, 0.55], np.float32)[None, :, None, None]

    disc = _soft(_ellipse(along, down, 0.15, 0.17), max(0.06, pixel))
    cup = _bump(along, down, batch.vary(11, 0.05, 0.08))
    pale = np.stack([0.97 + 0 * cup, 0.72 + 0.2 * cup, 0.40 + 0.35 * cup], axis=1)
    picture = picture * (1 - 0.9 * disc[:, None]) + 0.9 * disc[:, None] * pale * (1 - 0.3 * vessels[:, None])

    exudate, blood = np.array([0.98, 0.80, 0.40], np.float32), np.array([0.36, 0.06, 0.04], np.float32)
    for index in range(int(batch.count.max(initial=0))):
        there, radius, place = batch.mark(index)
        angle = 2.4 * index + 6.28 * batch.vary(12, 0, 1) + 0.7 * place[:, 0]  # the golden angle keeps them apart
        away = 0.13 + 0.105 * np.sqrt(np.float32(index)) + 0.08 * place[:, 1]
        u, v = along - 0.50 - away * np.cos(angle), down - 1.15 * away * np.sin(angle)
        squash = 0.75 + 0.5 * place[:, 2]
        shape = _soft(_ellipse(u * squash, v / squash, radius, radius), max(0.05, 1.2 * pixel)) * there * 0.85
        colour = (exudate if index % 2 == 0 else blood)[None, :, None, None]
        picture = picture * (1 - shape[:, None]) + shape[:, None] * colour
    field = _soft(rim - 0.94, 1.5 * pixel)
    return (np.clip(picture, 0, 1) * field[:, None]).astype(np.float32)


def _tissue(batch: _Batch) -> Floats:
    """Tissue stained with haematoxylin and eosin: (B, 3, H, W). Marks are nuclei."""
    x, y, pixel = batch.x, batch.y, batch.pixel
    angle = batch.vary(0, 0, np.pi)
    across = -np.sin(angle) * x + np.cos(angle) * y
    wavy = across * batch.vary(1, 9, 14) + 2.2 * _waves(batch, 8, 3.5)
    eosin = batch.vary(2, 0.26, 0.40) * (1 + 0.32 * np.sin(wavy) + 0.25 * _waves(batch, 11, 5.0))
    gap = _soft(_ellipse(x - batch.vary(3, -1, 1), y - batch.vary(4, -1, 1), 0.30, 0.22), 0.15)
    eosin *= 1 - 0.85 * gap * (batch.body[:, 5] < 0.6)[:, None, None]
    haematoxylin = np.full_like(x, 0.03)

    cell = 2 / 5  # nuclei stand in different cells of a 5×5 grid, in the patient's own order
    order = np.argsort(batch.place[:, :, 0], axis=1)
    for index in range(int(batch.count.max(initial=0))):
        there, radius, place = batch.mark(index)
        slot = order[:, index, None, None]
        column, row = (slot % 5 - 2).astype(np.float32), (slot // 5 - 2).astype(np.float32)
        u = x - (column + 0.6 * (place[:, 1] - 0.5)) * cell
        v = y - (row + 0.6 * (place[:, 2] - 0.5)) * cell
        turn, long = 3.14 * place[:, 3], 1.0 + 0.35 * place[:, 1]
        u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
        distance = _ellipse(u, v, radius * long, radius / long)
        body = _soft(distance, 1.2 * pixel) * there
        membrane = 0.22 * _soft(np.abs(distance + 0.02) - 0.02, pixel)
        chromatin = 0.72 + membrane + 0.14 * np.sin(34 * u + 20 * place[:, 2]) * np.sin(31 * v)
        haematoxylin = haematoxylin * (1 - body) + body * chromatin
        eosin = eosin * (1 - 0.6 * body)
    stain = batch.vary(6, 0.7, 1.45)[:, None]
    density = haematoxylin[:, None] * _HAEMATOXYLIN[None, :, None, None] + eosin[:, None] * _EOSIN[None, :, None, None]
    return np.exp(-1.35 * stain * density).astype(np.float32)
