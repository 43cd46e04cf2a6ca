"""One row of the grid from command to CSV: begun, gone on with, ended by its time budget, measured.

SPDX-License-Identifier: Apache-2.0

    OUT/<row>/<code>-<study>/
        elapsed.json           minutes so far, over all processes
        log.txt                what the command printed
        <study>-<time>/        the run folder that `synthward run` made
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.utility.grid import DATASETS, Row
from benchmarks.utility.measure import RULER, measure
from benchmarks.utility.process import last_line, run_limited
from benchmarks.utility.provenance import code_version, commit, hardware
from benchmarks.utility.results import Result, Status, append, load
from common.errors import CheckpointError, FederationError
from common.files import canonical_json, read_json, write_json
from server.checkpoints import RunFolder

SYNTHWARD = (sys.executable, "-m", "server.cli")
_REAL_STEPS, _QUICK_REAL_STEPS = 300, 60  # not the study's own: all recipes of a set are measured in one space

Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Where things are, and with what they are run.

    Attributes:
        data: folder of the npz files.
        out: folder of the run folders.
        results: the CSV.
        lock: a file descriptor that every command keeps open.
        command: what stands before `run` in a command line; tests put another there.
        measure: makes the figures of a finished run.
    """

    data: Path
    out: Path
    results: Path
    lock: int | None = None
    command: Sequence[str] = SYNTHWARD
    measure: Measure = measure
    code: str = field(default_factory=code_version)

    def is_done(self, row: Row) -> bool:
        """Its row is in the CSV, of the same code, settings and ruler."""
        return is_done(row, load(self.results)[0], code=self.code)

    def minutes_left(self, row: Row) -> float:
        """What is left of the row's own budget, over the processes that it had."""
        return max(0.0, row.budget_minutes - _elapsed(self._folder(row)))

    def log(self, row: Row) -> Path:
        return self._folder(row) / "log.txt"

    def run(self, row: Row) -> str:
        """Run, or go on with, a row and append it to the CSV; says in a few words how it ended.

        Raises:
            FederationError: the command failed; its last line is the reason. What it saved is gone on with next time.
        CheckpointError: the software changed meanwhile.
            SynthwardError: as `measure` raises them.
        """
        self._check_code()
        folder = self._folder(row)
        run = run_folder(folder)
        if run is None or not _is_finished(run):
            in_time = self._go_on(row, folder, run)
            run = run_folder(folder)
            if not in_time:
                self._append(row, "over budget", {})
                return f"over budget: ended after {_elapsed(folder):.0f} minutes"
        if run is None:
            raise CheckpointError("the command made no run folder", where=str(folder))
        figures = self.measure(
            row.study(), run, self.data / DATASETS[row.dataset].file, cache=self.out / "real",
            real_steps=_QUICK_REAL_STEPS if row.quick else _REAL_STEPS,
        )  # fmt: skip
        self._append(row, "ok", figures)
        return f"AUC {figures['test_auc']:.3f}, macro F1 {figures['test_f1']:.3f}, {_elapsed(folder):.1f} minutes"

    def _go_on(self, row: Row, folder: Path, run: Path | None) -> bool:
        """Bring the row's run to its end; False where its time budget ended it."""
        if self.minutes_left(row) <= 0:
            return False
        if run is not None and _is_resumable(run):
            code = self._command(row, folder, ["run", "--resume", str(run)])
            if code != 0 and code is not None:  # spoilt: a fresh start may do
                return self._start(row, folder)
            return code == 0
        return self._start(row, folder)

    def _start(self, row: Row, folder: Path) -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [part for override in row.overrides for part in ("--set", override)]
        data = self.data / DATASETS[row.dataset].file
        arguments = ["run", str(row.study_file), "--data", str(data), "--out", str(folder), *overrides]
        code = self._command(row, folder, arguments)
        if code not in (0, None):
            raise FederationError(last_line(folder / "log.txt").removeprefix("error: "), where=str(folder / "log.txt"))
        return code == 0

    def _command(self, row: Row, folder: Path, arguments: list[str]) -> int | None:
        before = _elapsed(folder)

        def tick(seconds: float) -> None:
            write_json(folder / "elapsed.json", {"minutes": before + seconds / 60})

        ended = run_limited(
            [*self.command, *arguments], log=folder / "log.txt", tick=tick,
            limit_seconds=60 * (row.budget_minutes - before), keep=() if self.lock is None else (self.lock,),
        )  # fmt: skip
        return ended.code

    def _check_code(self) -> None:
        """Files that change while a run goes on would make it one of no version at all."""
        if code_version() != self.code:
            raise CheckpointError(
                "the software changed since this benchmark began, so that this row would mix two versions",
                remedy="Begin again, from a clone that nobody edits.",
            )  # fmt: skip

    def _append(self, row: Row, status: Status, figures: dict[str, Any]) -> None:
        self._check_code()
        study, (head, dirty) = row.study(), commit()
        append(self.results, Result(
            dataset=row.dataset, epsilon=row.epsilon, recipe=row.recipe, seed=row.seed, status=status,
            finished=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), code=self.code, commit=head, dirty=dirty,
            ruler=RULER, study_sha256=study.sha256, budget_minutes=row.budget_minutes,
            minutes=_elapsed(self._folder(row)), hardware=hardware(),
            settings=canonical_json(study.model_dump(mode="json")), **figures,
        ))  # fmt: skip

    def _folder(self, row: Row) -> Path:
        return self.out / row.identity / f"{self.code}-{row.study().sha256[:12]}"


def is_done(row: Row, results: list[Result], code: str | None = None) -> bool:
    """Whether a result of this row is there, of the present code, settings and ruler."""
    code, sha = code or code_version(), row.study().sha256
    return any(
        (result.code, result.study_sha256, result.ruler) == (code, sha, RULER)
        and (*result.cell, result.seed) == (row.dataset, row.epsilon, row.recipe, row.seed)
        and (result.status == "ok" or result.budget_minutes >= row.budget_minutes)
        for result in results
    )


def run_folder(folder: Path) -> Path | None:
    """The newest run folder inside a row's folder."""
    found = sorted(folder.glob("*/study.sha256"))
    return found[-1].parent if found else None


def released(out: Path, result: Result) -> Path | None:
    """The synthetic set behind a result, where its run folder is still there."""
    run = run_folder(out / _identity(result) / f"{result.code}-{result.study_sha256[:12]}")
    file = None if run is None else RunFolder(run).release / "images.npz"
    return file if file is not None and file.is_file() else None


def _identity(result: Result) -> str:
    return Row(result.dataset, result.epsilon, result.recipe, result.seed).identity


def _is_finished(run: Path) -> bool:
    return RunFolder(run).finished


def _is_resumable(run: Path) -> bool:
    """It got as far as its first stage; before that its sites have not approved it."""
    return (run / "plan.json").is_file() and (run / "events.jsonl").is_file()


def _elapsed(folder: Path) -> float:
    path = folder / "elapsed.json"
    return float(read_json(path)["minutes"]) if path.exists() else 0.0
