"""Lines between hospitals and their coordinator that are slow, cut for a while, and cut for good, in one study.

`docs/reliability.md` has the times.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pytest

from server.checkpoints import RunFolder
from support.deployment import Loopback, Running, claimed, spent, wait, why_not
from support.line import Line
from support.studies import tiny_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(why_not()), reason=why_not())]
ROUNDS, TIMEOUT, CUT = 24, 150.0, 120.0
SLOW = {"delay": 0.3, "rate": 200e3}


@pytest.fixture(scope="module")
def whole():
    """Three hospitals: one near, one behind a slow line, one whose line a test may cut."""
    folder = Path(tempfile.mkdtemp(prefix="lines-", dir="/tmp"))
    study = folder / "study.toml"
    study.write_text(tiny_toml(training={"rounds": ROUNDS}, network={"width": 32},
                               federation={"min_sites": 2, "timeout_seconds": TIMEOUT}))  # fmt: skip
    deployment, lines = Loopback(folder, study), list[Line]()
    try:
        said = deployment.begin()
        deployment.services()
        lines += [Line(deployment.port, **SLOW), Line(deployment.port)]
        deployment.all_online(said, {"site-2": lines[0].port, "site-3": lines[1].port})
        yield deployment, lines
    finally:
        deployment.close()
        for line in lines:
            line.close()
    shutil.rmtree(folder)


class _Rounds:
    """The rounds of the study that runs."""

    def __init__(self, deployment: Loopback, run: Running) -> None:
        self._deployment, self._run = deployment, run

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self._deployment.run_folder())

    @property
    def steps(self) -> list[dict]:
        """The finished ones: who answered, and when."""
        if not list((self._deployment.coordinator / "runs").glob("*/plan.json")):
            return []
        return [e for e in self.folder.events() if e["event"] == "step" and e["stage"] == "train"]

    def wait(self, until, what: str, *, seconds: float = 600.0) -> float:
        """Seconds until a round is such."""
        began, known = time.monotonic(), len(self.steps)
        wait(lambda: self._over() or any(until(step) for step in self.steps[known:]), what, self._run.said,
             seconds=seconds)  # fmt: skip
        assert not self._over(), self._run.said()[-4000:]
        return time.monotonic() - began

    def _over(self) -> bool:
        return self._run.process.poll() is not None


def test_a_slow_line_is_waited_for_a_cut_one_is_gone_on_without_and_taken_in_again(whole):
    deployment, (slow, cut) = whole
    run = deployment.run(deployment.study)
    rounds, times = _Rounds(deployment, run), dict[str, float]()

    rounds.wait(lambda step: step["done"] >= 2, "two rounds")
    assert {"site-1", "site-2", "site-3"} <= set(rounds.steps[0]["accepted"]), rounds.steps
    times["a round, one line with 300 ms and 200 kB/s"] = _between(rounds.steps[0], rounds.steps[1])

    began = time.monotonic()
    cut.cut()
    times["cut: the round without it"] = rounds.wait(lambda step: "site-3" not in step["accepted"], "one without")
    run.wait_for("site-3 left out")
    time.sleep(max(0.0, CUT - (time.monotonic() - began)))
    cut.mend()
    times["mended: its next answer"] = rounds.wait(lambda step: "site-3" in step["accepted"], "site-3 is back")

    cut.swallow()
    times["nothing comes through: the round without it"] = rounds.wait(
        lambda step: "site-3" not in step["accepted"], "one without"
    )
    assert run.process.wait(1500) == 0, run.said()[-4000:]
    print(json.dumps({**times, "bytes of the slow line": slow.carried}, indent=1))
    _check(deployment, rounds)


def _between(one: dict, other: dict) -> float:
    return (datetime.fromisoformat(other["at"]) - datetime.fromisoformat(one["at"])).total_seconds()


def _check(deployment: Loopback, rounds: _Rounds) -> None:
    """Whole, no round missing or late, all others always there, and no ledger holds more than is claimed."""
    steps = rounds.steps
    deployment.require_whole(rounds.folder, ROUNDS)
    assert all({"site-1", "site-2"} <= set(step["accepted"]) for step in steps)
    slowest = max(_between(*pair) for pair in zip(steps, steps[1:], strict=False))
    assert slowest < TIMEOUT + 30, slowest
    warnings = [e["text"] for e in rounds.folder.events() if e["event"] == "warning" and "left out" in e["text"]]
    assert warnings and all(": site-3 left out:" in text for text in warnings), warnings
    claim = claimed(rounds.folder)
    assert {name: told["basis"] for name, told in claim.items()} == {
        "site-1": "ledger", "site-2": "ledger", "site-3": "plan",
    }  # fmt: skip
    for party in deployment.hospitals:
        held = spent(party)
        for part in ("train", "holdout"):
            told = claim[party.site.stem][f"epsilon_{part}"]
            if party.site.stem == "site-3":
                assert held[part] <= told
            else:
                assert held[part] == told
