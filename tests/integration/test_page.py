"""The data-protection officer's page, over real HTTP."""

from __future__ import annotations

import http.client
import re
import sqlite3
import threading
from contextlib import closing

import pytest

from client.page import render, server
from client.privacy.ledger import Ceiling, Ledger
from common.accounting import plan_study
from support.browser import browse
from support.sites import open_phantom_site
from support.studies import tiny_study

STUDY = tiny_study()


WIDE = Ceiling(100.0, 1e-5, "rdp")


@pytest.fixture
def site(tmp_path):
    """A site file whose ledger holds an approval, an answer and a hostile refusal."""
    opened = open_phantom_site(tmp_path, STUDY)
    with closing(Ledger.open(opened.state)) as ledger:
        counts = plan_study(STUDY)["counts"]
        numbers = ledger.reserve(
            counts, study=STUDY.sha256, request="r", study_ceiling=WIDE, ceiling=WIDE, approval=None
        )
        with ledger.confirming(*numbers, study=STUDY.sha256, approval=None):
            pass
        ledger.refused(STUDY, rule="<script>alert(1)</script>", what='"><img src=x onerror=alert(2)>')
    return tmp_path / "site-1.toml"


@pytest.fixture
def ask(site):
    running = server([site], 0)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()

    def ask(method="GET", path="/", host=None):
        connection = http.client.HTTPConnection("127.0.0.1", running.server_address[1], timeout=30)
        headers = {} if host is None else {"Host": host}
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode(), dict(reply.headers)

    assert running.server_address[0] == "127.0.0.1"
    yield ask
    running.shutdown()
    running.server_close()
    thread.join()


def test_it_shows_what_was_asked_allowed_refused_and_spent(ask, site):
    status, text, headers = ask()
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    ledger = Ledger.open(site.parent / "site-1")
    spent = ledger.spent(delta=1e-5, accountant="rdp")["train"]
    for words in (f"{spent:.2f}", f"{10 - spent:.2f}", "approved by Dr. T. Test", "Refused 1 times", "single images",
                  ledger.head()[1], "counts", "Policy in force"):  # fmt: skip
        assert words in text, words


def test_what_a_coordinator_wrote_is_shown_as_text(ask):
    _, text, _ = ask()
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search(r"(src|href)\s*=\s*['\"]?(http|//)", text)


def test_it_can_only_be_read_and_only_from_this_machine(ask):
    assert [ask(method)[0] for method in ("POST", "PUT", "DELETE")] == [405, 405, 405]
    assert ask("HEAD")[:2] == (200, "")
    assert ask(path="/../ledger.sqlite")[0] == 404
    assert ask(host="evil.example:8765")[0] == 403
    assert ask(host="localhost:8765")[0] == 200


def test_a_damaged_ledger_is_shown_in_words(site):
    db = sqlite3.connect(site.parent / "site-1" / "ledger.sqlite")
    db.execute("DROP TRIGGER entries_no_update")
    db.execute("UPDATE entries SET at = 'never' WHERE number = 2")
    db.commit()
    db.close()
    text = render([site])
    assert "the ledger was changed at entry 2" in text
    assert "Policy in force" in text


def test_a_lost_ledger_is_shown_in_words_and_not_begun_anew(site):
    (site.parent / "site-1" / "ledger.sqlite").unlink()
    text = render([site])
    assert "the ledger is gone" in text
    assert "Restore the whole state folder" in text
    assert not (site.parent / "site-1" / "ledger.sqlite").exists()


def test_reading_writes_nothing(site):
    state = site.parent / "site-1"
    before = Ledger.open(state).head(), (state / "ledger.head").read_bytes()
    render([site])
    assert (Ledger.open(state).head(), (state / "ledger.head").read_bytes()) == before


def test_a_browser_shows_it(site, tmp_path):
    (tmp_path / "page.html").write_text(render([site]))
    found = browse(tmp_path / "page.html", "--dump-dom")
    assert "Privacy account" in found.stdout
    assert "<polyline" in found.stdout
