"""Kill a site in the middle of its work, again and again, and count: python tests/kills.py [200]

SPDX-License-Identifier: Apache-2.0

A child process answers training requests with the shipped service, on phantoms. It is killed (-9) at a random moment.
Every access to the images is witnessed in a file of its own; afterwards each request that touched an image must stand
in the ledger with at least as many steps as were witnessed. A request that was killed is asked again, as a resumed
study would.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402

from client.privacy.ledger import Ledger  # noqa: E402
from client.service import SiteService  # noqa: E402
from common.accounting import epsilon_of, plan_study  # noqa: E402
from common.images import Units  # noqa: E402
from common.model.diffusion_model import initial_weights  # noqa: E402
from common.protocol import Agreement, Refusal, TrainRequest, decode_answer, encode, identity  # noqa: E402
from support.sites import open_phantom_site  # noqa: E402
from support.studies import tiny_study  # noqa: E402

LONGEST = 5  # answers' time until the kill


@dataclass(frozen=True)
class Tally:
    """What was seen over all kills.

    Attributes:
        unfinished: reservations without confirmation: kills that hit the middle of an answer.
        accesses: witnessed draws of images.
        under_counts: requests whose images were touched more often than the ledger says.
    """

    kills: int
    answered: int
    unfinished: int
    accesses: int
    under_counts: int


def run(folder: Path, kills: int, seed: int) -> Tally:
    """Kill `kills` times and compare ledger and witness after each."""
    torch.set_num_threads(1)  # no threads here: the children are forks
    study = tiny_study(training={"rounds": 3000, "local_steps": 2, "sample_rate": 0.2})
    agreed = Agreement(study=study, plan=plan_study(study))
    weights = initial_weights(study)
    site, witness = folder / "site-1.toml", folder / "witness"
    open_phantom_site(folder, study)
    witness.touch()
    draws, under, answered = random.Random(seed), 0, 0
    longest = LONGEST * _seconds_of_an_answer(folder / "warm", agreed, weights)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            _answer_until_killed(site, witness, agreed, weights)
        time.sleep(draws.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        under += _under_counts(folder, witness, agreed)
        if number % 20 == 19:
            print(f"{number + 1} kills, {under} under-counts", file=sys.stderr, flush=True)
    answered = len(list((folder / "site-1" / "replies").glob("*.reply")))
    ledger = Ledger.open(folder / "site-1")
    reserved, confirmed = ledger.counts(study.sha256)
    spent = ledger.spent(delta=1e-5, accountant="rdp")["train"]
    assert spent == epsilon_of([agreed.plan["train"].loss] * reserved, delta=1e-5, accountant="rdp") <= 8.0
    return Tally(kills, answered, reserved - confirmed, len(witness.read_text().splitlines()), under)


def _seconds_of_an_answer(folder: Path, agreed: Agreement, weights: dict) -> float:
    """Of a second one, at a site of its own; everything is imported then, for the children too."""
    folder.mkdir()
    open_phantom_site(folder, agreed.study)
    service, begun = SiteService(folder / "site-1.toml"), 0.0
    for number in (1, 2):
        begun = time.monotonic()
        service.answer(encode(TrainRequest(agreement=agreed, round=number, expected_batch=12.0), weights))
    return time.monotonic() - begun


def _answer_until_killed(site: Path, witness: Path, agreed: Agreement, weights: dict) -> None:
    """In the child: answer the first request that has no answer yet, then the next; never returns."""
    draw, current = Units.draw, ""

    def witnessed(self: Units, *given: object) -> object:
        with witness.open("a") as file:
            file.write(current + "\n")  # before the images are touched
        return draw(self, *given)  # pyright: ignore[reportArgumentType]

    Units.draw = witnessed  # pyright: ignore[reportAttributeAccessIssue]
    service, number = SiteService(site), 0
    while True:
        number += 1
        data = encode(TrainRequest(agreement=agreed, round=number, expected_batch=12.0), weights)
        current = identity(data)
        if (site.parent / "site-1" / "replies" / f"{current}.reply").exists():
            continue
        reply, _ = decode_answer(service.answer(data))
        if isinstance(reply.body, Refusal):
            os._exit(1)


def _under_counts(folder: Path, witness: Path, agreed: Agreement) -> int:
    ledger = Ledger.open(folder / "site-1")  # raises when the chain is broken, or an answer lies there that it lacks
    written: Counter[str] = Counter()
    for entry in ledger.entries():
        if entry.kind == "reserved":
            written[entry.body["request"]] += entry.body["steps"]
    ledger.close()
    seen = Counter(line for line in witness.read_text().splitlines() if line)
    return sum(written[request] < times for request, times in seen.items())


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        tally = run(Path(folder), kills, seed=1)
    print(tally)
    return 1 if tally.under_counts else 0


if __name__ == "__main__":
    raise SystemExit(main())
