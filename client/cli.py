"""The command of a site: check the data, approve studies, serve the data, read the ledger.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.commands import run
from common.errors import SynthwardError

if TYPE_CHECKING:  # the commands import late, so that --help is quick
    from client.privacy.ledger import Ledger
    from client.site import SiteConfig

app = typer.Typer(
    help="A hospital's side of a synthward study. Only `serve` answers anybody, and only over a local socket.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
Sites = Annotated[list[Path], typer.Argument(help="site files (TOML)", metavar="SITE.toml...")]
StudyFile = Annotated[Path, typer.Option("--study", help="the study file", metavar="STUDY.toml")]
OneSite = Annotated[Path, typer.Argument(help="site file (TOML)", metavar="SITE.toml")]
StudyArgument = Annotated[Path, typer.Argument(help="the study file", metavar="STUDY.toml")]
By = Annotated[str, typer.Option("--by", help="name and role of the person who decides", metavar="NAME")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def init(
    site: Annotated[Path, typer.Argument(help="the site file to write", metavar="SITE.toml")],
    name: Annotated[str, typer.Option(help="what the coordinator may call this site")],
    data: Annotated[Path, typer.Option(help="the images (npz), absolute or relative to the site file")],
) -> None:
    """Write a commented site file with this hospital's policy, and its empty ledger. Overwrites nothing.

    Example: synthward-site init /srv/synthward/site.toml --name hospital-a --data images.npz
    """
    from client.site import load_site_config
    from client.template import site_file_text
    from common.errors import DataError
    from common.files import atomic_write

    if site.exists():
        raise DataError("exists already", where=str(site), remedy="Edit it, or give another path.")
    atomic_write(site, site_file_text(name, data).encode())
    try:
        config = load_site_config(site)
    except SynthwardError:
        site.unlink()
        raise
    config.ledger().close()
    print(f"{site}: written; read its [policy] and set this hospital's ceilings\n{config.state}: ledger begun")


@app.command()
def check(sites: Sites, study: StudyFile, as_json: AsJson = False) -> None:
    """Load the site's images and check them against a study; shows class counts on this screen only.

    Example: synthward-site check site.toml --study configs/pneumonia.toml
    """
    from client.site import Site
    from common.accounting import plan_study
    from common.study import load_study

    settings = load_study(study)
    plan, rows = plan_study(settings), []
    for path in sites:
        site = Site.open(path, settings)
        # Whether it is approved is another matter: the check comes before, and `explain` after.
        site.config.policy.permit(settings, plan, site.cohort, approved=True)
        report = site.report
        rows.append({"name": site.config.name, "units": len(site.train), "train": list(report.train_counts),
                     "holdout": list(report.holdout_counts), "warnings": list(report.warnings)})  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']}: ready, {row['units']} training {settings.privacy.unit}s")
        for part in ("train", "holdout"):
            counts = ", ".join(f"{n} {c}" for n, c in zip(settings.data.classes, row[part], strict=True))
            print(f"  {part:<8} {sum(row[part])} images: {counts}")
        for warning in row["warnings"]:
            print(f"  warning  {warning}")


@app.command()
def explain(site: OneSite, study: StudyArgument) -> None:
    """Say in plain words what a study would take, ask and give here, and whether the policy allows it.

    The page is what an approver reads and signs. Exit code 3 when the policy or the ceilings say no. Spends nothing.

    Example: synthward-site explain site.toml configs/pneumonia.toml
    """
    from client.explain import explain as page
    from client.explain import judge
    from client.site import Site
    from common.accounting import plan_study
    from common.study import load_study

    settings = load_study(study)
    plan, opened = plan_study(settings), Site.open(site, settings)
    ledger = opened.config.ledger()
    verdict = judge(opened, ledger, settings, plan)
    ledger.close()
    print(page(opened, settings, plan, verdict), end="")
    if not verdict.possible:
        raise SystemExit(3)


@app.command()
def approve(sites: Sites, study: StudyFile, by: By) -> None:
    """Let a study ask this site for what its file says; written into the ledger with name and time.

    Read first what `synthward-site explain` says of it.

    Example: synthward-site approve site.toml --study configs/pneumonia.toml --by "Dr. A. Example, data protection"
    """
    from common.study import load_study

    settings = load_study(study)
    privacy = settings.privacy
    for config, ledger in _ledgers(sites):
        ledger.note("approved", settings.sha256, by=_name(by), name=settings.study.name, epsilon=privacy.epsilon,
                    delta=privacy.delta)  # fmt: skip
        print(f"{config.name}: study {settings.study.name} ({settings.sha256[:12]}) is approved by {by}")


@app.command()
def revoke(sites: Sites, study: StudyFile, by: By) -> None:
    """Take an approval back: from now on the study gets nothing but a refusal. What was spent stays spent.

    Example: synthward-site revoke site.toml --study configs/pneumonia.toml --by "Dr. A. Example, data protection"
    """
    from common.errors import DataError
    from common.study import load_study

    settings = load_study(study)
    for config, ledger in _ledgers(sites):
        if ledger.approval(settings.sha256) is None:
            raise DataError(
                f"study {settings.study.name} ({settings.sha256[:12]}) is not approved here", where=str(config.state)
            )
        ledger.note("revoked", settings.sha256, by=_name(by), name=settings.study.name)
        print(f"{config.name}: the approval of {settings.study.name} ({settings.sha256[:12]}) is revoked")


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

    if once is not None:
        atomic_write(once, render(sites).encode())
        return
    try:
        http = server(sites, port)
    except OSError as error:
        raise DataError(f"cannot listen ({error.strerror})", where=f"--port {port}", remedy="Try --port 0.") from error
    print(f"http://{HOST}:{http.server_address[1]}/  (Ctrl-C ends it)", flush=True)
    try:
        http.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        http.server_close()


@app.command()
def serve(
    sites: Sites,
    sockets: Annotated[Path, typer.Option(help="folder of the sockets, one a site: NAME OF SITE FILE.sock")],
    while_stdin: Annotated[bool, typer.Option("--while-stdin", help="end when standard input closes")] = False,
) -> None:
    """Own the site's images and answer a study's requests over a local socket, until stopped.

    Start the SuperNode beside it, under another user, with --node-config 'site="SOCKETS/site.sock"'.

    Example: synthward-site serve site.toml --sockets /run/synthward
    """
    import os
    import signal
    import threading

    from client.service import exposed, serving
    from client.site import load_site_config

    os.umask(0o077)  # ledger, answers and log are for this user alone
    for path in (found for site in sites for found in exposed(load_site_config(site))):
        if not while_stdin:
            print(f"warning: {path}: every user of this machine may read it; chmod o-rwx", file=sys.stderr, flush=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with serving(sites, sockets) as made:
        print("ready: " + " ".join(map(str, made)), flush=True)
        if while_stdin:
            sys.stdin.buffer.read()
            os._exit(0)  # whoever started us is gone: an answer under way is reserved, so nothing is under-counted
        stop.wait()
    print("stopped")


@app.command("verify-ledger")
def verify_ledger(sites: Sites) -> None:
    """Check that no entry of the ledger was changed, removed or inserted, and print its newest hash.

    Note the hash down elsewhere: it shows later that nothing up to here was changed.

    Example: synthward-site verify-ledger site.toml
    """
    for config, ledger in _ledgers(sites):
        number, newest = ledger.head()
        print(f"{config.name}: {number} entries, unbroken; newest hash {newest}")


def _ledgers(sites: list[Path]) -> Iterator[tuple[SiteConfig, Ledger]]:
    from client.site import load_site_config

    for path in sites:
        config = load_site_config(path)
        ledger = config.ledger()
        try:
            yield config, ledger
        finally:
            ledger.close()


def _name(by: str) -> str:
    from common.errors import DataError

    name = " ".join(by.split())
    if not name:
        raise DataError("no name given", where="--by", remedy="Say who approves or revokes.")
    return name


def main() -> None:
    """Entry point."""
    run(app, interrupted="interrupted; what was reserved counts as spent")


if __name__ == "__main__":
    main()
