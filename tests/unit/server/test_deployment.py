"""The coordinator's folder, its bundle, the carriers that it lets in, and its proxy's configuration."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tomllib
import zipfile
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError, FederationError, StorageError
from common.invitation import fingerprint, load_invitation
from common.supervision import QUIET
from server.deployment import bundle, certificates, flower, nodes, services
from server.deployment.folder import Addresses, Deployment
from support.deployment import free_port, why_not
from support.paths import REPOSITORY


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Deployment:
    addresses = Addresses(
        host="coordinator.example.org", listen="127.0.0.1", port=free_port(), superlink_port=free_port()
    )
    return Deployment.create(tmp_path_factory.mktemp("dep") / "my coordinator", addresses)


@pytest.fixture
def deployment(made, monkeypatch) -> Deployment:
    """With no SuperLink behind it, and no carrier."""
    for file in (made.path / "sites").iterdir():
        file.unlink()
    monkeypatch.setattr(nodes, "ask_or_hear", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(nodes, "ask", _down)
    return made


def _down(*_):
    raise FederationError("down")


def _key(folder, name: str, key=None) -> tuple:
    """(file, fingerprint) of a public key."""
    key = key or ec.generate_private_key(ec.SECP384R1()).public_key()
    data = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    file = folder / f"{name}.pub"
    file.write_bytes(data + b" somebody@somewhere\n")
    return file, fingerprint(data)


def test_a_new_folder_is_shut_to_others_and_says_how_to_reach_it(made):
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    for secret in ("authority.key", "server.key", "signing.key"):
        assert stat.S_IMODE((made.path / secret).stat().st_mode) == 0o600
    invitation = load_invitation(made.path / "invitation.json")
    assert invitation.coordinator == f"coordinator.example.org:{made.addresses.port}"
    assert invitation.certificate == made.authority.read_text()
    assert Deployment.open(made.path).addresses == made.addresses


def test_the_certificate_is_for_the_host_and_this_machine_only(made):
    certificate = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)


def test_a_renewed_certificate_is_of_the_same_authority(made):
    before, authority = made.certificate.read_bytes(), made.authority.read_bytes()
    made.renew()
    assert made.certificate.read_bytes() != before and made.authority.read_bytes() == authority
    x509.load_pem_x509_certificate(made.certificate.read_bytes()).verify_directly_issued_by(
        x509.load_pem_x509_certificate(authority)
    )


def test_nothing_is_overwritten(made):
    with pytest.raises(StorageError, match="not empty"):
        Deployment.create(made.path, made.addresses)


def test_a_folder_that_could_not_be_made_whole_is_left_empty(tmp_path, monkeypatch):
    def fails(*_):
        raise StorageError("no space left")

    monkeypatch.setattr("server.deployment.folder.build", fails)
    with pytest.raises(StorageError, match="no space left"):
        Deployment.create(tmp_path / "new", Addresses(host="localhost"))
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    assert Deployment.create(tmp_path / "new", Addresses(host="localhost")).path == tmp_path / "new"


@pytest.mark.parametrize(("change", "words"), [
    ({"host": "a b"}, "no name of a machine"), ({"host": ""}, "no name"), ({"host": "-x.org"}, "no name"),
    ({"host": 'x"; }'}, "no name"), ({"listen": "everywhere"}, "no IP address"), ({"superlink_port": 8443}, "the same"),
])  # fmt: skip
def test_addresses_that_cannot_be_used(tmp_path, change, words):
    with pytest.raises(DataError, match=words):
        Deployment.create(tmp_path / "new", Addresses(**{"host": "localhost", **change}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ['quo"te', "dol$lar", "se;mi", "bra{ce", "back\\slash", "new\nline"])
def test_a_folder_that_cannot_stand_in_the_proxys_configuration(tmp_path, name):
    with pytest.raises(DataError, match="a path with a quote"):
        Deployment.create(tmp_path / name, Addresses(host="localhost"))


def test_what_is_no_deployment_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"no deployment's folder .*deploy init"):
        Deployment.open(tmp_path)
    (tmp_path / "deployment.toml").write_text('host = "localhost"\nport = 70000\n')
    with pytest.raises(DataError, match=r"deployment\.toml: port: must be less than or equal to 65535"):
        Deployment.open(tmp_path)
    (tmp_path / "deployment.toml").write_text('hots = "localhost"\n')
    with pytest.raises(DataError, match="Did you mean 'host'"):
        Deployment.open(tmp_path)


def test_the_bundle_is_what_the_projects_own_settings_ship_but_for_studies(made):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    own = tomllib.loads((made.app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert own["components"] == project["components"]
    assert set(own["fab-include"]) == set(project["fab-include"]) - {"configs/**/*.toml", "LICENSE"}
    assert set(own["config"]) == set(project["config"])
    with zipfile.ZipFile(made.path / "app.fab") as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info/")}
    shipped = {path.relative_to(made.app).as_posix() for path in made.app.rglob("*") if path.is_file()}
    assert names == shipped
    assert {name for name in names if name.startswith("client/")} == {"client/__init__.py", "client/app.py"}
    assert {"server/app.py", "server/deployment/studies.py", "common/protocol.py"} <= names


def test_the_same_code_gives_the_same_bundle_and_other_code_another(made, tmp_path):
    app, flwr = tmp_path / "app", REPOSITORY / "no"
    flwr = bundle.Path(sys.executable).parent / "flwr"
    bundle.make_app(app)
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(tmp_path)}
    _, digest = bundle.build(app, flwr, environment)
    assert (digest,) == load_invitation(made.path / "invitation.json").bundles
    (app / "client" / "app.py").write_text((app / "client" / "app.py").read_text() + "\n")
    (app / "stale.py").write_text("")
    assert bundle.build(app, flwr, environment)[1] != digest
    bundle.make_app(app)
    assert bundle.build(app, flwr, environment)[1] == digest


def test_flower_is_told_to_send_and_fetch_nothing(made):
    environment = made.environment()
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0" and environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1" and environment["UV_OFFLINE"] == "1"
    assert environment["FLWR_HOME"].startswith(str(made.path))


def test_a_carrier_is_admitted_by_the_fingerprint_that_was_heard(deployment, tmp_path):
    file, own = _key(tmp_path, "hospital-a")
    carrier = nodes.admit(deployment, file, said=own.upper().replace(" ", "-"))
    assert (carrier.name, carrier.fingerprint) == ("hospital-a", own)
    assert nodes.carriers(deployment) == [carrier]
    assert b"somebody" not in (deployment.path / "sites" / "hospital-a.pub").read_bytes()
    assert nodes.register(deployment, "hospital-a") == "the services are not up; it is let in when they start"
    assert nodes.admit(deployment, file, said=own) == carrier  # once more is nothing new


def test_a_key_that_flower_does_not_take_is_no_admitted_one(deployment, tmp_path, monkeypatch):
    file, own = _key(tmp_path, "hospital-a")
    nodes.admit(deployment, file, said=own)
    monkeypatch.setattr(nodes, "ask", lambda *_: {"nodes": []})
    monkeypatch.setattr(nodes, "ask_or_hear", lambda *_: {"error-message": "Public key already in use"})
    with pytest.raises(FederationError, match=r"hospital-a: Flower does not let it in \(hospital-a: .*deploy dismiss"):
        nodes.register(deployment, "hospital-a")


def test_another_fingerprint_lets_nobody_in(deployment, tmp_path):
    file, own = _key(tmp_path, "hospital-a")
    with pytest.raises(DataError, match="the fingerprint is not the one given") as caught:
        nodes.admit(deployment, file, said=fingerprint(b"other"))
    assert own not in str(caught.value)  # or it would be copied from here
    assert nodes.carriers(deployment) == []


def test_a_name_or_a_key_is_one_carriers(deployment, tmp_path):
    (tmp_path / "b").mkdir()
    file, own = _key(tmp_path, "hospital-a")
    nodes.admit(deployment, file, said=own)
    other, others = _key(tmp_path / "b", "hospital-a")
    with pytest.raises(DataError, match="another carrier is called hospital-a"):
        nodes.admit(deployment, other, said=others)
    again = tmp_path / "hospital-b.pub"
    again.write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="carrier hospital-a has this key already"):
        nodes.admit(deployment, again, said=own)


@pytest.mark.parametrize(
    "data", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"ssh-rsa AAAA", b"\xff" * 99_999]
)
def test_what_is_no_key_is_refused(deployment, tmp_path, data):
    (tmp_path / "a.pub").write_bytes(data)
    with pytest.raises(DataError, match="not a public key"):
        nodes.admit(deployment, tmp_path / "a.pub", said="")


def test_a_key_that_flower_does_not_take_is_refused_at_once(deployment, tmp_path):
    file, own = _key(tmp_path, "a", ed25519.Ed25519PrivateKey.generate().public_key())
    with pytest.raises(DataError, match="not an elliptic-curve key"):
        nodes.admit(deployment, file, said=own)
    with pytest.raises(DataError, match="cannot be read"):
        nodes.admit(deployment, tmp_path / "none.pub", said=own)
    odd, own = _key(tmp_path, "a name with blanks")
    with pytest.raises(DataError, match="a name of letters"):
        nodes.admit(deployment, odd, said=own)


def test_the_superlink_is_told_of_those_it_does_not_know(deployment, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        file, own = _key(tmp_path, name)
        nodes.admit(deployment, file, said=own)
    (deployment.path / "sites" / "a.node").write_text("7\n")
    asked, told = [], []

    def answer(_deployment, *arguments):
        asked.append(arguments[-1])
        if arguments[-1] == "b":
            return {"success": True, "node-id": 11}
        return {"success": False, "error-message": "[code: 99] disk on fire"}

    monkeypatch.setattr(nodes, "ask", lambda *_: {"nodes": [{"node-id": "7", "status": "online"}]})
    monkeypatch.setattr(nodes, "ask_or_hear", answer)
    nodes.register_admitted(deployment, told.append)
    assert asked == ["b", "c"]
    assert {c.name: c.node for c in nodes.carriers(deployment)} == {"a": "7", "b": "11", "c": ""}
    assert told == ["warning: c is not registered: [code: 99] disk on fire"]


def test_a_dismissed_carrier_is_gone(deployment, tmp_path, monkeypatch):
    file, own = _key(tmp_path, "a")
    nodes.admit(deployment, file, said=own)
    (deployment.path / "sites" / "a.node").write_text("7\n")
    with pytest.raises(FederationError):  # no SuperLink: it would still let it in
        nodes.dismiss(deployment, "a")
    assert nodes.carriers(deployment)
    asked = []
    monkeypatch.setattr(nodes, "ask", lambda _, *arguments: asked.append(arguments) or {})
    nodes.dismiss(deployment, "a")
    assert asked == [("supernode", "unregister", "7", "here")] and not nodes.carriers(deployment)
    with pytest.raises(DataError, match="no carrier of that name"):
        nodes.dismiss(deployment, "a")


def test_a_carrier_whose_number_was_lost_is_shut_out_all_the_same(deployment, tmp_path, monkeypatch):
    for name in ("a", "b"):
        file, own = _key(tmp_path, name)
        nodes.admit(deployment, file, said=own)
    (deployment.path / "sites" / "b.node").write_text("7\n")
    listed = [{"node-id": "7", "status": "online"}, {"node-id": "8", "status": "online"},
              {"node-id": "9", "status": "unregistered"}]  # fmt: skip
    asked, told = [], []
    monkeypatch.setattr(nodes, "ask", lambda _, *arguments: asked.append(arguments) or {"nodes": listed})
    monkeypatch.setattr(nodes, "ask_or_hear", lambda *_: {"error-message": "Public key already in use"})
    nodes.register_admitted(deployment, told.append)
    assert len(told) == 1 and "deploy dismiss" in told[0]
    nodes.dismiss(deployment, "a")
    assert asked[-1] == ("supernode", "unregister", "8", "here") and [c.name for c in nodes.carriers(deployment)] == [
        "b"
    ]


@pytest.mark.parametrize(
    "output", ["", "Traceback ...", "{", "[1]", '{"success": false, "error-message": "a\\nb: no"}', "x {}"]
)
def test_whatever_flower_prints_a_no_is_one_line(made, monkeypatch, output):
    done = subprocess.CompletedProcess([], 0, output, "said on stderr")
    monkeypatch.setattr(flower.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(FederationError, match="Flower says: ") as caught:
        flower.ask(made, "list", "here")
    assert "\n" not in str(caught.value) and "deploy up" in caught.value.remedy


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@settings(max_examples=30, deadline=None)
@given(port=st.integers(1024, 65535), listen=st.sampled_from(["0.0.0.0", "127.0.0.1", "::1", "10.1.2.3"]))
def test_the_proxy_passes_the_fleet_api_and_nothing_else(made, port, listen):
    """What nginx itself makes of the file is tests/integration/test_loopback_deployment.py's."""
    addresses = made.addresses.model_copy(update={"listen": listen, "port": port})
    program = services._proxy(Deployment(made.path, addresses))
    text = (made.path / "state" / "proxy" / "nginx.conf").read_text()
    assert text.count("proxy_pass ") == 1 and text.count("location ") == 2
    assert "location / { return 403; }" in text and "location /v1/fleet/ {" in text
    assert 'if ($request_uri !~ "^/v1/fleet/[a-z-]+$") { return 403; }' in text
    assert (f"listen [::1]:{port} ssl" if ":" in listen else f"listen {listen}:{port} ssl") in text
    assert "proxy_ssl_verify on" in text and program.command()[1] == "-c"


