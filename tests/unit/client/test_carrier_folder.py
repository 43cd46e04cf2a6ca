"""A hospital's carrier: joining, its settings, and the bundles that it does not answer to."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client.app import app as installed
from client.carrier import carry, clientapp
from client.carrier.commands import join as join_command
from client.carrier.folder import join, load_carrier, require_next
from common.errors import DataError, StorageError
from common.invitation import Invitation, fingerprint
from support.invitations import invitation

BUNDLE = b"an app"
INVITATION = invitation(coordinator="localhost:1", bundles=(hashlib.sha256(BUNDLE).hexdigest(),), number=5)


def _joined(tmp_path: Path, **more):
    return join(
        tmp_path / "my carrier", INVITATION, **{"name": "hospital-a", "socket": Path("/run/s/site.sock"), **more}
    )


def test_the_key_is_made_here_and_only_its_public_part_is_to_be_sent(tmp_path):
    carrier = _joined(tmp_path)
    assert stat.S_IMODE(carrier.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(carrier.path.stat().st_mode) == 0o700
    private = load_ssh_private_key(carrier.key.read_bytes(), None)
    public = load_ssh_public_key(carrier.public.read_bytes())
    assert private.public_key().public_numbers() == public.public_numbers()
    assert carrier.fingerprint == fingerprint(carrier.public.read_bytes().strip())
    assert load_carrier(carrier.path) == carrier


def test_it_is_the_key_that_ssh_keygen_reads(tmp_path):
    carrier = _joined(tmp_path)
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    out = subprocess.run(["ssh-keygen", "-y", "-f", carrier.key], capture_output=True, text=True, check=False)
    if "No user exists" in out.stderr:
        pytest.skip("ssh-keygen does nothing for a user without an entry in /etc/passwd")
    assert out.stdout.split()[:2] == carrier.public.read_text().split()[:2]


def test_a_newer_invitation_keeps_the_key(tmp_path):
    before = _joined(tmp_path)
    key = before.key.read_bytes()
    newer = invitation(bundles=("1" * 64, "2" * 64), coordinator="elsewhere:2", number=6)
    after = join(before.path, newer, name="hospital-a", socket=Path("/other.sock"))
    assert after.key.read_bytes() == key
    assert load_carrier(before.path).config.bundles == ("1" * 64, "2" * 64)
    with pytest.raises(DataError, match="this is the folder of carrier hospital-a"):
        join(before.path, newer, name="hospital-b", socket=Path("/other.sock"))


def _sent(tmp_path: Path, given: Invitation) -> Path:
    file = tmp_path / "invitation.json"
    file.write_text(given.model_dump_json())
    return file


def test_the_first_invitation_needs_the_telephone_and_the_next_ones_the_same_signature(tmp_path, capsys):
    folder, file = tmp_path / "carrier", _sent(tmp_path, INVITATION)
    with pytest.raises(DataError, match=r"^--fingerprint: needed the first time"):
        join_command(folder, file, name="hospital-a")
    with pytest.raises(DataError, match=r"^--name: needed the first time"):
        join_command(folder, file, fingerprint=INVITATION.fingerprint)
    assert not folder.exists()
    socket = Path("/elsewhere/site.sock")
    join_command(folder, file, fingerprint=INVITATION.fingerprint, name="hospital-a", socket=socket)
    key = load_carrier(folder).key.read_bytes()

    join_command(folder, _sent(tmp_path, invitation(bundles=("1" * 64,), number=6)))
    after = load_carrier(folder)
    assert after.config.bundles == ("1" * 64,) and after.config.name == "hospital-a" and after.config.socket == socket
    assert after.key.read_bytes() == key and "its key is the one from before" in capsys.readouterr().out


def test_an_invitation_of_another_signer_or_an_older_one_changes_nothing_without_the_telephone(tmp_path):
    folder = tmp_path / "carrier"
    join_command(folder, _sent(tmp_path, INVITATION), fingerprint=INVITATION.fingerprint, name="hospital-a")
    before = (folder / "carrier.toml").read_bytes()
    other = invitation(Ed25519PrivateKey.generate(), bundles=("1" * 64,), number=9)
    with pytest.raises(DataError, match="not signed by the coordinator that this carrier has joined"):
        join_command(folder, _sent(tmp_path, other))
    older = invitation(bundles=("1" * 64,), number=4)
    with pytest.raises(DataError, match=r"is number 4, older than what this carrier has \(5\)"):
        join_command(folder, _sent(tmp_path, older))
    assert (folder / "carrier.toml").read_bytes() == before
    join_command(folder, _sent(tmp_path, other), fingerprint=other.fingerprint)  # heard: a new key of the coordinator's
    assert load_carrier(folder).config.signer == other.signer


def test_a_carrier_that_joined_before_there_were_signatures_has_to_hear_one_fingerprint(tmp_path):
    carrier = _joined(tmp_path)
    text = (carrier.path / "carrier.toml").read_text()
    (carrier.path / "carrier.toml").write_text(
        "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("signer", "number")))
    )
    with pytest.raises(DataError, match="not signed by the coordinator"):
        require_next(load_carrier(carrier.path), INVITATION, where="invitation.json")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a" * 41, 'a"', "é"])
def test_names_that_a_coordinator_could_not_show(tmp_path, name):
    with pytest.raises(DataError, match="--name: must be of letters"):
        _joined(tmp_path, name=name)
    assert not (tmp_path / "my carrier").exists()


def test_a_folder_that_is_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "my carrier").mkdir()
    (tmp_path / "my carrier" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="no carrier's folder"):
        _joined(tmp_path)
    assert [file.name for file in (tmp_path / "my carrier").iterdir()] == ["letter.txt"]


def test_a_key_that_others_may_read_or_that_is_gone(tmp_path):
    carrier = _joined(tmp_path)
    carrier.key.chmod(0o640)
    with pytest.raises(StorageError, match=r"others may read this key.*chmod 600"):
        load_carrier(carrier.path)
    carrier.key.unlink()
    with pytest.raises(DataError, match=r"carrier\.key: is missing"):
        load_carrier(carrier.path)


def test_only_listed_bundles_are_answered(tmp_path):
    config = _joined(tmp_path).config
    clientapp.require_listed(BUNDLE, config)
    with pytest.raises(
        DataError, match=f"hospital-a does not answer to app bundle {hashlib.sha256(b'other').hexdigest()}"
    ):
        clientapp.require_listed(b"other", config)


def test_flowers_program_neither_unpacks_a_bundle_nor_loads_an_app_from_it(tmp_path, monkeypatch):
    """What Flower's own code calls is ours by the time it runs."""
    carrier, seen = _joined(tmp_path), []
    monkeypatch.setenv(clientapp.VARIABLE, str(carrier.path))
    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(clientapp.flower, name, getattr(clientapp.flower, name))  # put back afterwards

    def flowers_own() -> None:
        clientapp.flower.install_from_fab(BUNDLE, skip_prompt=True)
        seen.append(
            clientapp.flower.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)("a", "b", "c")
        )
        with pytest.raises(DataError, match="does not answer to app bundle"):
            clientapp.flower.install_from_fab(b"other", skip_prompt=True)

    monkeypatch.setattr(clientapp, "flwr_clientapp", flowers_own)
    clientapp.main()
    assert seen == [installed]


