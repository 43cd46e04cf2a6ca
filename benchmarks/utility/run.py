"""The utility benchmark: `python -m benchmarks.utility.run`, every row of the grid by `synthward run`, then the table.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.utility.grid import REPOSITORY, Row, full_grid, quick_grid
from benchmarks.utility.results import load
from common.commands import run as run_command
from common.errors import DataError, StorageError, StudyError, SynthwardError

HOME = Path(__file__).resolve().parent  # where the committed results, table and pictures are
RESULTS = "results.csv"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="folder with the sets' npz files")] = REPOSITORY.parent / "shared" / "data",
    out: Annotated[Path, typer.Option(help="folder of the run folders")] = REPOSITORY / "runs" / "bench-utility",
    report: Annotated[
        Path | None, typer.Option(help="folder of results.csv, README.md and pictures; default: here, quick: OUT")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="two small runs in under ten minutes")] = False,
    only: Annotated[str, typer.Option(help="only rows with this in their name")] = "",
    minutes: Annotated[float | None, typer.Option(help="begin no row that may end after that many", min=0)] = None,
    listing: Annotated[bool, typer.Option("--list", help="list the rows and stop")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="write the table anew and stop")] = False,
) -> None:
    """Run what is missing of the grid, one row of results.csv a run, and write the table.

    It can be stopped and begun again at any time: what is finished is not run twice, what was begun goes on.

    Examples:

      python -m benchmarks.utility.run --quick

      python -m benchmarks.utility.run --only pneumoniamnist-eps8 --minutes 180
    """
    report = report or (out if quick else HOME)
    if quick and report.resolve() == HOME:
        raise StudyError(
            "quick rows do not belong among the committed results", where="--report", remedy="Give another folder."
        )
    rows = [row for row in (quick_grid() if quick else full_grid()) if only in row.identity]
    if not rows:
        raise StudyError(f"no row has '{only}' in its name", where="--only", remedy="See --list.")
    if listing:
        _list(rows, report / RESULTS)
        return
    failed = [] if table_only else _run(rows, data, out, report / RESULTS, minutes)
    _write_table(report, out)
    if failed:
        raise FailedRows(f"{len(failed)} of {len(rows)} rows failed ({', '.join(failed)})", remedy="See their logs.")


class FailedRows(SynthwardError):
    """Some rows ended with an error; the others are in the table."""

    exit_code = 1


def _run(rows: list[Row], data: Path, out: Path, results: Path, minutes: float | None) -> list[str]:
    """Run what is missing; the names of the rows that failed."""
    from benchmarks.utility.rows import Bench

    until = None if minutes is None else time.monotonic() + 60 * minutes
    available = [row for row in rows if not row.not_available()]
    _check_data(available, data)
    load(results)  # a table that cannot be read is better known before hours of work
    failed = []
    with _stoppable(), _locked(out) as lock:
        bench = Bench(data=data.resolve(), out=out.resolve(), results=results, lock=lock)
        for number, row in enumerate(rows, 1):
            head = f"[{number}/{len(rows)}] {row.identity}"
            why = row.not_available()
            if why or bench.is_done(row):
                _say(f"{head}: {why or 'done before'}")
                continue
            left = None if until is None else (until - time.monotonic()) / 60
            need = bench.minutes_left(row)
            if left is not None and left < need:
                _say(f"{head}: not begun, since it may take {need:.0f} minutes and {max(0.0, left):.0f} are left")
                continue
            _say(f"{head}: at most {need:.0f} minutes; log: {bench.log(row)}")
            try:
                _say(f"{head}: {bench.run(row)}")
            except SynthwardError as error:
                _say(f"{head}: failed: {error}")
                failed.append(row.identity)
    return failed


def _list(rows: list[Row], results: Path) -> None:
    from benchmarks.utility.rows import is_done

    done, _ = load(results)
    for row in rows:
        state = row.not_available() or ("done" if is_done(row, done) else f"at most {row.budget_minutes:g} minutes")
        print(f"{row.identity:<44} {state}")


def _check_data(rows: list[Row], data: Path) -> None:
    from benchmarks.utility.grid import DATASETS

    for name in dict.fromkeys(row.dataset for row in rows):
        if not (data / DATASETS[name].file).is_file():
            raise DataError(
                f"no {DATASETS[name].file} there", where=str(data),
                remedy="Give the folder of the npz files: --data DIR, or make bench-utility DATA=DIR.",
            )  # fmt: skip


def _write_table(report: Path, out: Path) -> None:
    from benchmarks.utility.table import write_report

    results, broken = load(report / RESULTS)
    if broken:
        _say(f"{broken} line(s) of {report / RESULTS} were cut off and are passed over")
    _say(f"table: {write_report(report, results, out)}")


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Only one benchmark at a time in a folder; its commands hold the lock too, should this process be killed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"cannot be used ({error.strerror})", where=str(out), remedy="Give another folder with --out."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError as error:
        raise StorageError(
            "another benchmark is at work there", where=str(out), remedy="Wait for it, or give --out."
        ) from error
    finally:
        os.close(handle)


@contextmanager
def _stoppable() -> Iterator[None]:
    """A polite kill is treated as Ctrl-C, so that the command under way is ended too."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    going_on = "interrupted: the same command goes on where it stopped"
    run_command(app, program="benchmarks.utility.run", interrupted=going_on)
