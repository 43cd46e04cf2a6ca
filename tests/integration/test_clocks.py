"""A clock that is wrong or jumps, at a hospital and at the coordinator: one line that names it, and the study goes on.

`docs/reliability.md` has the times.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from server.checkpoints import RunFolder
from support.clock import Clock, lacks_compiler
from support.deployment import Loopback, Running, rounds_of, wait, why_not
from support.studies import tiny_toml

_LACKS = why_not() or lacks_compiler()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(_LACKS), reason=_LACKS)]
ROUNDS = 10


@pytest.fixture
def deployment():
    folder = Path(tempfile.mkdtemp(prefix="clocks-", dir="/tmp"))
    made = Loopback(folder, folder / "study.toml")
    made.study.write_text(tiny_toml(training={"rounds": ROUNDS}, simulation={"sites": 2, "phantoms_per_site": 80},
                                    federation={"min_sites": 2, "timeout_seconds": 400}))  # fmt: skip
    try:
        yield made
    finally:
        made.close()
    shutil.rmtree(folder)


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path)


def _told(carry: Running, already: int, words: str) -> str:
    """What it has said since, once these words are in it."""
    wait(lambda: words in carry.said()[already:], f"{words!r} was not said", carry.said)
    return carry.said()[already:]


def test_a_hospitals_clock_that_is_wrong_is_named_and_right_again_it_is_let_in(deployment, clock):
    said = deployment.begin()
    deployment.services()
    party, already = deployment.join(deployment.folder / "site-1.toml", said), 0
    clock.set(600)
    deployment.carry(party, **clock.environment)
    assert party.carry is not None
    for offset, words in ((600, "ahead of the coordinator's"), (10, "ahead of the coordinator's"),
                          (-600, "behind the coordinator's"), (-7200, "this clock is wrong")):  # fmt: skip
        clock.set(offset)
        told = _told(party.carry, already, words)
        print(offset, told)
        assert "online" not in told and "not admitted" not in told, (offset, told)
        already = len(party.carry.said())
    clock.set(0)
    _told(party.carry, already, "online:")
    already = len(party.carry.said())
    clock.set(600)  # while it is in
    print("jumped", _told(party.carry, already, "ahead of the coordinator's"))
    clock.set(0)
    _told(party.carry, already, "online:")


def test_a_study_outlives_clocks_that_jump_at_a_hospital_and_at_the_coordinator(deployment, clock, tmp_path_factory):
    theirs = Clock(tmp_path_factory.mktemp("coordinator"))
    said = deployment.begin()
    deployment.services(**theirs.environment)
    for site in deployment.site_files():
        deployment.hospital(site, said)
    first = deployment.hospitals[0]
    assert first.carry is not None
    first.carry.end()
    deployment.carry(first, **clock.environment)
    run = deployment.run(deployment.study)
    _until(deployment, run, 1)
    times = dict[str, float]()

    began, already = time.monotonic(), len(first.carry.said())
    clock.set(600)
    times["a hospital's clock jumps: named there"] = _seconds(began, lambda: _told(first.carry, already, "ahead of"))
    clock.set(0)
    times["right again: next round"] = _next(deployment, run)

    for offset in (3600, 0):  # what is late by an hour all at once, and what is early
        theirs.set(offset)
        if offset:
            time.sleep(30)
        times[f"the coordinator's clock jumps to {offset:+d} s"] = _next(deployment, run)
    assert run.process.wait(900) == 0, run.said()[-3000:]
    print(json.dumps(times, indent=1))
    deployment.require_whole(RunFolder(deployment.run_folder()), ROUNDS)


def _seconds(began: float, until) -> float:
    until()
    return time.monotonic() - began


def _rounds(deployment: Loopback) -> int:
    return rounds_of(deployment.folder_of_run())


def _until(deployment: Loopback, run: Running, number: int) -> None:
    wait(lambda: _rounds(deployment) >= number or run.process.poll() is not None, f"round {number}", run.said,
         seconds=900)  # fmt: skip
    assert run.process.poll() is None, run.said()[-3000:]


def _next(deployment: Loopback, run: Running) -> float:
    began = time.monotonic()
    _until(deployment, run, _rounds(deployment) + 1)
    return time.monotonic() - began