def test_services_do_not_start_on_a_port_that_is_taken_or_with_an_expired_certificate(made, monkeypatch):
    monkeypatch.setattr(services, "require_path_without_blanks", lambda: None)  # the tests' own may have one
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = made.addresses.model_copy(update={"port": other.getsockname()[1]})
        with pytest.raises(DataError, match=r"port \d+ cannot be used"):
            services.up(Deployment(made.path, taken), services.threading.Event(), print)
    monkeypatch.setattr(certificates, "_SERVER_DAYS", -0.01)
    made.renew()
    with pytest.raises(DataError, match=r"expired.*deploy renew"):
        services.up(made, services.threading.Event(), print)
    monkeypatch.setattr(certificates, "_SERVER_DAYS", 10)
    made.renew()
    told = []
    services._warn_of_expiry(made, told.append)
    assert told and "expires in 10 days" in told[0]
    monkeypatch.undo()
    made.renew()


def _copied(made, tmp_path) -> Deployment:
    shutil.copytree(made.path, tmp_path / "copy")
    return Deployment(tmp_path / "copy", made.addresses)


@pytest.mark.parametrize("data", [b"", b"-----BEGIN", b"\xff\xfe\x00"])
def test_a_damaged_authority_is_one_line_and_nothing_is_changed(made, tmp_path, data):
    copy = _copied(made, tmp_path)
    (copy.path / "authority.crt").write_bytes(data)
    before = (copy.path / "app.fab").read_bytes(), copy.certificate.read_bytes()
    with pytest.raises(DataError, match="cannot be read|is not a certificate"):
        copy.renew()
    with pytest.raises(DataError, match="is not a certificate"):
        copy.ship()
    assert ((copy.path / "app.fab").read_bytes(), copy.certificate.read_bytes()) == before


