"""The benchmark's README: tables, bars and pictures made from the results; what people wrote around them stays.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.utility.cells import Cell, cells_of, figure, spread
from benchmarks.utility.grid import DATASETS, RECIPES, Row, epsilon_label, full_grid
from benchmarks.utility.pictures import Point, over_epsilon, sheet
from benchmarks.utility.results import Result
from benchmarks.utility.rows import released
from benchmarks.utility.sites import synthetic_set
from common.claims import two_digits_up
from common.errors import DataError, StudyError
from common.files import atomic_write
from common.study_file import load_study, parse_study

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
_SHEET_EPSILON = 8.0
_CHANCE = 0.5
_HEAD = "# What the synthetic images are worth\n\nMade by `make bench-utility`.\n\n"
_COLUMNS = (
    "epsilon", "recipe", "seeds", "test AUC", "test macro F1", "val AUC", "released AUC", "released F1",
    "reference AUC", "KID", "coverage", "recall", "two-sample", "KID, held-out", "two-sample, held-out", "minutes",
    "commit",
)  # fmt: skip
_LEGEND = """Test AUC and macro F1: a classifier that saw synthetic images only, on all real test images, exact; in
brackets the smallest and the largest seed, or of a single seed the 95 % bootstrap interval over the test images. Val
AUC: the same on the val split, on which settings are chosen. Released: what a study publishes, with its privacy noise;
reference: a classifier trained on real images within the same budget, published likewise. KID, coverage, recall and
two-sample accuracy (0.5 = nobody can tell): against the images that each simulated site trains on, as many of each and
with their class mix, then averaged; in the features of a classifier of the real val images, which has seen neither
side. Held-out: the same against the site's held-out images, which come from other patients. KID is 0 for the same
distribution; of a single seed its brackets hold the smallest and the largest site. The first line of a table is what
other real training images reach in place of synthetic ones, without privacy. "+" behind a commit: the software differed
from it. Settings: at the end.
"""


def write_report(folder: Path, results: Sequence[Result], out: Path) -> Path:
    """Write README.md and the pictures; returns the README's path.

    Args:
        out: folder of the run folders; contact sheets are made of those that are still there.

    Raises:
        DataError: the README has one marker, or both in the wrong order.
        StorageError: a file cannot be written.
    """
    readme = folder / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.exists() else _HEAD
    cells = cells_of(results)
    pictures = _write_pictures(folder, cells, out)
    text = between_markers(before, render(cells, pictures), where=str(readme))
    atomic_write(readme, text.encode())
    return readme


def between_markers(before: str, table: str, *, where: str) -> str:
    """`before` with everything between the markers replaced; where there are none, they are put at the end.

    Raises:
        DataError: not one of each, in that order.
    """
    block = f"{BEGIN}\n{table.strip()}\n{END}"
    counts = before.count(BEGIN), before.count(END)
    if counts == (0, 0):
        return f"{before.rstrip()}\n\n{block}\n"
    if counts != (1, 1) or before.index(BEGIN) > before.index(END):
        raise DataError(
            "the markers of the table are not there once each, in order", where=where,
            remedy=f"Put {BEGIN} and {END} around it.",
        )  # fmt: skip
    return before[: before.index(BEGIN)] + block + before[before.index(END) + len(END) :]


def render(cells: Sequence[Cell], pictures: Sequence[str] = ()) -> str:
    """Everything between the markers, as Markdown."""
    if not cells:
        return "No run yet.\n"
    parts = [_LEGEND]
    for name in DATASETS:
        own = [cell for cell in cells if cell.dataset == name]
        if own:
            shown = [file for file in pictures if file.startswith(f"{name}-")]
            parts += [f"## {name}", _set_table(own), *(f"![{file}]({file})" for file in shown)]
    parts += ["## Bars", _bars(cells), _comparisons(cells), "## What the recipes are", _recipes()]
    return "\n\n".join(part.strip() for part in (*parts, _settings(cells)) if part) + "\n"


def _set_table(cells: Sequence[Cell]) -> str:
    rows = [_real_line(cells)]
    for cell in cells:
        one, say = cell.results, cell.text
        minutes = f"{fmean(result.minutes for result in one):.0f}"
        if cell.over_budget:
            minutes = f"{minutes}; {len(cell.over_budget)} over budget"
        rows.append((
            epsilon_label(cell.epsilon), cell.recipe, str(len(cell.finished)), say("test_auc"), say("test_f1"),
            say("val_auc"), say("released_auc"), say("released_f1"), say("reference_auc"), say("kid", 4),
            say("coverage", 2), say("recall", 2), say("two_sample", 2), say("holdout_kid", 4),
            say("holdout_two_sample", 2), minutes,
            ", ".join(dict.fromkeys(result.commit + ("+" if result.dirty == "yes" else "") for result in one)),
        ))  # fmt: skip
    return markdown_table(_COLUMNS, rows)


def _real_line(cells: Sequence[Cell]) -> tuple[str, ...]:
    done = [result for cell in cells for result in cell.finished]

    def mean(name: str, digits: int = 3) -> str:
        known = [value for value in (getattr(result, name) for result in done) if value is not None]
        return figure(fmean(known), digits) if known else "–"

    return (
        "none", "real images", "–", mean("real_auc"), mean("real_f1"), "–", "–", "–", "–",
        mean("floor_kid", 4), mean("floor_coverage", 2), mean("floor_recall", 2), mean("floor_two_sample", 2),
        mean("floor_holdout_kid", 4), mean("floor_holdout_two_sample", 2), "–", "–",
    )  # fmt: skip


_BARS: tuple[tuple[str, float, str, float], ...] = (
    ("pneumoniamnist", 8.0, "test_auc", 0.94),
    ("pneumoniamnist", 8.0, "test_f1", 0.86),
    ("pneumoniamnist", 1.0, "test_auc", 0.90),
    ("pneumoniamnist", 1.0, "test_f1", 0.80),
    ("colonpath4", 8.0, "test_auc", 0.78),
    ("colonpath4", 8.0, "test_f1", 0.50),
    ("fundus4", 8.0, "test_auc", 0.85),
)
_NAMES = {
    "test_auc": "AUC", "test_f1": "macro F1", "kid": "KID", "two_sample": "two-sample accuracy",
    "holdout_kid": "KID, held-out", "holdout_two_sample": "two-sample accuracy, held-out",
}  # fmt: skip


def _bars(cells: Sequence[Cell]) -> str:
    """What was asked for, and whether the default recipe's mean over its seeds reaches it."""
    found = {(cell.dataset, cell.epsilon): cell for cell in cells if cell.recipe == "default"}
    rows = []
    for dataset, epsilon, name, least in _BARS:
        cell = found.get((dataset, epsilon))
        mean = None if cell is None else cell.mean(name)
        rows.append((
            dataset, epsilon_label(epsilon), f"{_NAMES[name]} ≥ {least:.2f}", "–" if mean is None else figure(mean),
            "–" if cell is None else str(len(cell.finished)), verdict(mean, lambda value, bar=least: value >= bar),
        ))  # fmt: skip
    for (dataset, epsilon), cell in found.items():
        most, longest = DATASETS[dataset].minutes, max(result.minutes for result in cell.results)
        met = verdict(None if cell.over_budget else longest, lambda value, bar=most: value <= bar)
        rows.append((dataset, epsilon_label(epsilon), f"at most {most:g} minutes", f"{longest:.0f}",
                     str(len(cell.results)), "missed" if cell.over_budget else met))  # fmt: skip
    return markdown_table(("set", "epsilon", "bar", "default, mean of seeds", "seeds", "verdict"), rows)


