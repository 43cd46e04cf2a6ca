"""A whole deployment on this machine, and what goes wrong in one: make deploy-demo, or python tests/deploy_demo.py

SPDX-License-Identifier: Apache-2.0

A coordinator and three hospitals with phantoms, each its own processes on loopback: TLS, carriers that show their keys,
the proxy, and an app bundle that the hospitals list by its hash. In the middle the SuperLink is killed, and so are one
hospital's carrier and its own process; the study ends all the same, and the hospitals' ledgers say what the claim says.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from server.checkpoints import RunFolder
from support.deployment import Loopback, Running, claimed, command, spent, wait, why_not, worked
from support.paths import REPOSITORY

SECONDS = 900.0
_BEGAN = time.monotonic()


def main() -> int:
    lacks = why_not()
    if lacks:
        print(f"error: {lacks}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="synthward-deploy-"))
    study = folder / "study.toml"
    study.write_text((REPOSITORY / "configs" / "demo.toml").read_text())
    deployment = Loopback(folder, study)
    try:
        _prepare(deployment)
        _run(deployment)
        return 0 if _verified(deployment) else 1
    finally:
        deployment.close()


def _prepare(deployment: Loopback) -> None:
    said = deployment.begin()
    _tell(f"coordinator's folder written; its invitation's fingerprint is {said}")
    deployment.services()
    _tell("SuperLink and proxy are up")
    for site in deployment.site_files():
        deployment.hospital(site, said)
        _tell(f"{site.stem}: joined, admitted, the study approved; serves its phantoms")


def _run(deployment: Loopback) -> None:
    """The study, with a SuperLink and a hospital that are killed on the way."""
    run = deployment.run(deployment.study)
    _until(run, "train     1/4")
    os.kill(deployment.superlink(), signal.SIGKILL)
    _tell("killed the SuperLink (signal 9)")
    _until(run, "train     2/4")
    party = deployment.hospitals[0]
    assert party.carry is not None and party.serve is not None
    party.serve.end(signal.SIGKILL)
    party.carry.end(signal.SIGKILL)
    _tell(f"killed {party.site.stem}: its own process and its carrier (signal 9)")
    time.sleep(5)
    deployment.serve(party)
    deployment.carry(party)
    _tell(f"started {party.site.stem} again")
    assert run.process.wait(SECONDS) == 0, run.said()[-3000:]
    print(run.said(), flush=True)


def _verified(deployment: Loopback) -> bool:
    """Whether the release is whole, and every hospital's ledger holds exactly what the claim says of it."""
    released = deployment.run_folder()
    print(worked(command("synthward", "verify", released)), end="")
    claim = claimed(RunFolder(released))
    good = True
    for party in deployment.hospitals:
        name = party.site.stem
        worked(command("synthward-site", "verify-ledger", party.site))
        held = spent(party)
        for part in ("train", "holdout"):
            told = claim[name][f"epsilon_{part}"]
            same = abs(held[part] - told) < 1e-9
            good &= same
            print(f"{name} {part:<8} epsilon {held[part]:.6f} in its ledger, {told:.6f} in the claim"
                  + ("" if same else "  DIFFERS"))  # fmt: skip
    print(f"{time.monotonic() - _BEGAN:.0f} s; everything is in {deployment.folder}")
    return good


def _until(run: Running, words: str) -> None:
    wait(lambda: words in run.said() or run.process.poll() is not None, words, run.said, seconds=SECONDS)
    assert run.process.poll() is None, run.said()[-3000:]


def _tell(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:4.0f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
