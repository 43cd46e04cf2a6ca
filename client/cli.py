"""The command of a site: check the data, approve studies, serve the data, read the ledger.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.carrier.commands import add_to as add_carrier_commands
from common.commands import Stopped, run

if TYPE_CHECKING:  # the commands import late, so that --help is quick
    from client.privacy.ledger import Ledger
    from client.site import Site, SiteConfig
    from common.accounting import StudyPlan
    from common.study import Study

app = typer.Typer(
    help="A hospital's side of a synthward study. Only `serve` answers anybody, and only over a local socket.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
Sites = Annotated[list[Path], typer.Argument(help="site files (TOML)", metavar="SITE.toml...")]
StudyFile = Annotated[Path, typer.Option("--study", help="the study file", metavar="STUDY.toml")]
OneSite = Annotated[Path, typer.Argument(help="site file (TOML)", metavar="SITE.toml")]
By = Annotated[str, typer.Option("--by", help="name and role of who decides", metavar="NAME")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def init(
    sites: Annotated[list[Path], typer.Argument(help="the site file to write", metavar="SITE.toml")],
    name: Annotated[str | None, typer.Option(help="what the coordinator may call this site")] = None,
    data: Annotated[Path | None, typer.Option(help="the images (npz), absolute or relative to the site file")] = None,
) -> None:
    """Write a commented site file with this hospital's policy, and begin its ledger. Overwrites nothing.

    For a site file that is there already, without --name and --data: begin its ledger only. No other command makes one.

    Example: synthward-site init /srv/synthward/site.toml --name hospital-a --data images.npz
    """
    from client.beginning import begin
    from client.owner import act_as_owner
    from client.site import load_site_config
    from common.errors import DataError

    if len(sites) > 1 and (name is not None or data is not None):
        raise DataError("one name and one file of images are of one site", where="init", remedy="Give one SITE.toml.")
    for site in sites:
        act_as_owner(load_site_config(site).state if name is None and site.exists() else site.absolute().parent, site)
        config = begin(site, name, data)
        if name is not None:
            print(f"{site}: written; read its [policy] and set this hospital's ceilings")
        print(f"{config.state}: ledger begun; back this folder up whole")
        if config.missing is not None:
            print(f"warning: {config.missing} is not there (yet)", file=sys.stderr)


@app.command()
def check(
    sites: Sites,
    study: StudyFile,
    as_json: AsJson = False,
    picture: Annotated[Path | None, typer.Option(help="also show the most unusual images", metavar="FILE.png")] = None,
) -> None:
    """Load the site's images and check them against a study; shows counts and brightness on this screen only.

    Example: synthward-site check site.toml --study configs/pneumonia.toml --picture unusual.png
    """
    from client.approval import require_meant
    from client.site import Site
    from common.errors import DataError
    from common.files import atomic_write

    if picture is not None and len(sites) > 1:
        raise DataError("one picture shows one site", where="--picture", remedy="Give a single site file.")
    settings, plan = _tried(study, sites)
    rows = []
    for path in sites:
        site = Site.open(path, settings)
        site.config.policy.permit(settings, plan, site.cohort)
        if picture is not None:
            atomic_write(picture, site.unusual)
            print(f"{picture}: written (PNG): the strangest train images, with row: label", file=sys.stderr)
        require_meant(site)
        rows.append(_row(site, *site.cohort.warnings(settings)))
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']}: ready, {row['units']} training {settings.privacy.unit}s")
        for part in ("train", "holdout"):
            counts = ", ".join(f"{n} {c}" for n, c in zip(settings.data.classes, row[part], strict=True))
            print(f"  {part:<8} {sum(row[part])} images: {counts}")
        for line in row["looks"]:
            print(f"  {line}")
        for warning in row["warnings"]:
            print(f"  warning  {warning}")


@app.command()
def explain(site: OneSite, study: Annotated[Path, typer.Argument(help="its file", metavar="STUDY.toml")]) -> None:
    """Say in plain words what a study would take, ask and give here, and whether the policy allows it.

    The page is what an approver reads and signs. Exit code 3 when the policy or the ceilings say no. Spends nothing.

    Example: synthward-site explain site.toml configs/pneumonia.toml
    """
    from client.approval import judge
    from client.explain import explain as page
    from client.site import Site

    settings, plan = _tried(study, [site])
    with closing(_ledger(site)[1]) as ledger:
        opened = Site.open(site, settings)
        verdict = judge(opened, ledger, settings, plan)
    print(page(opened, settings, plan, verdict), end="")
    if not verdict.possible:
        raise SystemExit(3)


@app.command()
def approve(sites: Sites, study: StudyFile, by: By, as_json: AsJson = False) -> None:
    """Let a study ask this site for what its file says, of the records that are here now.

    Opens and checks the images, asks every rule of the policy, and writes plan, data digest, name and time into the
    ledger. Read first what `synthward-site explain` says. When the images change, approve again.

    Example: synthward-site approve site.toml --study configs/pneumonia.toml --by "Dr. A. Example, data protection"
    """
    from client.approval import approve as decide
    from client.approval import clean_name
    from client.explain import cost_in_words, room_in_words
    from client.site import Site

    who = clean_name(by)
    settings, plan = _tried(study, sites)
    rows = []
    for path in sites:
        with closing(_ledger(path)[1]) as ledger:
            site = Site.open(path, settings)
            approval, verdict = decide(site, ledger, settings, plan, by=who)
        rows.append(_row(site, *site.cohort.warnings(settings)))
        if as_json:
            continue
        print(f"{site.config.name}: study {approval.name} ({approval.study[:12]}) is approved by {approval.by}")
        print(f"  cost     {cost_in_words(settings, plan)}")
        print(f"  ceiling  {room_in_words(verdict, site.config.policy.max_epsilon)}")
        for warning in verdict.warnings:
            print(f"  warning  {warning}")
    if as_json:
        print(json.dumps(rows))


@app.command()
def revoke(
    sites: Sites,
    by: By,
    study: Annotated[Path | None, typer.Option("--study", help="by its file", metavar="STUDY.toml")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="by (the first digits of) its SHA-256")] = None,
    name: Annotated[str | None, typer.Option("--name", help="by its name")] = None,
) -> None:
    """Take an approval back: from now on the study gets nothing but a refusal. What was spent stays spent.

    Example: synthward-site revoke site.toml --study configs/pneumonia.toml --by "Dr. A. Example, data protection"
    """
    from client.approval import chosen, clean_name
    from common.errors import DataError
    from common.study_file import load_study

    if [study, sha256, name].count(None) != 2:
        raise DataError("say which study, in one way", where="revoke", remedy="Give --study, --sha256 or --name.")
    who, digest = clean_name(by), sha256 if study is None else load_study(study).sha256
    for config, ledger in _ledgers(sites):
        approval = chosen(ledger, sha256=digest, name=name)
        ledger.revoke(approval.study, by=who)
        print(f"{config.name}: the approval of {approval.name} ({approval.study[:12]}) is revoked")


@app.command()
def budget(
    sites: Sites,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="also draw epsilon over time", metavar="FILE.svg")] = None,
) -> None:
    """Show what was asked, allowed, refused and spent at this site, by study and stage.

    Example: synthward-site budget site.toml --plot budget.svg
    """
    from client.account import account_of, budget_table
    from client.page import chart
    from common.errors import DataError
    from common.files import atomic_write

    if plot is not None and len(sites) > 1:
        raise DataError("one picture shows one site", where="--plot", remedy="Give a single site file.")
    accounts = [account_of(config.name, ledger, config.policy) for config, ledger in _ledgers(sites)]
    print(json.dumps([a.to_json() for a in accounts]) if as_json else "\n\n".join(map(budget_table, accounts)))
    if plot is not None:
        atomic_write(plot, str(chart(accounts[0])).encode())


@app.command()
def page(
    sites: Sites,
    port: Annotated[int, typer.Option(help="on 127.0.0.1; 0 takes a free one")] = 8765,
    once: Annotated[Path | None, typer.Option(help="write the page to a file and end", metavar="FILE.html")] = None,
) -> None:
    """Show the data-protection officer's page to a browser on this machine, until stopped. It can only be read.

    Example: synthward-site page site.toml
    """
    from client.page import HOST, render, server
    from common.errors import DataError
    from common.files import atomic_write

    list(_ledgers(sites))  # one that is lost stops this command, as every other
    if once is not None:
        atomic_write(once, render(sites).encode())
        print(once)
        return
    try:
        http = server(sites, port)
    except OSError as error:
        raise DataError(f"cannot listen ({error.strerror})", where=f"--port {port}", remedy="Try --port 0.") from error
    print(f"http://{HOST}:{http.server_address[1]}/  (Ctrl-C ends it)", flush=True)
    try:
        http.serve_forever()
    except Stopped:
        print("stopped")
    finally:
        http.server_close()


@app.command()
def serve(
    sites: Sites,
    sockets: Annotated[Path, typer.Option(help="folder of the sockets, one per site: NAME OF SITE FILE.sock")],
    while_stdin: Annotated[bool, typer.Option("--while-stdin", help="end when standard input closes")] = False,
) -> None:
    """Own the site's images and answer a study's requests over a local socket, until stopped.

    Beside it, under another user, `synthward-site carry` brings the requests.

    Example: synthward-site serve site.toml --sockets /run/synthward
    """
    import os
    import signal
    import threading

    from client.service import serving, shortcomings

    os.umask(0o077)  # answers and log are for this user alone
    _placed(sites)
    for warning in () if while_stdin else shortcomings(sites):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda code, _: os._exit(128 + code) if stop.is_set() else stop.set())
    with serving(sites, sockets) as made:
        print("ready: " + " ".join(map(str, made)), flush=True)
        if while_stdin:
            sys.stdin.buffer.read()
            os._exit(0)  # whoever started us is gone: an answer under way is reserved, so nothing is under-counted
        stop.wait()
        print("stopping; an answer under way leaves first (a second signal ends it, its cost counted)", flush=True)
    print("stopped")


@app.command()
def backup(
    site: OneSite,
    to: Annotated[Path, typer.Option(help="the file to write; a new one for every backup", metavar="FILE.tar")],
) -> None:
    """Write ledger, key and stored answers into one file, as they are at one moment; also while `serve` answers.

    The file is as secret as the state folder: the ledger's key is in it.

    Example: synthward-site backup site.toml --to backups/2026-01-02.tar
    """
    from client.backup import back_up

    for config, ledger in _ledgers([site]):
        number, newest = back_up(ledger, to)
        print(f"{config.name}: {number} entries in {to}; newest hash {newest}")


@app.command()
def restore(
    site: OneSite,
    backup: Annotated[Path, typer.Option("--from", help="a file of `synthward-site backup`", metavar="FILE.tar")],
) -> None:
    """Put a backup back into the site's state folder, which has to be empty or gone.

    Whatever was spent since the backup was made is not in it, and nothing on this machine can tell: see docs/site.md.

    Example: synthward-site restore site.toml --from backups/2026-01-02.tar
    """
    from client.backup import restore as put_back
    from client.owner import act_as_owner
    from client.registry import Registry
    from client.site import load_site_config

    config = load_site_config(site)
    act_as_owner(config.state, site)
    registry = Registry(config.registry)
    with registry.locked():
        newest = put_back(backup, config.state, accept=registry.require_not_older)
    print(f"{config.name}: {newest.number} entries, the newest of {newest.at}, hash {newest.hash}")
    print("Losses after that are not in it. If an answer may have been given since, treat these images as spent.")


@app.command("verify-ledger")
def verify_ledger(sites: Sites) -> None:
    """Check that no entry of the ledger was changed, removed or inserted, and print its newest hash.

    Note the hash down elsewhere: it shows later that nothing up to here was changed.

    Example: synthward-site verify-ledger site.toml
    """
    _placed(sites)
    for config, ledger in _ledgers(sites):
        number, newest = ledger.head()
        print(f"{config.name}: {number} entries, unbroken; newest hash {newest}")


def _ledger(path: Path) -> tuple[SiteConfig, Ledger]:
    from client.owner import act_as_owner
    from client.registry import open_ledger
    from client.site import load_site_config

    config = load_site_config(path)
    act_as_owner(config.state)
    return config, open_ledger(config.name, config.state, config.registry)


def _row(site: Site, *warnings: str) -> dict[str, Any]:
    """A site's exact numbers, for its own screen."""
    report = site.report
    looks = [
        f"{look.part:<8} {look.name}: brightness {look.brightness:.0f}, contrast {look.contrast:.0f}, pixels"
        f" {look.darkest} to {look.brightest} of 255"
        for look in site.content.looks
        if look.images
    ]
    return {
        "name": site.config.name, "units": len(site.train), "train": list(report.train_counts),
        "holdout": list(report.holdout_counts), "warnings": [*warnings, *report.warnings, *site.content.warnings],
        "looks": looks,
    }  # fmt: skip


def _ledgers(sites: list[Path]) -> Iterator[tuple[SiteConfig, Ledger]]:
    for path in sites:
        config, ledger = _ledger(path)
        with closing(ledger):
            yield config, ledger


def _placed(sites: list[Path]) -> None:
    """Hold every site's ledger against what this machine knows of it: a copy, or an older backup, stops here."""
    from client.registry import Registry

    for config, ledger in _ledgers(sites):
        registry = Registry(config.registry)
        with registry.locked():
            registry.place(config.name, ledger)


def _tried(path: Path, sites: list[Path]) -> tuple[Study, StudyPlan]:
    """A study in which everything that it names was tried, and its plan; after a look at the sites' ledgers."""
    from common.accounting import plan_study
    from common.preflight import try_study
    from common.study_file import load_study

    study = load_study(path)
    for config, _ in _ledgers(sites):  # a site that lost its own learns it at once
        config.require_images()
    try_study(study)
    return study, plan_study(study)


add_carrier_commands(app)


def main() -> None:
    """Entry point."""
    run(app, program="synthward-site", interrupted="interrupted; what was reserved counts as spent")


if __name__ == "__main__":
    main()
