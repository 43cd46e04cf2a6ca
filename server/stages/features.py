"""Features: private class features from the sites, and the teacher that is made of them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.errors import CheckpointError
from common.features import View, directions_of, features_of
from common.files import atomic_write, pack_arrays, unpack_arrays
from common.protocol import Arrays, FeaturesReply, FeaturesRequest
from server.federation.screening import largest_sum_norm, most_units, screen_arrays, screen_norm
from server.session import Session
from server.synthesis.public_set import public_images
from server.synthesis.teacher import Teacher, view_of


def features(session: Session) -> Teacher | None:
    """The teacher that the sites' features make; None where the study plans none.

    Directions and answers are kept: a run that was stopped asks the very same question, and only once.

    Raises:
        FederationError: fewer usable answers than federation.min_sites.
        DataError: the public set cannot be read.
    """
    study, plan = session.agreement.study, session.agreement.plan.get("features")
    if plan is None:
        return None
    folder = session.folder.path / "checkpoints"

    def asked() -> Arrays:
        arrays = _kept(folder / "directions.safetensors", lambda: _directions(session))
        return {**_ask(session, View.read(study, arrays)), **arrays}

    sums = _kept(folder / "features.safetensors", asked)  # with the directions that they are along
    view = View.read(study, {name: sums[name] for name in ("centre", "directions")})
    return Teacher.fit(
        features_of(study), view, sums["means"], sums["second_moments"], sums["counts"],
        noise_std=float(sums["noise_std"][0]),
    )  # fmt: skip


def _kept(file: Path, make: Callable[[], Arrays]) -> Arrays:
    """What the file holds; where there is none, or it is spoilt, what `make` gives, kept."""
    try:
        return unpack_arrays(file.read_bytes(), where=str(file))
    except (OSError, CheckpointError):
        arrays = make()
        atomic_write(file, pack_arrays(arrays))
        return arrays


def _directions(session: Session) -> Arrays:
    study = session.agreement.study
    session.progress.stage("features", "looking for directions in public images")
    public = public_images(study).images
    return view_of(public, features_of(study), many=directions_of(study), seed=study.study.seed).arrays()


def _ask(session: Session, view: View) -> Arrays:
    """The sums of all sites that answer, with "counts" (K,) and "noise_std" (1,), the noise of each number."""
    study, plan = session.agreement.study, session.agreement.plan["features"]
    counts_std, many = session.agreement.plan["counts"].noise_std, directions_of(study)
    shapes = {"means": (len(study.data.classes), many), "second_moments": (many * (many + 1) // 2,)}
    numbers = sum(math.prod(shape) for shape in shapes.values())

    def screen(node: int, _body: FeaturesReply, arrays: Arrays) -> None:
        screen_arrays(arrays, expected=shapes, dtype="float64")
        units = most_units(session.members[node].counts, counts_std)
        largest = largest_sum_norm(units=units, sensitivity=plan.sensitivity, noise_std=plan.noise_std, numbers=numbers)
        screen_norm(arrays, largest=largest, what="sums")

    session.progress.stage("features", f"asking {len(session.members)} sites for private class features")
    request = FeaturesRequest(agreement=session.agreement)
    requests = dict.fromkeys(session.members, (request, view.arrays()))
    collected = session.ask("features", requests, FeaturesReply, screen)
    counts = np.sum([np.maximum(session.members[a.node].counts, 1.0) for a in collected.accepted], axis=0)
    total = {name: np.sum([answer.arrays[name] for answer in collected.accepted], axis=0) for name in shapes}
    return {**total, "counts": counts, "noise_std": np.array([math.sqrt(len(collected.accepted)) * plan.noise_std])}
