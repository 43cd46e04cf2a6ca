"""The command of the coordinator: `synthward run`, `verify`, `release`, `deploy`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.commands import need
from common.commands import run as run_command
from common.errors import StudyError, SynthwardError
from server.deployment.commands import app as deploy

if TYPE_CHECKING:  # the commands import late, so that --help is quick
    from common.accounting import StudyPlan
    from common.study import Study
    from server.launch import SiteCheck

app = typer.Typer(
    help="Train one private diffusion model over several hospitals and release a synthetic image set.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
app.add_typer(deploy, name="deploy")


@app.command()
def run(
    study: Annotated[Path | None, typer.Argument(help="the study file (TOML)", metavar="STUDY.toml")] = None,
    data: Annotated[Path | None, typer.Option(help="MedMNIST-layout npz to shard; default: phantoms")] = None,
    public: Annotated[Path | None, typer.Option(help="npz of public images; default: as the study says")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="section.key=value", metavar="K=V")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop; spends nothing")] = False,
    resume: Annotated[Path | None, typer.Option(help="go on with this run folder", metavar="RUN")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run folders")] = Path("runs"),
) -> None:
    """Run a study with simulated sites on this machine, from real images or phantoms to a release.

    Public images, or drawn phantoms in their place, lend the synthetic ones their shapes; --public writes the path and
    the hash of a file into the study, so that every site sees which it is.

    A study cannot change once its run has begun; everything that it names is tried before, as by --dry-run.

    Examples:

      synthward run configs/demo.toml

      synthward run configs/pneumonia.toml --data pneumoniamnist.npz --set training.rounds=2

      synthward run configs/pneumonia.toml --data pneumoniamnist.npz --public public-radiographs.npz

      synthward run configs/pneumonia.toml --data pneumoniamnist.npz --dry-run

      synthward run --resume runs/demo-20260102-030405
    """
    if resume is not None:
        if study is not None or data is not None or public is not None or override:
            raise StudyError(
                "a resumed run keeps its study, data and settings", where="--resume",
                remedy="Give --resume alone, or start a new run without it.",
            )  # fmt: skip
        _go_on(resume)
        return
    if study is None:
        raise StudyError(
            "no study file given", where="STUDY.toml", remedy="For example: synthward run configs/demo.toml"
        )
    _start(study, data, (*(override or ()), *_named(public)), out, dry_run=dry_run)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a release, or the run folder of one", metavar="FOLDER")],
) -> None:
    """Check a release: its files, its claim's arithmetic, images and weights; and say what it promises. Asks nobody.

    Example: synthward verify runs/demo-20260102-030405
    """
    from server.release.verification import in_words, release_folder, verified

    release = release_folder(folder)
    print(in_words(release, verified(release)))


@app.command()
def release(
    run_dir: Annotated[Path, typer.Argument(help="the run folder", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="where to; default: RUN-release", metavar="FOLDER")] = None,
    dicom: Annotated[bool, typer.Option("--dicom", help="the set as DICOM files, too")] = False,
    uid_root: Annotated[str, typer.Option(help="root of their UIDs; default: as the study says")] = "",
) -> None:
    """Give a finished run's release away: checked once more, copied whole, refused where a limit is not met.

    What `synthward verify` checks is checked; then the claim is held against what the sites' ledgers reported to the
    run, and the set against the least that the study asks of it (release.min_auc, release.smallest_class).

    Examples:

      synthward release runs/demo-20260102-030405 --out chest-phantoms

      synthward release runs/demo-20260102-030405 --dicom --uid-root 1.2.826.0.1.3680043.10.1
    """
    from server.release.export import give_away

    if uid_root and not dicom:
        raise StudyError("goes with --dicom", where="--uid-root", remedy="Give both, or neither.")
    print(f"{give_away(run_dir, out, dicom=dicom, uid_root=uid_root)}: can be given away as it is")


def _named(public: Path | None) -> tuple[str, ...]:
    """The settings that name a public set."""
    if public is None:
        return ()
    import json

    from common.errors import DataError
    from common.files import sha256_file

    if not public.is_file():
        raise DataError("no such file", where=f"--public {public}", remedy="Give the path of an .npz file.")
    path = json.dumps(str(public.resolve()), ensure_ascii=False)  # which is TOML's basic string, too
    return ('pretrain.source="npz"', f"pretrain.path={path}", f'pretrain.sha256="{sha256_file(public)}"')


def _start(study_path: Path, data: Path | None, overrides: tuple[str, ...], out: Path, *, dry_run: bool) -> None:
    from common.files import sha256_file
    from common.preflight import try_study
    from common.study_file import load_study
    from server.synthesis.public_set import check_public_set, with_absolute_path

    if not dry_run:
        need("ray", "matplotlib")  # before a run folder is made

    study = with_absolute_path(load_study(study_path, overrides))
    if study.federation.min_sites > study.simulation.sites:
        raise StudyError(
            f"{study.federation.min_sites} sites needed, {study.simulation.sites} simulated",
            where="federation.min_sites", remedy="Raise simulation.sites, or lower federation.min_sites.",
        )  # fmt: skip
    print(f"{study.study.name}: trying what the study names, solving for the noise and checking the sites' data ...",
          file=sys.stderr, flush=True)  # fmt: skip
    if study.pretrain.sha256 and data is not None and data.is_file() and sha256_file(data) == study.pretrain.sha256:
        raise StudyError("the public set is the sites' own file: its images would be used without any noise",
                         where="--public", remedy="Give images that are nobody's secret.")  # fmt: skip
    try_study(study)
    check_public_set(study)
    if dry_run:
        _dry_run(study, data)
    else:
        _simulate(_approved(study, data, out))


def _dry_run(study: Study, data: Path | None) -> None:
    import tempfile

    from common.files import atomic_write
    from common.study_file import study_toml
    from server.launch import check_sites, write_site_files
    from server.planning import describe

    with tempfile.TemporaryDirectory(prefix="synthward-") as scratch:
        file = Path(scratch) / "study.toml"
        atomic_write(file, study_toml(study).encode())
        plan, checks = _while_solving(study, check_sites, file, write_site_files(Path(scratch), study, data))
    print(describe(study, plan, checks), flush=True)


def _approved(study: Study, data: Path | None, out: Path) -> Path:
    """A new run folder whose simulated sites have approved the study; nothing is left where one of them does not."""
    import shutil
    from contextlib import suppress

    from server.checkpoints import RunFolder
    from server.launch import approve, write_site_files
    from server.planning import describe

    new = not out.exists()
    folder = RunFolder.create(out, study)
    try:
        sites = write_site_files(folder.path / "sites", study, data)
        plan, checks = _while_solving(study, approve, folder.path / "study.toml", sites)
        folder.keep_plan(plan)
    except BaseException:
        shutil.rmtree(folder.path, ignore_errors=True)
        if new:
            with suppress(OSError):
                out.rmdir()
        raise
    print(describe(study, plan, checks), file=sys.stderr, flush=True)
    return folder.path


def _while_solving(
    study: Study, ask: Callable[[Path, list[Path]], list[SiteCheck]], file: Path, sites: list[Path]
) -> tuple[StudyPlan, list[SiteCheck]]:
    """(plan, what the sites say): the sites solve the same plan for themselves, at the same time."""
    import threading

    from common.accounting import plan_study

    found: list[StudyPlan | Exception] = []

    def solve() -> None:
        try:
            found.append(plan_study(study))
        except Exception as error:
            found.append(error)

    solving = threading.Thread(target=solve, daemon=True)  # a stop does not wait for it
    solving.start()
    asked = ask(file, sites)  # in this thread: a stop ends the sites' command at once
    solving.join()
    (plan,) = found
    if isinstance(plan, Exception):
        raise plan
    return plan, asked


def _go_on(path: Path) -> None:
    from server.checkpoints import RunFolder

    folder = RunFolder.open(path)
    folder.study()
    if folder.finished:  # a release that is out must not change
        print(f"already finished: {folder.release / 'report.html'}")
        return
    _simulate(path)


def _simulate(path: Path) -> None:
    import shlex

    from common.commands import Stopped
    from server.checkpoints import RunFolder
    from server.planning import summary
    from server.simulation import simulate

    print(f"run folder: {path}", file=sys.stderr, flush=True)
    go_on = f"synthward run --resume {shlex.quote(str(path))}"
    try:
        simulate(RunFolder.open(path))
    except SynthwardError as error:
        raise type(error)(error.what, where=error.where, remedy=f"{error.remedy} Then: {go_on}".strip()) from error
    except Stopped as stop:
        raise Stopped(stop.number, f"interrupted; nothing that was finished is lost. Go on with: {go_on}") from None
    print(summary(RunFolder.open(path)))


def main() -> None:
    """Entry point."""
    run_command(app, program="synthward", interrupted="interrupted: nothing was begun")


if __name__ == "__main__":
    main()
