"""A coordinator and two hospitals over TLS, by their own commands: who is kept out, and what happens when things die.

One deployment and one study for all of it, since hospitals pay for every study. `docs/reliability.md` has the times.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import tempfile
import time
from http.client import HTTPSConnection
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.carrier.folder import load_carrier
from server.checkpoints import RunFolder
from server.deployment import certificates
from support.deployment import (
    Loopback,
    Running,
    command,
    fingerprint,
    rounds_of,
    server_app,
    spent,
    wait,
    why_not,
    worked,
)
from support.invitations import invitation
from support.studies import tiny_toml

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
ROUNDS = 8


@pytest.fixture(scope="module")
def whole():
    """Services up, two hospitals that serve, nobody asked yet."""
    folder = Path(tempfile.mkdtemp(prefix="my dep-", dir="/tmp"))
    study = folder / "study.toml"
    study.write_text(tiny_toml(training={"rounds": ROUNDS}, simulation={"sites": 2, "phantoms_per_site": 80},
                               federation={"min_sites": 2, "timeout_seconds": 400}))  # fmt: skip
    deployment = Loopback(folder, study)
    try:
        said = deployment.begin()
        deployment.services()
        deployment.all_online(said)
        yield deployment, said
    finally:
        deployment.close()
    shutil.rmtree(folder)


def _post(deployment: Loopback, path: str, body: bytes = b"") -> int:
    """Status of a request by somebody who has nothing but the authority's certificate, as every hospital has."""
    context = ssl.create_default_context(cafile=str(deployment.coordinator / "authority.crt"))
    connection = HTTPSConnection("localhost", deployment.port, context=context, timeout=20)
    try:
        connection.putrequest("POST", path, skip_accept_encoding=True)
        connection.putheader("Content-Type", "application/protobuf")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", [
    "/v1/control/list-nodes", "/v1/control/start-run", "/v1/control/register-node", "/docs", "/openapi.json", "/",
    "/v1/runtime/pull-task-input", "/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/..%2fcontrol/list-nodes", "/v1/fleet/./../control/list-nodes", "/v1/fleet//../../v1/control/list-nodes",
    "/V1/FLEET/../control/list-nodes", "//v1/control/list-nodes", "/v1/control/list-nodes%3f/../../fleet/x",
    "/v1/control/list-nodes%23/../../fleet/x", "/v1/control/../fleet/pull-messages",
    "/v1/fleet/..%252fcontrol/list-nodes",
    "/v1/fleet/..;/control/list-nodes", "/v1/fleet/pull-messages?x", "/v1/fleet/",
])  # fmt: skip
def test_from_a_hospitals_side_there_is_no_way_to_the_control_api(whole, path):
    assert _post(whole[0], path) in (400, 403)


@pytest.mark.parametrize("call", ["register-node", "activate-node", "pull-messages", "push-messages", "get-fab"])
def test_the_fleet_api_answers_nobody_without_a_signature(whole, call):
    assert _post(whole[0], f"/v1/fleet/{call}") == 401


def test_a_carrier_that_is_not_admitted_is_not_let_in(whole):
    deployment, said = whole
    out = worked(command("synthward-site", "join", deployment.folder / "stranger", "--invitation",
                         deployment.coordinator / "invitation.json", "--fingerprint", said, "--name", "stranger",
                         "--socket", deployment.folder / "sockets" / "site-1.sock"))  # fmt: skip
    running = deployment.start("client.cli", "carry", deployment.folder / "stranger", name="stranger")
    running.wait_for("does not let it in")
    assert fingerprint(out) in running.said() and "online" not in running.said()
    running.end()
    assert {carrier["name"] for carrier in deployment.status()["carriers"]} == {"site-1", "site-2"}


