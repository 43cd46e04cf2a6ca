"""The table of runs as a CSV file: one row a run, appended whole or not at all.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from common.errors import DataError, StorageError
from common.files import atomic_write

Status = Literal["ok", "over budget"]


@dataclass(frozen=True)
class Result:
    """One finished run, or one that its time budget ended; figures are None where there are none.

    Attributes:
        finished: UTC.
        code: digest of the software's own files; `commit` and `dirty` name it for people.
        ruler: version of how figures are measured (`measure.RULER`).
        minutes: wall time over all processes of the run, start and end included; `budget_minutes` was allowed.
        epsilon_spent: the largest that a site's ledger holds.
        test_*, val_*: classifier trained on the synthetic set, on all real test or val images, exact; 95 % intervals.
        released_*: the private figures of the same, as the run publishes them, with their own intervals.
        reference_*: the private figures of the reference trained on real images under the same epsilon.
        kid … two_sample: of synthetic images against those trained on, means over sites; `kid_low` and `kid_high` are
            the smallest and the largest site's.
        fidelity_images: images of each kind that were compared, all sites together.
        holdout_*: of synthetic images against held-out ones.
        floor_*: the same with others of the site's real training images in place of the synthetic ones.
        real_auc, real_f1: classifier trained on all real training images without privacy, on the test images.
        settings: every setting of the study, as canonical JSON.
    """

    dataset: str
    epsilon: float
    recipe: str
    seed: int
    status: Status
    finished: str
    code: str
    commit: str
    dirty: str
    ruler: int
    study_sha256: str
    budget_minutes: float
    minutes: float
    hardware: str
    peak_memory_mb: float | None = None
    epsilon_spent: float | None = None
    images: int | None = None
    test_auc: float | None = None
    test_auc_low: float | None = None
    test_auc_high: float | None = None
    test_f1: float | None = None
    test_f1_low: float | None = None
    test_f1_high: float | None = None
    val_auc: float | None = None
    val_f1: float | None = None
    released_auc: float | None = None
    released_auc_low: float | None = None
    released_auc_high: float | None = None
    released_f1: float | None = None
    released_f1_low: float | None = None
    released_f1_high: float | None = None
    reference_auc: float | None = None
    reference_f1: float | None = None
    kid: float | None = None
    kid_low: float | None = None
    kid_high: float | None = None
    coverage: float | None = None
    recall: float | None = None
    two_sample: float | None = None
    holdout_kid: float | None = None
    holdout_two_sample: float | None = None
    fidelity_images: int | None = None
    floor_kid: float | None = None
    floor_coverage: float | None = None
    floor_recall: float | None = None
    floor_two_sample: float | None = None
    floor_holdout_kid: float | None = None
    floor_holdout_two_sample: float | None = None
    real_auc: float | None = None
    real_f1: float | None = None
    settings: str = "{}"

    @property
    def cell(self) -> tuple[str, float, str]:
        """The cell of the grid that the run belongs to, whatever its seed."""
        return self.dataset, self.epsilon, self.recipe


COLUMNS = tuple(field.name for field in fields(Result))
_KINDS = {field.name: str(field.type).removesuffix(" | None") for field in fields(Result)}
_OPTIONAL = {field.name for field in fields(Result) if field.default is not MISSING}


def load(path: Path) -> tuple[list[Result], int]:
    """(whole rows in their order, number of lines passed over because they are cut off or cannot be read).

    A line counts only with its line end: of a row that was cut within its last number, nothing would show.

    Raises:
        DataError: not a table of results.
        StorageError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot be read ({error})", where=str(path), remedy="Move it away.") from error
    lines = text.split("\n")
    cut_off = bool(lines.pop())  # what stands behind the last line end
    if not lines:
        return [], int(cut_off)
    header = lines[0].rstrip("\r").split(",")
    unknown, missing = set(header) - set(COLUMNS), set(COLUMNS) - set(header) - _OPTIONAL
    if unknown or missing or len(set(header)) != len(header):
        odd = sorted(unknown | missing) or ["one twice"]
        raise DataError(
            f"columns do not fit this version ({', '.join(odd[:3])})", where=str(path),
            remedy="Move the file away; the runs themselves are kept and are measured again.",
        )  # fmt: skip
    rows = [_parse(header, line) for line in lines[1:] if line.strip()]
    whole = [row for row in rows if row is not None]
    return whole, len(rows) - len(whole) + int(cut_off)


def append(path: Path, result: Result) -> None:
    """Add a row; after a crash the file holds either all rows or all rows but this one.

    Raises:
        DataError, StorageError: as `load`, or the file cannot be written.
    """
    kept, _ = load(path)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[_text(getattr(row, name)) for name in COLUMNS] for row in (*kept, result)])
    atomic_write(path, out.getvalue().encode())


def newest(results: list[Result]) -> list[Result]:
    """The last row of each cell and seed, in order of first appearance."""
    last = {(*row.cell, row.seed): row for row in results}
    return list(last.values())


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _parse(header: list[str], line: str) -> Result | None:
    try:
        (cells,) = csv.reader([line], strict=True)
        values = {name: _value(name, cell) for name, cell in zip(header, cells, strict=True)}
        result = Result(**values)
    except (ValueError, TypeError, csv.Error):
        return None
    return result if result.status in get_args(Status) else None


def _value(name: str, cell: str) -> Any:
    if cell == "" and name in _OPTIONAL:
        return None
    kind = _KINDS[name]
    if kind == "int":
        return int(cell)
    if kind == "float":
        number = float(cell)
        if not math.isfinite(number):
            raise ValueError(f"{name}: {cell}")
        return number
    return cell
