"""The Flower ServerApp of the coordinator: from Flower's context to the pipeline, nothing else.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.accounting import plan_study
from common.errors import CheckpointError, StudyError
from common.locks import held
from common.preflight import try_study
from common.study_file import load_study
from server import pipeline
from server.checkpoints import RunFolder
from server.deployment.nodes import admitted_nodes
from server.federation.sites import SiteGroup
from server.progress import Progress
from server.synthesis.public_set import check_public_set

app = ServerApp()
RUN_VARIABLE = "SYNTHWARD_RUN"


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = run_folder(context)
    timeout = folder.study().federation.timeout_seconds
    busy = CheckpointError(
        "another process works on this run", where=str(folder.path), remedy="Wait for it, or end it."
    )
    with held(folder.path / "run.lock", busy=busy):
        hoped = int(context.run_config.get("sites", 0) or 0)
        sites = str(context.run_config.get("admitted", ""))
        group = SiteGroup(
            grid, timeout_seconds=timeout, admitted=partial(admitted_nodes, Path(sites)) if sites else None
        )
        pipeline.run(folder, group, Progress(folder), hoped=hoped)


def run_folder(context: Context) -> RunFolder:
    """The run's folder: made beforehand by `synthward run`; in a deployment named, or made, by the run's config.

    Everything that the study names is tried before, so that no site is asked for a study that cannot come to its end.

    Run config: `run-dir` = an existing run folder to go on with, or empty; `study` = the study file for a new one;
    `out` = where new run folders are made; `sites` = how many may take part at best; `admitted` = the folder that names
    the nodes that may, in a deployment.
    """
    given = str(context.run_config.get("run-dir", "")) or os.environ.get(RUN_VARIABLE, "")
    if given:
        folder = RunFolder.open(Path(given))
        try_study(folder.study())
        if folder.last_checkpoint() is None:  # later on the public set is not read any more
            check_public_set(folder.study())
        return folder
    file = str(context.run_config.get("study", ""))
    if not file:
        raise StudyError("no study given", where="run-config: study", remedy="Pass --run-config 'study=\"PATH\"'.")
    study = load_study(Path(file))
    try_study(study)
    check_public_set(study)
    return RunFolder.create(Path(str(context.run_config.get("out", "") or "runs")), study, plan_study(study))