def test_an_invitation_or_a_key_that_somebody_exchanged_is_refused(whole, tmp_path):
    deployment, said = whole
    given = json.loads((deployment.coordinator / "invitation.json").read_text())
    certificates.make_authority(tmp_path / "key", tmp_path / "crt", name="evil")
    forged = tmp_path / "invitation.json"
    given["certificate"] = (tmp_path / "crt").read_text()
    own = {name: given[name] for name in ("coordinator", "certificate", "bundles", "number")}
    signed = invitation(Ed25519PrivateKey.generate(), **own).model_dump_json()
    for data, words in ((json.dumps(given), "its signature does not fit"), (signed, "not the one given")):
        forged.write_text(data)
        result = command("synthward-site", "join", tmp_path / "c", "--invitation", forged, "--fingerprint", said,
                         "--name", "x")  # fmt: skip
        assert result.returncode == 2 and words in result.stderr and not (tmp_path / "c").exists()
    public = deployment.hospitals[0].carrier / "site-1.pub"
    result = command("synthward", "deploy", "admit", deployment.coordinator, public, "--fingerprint", said)
    assert result.returncode == 2 and "not the one given" in result.stderr


def test_a_carrier_does_not_speak_to_another_authoritys_coordinator(whole, tmp_path):
    deployment, _ = whole
    shutil.copytree(deployment.hospitals[0].carrier, tmp_path / "c")
    certificates.make_authority(tmp_path / "key", tmp_path / "crt", name="evil")
    (tmp_path / "c" / "authority.crt").write_bytes((tmp_path / "crt").read_bytes())
    running = deployment.start("client.cli", "carry", tmp_path / "c", name="misled")
    running.wait_for("another authority")
    running.end()
    result = command("synthward-site", "doctor", tmp_path / "c")
    assert result.returncode == 1 and "AMISS  coordinator" in result.stdout and "another authority" in result.stdout


def test_the_doctors_find_nothing_amiss_and_a_second_of_anything_is_refused(whole):
    deployment, _ = whole
    for program, words in (("synthward", ("deploy", "doctor", deployment.coordinator)),
                           ("synthward-site", ("doctor", deployment.hospitals[0].carrier))):  # fmt: skip
        out = worked(command(program, *words))
        assert "AMISS" not in out and out.count("ok ") >= 6
    result = command("synthward", "deploy", "up", deployment.coordinator)
    assert result.returncode == 2 and "run already" in result.stderr
    result = command("synthward-site", "carry", deployment.hospitals[0].carrier)
    assert result.returncode == 2 and "runs already" in result.stderr


def test_a_bundle_that_a_hospital_does_not_list_is_said_to_both_before_anything_is_spent(whole):
    deployment, _ = whole
    party = deployment.hospitals[1]
    file = party.carrier / "carrier.toml"
    listed, (digest,) = file.read_text(), load_carrier(party.carrier).config.bundles
    file.write_text(listed.replace(digest, "0" * 64))
    run = deployment.run(deployment.study)
    assert run.process.wait(300) == 1, run.said()
    assert f"site-2 does not answer to app bundle {digest}" in run.said()
    assert "--resume" in run.said() and "spends nothing" in run.said()
    assert party.carry is not None
    party.carry.wait_for("refused an app bundle")
    worked(command("synthward", "deploy", "ship", deployment.coordinator))
    out = worked(command("synthward-site", "join", party.carrier, "--invitation",
                         deployment.coordinator / "invitation.json"))  # fmt: skip
    assert "its key is the one from before" in out  # the coordinator's signature was enough
    assert load_carrier(party.carrier).config.bundles == (digest,)
    assert all(spent(p) == {} for p in deployment.hospitals)


class _Study:
    """The study as it runs, and what is done to it between two rounds."""

    def __init__(self, deployment: Loopback) -> None:
        self.deployment, self.times = deployment, dict[str, float]()
        self.run = self._resumed()

    def _resumed(self) -> Running:
        return self.deployment.run("--resume", self.folder.path)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.deployment.run_folder())

    def rounds(self) -> int:
        return rounds_of(self.folder)

    def after_round(self, number: int, name: str, fault) -> None:
        """Do it once a round is done, and take the time until the next one is."""
        self._until(number)
        began = time.monotonic()
        fault()
        self._until(min(self.rounds() + 1, ROUNDS))  # a slow machine may have come to the end meanwhile
        self.times[name] = time.monotonic() - began

    def _until(self, number: int) -> None:
        wait(lambda: self.rounds() >= number or self.run.process.poll() is not None, f"round {number}", self.run.said,
             seconds=400)  # fmt: skip
        assert self.rounds() >= number, self.run.said()[-4000:]


