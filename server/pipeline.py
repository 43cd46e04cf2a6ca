"""The stages of a study in order, from the newest checkpoint to the release.

SPDX-License-Identifier: Apache-2.0

canary → enrol → features → moments → train → generate → validate → release. Each takes up what was kept: a round that
has a checkpoint, a batch of images, an answer that a site has stored, is never made or paid for twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil

from common.errors import StorageError, SynthwardError
from common.protocol import Agreement
from common.supervision import since_boot
from server.checkpoints import RunFolder
from server.federation.sites import SiteGroup
from server.live_page import LivePage
from server.progress import Progress
from server.session import Session
from server.stages.canary import canary
from server.stages.enrol import enrol
from server.stages.features import features
from server.stages.generate import generate
from server.stages.moments import moments
from server.stages.release import release
from server.stages.train import train
from server.stages.validate import validate


def run(folder: RunFolder, group: SiteGroup, progress: Progress, *, hoped: int = 0) -> Path:
    """Run, or go on with, a study.

    Args:
        folder: the run's folder, with study and plan in it.
        group: the sites.
        hoped: how many of them there may be at best.

    Returns:
        The path of the report.

    Raises:
        SynthwardError: with everything saved that was finished; the run can be resumed.
    """
    session = Session(Agreement(study=folder.study(), plan=folder.plan()), folder, group, progress, hoped=hoped)
    page, report = LivePage(folder), None
    folder.listeners.append(page.take)
    own = os.getpid()  # who follows the run sees by these whether it lives
    folder.event("begin", study=session.agreement.study.sha256, pid=own, since_boot=since_boot(own))
    began = time.monotonic()
    try:
        report = _stages(session, began)
        return report
    except SynthwardError as error:
        with suppress(StorageError):  # the disk may be what is full
            told = {"what": error.what, "where": error.where, "remedy": error.remedy}
            folder.event("failed", error=type(error).__name__, **told)
        raise
    finally:
        progress.close()
        folder.event("end", seconds=round(time.monotonic() - began, 2))
        page.close(report)


def _stages(session: Session, began: float) -> Path:
    with _peak_memory() as largest:
        enrol(session, canary(session, session.online()))
        teacher = features(session)
        moments(session, teacher)
        state = train(session)
        synthetic = generate(session, state, teacher)
        validation = validate(session, synthetic)
    return release(
        session, state, synthetic, validation.merged, validation.by_site, validation.prevalence,
        seconds=_seconds_before(session.folder, began), peak_memory_mb=largest[0] / 1e6,
    )  # fmt: skip


@contextmanager
def _peak_memory(*, every_seconds: float = 2.0) -> Iterator[list[int]]:
    """The largest resident size, bytes, of this process and all under it so far, as the one entry of a list."""
    stop, largest, own = threading.Event(), [0], psutil.Process()

    def watch() -> None:
        while not stop.is_set():
            total = 0
            for process in (own, *own.children(recursive=True)):
                with suppress(psutil.Error):  # it has ended meanwhile
                    total += process.memory_info().rss
            largest[0] = max(largest[0], total)
            stop.wait(every_seconds)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield largest
    finally:
        stop.set()
        thread.join()


def _seconds_before(folder: RunFolder, began: float) -> float:
    """Working time of the run over all its processes; a killed one counts to its last event."""
    total, first, last = 0.0, None, None
    for event in folder.events():
        at = datetime.fromisoformat(event["at"])
        if event["event"] == "begin":
            total += (last - first).total_seconds() if first and last else 0.0
            first = at
        last = at
    return total + time.monotonic() - began
