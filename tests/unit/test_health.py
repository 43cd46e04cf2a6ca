"""docker/health.py: well only when somebody really answers."""

from __future__ import annotations

import http.server
import importlib.util
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from support.paths import REPOSITORY

SPEC = importlib.util.spec_from_file_location("health", REPOSITORY / "docker" / "health.py")
assert SPEC is not None and SPEC.loader is not None
health = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(health)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(health, "SECONDS", 2.0)


@contextmanager
def _answering(code):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(code)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_site_is_well_while_its_process_answers_and_ill_after_and_before(tmp_path):
    with pytest.raises(health.Ill, match="no socket"):
        health.site(tmp_path)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/site.sock")
    server.start()
    health.site(tmp_path)
    server.stop(None).wait()
    (tmp_path / "site.sock").touch()  # what a process that was killed leaves
    with pytest.raises(health.Ill, match="nobody answers"):
        health.site(tmp_path)


@pytest.mark.parametrize(("code", "refused", "well"), [
    (200, False, True), (503, False, False), (404, False, False), (401, True, True), (502, True, False),
    (200, True, False),
])  # fmt: skip
def test_an_answer_is_good_or_a_refusal_where_that_is_right(code, refused, well):
    with _answering(code) as address:
        if well:
            health.answer(address, refused=refused)
        else:
            with pytest.raises(health.Ill, match=str(code)):
                health.answer(address, refused=refused)


def test_nobody_there_is_ill():
    with _answering(200) as address:
        pass
    with pytest.raises(health.Ill, match="refused"):
        health.answer(address)


def test_a_carrier_is_as_well_as_its_supernode():
    """A process of that name, with a port on which somebody answers, or nobody."""
    code = "import sys; print('on', flush=True); sys.stdin.read()"
    with _answering(200) as address:
        port = address.split(":")[-1].strip("/")
        words = ["flower-supernode", "-c", code, "--host", "127.0.0.1", "--port", port]
        with subprocess.Popen(words, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True) as node:  # fmt: skip
            assert node.stdout is not None
            node.stdout.readline()
            assert port in [line[line.index("--port") + 1] for line in health.commands("flower-supernode")]
            node.communicate("")
    assert port not in [line[line.index("--port") + 1] for line in health.commands("flower-supernode")]


def test_what_is_wrong_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(health, "commands", lambda _: iter(()))
    assert health.main("carrier") == 1
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(health, "commands", lambda _: iter([["flower-supernode", "--port", "1"]]))
    assert health.main("carrier") == 1
    monkeypatch.setattr(health, "answer", lambda *_: None)
    assert health.main("carrier") == 0
