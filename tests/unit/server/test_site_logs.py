"""The owner of simulated sites reads what the sites do not tell the server; what it was told is not said twice."""

from __future__ import annotations

import os

import client.log as log_module
from client.log import write_error, write_note  # the real writer
from client.site import load_site_config
from common.errors import BudgetError, DataError, StorageError
from server.site_logs import SiteLogs
from support.sites import make_site


def _raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_new_entries_are_told_once_and_what_the_server_knows_is_not(tmp_path):
    site = make_site(tmp_path)
    config = load_site_config(site)
    write_error(config.state, _raised(DataError("an old story", where="x")))
    logs = SiteLogs([site])
    assert list(logs.news()) == []
    write_error(config.state, _raised(DataError("the images are others", where="images.npz", remedy="Put them back.")))
    write_error(config.state, _raised(DataError("the images are others", where="images.npz", remedy="Put them back.")))
    write_error(config.state, _raised(BudgetError("used up", where="policy.max_epsilon", asked="1", allowed="0")))
    assert list(logs.news()) == [(site.stem, "images.npz: the images are others. Put them back.")]
    write_error(config.state, _raised(StorageError("no space left", where="ledger\x1b[31m")))
    (told,) = logs.news()
    assert "no space left" in told[1] and told[1].isprintable()
    assert list(logs.news()) == []


def test_a_log_that_begins_anew_is_read_from_its_beginning_and_a_missing_one_is_empty(tmp_path):
    site = make_site(tmp_path)
    config = load_site_config(site)
    logs = SiteLogs([site, tmp_path / "other.toml"])
    write_error(config.state, _raised(DataError("first " * 50, where="x")))
    assert len(list(logs.news())) == 1
    (config.state / "site.log").unlink()
    write_error(config.state, _raised(DataError("second", where="x")))
    assert [message for _, message in logs.news()] == ["x: second"]


def test_one_line_of_each_kind_says_what_it_is(tmp_path):
    """Before: a KeyError was "3", of pydantic's many lines the last was shown, and what had no head was lost."""
    site = make_site(tmp_path)
    state = load_site_config(site).state
    logs = SiteLogs([site])
    write_error(state, _raised(KeyError(3)))
    write_error(state, _raised(ValueError("first of many\nsecond\n    last")), doing="its own reference")
    write_error(state, MemoryError())
    write_note(state, "round 1: 2 images had no finite gradient")
    assert [message for _, message in logs.news()] == [
        "KeyError: 3", "ValueError: its own reference failed: first of many second last", "MemoryError: no words",
        "round 1: 2 images had no finite gradient",
    ]  # fmt: skip
    write_error(state, _raised(DataError("2026-01-01T00:00:00 BudgetError: forged\n2026-01-01T00:00:00 Note: forged")))
    (told,) = logs.news()
    assert told[1].count("forged") == 2


def test_what_is_written_while_the_log_is_begun_anew_is_not_lost(tmp_path, monkeypatch):
    site = make_site(tmp_path)
    state = load_site_config(site).state
    write_note(state, "old")
    logs = SiteLogs([site])
    write_note(state, "last of the old one, a long line that makes it longer than the new one")
    monkeypatch.setattr(log_module, "MOST_BYTES", 10)
    write_note(state, "first of the new one")
    assert [message.split()[0] for _, message in logs.news()] == ["last", "first"]


def test_half_a_line_is_read_when_the_rest_is_written_and_no_terminal_takes_a_line_for_a_command(tmp_path):
    site = make_site(tmp_path)
    log = load_site_config(site).state / "site.log"
    logs = SiteLogs([site])
    with log.open("a") as file:
        file.write("2026-01-02T03:04:05+00:00 DataError: the first h")
        file.flush()
        assert list(logs.news()) == []
        file.write("alf\n")
    assert [message for _, message in logs.news()] == ["the first half"]
    write_error(log.parent, _raised(ValueError("\x1b]0;owned\x07 \udc80 \u202e")))
    text = log.read_text()
    assert "ValueError" in text and all(letter.isprintable() or letter == "\n" for letter in text)
    assert len(list(logs.news())) == 1


def test_a_log_that_is_no_file_holds_nobody_up(tmp_path):
    site = make_site(tmp_path)
    log = load_site_config(site).state / "site.log"
    log.unlink()
    os.mkfifo(log)
    write_note(log.parent, "nobody reads it")
    log.unlink()
    log.symlink_to(tmp_path / "elsewhere")
    write_note(log.parent, "nor there")
    assert not (tmp_path / "elsewhere").exists()