def test_every_invitation_is_signed_by_the_same_key_and_newer_than_the_last(made, tmp_path):
    copy = _copied(made, tmp_path)
    first = load_invitation(copy.path / "invitation.json")  # reads it only when its signature fits
    copy.ship()
    second = load_invitation(copy.path / "invitation.json")
    assert (second.signer, second.number) == (first.signer, first.number + 1)
    (copy.path / "signing.key").unlink()
    copy.ship()
    third = load_invitation(copy.path / "invitation.json")
    assert third.signer != first.signer and third.number == first.number + 2


@pytest.mark.parametrize("file", ["signing.key", "invitation.json"])
@pytest.mark.parametrize("data", [b"", b"-----BEGIN", b"\xff\xfe\x00", None])
def test_a_damaged_signing_key_or_invitation_is_one_line_and_nothing_is_changed(made, tmp_path, file, data):
    copy = _copied(made, tmp_path)
    other = (copy.path / "authority.key").read_bytes()  # a key, of another kind
    (copy.path / file).write_bytes(other if data is None else data)
    before = (copy.path / "app.fab").read_bytes()
    with pytest.raises(DataError, match=rf"{file}: is (no signing key|damaged)\. Put it back from a backup"):
        copy.ship()
    assert (copy.path / "app.fab").read_bytes() == before