def test_a_study_comes_to_its_end_whatever_dies_on_the_way_and_nothing_is_paid_for_twice(whole):
    deployment, _ = whole
    study, (first, second) = _Study(deployment), deployment.hospitals
    assert deployment.up is not None and first.carry is not None and second.serve is not None

    def restart_site() -> None:
        second.serve.end(signal.SIGKILL)
        deployment.serve(second)

    def restart_carrier() -> None:
        first.carry.end(signal.SIGKILL)
        deployment.carry(first)

    def cut() -> None:
        """Nothing gets through for twenty seconds."""
        proxy = [p for p in psutil.Process(deployment.up.process.pid).children(recursive=True) if "nginx" in p.name()]
        for process in proxy:
            process.suspend()
        time.sleep(20)
        for process in proxy:
            process.resume()

    def stop_watching() -> None:
        assert study.run.end(signal.SIGINT) == 130
        assert "the study goes on" in study.run.said()
        study.run = study._resumed()

    def stop_and_resume() -> None:
        worked(command("synthward", "deploy", "stop", deployment.coordinator, study.folder.path))
        assert study.run.process.wait(60) == 1 and "was stopped by" in study.run.said(), study.run.said()[-2000:]
        assert deployment.status()["run"]["state"] != "running"
        study.run = study._resumed()

    study.after_round(1, "SuperLink killed", lambda: os.kill(deployment.superlink(), signal.SIGKILL))
    study.after_round(2, "server app killed", lambda: server_app(study.folder).kill())
    study.after_round(3, "a site's own process killed and started", restart_site)
    study.after_round(4, "a carrier killed and started", restart_carrier)
    study.after_round(5, "nothing gets through for 20 s", cut)
    study.after_round(6, "`deploy stop`, then resumed", stop_and_resume)
    study.after_round(7, "`deploy run` stopped and started", stop_watching)
    assert study.run.process.wait(400) == 0, study.run.said()[-4000:]
    print(json.dumps(study.times, indent=1))

    deployment.require_whole(study.folder, ROUNDS)
    deployment.require_ledgers_equal_claim(study.folder)
    status = deployment.status()
    assert status["run"]["state"] == "finished" and {c["state"] for c in status["carriers"]} == {"online"}
    again = command("synthward", "deploy", "run", deployment.coordinator, "--resume", study.folder.path)
    assert again.returncode == 0 and "report:" in again.stdout


def test_a_dismissed_carrier_is_shut_out_and_its_key_spent(whole):
    deployment, _ = whole
    party = deployment.hospitals[1]
    worked(command("synthward", "deploy", "dismiss", deployment.coordinator, "site-2"))
    assert party.carry is not None
    party.carry.wait_for("does not let it in", seconds=120)
    assert [carrier["name"] for carrier in deployment.status()["carriers"]] == ["site-1"]


def test_nothing_that_the_coordinator_logs_has_a_path_of_a_site_or_a_key(whole):
    deployment, _ = whole
    logs = [path for path in deployment.coordinator.rglob("*") if path.suffix in (".log", ".jsonl")]
    assert len(logs) >= 3
    secrets = [str(deployment.folder / "sites"), str(deployment.folder / "sockets"), "PRIVATE KEY", "carrier.key"]
    for log in logs:
        text = log.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], log


def test_the_services_end_when_they_are_told_and_leave_nothing_behind(whole):
    deployment, _ = whole
    assert deployment.up is not None
    children = psutil.Process(deployment.up.process.pid).children(recursive=True)
    assert deployment.up.end() == 0
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive and len(gone) >= 3
