"""`synthward deploy`: the commands of a coordinator with real hospitals.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.commands import Stopped, need, told_to_stop
from common.errors import SynthwardError

if TYPE_CHECKING:  # the commands import late, so that --help is quick
    from server.checkpoints import RunFolder
    from server.deployment.folder import Deployment

app = typer.Typer(
    help="A coordinator with real hospitals: its services, whom they let in, and studies. See docs/coordinator.md.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
Folder = Annotated[Path, typer.Argument(help="the deployment's folder", metavar="FOLDER")]


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="a new folder for the deployment", metavar="FOLDER")],
    host: Annotated[str, typer.Option(help="the name or IP address by which hospitals reach this machine")],
    port: Annotated[int, typer.Option(help="of the proxy: the only one hospitals need")] = 8443,
    superlink_port: Annotated[int, typer.Option(help="of Flower's SuperLink, on loopback only")] = 18443,
    listen: Annotated[str, typer.Option(help="address on which the proxy listens")] = "0.0.0.0",
) -> None:
    """Write keys, certificates, settings, the app bundle and the invitation for hospitals. Overwrites nothing.

    Example: synthward deploy init coordinator --host coordinator.example.org
    """
    from pydantic import ValidationError

    from common.errors import DataError
    from common.invitation import load_invitation
    from common.settings import settings_error_line
    from server.deployment.folder import Addresses, Deployment
    from server.deployment.services import require_path_without_blanks

    try:
        addresses = Addresses(host=host, port=port, superlink_port=superlink_port, listen=listen)
    except ValidationError as error:
        field, what, remedy = settings_error_line(error, Addresses)
        raise DataError(what, where=f"--{field.replace('_', '-')}", remedy=remedy) from error
    require_path_without_blanks()
    made = Deployment.create(folder, addresses)
    file = made.path / "invitation.json"
    print(f"{made.path}: written; back it up, its keys are secret")
    print(f"{file}: give this to every hospital, and read to them by telephone:")
    print(f"  fingerprint  {load_invitation(file).fingerprint}")
    print(f"Then: synthward deploy up {folder}")


@app.command()
def admit(
    folder: Folder,
    key: Annotated[
        Path, typer.Argument(help="the file that the hospital's `synthward-site join` wrote", metavar="NAME.pub")
    ],
    fingerprint: Annotated[str, typer.Option(help="as the hospital reads it out by telephone")],
) -> None:
    """Let a hospital's carrier in.

    Example: synthward deploy admit coordinator hospital-a.pub --fingerprint "1f2e 3d4c 5b6a 7988 1f2e 3d4c 5b6a 7988"
    """
    from server.deployment import nodes

    deployment = _open(folder)
    carrier = nodes.admit(deployment, key, said=fingerprint)
    waits = nodes.register(deployment, carrier.name)
    print(f"{carrier.name}: admitted{f'; {waits}' if waits else ''}")


@app.command()
def dismiss(folder: Folder, name: Annotated[str, typer.Argument(help="of the carrier", metavar="NAME")]) -> None:
    """Let a carrier in no longer. Its key is spent: to come back, the hospital joins anew.

    Example: synthward deploy dismiss coordinator hospital-a
    """
    from server.deployment import nodes

    nodes.dismiss(_open(folder), name)
    print(f"{name}: dismissed")


@app.command()
def renew(folder: Folder) -> None:
    """Make a new server certificate. Hospitals need nothing: they know its authority. Restart the services then.

    Example: synthward deploy renew coordinator
    """
    from server.deployment.certificates import days_left

    deployment = _open(folder)
    deployment.renew()
    days = days_left(deployment.certificate)
    print(f"{deployment.certificate}: good for {days:.0f} days; restart `synthward deploy up`")


@app.command()
def ship(folder: Folder) -> None:
    """Bundle the code that is installed here, after an update of synthward, and sign the new invitation.

    Every hospital needs it; to one that has joined, the signature says that it is yours.

    Example: synthward deploy ship coordinator
    """
    from common.invitation import load_invitation

    deployment = _open(folder)
    digest = deployment.ship()
    print(f"{deployment.path / 'invitation.json'}: bundle {digest}")
    print(f"  fingerprint  {load_invitation(deployment.path / 'invitation.json').fingerprint}")


@app.command()
def up(
    folder: Folder,
    metrics_port: Annotated[
        int | None, typer.Option(help="also answer Prometheus at http://127.0.0.1:PORT/metrics", metavar="PORT")
    ] = None,
) -> None:
    """Run Flower's SuperLink and the proxy before it until stopped; whichever ends is started again.

    Examples:

      synthward deploy up coordinator

      synthward deploy up coordinator --metrics-port 9464
    """
    from server.deployment.services import up as run_services

    deployment = _open(folder)
    if metrics_port is not None:
        need("prometheus_client")
        from server.deployment.metrics import serve_metrics

        serve_metrics(deployment, metrics_port)
    run_services(deployment, told_to_stop(), _say)
    _say("stopped")


@app.command()
def run(
    folder: Folder,
    study: Annotated[
        Path | None, typer.Argument(help="the study file that the hospitals approved", metavar="STUDY.toml")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run folder", metavar="RUN")] = None,
) -> None:
    """Run a study over the admitted hospitals, to a release; goes on by itself when Flower's SuperLink is restarted.

    Stopping this command does not stop the study: `--resume RUN` follows it again, `synthward deploy stop` ends it.

    Examples:

      synthward deploy run coordinator study.toml

      synthward deploy run coordinator --resume coordinator/runs/demo-20260102-030405
    """
    import shlex

    from common.errors import StudyError
    from server.checkpoints import RunFolder
    from server.deployment.studies import carry_on
    from server.planning import summary

    deployment = _open(folder)
    if (study is None) == (resume is None):
        raise StudyError("give a study file, or --resume RUN", where="STUDY.toml")
    followed = _begun(deployment, study) if study is not None else RunFolder.open(_within(deployment, resume))
    again = f"synthward deploy run {shlex.quote(str(folder))} --resume {shlex.quote(str(followed.path))}"
    try:
        carry_on(deployment, followed, _say)
    except SynthwardError as error:
        raise type(error)(error.what, where=error.where, remedy=f"{error.remedy} Then: {again}".strip()) from error
    except Stopped as stopped:
        raise Stopped(stopped.number, f"no longer watching; the study goes on. Follow it with: {again}") from None
    print(summary(followed))


@app.command()
def stop(folder: Folder, run_dir: Annotated[Path, typer.Argument(help="its run folder", metavar="RUN")]) -> None:
    """End a running study's server app. What was finished is kept; `run --resume` goes on with it.

    Example: synthward deploy stop coordinator coordinator/runs/demo-20260102-030405
    """
    from server.checkpoints import RunFolder
    from server.deployment import studies

    deployment = _open(folder)
    studies.stop(deployment, RunFolder.open(_within(deployment, run_dir)))
    print(f"{run_dir}: stopped")


@app.command()
def status(
    folder: Folder,
    watch: Annotated[bool, typer.Option("--watch", help="again every few seconds, until stopped")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the services, every hospital's carrier, and the newest study: stage, round, spent epsilon, last words.

    Example: synthward deploy status coordinator --watch
    """
    import time

    from server.deployment.status import status_of, table

    deployment = _open(folder)
    while True:
        found = status_of(deployment)
        print(json.dumps(found.model_dump(mode="json")) if as_json else table(found), flush=True)
        if not watch:
            return
        time.sleep(5)
        print()