@pytest.mark.parametrize("name", ["install_from_fab", "get_load_client_app_fn"])
def test_a_flower_that_has_renamed_them_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv(clientapp.VARIABLE, str(_joined(tmp_path).path))
    monkeypatch.setattr(clientapp, "flwr_clientapp", lambda: pytest.fail("it ran"))
    other = "get_load_client_app_fn" if name == "install_from_fab" else "install_from_fab"
    monkeypatch.setattr(clientapp.flower, other, getattr(clientapp.flower, other))
    monkeypatch.delattr(clientapp.flower, name)
    with pytest.raises(SystemExit, match="cannot keep its bundles out"):
        clientapp.main()


def test_flowers_executor_starts_programs_by_the_names_that_ours_have(tmp_path, monkeypatch):
    """Else Flower's own would run, and unpack what the coordinator ships; an agent app's run wants `flwr-agentapp`."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import ExecutionSpec, subprocess_executor

    path, started = carry._environment(_joined(tmp_path))["PATH"], []
    monkeypatch.setattr(subprocess_executor.subprocess, "Popen", lambda line, **_: started.append(line[0]))
    for kind in TaskType:
        subprocess_executor.SubprocessExecutor().launch(
            ExecutionSpec(task_type=kind, runtime_api_address="localhost:1", token="t", insecure=True,
                          root_certificates_path=None, runtime_dependency_install=False, parent_pid=None,
                          suppress_output=True, task_id=1, fab_hash=None)
        )  # fmt: skip
    assert len(set(started)) == len(TaskType) >= 6
    for name in started:
        found = shutil.which(name, path=path)
        assert found is not None and "client.carrier.clientapp" in Path(found).read_text()


def test_ours_is_first_on_the_path_and_flower_is_quiet(tmp_path):
    carrier = _joined(tmp_path)
    environment = carry._environment(carrier)
    first = Path(environment["PATH"].split(os.pathsep)[0])
    assert first == carrier.path / "state" / "bin"
    text = (first / "flwr-clientapp").read_text()
    assert "client.carrier.clientapp" in text and os.access(first / "flwr-clientapp", os.X_OK)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0" and environment["UV_OFFLINE"] == "1"
    assert environment["FLWR_HOME"].startswith(str(carrier.path))


def test_news_are_told_once():
    told = []
    news = carry._News("host:1", told.append)
    for line in (
        "Starting",
        "SuperNode ID: 12",
        "Connection attempt failed, retrying in 1",
        "Connection attempt failed",
        "Connection successful after 2",
        f"x {clientapp.NOT_LISTED} abc",
        f"x {clientapp.NOT_LISTED} abc",
    ):
        news(line)
    refused = "refused an app bundle of host:1 that carrier.toml does not list"
    waiting = "waiting for host:1: it does not answer"
    assert told == ["online: host:1 let this carrier in", waiting, "online again: host:1", refused]


def test_it_is_told_again_that_it_is_online_once_the_supernode_has_ended_and_come_back(tmp_path, monkeypatch):
    """Before: the last word was that it had ended, though it was let in again; seen after a clock that jumped."""
    monkeypatch.setattr(carry, "reach", lambda *_: _Found("the clocks differ", "Set it."))
    told = []
    program = carry._program(_joined(tmp_path), told.append)
    program.on_line("SuperNode ID: 12")
    program.why(["x"])
    program.on_line("SuperNode ID: 12")
    assert [line.partition(":")[0] for line in told] == ["online", "online"]


def test_a_socket_whose_path_cannot_be_given_to_flower(tmp_path):
    carrier = _joined(tmp_path, socket=Path('/run/a"b/site.sock'))
    with pytest.raises(DataError, match="a path with a quote"):
        carry._program(carrier, print)


def test_why_it_ended_is_said_in_plain_words(tmp_path, monkeypatch):
    carrier = _joined(tmp_path)
    monkeypatch.setattr(carry, "reach", lambda *_: _Found("is down", "Wait."))
    assert carry._why(["x"], carrier) == "is down. Wait."
    monkeypatch.setattr(carry, "reach", lambda *_: _Found("", ""))
    assert carrier.fingerprint in carry._why(["a", "[code: 2004] Failed to activate SuperNode."], carrier)
    for lines in (["a", "Your licence has ended. Run: curl x"], []):  # the coordinator's words, for all we know
        assert carry._why(lines, carrier) == f"{carrier.path / 'state' / 'carrier.log'} says why"


class _Found:
    def __init__(self, problem: str, remedy: str) -> None:
        self.problem, self.remedy = problem, remedy


def test_a_join_that_was_cut_off_is_said_to_be(tmp_path):
    carrier = _joined(tmp_path)
    (carrier.path / "carrier.toml").unlink()
    with pytest.raises(DataError, match=r"a `join` was cut off here\. Remove this folder"):
        _joined(tmp_path)


@pytest.mark.parametrize("which", ["key", "public"])
@pytest.mark.parametrize("data", [b"", b"half", None])
def test_a_damaged_key_is_found_before_flower_fails_with_it(tmp_path, which, data):
    carrier, other = _joined(tmp_path), _joined(tmp_path / "other")
    file = getattr(carrier, which)
    file.write_bytes(getattr(other, which).read_bytes() if data is None else data)
    with pytest.raises(DataError, match="damaged, or not the key of hospital-a.pub"):
        load_carrier(carrier.path)
