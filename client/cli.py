"""The command of a site: `synthward-site check` and `synthward-site status`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.errors import SynthwardError

app = typer.Typer(
    help="A hospital's side of a synthward study: check the data, read the ledger. Nothing leaves this machine.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
Sites = Annotated[list[Path], typer.Argument(help="site files (TOML)", metavar="SITE.toml...")]
StudyFile = Annotated[Path, typer.Option("--study", help="the study file", metavar="STUDY.toml")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
def check(sites: Sites, study: StudyFile, as_json: AsJson = False) -> None:
    """Load the site's images and check them against a study; shows class counts on this screen only.

    Example: synthward-site check site.toml --study configs/pneumonia.toml
    """
    from client.site import Site
    from common.study import load_study

    settings = load_study(study)
    rows = []
    for path in sites:
        site = Site.open(path, settings)
        site.config.policy.permit(settings, records=len(site.splits.train))
        report = site.report
        rows.append({"name": site.config.name, "train": list(report.train_counts),
                     "holdout": list(report.holdout_counts), "warnings": list(report.warnings)})  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']}: ready")
        for part in ("train", "holdout"):
            counts = ", ".join(f"{n} {c}" for n, c in zip(settings.data.classes, row[part], strict=True))
            print(f"  {part:<8} {sum(row[part])} records: {counts}")
        for warning in row["warnings"]:
            print(f"  warning  {warning}")


@app.command()
def status(sites: Sites, study: StudyFile, as_json: AsJson = False) -> None:
    """Show what a study has spent at this site, from the site's own ledger.

    Example: synthward-site status site.toml --study configs/pneumonia.toml
    """
    from client.privacy.ledger import Ledger
    from client.site import load_site_config
    from common.study import load_study

    settings = load_study(study)
    privacy, rows = settings.privacy, []
    for path in sites:
        config = load_site_config(path)
        ledger = Ledger(config.state / "ledger.sqlite")
        spent = ledger.spent(delta=privacy.delta, accountant=privacy.accountant, study=settings.sha256)
        in_all = ledger.spent(delta=privacy.delta, accountant=privacy.accountant)
        reserved, confirmed = ledger.counts(settings.sha256)
        ledger.close()
        rows.append({"name": config.name, "study": spent, "all_studies": in_all, "reserved": reserved,
                     "confirmed": confirmed, "ceiling": config.policy.max_epsilon})  # fmt: skip
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        spent = row["study"]
        print(
            f"{row['name']}: epsilon {spent['train']:.3f} on train and {spent['holdout']:.3f} on held-out "
            f"records in this study (delta {privacy.delta:g}); all studies {max(row['all_studies'].values()):.3f} of "
            f"{row['ceiling']:g}; {row['reserved']} requests reserved, {row['confirmed']} confirmed"
        )


def main() -> None:
    """Entry point; an error is one line on standard error and its exit code."""
    try:
        app()
    except SynthwardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
