"""Test counts of a classifier, and the figures with intervals that are read from them, noise included.

SPDX-License-Identifier: Apache-2.0

Shapes: N images, U units, C classes, B bins, R bootstrap replicates.

A site tests a classifier on held-out images and sends only one noisy vector: for each class the histogram of its score
over the class's own images and over all others, and the confusion matrix. Everything reported is computed from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, ReplyError

if TYPE_CHECKING:
    from common.bounded import BoundedSum
    from common.images import Units

Floats = NDArray[np.float64]
_LOGIT_RANGE = 6.0
_BLOCK_BYTES = 24 << 20  # of the rows in memory together
# Added to the rates that are resampled (and taken off again): a count of 0 or n would else have an interval of width 0.
_CELL_PRIOR = 0.5  # in each cell of the confusion matrix
_HISTOGRAM_PRIOR = 1.0  # in a whole histogram


@dataclass(frozen=True)
class ScoreCounts:
    """What one or more sites counted; exact, noisy, or a sum of such.

    Attributes:
        positives: shape (C, B), histogram of class k's score over the images of class k.
        negatives: shape (C, B), the same over the images of the other classes.
        confusion: shape (C, C), images by (true class, predicted class).
    """

    positives: Floats
    negatives: Floats
    confusion: Floats

    def vector(self) -> Floats:
        """Flat float64, length C·2B + C²: for each class positives then negatives; then the confusion matrix."""
        histograms = np.stack([self.positives, self.negatives], axis=1)
        return np.concatenate([histograms.ravel(), self.confusion.ravel()])

    @classmethod
    def from_vector(cls, vector: NDArray[Any], classes: int, bins: int) -> ScoreCounts:
        """Inverse of `vector`.

        Raises:
            ReplyError: wrong length, or a value that is not finite.
        """
        length = vector_length(classes, bins)
        if vector.shape != (length,) or not np.isfinite(vector).all():
            raise ReplyError(
                f"score counts of shape {vector.shape}, finite values of shape ({length},) wanted",
                where="validate reply",
                remedy="Use the same study file at site and server.",
            )
        flat = np.asarray(vector, dtype=np.float64)
        histograms = flat[: classes * 2 * bins].reshape(classes, 2, bins)
        return cls(
            histograms[:, 0].copy(),
            histograms[:, 1].copy(),
            flat[classes * 2 * bins :].reshape(classes, classes).copy(),
        )

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        return ScoreCounts(
            self.positives + other.positives, self.negatives + other.negatives, self.confusion + other.confusion
        )


def vector_length(classes: int, bins: int) -> int:
    """Length of `ScoreCounts.vector`."""
    return classes * 2 * bins + classes * classes


def l2_sensitivity(classes: int) -> float:
    """L2 norm of one image's row in `ScoreCounts.vector`: one bin per class, one confusion cell."""
    return math.sqrt(classes + 1)


