"""The Flower ServerApp of the coordinator: from Flower's context to the pipeline, nothing else.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.accounting import plan_study
from common.errors import StudyError
from common.study import load_study
from server import pipeline
from server.checkpoints import RunFolder
from server.federation.sites import SiteGroup
from server.progress import Progress
from server.synthesis.public_set import check_public_set

app = ServerApp()
RUN_VARIABLE = "SYNTHWARD_RUN"


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = run_folder(context)
    study = folder.study()
    pipeline.run(folder, SiteGroup(grid, timeout_seconds=study.federation.timeout_seconds), Progress(folder))


def run_folder(context: Context) -> RunFolder:
    """The run's folder: made beforehand by `synthward run`; in a deployment named, or made, by the run's config.

    Run config: `run-dir` = an existing run folder to go on with, or empty; `study` = the study file for a new one;
    `out` = where new run folders are made.
    """
    given = str(context.run_config.get("run-dir", "")) or os.environ.get(RUN_VARIABLE, "")
    if given:
        return RunFolder.open(Path(given))
    file = str(context.run_config.get("study", ""))
    if not file:
        raise StudyError("no study given", where="run-config: study", remedy="Pass --run-config 'study=\"PATH\"'.")
    study = load_study(Path(file))
    check_public_set(study)  # before any site is asked
    return RunFolder.create(Path(str(context.run_config.get("out", "") or "runs")), study, plan_study(study))
