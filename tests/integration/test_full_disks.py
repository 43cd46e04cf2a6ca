"""A disk that fills in a deployment, first a hospital's and then the coordinator's, in one study."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from server.checkpoints import RunFolder
from support.deployment import Loopback, Running, rounds_of, wait, why_not
from support.studies import tiny_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(why_not()), reason=why_not())]
ROUNDS = 6
FULL = re.compile("No space left on device|no space left to write|disk is full")


@pytest.fixture(scope="module")
def whole():
    """Two hospitals; the second one's state and the coordinator's folder each have a small disk of their own."""
    folder = Path(tempfile.mkdtemp(prefix="disks-", dir="/tmp"))
    study, disks = folder / "study.toml", [folder / "coordinator", folder / "sites" / "site-2"]
    study.write_text(tiny_toml(training={"rounds": ROUNDS}, simulation={"sites": 2, "phantoms_per_site": 80},
                               federation={"min_sites": 2, "timeout_seconds": 300}))  # fmt: skip
    deployment, mounted = Loopback(folder, study), list[Path]()
    try:
        for disk in disks:
            disk.mkdir(parents=True)
            line = ["mount", "-t", "tmpfs", "-o", "size=60m,mode=700", "tmpfs", str(disk)]
            if subprocess.run(line, check=False, capture_output=True).returncode:
                pytest.skip("only root may mount a disk")
            mounted.append(disk)
        said = deployment.begin()
        deployment.services()
        deployment.all_online(said)
        yield deployment
    finally:
        deployment.close()
        for disk in mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    shutil.rmtree(folder)


def test_a_disk_that_fills_is_named_at_its_own_end_and_the_study_goes_on_when_there_is_room(whole):
    hospital = whole.hospitals[1]
    assert hospital.serve is not None
    run = whole.run(whole.study)
    _until(whole, run, 1)

    _fill(hospital.site.parent / "site-2")
    words = _ended(run)
    assert "site-2: refused (Unavailable) the site cannot answer now" in words and "--resume" in words
    assert FULL.search(hospital.serve.said()), hospital.serve.said()[-2000:]
    assert not FULL.search(words), "what happens at a hospital is told there, not at the coordinator's"
    run, seconds = _go_on(whole, hospital.site.parent / "site-2")

    _until(whole, run, 3)
    _fill(whole.coordinator)
    words = _ended(run)
    assert FULL.search(words) and "--resume" in words, words
    run, others = _go_on(whole, whole.coordinator)
    assert run.process.wait(600) == 0, run.said()[-3000:]
    print(json.dumps({"a hospital's disk: room to next round": seconds, "the coordinator's": others}))
    _check(whole)


def _folder(deployment: Loopback) -> RunFolder:
    return RunFolder(deployment.run_folder())


def _rounds(deployment: Loopback) -> int:
    return rounds_of(deployment.folder_of_run())


def _until(deployment: Loopback, run: Running, number: int) -> None:
    wait(lambda: _rounds(deployment) >= number or run.process.poll() is not None, f"round {number}", run.said,
         seconds=600)  # fmt: skip
    assert run.process.poll() is None, run.said()[-3000:]


def _fill(disk: Path) -> None:
    """To its last byte."""
    for size in (65536, 1024, 1):
        with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
            while file.write(b"0" * size):
                pass


def _ended(run: Running) -> str:
    """What it says last, once it has ended by itself: one line, and no traceback."""
    already = len(run.said())
    assert run.process.wait(600) in (1, 2), run.said()[-3000:]
    words = run.said()
    assert "Traceback" not in words, words[-3000:]
    print(words[already:])
    return words.strip().splitlines()[-1]


def _go_on(deployment: Loopback, disk: Path) -> tuple[Running, float]:
    """Make room, take the study up again; seconds until the next round is done."""
    (disk / "filler").unlink()
    began, known = time.monotonic(), _rounds(deployment)
    run = deployment.run("--resume", deployment.run_folder())
    _until(deployment, run, known + 1)
    return run, time.monotonic() - began


def _check(deployment: Loopback) -> None:
    """The release is whole, no round is there twice or missing, and every ledger holds what the claim says."""
    deployment.require_whole(_folder(deployment), ROUNDS)
    deployment.require_ledgers_equal_claim(_folder(deployment))
