"""The figures of one finished run: what its release says, and what only somebody with the real images can know.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, K classes, R bootstrap replicates, S distinct scores.

Nothing here is private. The released figures are; they stand beside the exact ones, so that both can be compared.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.utility.features import FeatureSpace, real_classifier
from benchmarks.utility.fidelity import FEWEST, Fidelity, fidelity
from benchmarks.utility.sites import site_splits, synthetic_set, validation_split, whole
from common.claims import Claim
from common.errors import CheckpointError
from common.files import read_json, sha256_file, unpack_arrays
from common.images import ImageSet
from common.metrics import Estimate, auc_from_counts
from common.model.classifier import BiomarkerClassifier
from common.study import Study
from server.checkpoints import RunFolder

RULER = 4  # raise it with every change of how a figure is made: rows of another ruler are measured anew
_SEED = 0
_REPLICATES = 1000
_CONFIDENCE = 0.95
_MOST_IMAGES = 500  # of each kind that are compared at a site: the distances grow with the square
_OF_HOLDOUT = ("kid", "two_sample")  # what is told of the comparison with held-out images
_AT_ONCE = 100  # replicates held in memory

Floats = NDArray[np.float64]


def measure(study: Study, run: Path, data: Path, *, cache: Path, real_steps: int) -> dict[str, Any]:
    """Every measured field of a `Result`, for a finished run folder.

    Args:
        study: of the run, seed included: the sites' shares follow from it.
        data: the npz that the run was given.
        cache: folder for classifiers of real images, which serve all runs of a set.
        real_steps: training steps of those classifiers.

    Raises:
        CheckpointError: the run is not finished, or is of another study.
        ReplyError: its classifier is of another network.
        DataError: the released images or the real ones cannot be used.
    """
    released = released_figures(study, run)
    synthetic = synthetic_set(RunFolder(run).release / "images.npz", study.data)
    real = whole(data, study.data)
    test, val = real.holdout, validation_split(data, study.data)
    teacher = real_classifier(real.train, study, steps=real_steps, cache=cache / _cache_name(data, real_steps, "train"))
    # Images are compared by one that has seen neither side: those that it was trained on lie apart in its features.
    judge = real_classifier(val, study, steps=real_steps, cache=cache / _cache_name(data, real_steps, "val"))
    student = released_classifier(study, run)
    auc, f1 = exact_figures(student.predict(test.images), test.labels)
    val_auc, val_f1 = exact_figures(student.predict(val.images), val.labels, replicates=0)
    real_auc, real_f1 = exact_figures(teacher.predict(test.images), test.labels, replicates=0)
    return {
        **released, "images": len(synthetic),
        **_spread("test_auc", auc), **_spread("test_f1", f1), "val_auc": val_auc.value, "val_f1": val_f1.value,
        "real_auc": real_auc.value, "real_f1": real_f1.value,
        **_fidelity(study, data, synthetic, FeatureSpace.of(judge, val)),
    }  # fmt: skip


def released_classifier(study: Study, run: Path) -> BiomarkerClassifier:
    """The classifier that the run trained on its synthetic images and had tested at the sites.

    Raises:
        CheckpointError: the file is missing or damaged.
        ReplyError: it is of another network.
    """
    files = sorted((run / "checkpoints").glob("classifier-*.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise CheckpointError("no classifier", where=str(run), remedy="Remove the run folder; it runs anew.")
    file = files[-1]
    return BiomarkerClassifier.from_state(
        unpack_arrays(file.read_bytes(), where=str(file)), classes=len(study.data.classes),
        channels=study.data.channels, image_size=study.data.image_size, backbone=study.validation.backbone,
    )  # fmt: skip


def released_figures(study: Study, run: Path) -> dict[str, Any]:
    """What the run itself publishes: noisy figures with their intervals, and what its claim says was spent.

    Raises:
        CheckpointError: a file is missing, does not hold what it should, or is of another study.
    """
    metrics, claim = (read_json(RunFolder(run).release / name) for name in ("metrics.json", "claim.json"))
    try:
        rows = {str(row["name"]): row for row in metrics["validation"]}
        synthetic = next(row for name, row in rows.items() if name.startswith("trained on the synthetic"))
        reference = next((row for name, row in rows.items() if name.startswith("reference")), None)
        figures = {
            **_spread("released_auc", Estimate.from_json(synthetic["auc_macro"])),
            **_spread("released_f1", Estimate.from_json(synthetic["f1_macro"])),
            "reference_auc": None if reference is None else reference["auc_macro"]["value"],
            "reference_f1": None if reference is None else reference["f1_macro"]["value"],
            "epsilon_spent": Claim.from_json(claim).epsilon_max,
            "peak_memory_mb": float(metrics["peak_memory_mb"]),
        }
        hashes = {metrics["sha256"], claim["study_sha256"]}
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise CheckpointError(f"not the metrics and the claim of a run ({error!r})", where=str(run)) from error
    if hashes != {study.sha256}:
        raise CheckpointError("the run is of another study", where=str(run), remedy="Remove the folder; it runs anew.")
    return figures


def exact_figures(
    scores: NDArray[Any], labels: NDArray[np.int64], *, replicates: int = _REPLICATES
) -> tuple[Estimate, Estimate]:
    """(macro AUC, macro F1) with 95 % percentile bootstrap intervals over the images (Efron & Tibshirani 1993, ch. 13).

    Args:
        scores: (N, K) class probabilities.
        labels: (N,).
        replicates: R; 0 for no interval.
    """
    once = np.ones((1, len(labels)))
    auc, f1 = float(_macro_auc(scores, labels, once)[0]), float(_macro_f1(scores, labels, once)[0])
    draws = np.random.default_rng(_SEED)
    again: list[tuple[Floats, Floats]] = []
    for start in range(0, replicates, _AT_ONCE):
        count = min(_AT_ONCE, replicates - start)
        times = draws.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=count).astype(np.float64)
        again.append((_macro_auc(scores, labels, times), _macro_f1(scores, labels, times)))
    if not again:
        nan = float("nan")
        return Estimate(auc, nan, nan), Estimate(f1, nan, nan)
    auc_again, f1_again = (np.concatenate(parts) for parts in zip(*again, strict=True))
    return _interval(auc, auc_again), _interval(f1, f1_again)


def alike(wanted: NDArray[np.int64], labels: NDArray[np.int64], draws: np.random.Generator) -> NDArray[np.int64]:
    """Positions of len(wanted) images, drawn without replacement, with the class mix of `wanted` as far as it goes.

    Where a class has too few images, others take their place: a class that the set lacks has to show.

    Args:
        wanted: classes to match, at most len(labels) of them.
    """
    chosen = []
    for label in np.unique(wanted):
        have = np.flatnonzero(labels == label)
        chosen.append(draws.permutation(have)[: int((wanted == label).sum())])
    taken = np.concatenate(chosen)
    rest = draws.permutation(np.setdiff1d(np.arange(len(labels)), taken))
    return np.concatenate([taken, rest[: len(wanted) - len(taken)]])


def _fidelity(study: Study, data: Path, synthetic: ImageSet, space: FeatureSpace) -> dict[str, Any]:
    """Synthetic images against those that a site trains on, and against its held-out ones; real ones in their place.

    What a generator is to imitate is what it is trained on: held-out images may come from other patients, scanners or
    stains, so that real training images differ from them, too. In the place of synthetic images stand training images
    that are not among those compared with. As many of each kind, with the same class mix: how often a class occurs is
    not what is asked here.
    """
    draws = np.random.default_rng(_SEED)
    pairs: dict[str, list[Fidelity]] = {"": [], "floor_": [], "holdout_": [], "floor_holdout_": []}
    synthetic_features, compared = space.features(synthetic.images), 0
    for site in site_splits(study, data):
        count = min(len(site.train) // 2, len(site.holdout), len(synthetic), _MOST_IMAGES)
        if count < FEWEST:
            continue
        order = draws.permutation(len(site.train))
        rest = site.train.select(order[count:])
        for prefix, images in (("", site.train), ("holdout_", site.holdout)):
            chosen = images.select(order[:count] if not prefix else draws.permutation(len(images))[:count])
            real, others = space.features(chosen.images), rest.select(alike(chosen.labels, rest.labels, draws))
            same_mix = synthetic_features[alike(chosen.labels, synthetic.labels, draws)]
            pairs[prefix].append(fidelity(real, same_mix))
            pairs[f"floor_{prefix}"].append(fidelity(real, space.features(others.images)))
        compared += count
    if not compared:
        return {}
    kids = [entry.kid for entry in pairs[""]]
    means = {f"{prefix}{name}": value for prefix, entries in pairs.items() for name, value in _mean(entries).items()}
    return {
        **{name: value for name, value in means.items() if "holdout" not in name or name.endswith(_OF_HOLDOUT)},
        "kid_low": min(kids), "kid_high": max(kids), "fidelity_images": compared,
    }  # fmt: skip


def _mean(entries: list[Fidelity]) -> dict[str, float]:
    rows = [asdict(entry) for entry in entries]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _macro_auc(scores: NDArray[Any], labels: NDArray[np.int64], times: Floats) -> Floats:
    """Mean one-against-rest AUC (R,) of images that count `times` (R, N) each; classes without images are left out."""
    per_class = []
    for k in range(scores.shape[1]):
        order = np.argsort(scores[:, k], kind="stable")
        _, first = np.unique(scores[order, k], return_index=True)  # a histogram with a bin for each distinct score
        own = (labels[order] == k).astype(np.float64)
        positives = np.add.reduceat(times[:, order] * own, first, axis=1)
        negatives = np.add.reduceat(times[:, order] * (1.0 - own), first, axis=1)
        per_class.append(auc_from_counts(positives, negatives))
    return _mean_of_defined(np.stack(per_class, axis=1))


def _macro_f1(scores: NDArray[Any], labels: NDArray[np.int64], times: Floats) -> Floats:
    """Mean F1 (R,) over the classes that occur among labels or predictions."""
    predicted, per_class = scores.argmax(axis=1), []
    for k in range(scores.shape[1]):
        hits = times @ ((labels == k) & (predicted == k)).astype(np.float64)
        seen = times @ ((labels == k).astype(np.float64) + (predicted == k))
        per_class.append(np.where(seen > 0, 2.0 * hits / np.maximum(seen, 1.0), np.nan))
    return _mean_of_defined(np.stack(per_class, axis=1))


def _mean_of_defined(values: Floats) -> Floats:
    defined = np.isfinite(values)
    count = defined.sum(axis=1)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(axis=1) / np.maximum(count, 1), np.nan)


def _interval(value: float, again: Floats) -> Estimate:
    tail = (1.0 - _CONFIDENCE) / 2.0
    defined = again[np.isfinite(again)]
    if not defined.size:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _cache_name(data: Path, steps: int, part: str) -> str:
    return f"real-{part}-{sha256_file(data)[:12]}-{steps}steps-ruler{RULER}.safetensors"
