"""Study after study on one deployment whose parts are killed at random moments: make soak MINUTES=30 SITES=5

SPDX-License-Identifier: Apache-2.0

A coordinator and hospitals with phantoms, each its own processes on loopback. Hospitals, carriers, the SuperLink and
the server app are killed (signal 9) and started again. It fails where a study does not go on by itself, a round is
missing or there twice, a ledger holds other than its claim, a process is left over, or one grows in memory. So that
growth can be seen at all, the last hospital and its carrier are never killed, and the SuperLink not after a third.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import psutil

from server.checkpoints import RunFolder
from support.deployment import Loopback, Party, Running, claimed, command, rounds_of, server_app, spent, why_not, worked
from support.memory import HEAD, MemoryWatch
from support.studies import tiny_toml

ROUNDS, TIMEOUT = 6, 400
BETWEEN = (25.0, 90.0)  # seconds from one fault to the next
AWAY = 20.0  # seconds that a hospital or carrier stays away at most
STILL = 420.0  # seconds without any new event after which a study counts as hanging
GROWTH_MB = 15.0  # from a third of a process's life to its end; a life counts from a quarter of the soak on
_BEGAN = time.monotonic()


class Soak:
    """One deployment, the faults, and what is found wrong."""

    def __init__(self, folder: Path, minutes: float, sites: int, seed: int) -> None:
        self.deployment = Loopback(folder, folder / "study-1.toml")
        self.minutes, self.sites, self.random = minutes, sites, random.Random(seed)
        self.amiss, self.faults, self.studies = list[str](), Counter[str](), 0
        self.watch: MemoryWatch
        self.next_fault = self.ends = time.monotonic() + 1e9

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def prepare(self) -> None:
        deployment = self.deployment
        self._write(1)
        said = deployment.begin()
        deployment.services()
        files = deployment.site_files()
        for site in files:
            site.write_text(site.read_text().replace("max_epsilon = 8.0", "max_epsilon = 4000.0"))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda site: deployment.hospital(site, said), files))
        deployment.hospitals.sort(key=lambda party: party.site)
        for party in deployment.hospitals:
            assert party.carry is not None
            party.carry.wait_for("online:")
        tell(f"a coordinator and {self.sites} hospitals are up, in {deployment.folder}")
        self.watch = MemoryWatch(deployment)
        self.ends = time.monotonic() + 60 * self.minutes
        self.next_fault = time.monotonic() + 20

    def study(self) -> None:
        """One study to its release, with faults on the way."""
        self.studies += 1
        number, deployment = self.studies, self.deployment
        file = self._write(number)
        if number > 1:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda party: worked(command(
                    "synthward-site", "approve", party.site, "--study", file, "--by", "Dr. A. Example",
                )), deployment.hospitals))  # fmt: skip
        began, before = time.monotonic(), self.watch.rounds
        run = deployment.run(file)
        folder = self._follow(run, number, before)
        if run.process.returncode:
            self.wrong(f"study {number} did not go on by itself: {run.said().strip().splitlines()[-1]}")
            worked(command("synthward", "deploy", "run", deployment.coordinator, "--resume", folder.path, seconds=900))
        self._check(number, folder)
        seconds = time.monotonic() - began
        tell(f"study {number} came to its release in {seconds:.0f} s, {self.watch.rounds} rounds so far")

    def _follow(self, run: Running, number: int, before: int) -> RunFolder:
        """Kill this and that until the study ends by itself; its folder."""
        news, last = 0, time.monotonic()
        while run.process.poll() is None:
            time.sleep(0.5)
            folder = self._folder(number)
            if folder is None:
                continue
            events = folder.events()
            if len(events) > news:
                news, last = len(events), time.monotonic()
            assert time.monotonic() - last < STILL, f"study {number} hangs:\n{run.said()[-3000:]}"
            self.watch.rounds = before + rounds_of(folder)
            if time.monotonic() > self.next_fault and self.left > 0:
                self._fault(folder)
                self.next_fault = time.monotonic() + self.random.uniform(*BETWEEN)
        folder = self._folder(number)
        assert folder is not None, run.said()[-3000:]
        self.watch.rounds = before + rounds_of(folder)
        return folder

    def _fault(self, folder: RunFolder) -> None:
        deployment = self.deployment
        party = self.random.choice(deployment.hospitals[:-1])
        away = self.random.uniform(0, AWAY)
        possible: dict[str, Callable[[], None]] = {
            f"{party.site.stem}'s own process": lambda: self._again(party, "serve", away),
            f"{party.site.stem}'s carrier": lambda: self._again(party, "carry", away),
            "the server app": lambda: server_app(folder).kill(),
        }
        if self.left > 60 * self.minutes * 2 / 3:
            possible["the SuperLink"] = lambda: os.kill(deployment.superlink(), signal.SIGKILL)
        name = self.random.choice(list(possible))
        back = f", back after {away:.0f} s" if party.site.stem in name else ""
        tell(f"  killed {name} after {rounds_of(folder)} rounds{back}")
        with suppress(psutil.NoSuchProcess, AssertionError):  # just ended, or is being started again
            possible[name]()
            self.faults[name.rpartition("'s ")[2]] += 1

    def _again(self, party: Party, what: str, away: float) -> None:
        """Kill a hospital's process or its carrier, and start it again."""
        running = getattr(party, what)
        running.end(signal.SIGKILL)
        time.sleep(away)
        getattr(self.deployment, what)(party)

    def _check(self, number: int, folder: RunFolder) -> None:
        """That the release is whole, no round is there twice or missing, and every ledger holds what the claim says."""
        worked(command("synthward", "verify", folder.path))
        last = folder.last_checkpoint()
        rounds = [] if last is None else [row.round for row in last.rows]
        if rounds != list(range(1, ROUNDS + 1)):
            self.wrong(f"study {number} has the rounds {rounds}")
        claim = claimed(folder)
        digest = (folder.path / "study.sha256").read_text().strip()
        compare = lambda party: self._compare(number, party, digest, claim.get(party.site.stem))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compare, self.deployment.hospitals))

    def _compare(self, number: int, party: Party, digest: str, told: dict | None) -> None:
        name = party.site.stem
        if "unbroken" not in worked(command("synthward-site", "verify-ledger", party.site)):
            self.wrong(f"the ledger of {name} is broken")
        held = spent(party, digest)
        if told is None:  # it was not there when the study began, and gave nothing
            if any(held.values()):
                self.wrong(f"study {number}: the claim does not name {name}, whose ledger holds {held}")
            return
        for part in ("train", "holdout"):
            claimed, counted, basis = told[f"epsilon_{part}"], held[part], told["basis"]
            # Who was asked last and could not answer is claimed with its whole plan: an upper bound, and told as one.
            good = abs(claimed - counted) < 1e-9 if basis == "ledger" else claimed > counted - 1e-9
            if not good:
                self.wrong(f"study {number}: {name} {part} {counted} in its ledger, {claimed} claimed ({basis})")

    def judge(self) -> None:
        """Memory, and processes that nothing owns; then the end of all."""
        left = self.watch.left_over()
        print(HEAD, flush=True)
        for life in self.watch.lives:
            if life.seconds >= 60 * self.minutes / 4:
                print(life.row, flush=True)
                if life.growth > GROWTH_MB:
                    self.wrong(f"{life.name} ({life.number}) grew by {life.growth:.1f} MB, {GROWTH_MB:.0f} allowed")
        self.watch.end()
        self.deployment.close()
        psutil.wait_procs(self.watch.seen, timeout=20)
        for line in [*left, *(f"after the end: {line}" for line in self.watch.left_over())]:
            self.wrong(f"a process is left over: {line}")

    def _write(self, number: int) -> Path:
        file = self.deployment.folder / f"study-{number}.toml"
        file.write_text(tiny_toml(
            study={"name": f"soak-{number}", "seed": number}, training={"rounds": ROUNDS},
            simulation={"sites": self.sites, "phantoms_per_site": 80},
            federation={"min_sites": max(2, self.sites - 2), "timeout_seconds": TIMEOUT},
        ))  # fmt: skip
        return file

    def _folder(self, number: int) -> RunFolder | None:
        found = [plan.parent for plan in (self.deployment.coordinator / "runs").glob(f"soak-{number}-*/plan.json")]
        return RunFolder(found[0]) if found else None

    def wrong(self, what: str) -> None:
        self.amiss.append(what)
        tell(f"AMISS  {what}")


def main() -> int:
    lacks = why_not()
    if lacks:
        print(f"error: {lacks}", file=sys.stderr)
        return 2
    minutes, sites, seed = (float(os.environ.get("MINUTES", "30")), int(os.environ.get("SITES", "5")),
                            int(os.environ.get("SEED", "1")))  # fmt: skip
    soak = Soak(Path(tempfile.mkdtemp(prefix="synthward-soak-")), minutes, sites, seed)
    try:
        soak.prepare()
        try:
            while soak.left > 0:
                soak.study()
        except (AssertionError, TimeoutExpired) as error:  # what was seen of memory until then is shown all the same
            soak.wrong(str(error))
        soak.judge()
    finally:
        soak.deployment.close()
    print(f"{soak.studies} studies, {soak.watch.rounds} rounds, {sum(soak.faults.values())} faults {dict(soak.faults)} "
          f"in {(time.monotonic() - _BEGAN) / 60:.0f} min (seed {seed}); amiss: {len(soak.amiss)}")  # fmt: skip
    print(*soak.amiss, sep="\n")
    return 1 if soak.amiss else 0


def tell(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