def verdict(mean: float | None, reached: Callable[[float], bool]) -> str:
    """ "met" or "missed", or that there is no run."""
    return "not run" if mean is None else "met" if reached(mean) else "missed"


def _comparisons(cells: Sequence[Cell]) -> str:
    """Default against moments only: lower KID, two-sample accuracy nearer to chance, no lower AUC."""
    found = {(cell.dataset, cell.epsilon, cell.recipe): cell for cell in cells}
    rows = []
    for dataset, epsilon, recipe in found:
        other = found.get((dataset, epsilon, "moments"))
        if recipe != "default" or other is None:
            continue
        compared = ("kid", 4), ("two_sample", 3), ("holdout_kid", 4), ("holdout_two_sample", 3), ("test_auc", 3)
        for name, digits in compared:
            ours, theirs = found[dataset, epsilon, recipe].mean(name), other.mean(name)
            if ours is None or theirs is None:
                continue
            if name.endswith("two_sample"):
                met = abs(ours - _CHANCE) < abs(theirs - _CHANCE)
            else:
                met = ours >= theirs if name == "test_auc" else ours < theirs
            rows.append((dataset, epsilon_label(epsilon), _NAMES[name], figure(ours, digits), figure(theirs, digits),
                         "met" if met else "missed"))  # fmt: skip
    if not rows:
        return ""
    head = ("set", "epsilon", "figure", "default", "moments only", "default is better, or for AUC no worse")
    return markdown_table(head, rows)