def score_sum(units: Units, probabilities: NDArray[Any], bins: int, *, name: str) -> BoundedSum:
    """Counts of one classifier's scores as a sum over units: part `name`, a `ScoreCounts.vector`, one row per unit.

    A unit's row is the mean of its images' rows, so that it is no longer than one image's. An image whose scores are
    not finite adds zero: nothing raises because of an image.

    Args:
        probabilities: shape (N, C), of the units' images in their order; each row depends on its own image alone.
        bins: as for `count_scores`.
    """
    from common.bounded import RunningSum  # late: brings torch, and a plan needs only `l2_sensitivity`

    classes = probabilities.shape[1]
    length = vector_length(classes, bins)
    cells, usable = _cells(probabilities, units.images.labels, bins)
    running, at_once = RunningSum({name: (length,)}, l2_sensitivity(classes)), max(1, _BLOCK_BYTES // (8 * length))
    for start in range(0, len(units), at_once):
        members = units.members[start : start + at_once]
        images = np.concatenate(members)
        row = np.repeat(np.arange(len(members)), [len(member) for member in members])
        share = np.concatenate([np.full(len(member), 1.0 / len(member)) for member in members])
        rows = np.zeros((len(members), length))
        np.add.at(rows, (row[:, None], cells[images]), (share * usable[images])[:, None])
        running.add({name: rows})
    return running.total()


def count_scores(probabilities: NDArray[Any], labels: NDArray[np.int64], bins: int) -> ScoreCounts:
    """Count the scores of N images, N = 0 included; exact, so for images that need no protection, and for tests.

    Args:
        probabilities: shape (N, C), values 0 to 1.
        labels: shape (N,), values 0 to C - 1.
        bins: equal bins of logit(p) on [-6, 6]; the end bins take what lies outside.

    Raises:
        DataError: shapes that do not fit, a label out of range, a probability that is NaN or outside [0, 1].
    """
    classes = probabilities.shape[1]
    cells, usable = _cells(probabilities, labels, bins)
    if not usable.all():
        raise DataError("a probability is NaN or outside 0 to 1", where="score counts", remedy="Check the classifier.")
    vector = np.bincount(cells.ravel(), minlength=vector_length(classes, bins)).astype(np.float64)
    return ScoreCounts.from_vector(vector, classes, bins)


def _cells(
    probabilities: NDArray[Any], labels: NDArray[np.int64], bins: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where in `ScoreCounts.vector` each image counts (N, C + 1), and whether its scores are usable (N,)."""
    count, classes = probabilities.shape
    if labels.shape != (count,) or not ((labels >= 0) & (labels < classes)).all():
        raise DataError(f"labels do not fit {count} scores of {classes} classes", where="score counts")
    usable: NDArray[np.bool_] = np.all((probabilities >= 0) & (probabilities <= 1), axis=1)  # False for NaN too
    scores = np.where(usable[:, None], probabilities, 0.5).astype(np.float64)
    with np.errstate(divide="ignore"):
        logits = np.log(scores) - np.log1p(-scores)
    position = (np.clip(logits, -_LOGIT_RANGE, _LOGIT_RANGE) + _LOGIT_RANGE) / (2 * _LOGIT_RANGE) * bins
    each = np.arange(classes)
    histogram = (2 * each + (labels[:, None] != each)) * bins + np.minimum(position.astype(np.int64), bins - 1)
    confusion = classes * 2 * bins + labels * classes + scores.argmax(axis=1)
    return np.concatenate([histogram, confusion[:, None]], axis=1), usable


def auc_from_counts(positives: Floats, negatives: Floats) -> Floats:
    """Area under the ROC curve by the trapezoid rule, a tie counting one half; last axis = bins, ascending score.

    Negative counts are *not* set to 0: the sum over pairs of bins is linear in each histogram, so symmetric noise
    averages out, where setting noise to 0 from below would pull every figure towards 0.5. The result is kept within
    [0, 1]; it is NaN where either side's total is not positive.
    """
    below = np.cumsum(negatives, axis=-1) - 0.5 * negatives
    return _share((positives * below).sum(axis=-1), positives.sum(axis=-1), negatives.sum(axis=-1))


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; all three NaN where the counts do not determine it."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        return {name: _none_if_nan(getattr(self, name)) for name in ("value", "low", "high")}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Estimate:
        return cls(*(math.nan if raw[name] is None else float(raw[name]) for name in ("value", "low", "high")))


@dataclass(frozen=True)
class Figures:
    """What a report prints of one classifier; tuples have one entry per class, one class against the rest.

    Attributes:
        auc_macro, f1_macro: means over the classes for which the figure is defined.
        support: images of the class (of a patient, shares); its interval holds the privacy noise only.
        confidence: of every interval.
    """

    auc_macro: Estimate
    f1_macro: Estimate
    auc: tuple[Estimate, ...]
    sensitivity: tuple[Estimate, ...]
    specificity: tuple[Estimate, ...]
    support: tuple[Estimate, ...]
    confidence: float = 0.95

    def to_json(self) -> dict[str, Any]:
        """Plain dict for a JSON file; NaN becomes None."""
        out: dict[str, Any] = {"auc_macro": self.auc_macro.to_json(), "f1_macro": self.f1_macro.to_json()}
        for name in _PER_CLASS:
            out[name] = [estimate.to_json() for estimate in getattr(self, name)]
        return {**out, "confidence": self.confidence}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Figures:
        """Inverse of `to_json`."""
        lists = {name: tuple(Estimate.from_json(entry) for entry in raw[name]) for name in _PER_CLASS}
        auc_macro, f1_macro = Estimate.from_json(raw["auc_macro"]), Estimate.from_json(raw["f1_macro"])
        return cls(auc_macro, f1_macro, *(lists[name] for name in _PER_CLASS), confidence=float(raw["confidence"]))


_PER_CLASS = ("auc", "sensitivity", "specificity", "support")


def figures(
    counts: ScoreCounts, *, noise_std: float, confidence: float = 0.95, replicates: int = 1000, seed: int = 0
) -> Figures:
    """Figures of (summed, noisy) counts, with parametric bootstrap intervals (Efron & Tibshirani 1993, section 6.5).

    A replicate is the observed count, plus a centred Poisson draw of that mean (which images were tested), plus
    Gaussian noise once more (privacy). Both errors are therefore in each interval.

    Args:
        noise_std: standard deviation of the noise in each entry of the sum: sqrt(sites)·sigma·`l2_sensitivity`; 0 for
            exact counts.
        confidence: of each interval, between 0 and 1.
        replicates: R.
    """
    draws = np.random.default_rng(seed)
    classes, bins = counts.positives.shape

    def again(observed: Floats, prior: float) -> Floats:  # (R, *shape)
        rate = np.maximum(observed, 0.0) + prior
        sampling = draws.poisson(rate, (replicates, *observed.shape)) - rate
        return observed + sampling + draws.normal(0.0, 1.0, sampling.shape) * noise_std

    def estimate(value: Floats, again_values: Floats) -> Estimate:
        return _interval(float(value), again_values, confidence)

    per_class_auc = auc_from_counts(counts.positives, counts.negatives)
    auc_again = np.empty((replicates, classes))
    for k in range(classes):  # one class at a time: with many bins all at once would fill memory
        sides = (
            again(counts.positives[k], _HISTOGRAM_PRIOR / bins),
            again(counts.negatives[k], _HISTOGRAM_PRIOR / bins),
        )
        auc_again[:, k] = auc_from_counts(*sides)
    observed, repeated = _rates(counts.confusion), _rates(again(counts.confusion, _CELL_PRIOR))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * noise_std * math.sqrt(classes)
    support = [max(0.0, float(total)) for total in counts.confusion.sum(axis=1)]
    return Figures(
        auc_macro=estimate(_mean_of_defined(per_class_auc), _mean_of_defined(auc_again)),
        f1_macro=estimate(_mean_of_defined(observed["f1"]), _mean_of_defined(repeated["f1"])),
        auc=tuple(estimate(per_class_auc[k], auc_again[:, k]) for k in range(classes)),
        sensitivity=tuple(estimate(observed["sens"][k], repeated["sens"][:, k]) for k in range(classes)),
        specificity=tuple(estimate(observed["spec"][k], repeated["spec"][:, k]) for k in range(classes)),
        support=tuple(Estimate(n, max(0.0, n - half), n + half) for n in support),
        confidence=confidence,
    )


@dataclass(frozen=True)
class Chance:
    """What guessing reaches."""

    auc: float
    f1_macro: float


def chance(classes: int, prevalence: NDArray[Any]) -> Chance:
    """AUC and macro F1 of a guesser that draws class k with probability p_k, the class's prevalence.

    Precision and recall of class k are then both p_k, so F1_k = p_k, and the mean over the m classes with p_k > 0 is
    sum(p_k) / m = 1 / m. The AUC is 0.5.

    Args:
        prevalence: shape (C,), noisy counts or shares; values below 0 count as 0. All zero means equal classes.
    """
    shares = np.maximum(np.asarray(prevalence, dtype=np.float64), 0.0)
    if shares.shape != (classes,):
        raise ValueError(f"prevalence of shape {shares.shape} for {classes} classes")
    return Chance(auc=0.5, f1_macro=1.0 / (int((shares > 0).sum()) or classes))


def _rates(confusion: Floats) -> dict[str, Floats]:
    """Per-class figures (..., C) of confusion matrices (..., C, C)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total = true.sum(axis=-1, keepdims=True)
    others = total - true
    return {
        "sens": _share(hits, true),
        "spec": _share(others - (predicted - hits), others),
        "f1": _share(2.0 * hits, true + predicted),
    }


def _share(part: Floats, *wholes: Floats) -> Floats:
    """part / product of wholes within [0, 1]; NaN where a whole is not positive."""
    defined = np.logical_and.reduce([whole > 0 for whole in wholes])
    product = np.where(defined, math.prod(wholes), 1.0)
    return np.where(defined, np.clip(part / product, 0.0, 1.0), np.nan)


def _mean_of_defined(values: Floats) -> Floats:
    """Mean over the last axis without the NaN; NaN where nothing is left."""
    defined = np.isfinite(values)
    count = defined.sum(axis=-1)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _interval(value: float, repeated: Floats, confidence: float) -> Estimate:
    if math.isnan(value):
        return Estimate(math.nan, math.nan, math.nan)
    tail = (1.0 - confidence) / 2.0
    defined = repeated[np.isfinite(repeated)]
    if 1.0 - defined.size / repeated.size > tail:  # too often undetermined: the counts bound nothing
        return Estimate(value, 0.0, 1.0)
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