def test_a_key_of_another_authority_signs_nothing(made, tmp_path):
    copy = _copied(made, tmp_path)
    certificates.make_authority(copy.path / "authority.key", tmp_path / "other.crt", name="other")
    with pytest.raises(DataError, match=r"is not the key of authority\.crt"):
        copy.renew()


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_services_say_that_the_servers_key_is_damaged_and_make_what_is_missing(made, tmp_path):
    copy = _copied(made, tmp_path)
    shutil.rmtree(copy.path / "state")
    (copy.path / "server.key").write_bytes((copy.path / "server.key").read_bytes()[:100])
    with pytest.raises(DataError, match=r"server\.key: is no key.*deploy renew"):
        services.up(copy, services.threading.Event(), print)
    copy.renew()
    stop = services.threading.Event()
    stop.set()
    services.up(copy, stop, print)
    assert str(copy.path) in (copy.path / "state" / "flower" / "config.toml").read_text()  # it was made elsewhere


def test_a_path_with_a_blank_is_told_before_flower_fails_without_a_word(monkeypatch):
    spec = SimpleNamespace(origin="/srv/My Clone/.venv/lib/flwr/__init__.py")
    monkeypatch.setattr(services, "find_spec", lambda _: spec)
    with pytest.raises(DataError, match="does not run from a path with a blank"):
        services.require_path_without_blanks()
    spec.origin = "/opt/synthward/.venv/lib/flwr/__init__.py"
    services.require_path_without_blanks()


def test_a_carriers_number_that_is_damaged_is_none(deployment, tmp_path):
    file, own = _key(tmp_path, "a")
    nodes.admit(deployment, file, said=own)
    for data in (b"", b"\xff\x00", b"12x", b"-1"):
        (deployment.path / "sites" / "a.node").write_bytes(data)
        assert [carrier.node for carrier in nodes.carriers(deployment)] == [""]


def test_a_key_that_is_no_file_is_not_waited_for(deployment, tmp_path):
    os.mkfifo(tmp_path / "a.pub")
    with pytest.raises(DataError, match="not a regular file"):
        nodes.admit(deployment, tmp_path / "a.pub", said="x")