def _recipes() -> str:
    missing = {row.recipe: row.not_available() for row in full_grid() if row.not_available()}
    lines = [f"- {recipe.name}: {recipe.says}" for recipe in RECIPES.values()]
    return "\n".join(lines + [f"- rows of {name}: {why}" for name, why in missing.items()])


def _settings(cells: Sequence[Cell]) -> str:
    """Every run's settings as differences from the study file as it is now."""
    rows = []
    for cell in cells:
        for result in cell.results:
            rows.append((
                result.dataset, epsilon_label(result.epsilon), result.recipe, str(result.seed), result.status,
                f"`{result.study_sha256[:12]}`", f"`{result.code}`",
                "–" if result.epsilon_spent is None else two_digits_up(result.epsilon_spent), differences(result),
                result.hardware, "–" if result.peak_memory_mb is None else f"{result.peak_memory_mb:.0f}",
                result.finished,
            ))  # fmt: skip
    head = ("set", "epsilon", "recipe", "seed", "status", "study", "code", "epsilon spent",
            "differs from its study file", "machine", "peak MB", "finished, UTC")  # fmt: skip
    files = ", ".join(f"{entry.name}: `configs/{entry.study}`" for entry in DATASETS.values())
    table = markdown_table(head, rows)
    return f"<details><summary>Settings of every run</summary>\n\nStudy files: {files}.\n\n{table}\n</details>"


def differences(result: Result) -> str:
    """`section.key=value` of every setting that the result's study file does not have so."""
    try:
        base = load_study(Row(result.dataset, result.epsilon, result.recipe, result.seed).study_file)
    except StudyError as error:
        return f"the study file cannot be read ({error.what})"
    theirs, present = json.loads(result.settings), base.model_dump(mode="json")
    changed: list[str] = []
    for section in sorted({*theirs, *present}):
        new, old = theirs.get(section) or {}, present.get(section) or {}
        keys = [key for key in sorted({*new, *old}) if new.get(key) != old.get(key)]
        changed += [f"{section}.{key}={_short(new.get(key))}" for key in keys]
    return ", ".join(f"`{entry}`" for entry in changed) or "nothing"


def _short(value: Any) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _write_pictures(folder: Path, cells: Sequence[Cell], out: Path) -> list[str]:
    """The names of all pictures that the README may show; a contact sheet whose runs are gone stays as it is."""
    names: list[str] = []
    for dataset, entry in DATASETS.items():
        own = [cell for cell in cells if cell.dataset == dataset and cell.finished]
        if not own:
            continue
        for name, level in (("test_auc", "real_auc"), ("kid", "floor_kid")):
            levels = [getattr(result, level) for cell in own for result in cell.finished]
            known = [value for value in levels if value is not None]
            lines = {recipe: _points(own, recipe, name) for recipe in RECIPES if _points(own, recipe, name)}
            if lines:
                svg = over_epsilon(lines, ylabel=f"{_NAMES[name]}, {dataset}",
                                   level=("real images", fmean(known)) if known else None)  # fmt: skip
                names.append(f"{dataset}-{_NAMES[name].lower()}.svg")
                atomic_write(folder / names[-1], svg.encode())
        if entry.shareable:
            file = folder / f"{dataset}-sheet.png"
            if (png := _sheet(own, out)) is not None:
                atomic_write(file, png)
            names += [file.name] if file.exists() else []
    return names


def _points(cells: Sequence[Cell], recipe: str, name: str) -> list[Point]:
    points = []
    for cell in cells:
        mean = cell.mean(name)
        if cell.recipe == recipe and mean is not None:
            points.append(Point(cell.epsilon, mean, *spread(cell.finished, name)))
    return points


def _sheet(cells: Sequence[Cell], out: Path) -> bytes | None:
    """Synthetic images of every recipe at one epsilon; None where a run of theirs is no longer there."""
    rows, captions = [], []
    for cell in (cell for cell in cells if cell.epsilon == _SHEET_EPSILON):
        result = cell.finished[0]
        file = released(out, result)
        if file is None:
            return None
        study = parse_study(json.loads(result.settings), where=cell.recipe)
        images = synthetic_set(file, study.data)
        rows += [(f"{cell.recipe}: {name}", images, label) for label, name in enumerate(study.data.classes)]
        privacy, spent = study.privacy, two_digits_up(result.epsilon_spent or cell.epsilon)
        captions.append(
            f"delta {privacy.delta:g} per {privacy.unit} and site, trust model {privacy.trust}, spent {spent}"
        )
    if not rows:
        return None
    said = "; ".join(dict.fromkeys(captions))
    return sheet(rows, f"Synthetic images, no patients. epsilon {_SHEET_EPSILON:g}, {said}.")