@app.command()
def doctor(folder: Folder) -> None:
    """Check what a deployment needs: versions, clock, disk, memory, certificate, nginx, ports, SuperLink. Exit code 1
    when something is amiss.

    Example: synthward deploy doctor coordinator
    """
    from server.deployment.doctor import findings

    amiss = 0
    for finding in findings(_open(folder)):
        print(finding.line)
        amiss += not finding.good
    if amiss:
        raise SystemExit(1)


def _open(folder: Path) -> Deployment:
    from server.deployment.folder import Deployment

    return Deployment.open(folder)


def _begun(deployment: Deployment, file: Path) -> RunFolder:
    """A run folder for a study file, after everything that it names was tried."""
    from common.preflight import try_study
    from common.study_file import load_study
    from server.deployment.studies import begin
    from server.synthesis.public_set import check_public_set, with_absolute_path

    need("matplotlib")  # at the end: the report's charts
    study = with_absolute_path(load_study(file))
    _say(f"{study.study.name}: trying what the study names, and solving for the noise ...")
    try_study(study)
    check_public_set(study)
    folder = begin(deployment, study)
    _say(f"run folder: {folder.path}; in a browser: {folder.path / 'live.html'}")
    return folder


def _within(deployment: Deployment, run_dir: Path | None) -> Path:
    """A run folder's absolute path: the server app runs elsewhere."""
    assert run_dir is not None
    if run_dir.exists() or run_dir.is_absolute():
        return run_dir.absolute()
    return deployment.path / "runs" / run_dir


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
