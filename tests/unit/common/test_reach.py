"""The way to a coordinator: tried against a real TLS server of our own certificates."""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path

import pytest

from common import reach as reaching
from common.findings import Finding
from common.reach import FLEET, reach
from server.deployment import certificates


@pytest.fixture
def made(tmp_path: Path) -> Path:
    certificates.make_authority(tmp_path / "ca.key", tmp_path / "ca.crt", name="localhost")
    _server_certificate(tmp_path, "localhost")
    return tmp_path


def _server_certificate(folder: Path, host: str) -> None:
    files = (folder / name for name in ("ca.key", "ca.crt", "key", "crt"))
    certificates.make_server_certificate(*files, host=host)


@contextmanager
def served(folder: Path, *, status: int = 401, date: str | None = None):
    """Port of a server that answers every POST alike."""
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response_only(status)
            self.send_header("Date", date or self.date_time_string())
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # who does not believe us hangs up
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_coordinator_that_answers(made):
    with served(made) as (port, asked):
        found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
    assert found.problem == "" and found.status == 401 and asked == [FLEET]
    assert 395 < found.days < 398 and abs(found.clock) < 5
    assert "397" in found.told or "396" in found.told


def test_another_authority_is_not_who_invited_us(made, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    certificates.make_authority(other / "ca.key", other / "ca.crt", name="localhost")
    with served(made) as (port, asked):
        found = reach(f"localhost:{port}", (other / "ca.crt").read_text())
    assert "another authority" in found.problem and "telephone" in found.remedy
    assert asked == []


def test_a_certificate_that_has_expired(made, monkeypatch):
    monkeypatch.setattr(certificates, "_SERVER_DAYS", -0.01)
    _server_certificate(made, "localhost")
    with served(made) as (port, asked):
        found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
    assert "expired" in found.problem and asked == []
    assert certificates.days_left(made / "crt") < 0


def test_a_certificate_for_another_machine(made):
    with served(made) as (port, _):
        found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
        other = reach(f"coordinator.example:{port}", (made / "ca.crt").read_text(), by="127.0.0.1")
    assert found.problem == ""
    assert "not for coordinator.example" in other.problem


def test_a_proxy_without_flower_behind_it(made):
    with served(made, status=502) as (port, _):
        found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
    assert "502" in found.problem


@pytest.mark.parametrize(("seconds", "told"), [
    (-3600, "ahead of the coordinator's"), (-7, "ahead of the coordinator's"), (-1, ""), (200, ""),
    (400, "behind the coordinator's"), (3600, "behind the coordinator's"),
])  # fmt: skip
def test_a_clock_is_off_as_soon_as_flower_refuses_its_signatures(made, seconds, told):
    """Before: from a minute on, either way, though Flower takes nothing of five seconds from now."""
    with served(made, date=formatdate(time.time() + seconds, usegmt=True)) as (port, _):
        found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
    assert told in found.problem and bool(found.problem) == bool(told)
    assert "clock" in found.problem if told else found.status == 401


def test_a_slow_line_is_no_wrong_clock():
    date = formatdate(time.time() - 9, usegmt=True)
    assert reaching._ahead(date, 9.0) == 0.0
    assert -9.0 < reaching._ahead(date, 0.5) < -7.0


def test_nobody_there(made):
    with served(made) as (port, _):
        pass
    found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
    assert "cannot be reached" in found.problem and "deploy up" in found.remedy
    assert "no machine" in reach("no-such-machine.invalid:1", (made / "ca.crt").read_text()).problem
    assert "cannot be read" in reach(f"localhost:{port}", "nonsense").problem


def test_the_certificate_satisfies_openssl_at_its_strictest(made):
    context = ssl.create_default_context(cafile=str(made / "ca.crt"))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    with served(made) as (port, _):
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
            assert secure.version() == "TLSv1.3"


def test_a_finding_moves_no_terminal_and_names_its_remedy_only_where_it_is_needed():
    assert Finding("disk", True, "5 GB free", "Free some.").line == "ok     disk         5 GB free"
    assert Finding("disk", False, "0 GB\x1b[2J", "Free some.").line == "AMISS  disk         0 GB [2J. Free some."


@pytest.mark.parametrize("date", ["x", "Mon, 30 Nov 2026 10:00:00 +9999", "Mon, 30 Nov 99999 10:00:00 GMT", "\xff"])
def test_a_date_that_is_none_is_no_reason_to_fail(made, date):
    with served(made, date=date) as (port, _):
        found = reach(f"localhost:{port}", (made / "ca.crt").read_text())
    assert found.status == 401 and found.clock == 0.0


def test_a_date_without_a_zone_is_utc(made):
    with served(made, date="Mon, 30 Nov 2020 10:00:00 -0000") as (port, _):
        assert "clocks differ" in reach(f"localhost:{port}", (made / "ca.crt").read_text()).problem


@pytest.mark.parametrize("address", ["a..b:443", f"{'x' * 70}.org:443", "localhost:99999"])
def test_an_address_that_cannot_be_is_said_to_be_so(made, address):
    assert reach(address, (made / "ca.crt").read_text()).problem


@pytest.mark.parametrize("authority", ["", " ", "\ufffd", "-----BEGIN CERTIFICATE-----"])
def test_an_authority_that_is_none_makes_nobody_believed(authority):
    assert "cannot be read" in reach("localhost:1", authority).problem


def test_whoever_answers_a_letter_at_a_time_holds_up_nobody(made, monkeypatch):
    monkeypatch.setattr("common.reach._SECONDS", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made / "crt", made / "key")

    def drip() -> None:
        with suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as one:
            one.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(100):
                one.sendall(b"x")
                time.sleep(0.2)

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    found = reach(f"localhost:{listener.getsockname()[1]}", (made / "ca.crt").read_text())
    listener.close()
    assert found.problem and time.monotonic() - began < 5
