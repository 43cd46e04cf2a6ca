"""A run's events: their parts, what they say together, and the page that shows it."""

from __future__ import annotations

import re

import pytest

from common.errors import StorageError
from server import checkpoints, live_page
from server.checkpoints import RunFolder
from server.live_page import NAME, LivePage, render
from server.run_status import RunStatus
from support.studies import agreement, tiny_study


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path, tiny_study(), agreement().plan)


def _round(folder: RunFolder, number: int, loss: float = 0.5, **more) -> None:
    values = {"round": number, "loss": loss, "epsilon": {"site-1": number / 2}, "accepted": ["site-1"], **more}
    folder.event("step", stage="train", done=number, total=9, text=f"loss {loss}", seconds_left=300.0, **values)


def _page(folder: RunFolder) -> str:
    return (folder.path / NAME).read_text()


def test_events_go_into_parts_of_bounded_size_and_are_read_in_their_order(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "MOST_EVENT_BYTES", 1000)
    for number in range(1, 31):
        _round(folder, number)
    parts = sorted(folder.path.glob("events*.jsonl"))
    assert len(parts) > 3 and all(part.stat().st_size < 1400 for part in parts)
    assert [event["round"] for event in folder.events()] == list(range(1, 31))


def test_a_part_that_is_begun_while_they_are_read_is_read_too(folder, monkeypatch):
    _round(folder, 1)
    once, whole_lines = [], checkpoints._whole_lines

    def begins_a_part(path):
        if not once:
            once.append(path)
            (folder.path / "events.jsonl").rename(folder.path / "events-00001.jsonl")
            _round(folder, 2)
        return whole_lines(path)

    monkeypatch.setattr(checkpoints, "_whole_lines", begins_a_part)
    assert [event["round"] for event in folder.events()] == [1, 2]


def test_the_page_follows_the_run_and_says_at_last_where_the_report_is(folder, monkeypatch):
    monkeypatch.setattr(live_page, "_EVERY_SECONDS", 0.0)
    page = LivePage(folder)
    folder.listeners.append(page.take)
    folder.event("begin", study="x")
    assert "begins" in _page(folder) and 'http-equiv="refresh"' in _page(folder)
    _round(folder, 1, 0.75)
    _round(folder, 2, 0.5, rejected={"site-2": "no <answer>"})
    text = _page(folder)
    assert "train 2 of 9" in text and "about 5 min left" in text
    assert "1.000" in text and "no &lt;answer&gt;" in text and "<answer>" not in text
    assert "from 0.750 to 0.500" in text and text.count("<polyline") == 1
    page.close(folder.path / "report.html")
    assert 'href="report.html"' in _page(folder) and 'http-equiv="refresh"' not in _page(folder)


def test_it_asks_nothing_of_anybody_and_runs_no_script(folder):
    text = render(RunStatus(folder="x", state="running", warnings=["<script>alert(1)</script>"]), name="a<b")
    assert "<script" not in text and not re.search(r"(src|href)=|url\(|https?://", text)


def test_a_run_that_goes_on_shows_what_was_before_it(folder):
    _round(folder, 1, 0.75)
    page = LivePage(folder)
    folder.listeners.append(page.take)
    folder.event("begin", study="x")
    _round(folder, 2)
    folder.event("end")
    assert "from 0.750 to 0.500" in _page(folder)
    folder.event("failed", error="FederationError", what="too few sites")
    page.close(None)
    assert "too few sites" in _page(folder) and "failed: " in _page(folder)


def test_a_round_that_is_made_again_takes_the_place_of_the_lost_one(folder):
    run = RunStatus(folder="x", state="running")
    for number, loss in ((1, 0.9), (2, 0.8), (3, 0.7), (2, 0.6)):
        run.take({"event": "step", "stage": "train", "done": number, "total": 9, "loss": loss})
    assert run.losses == [0.9, 0.6]


def test_a_page_that_cannot_be_written_ends_no_run(folder, monkeypatch):
    def full(*_):
        raise StorageError("no space left")

    monkeypatch.setattr(live_page, "atomic_write", full)
    page = LivePage(folder)
    page.take({"event": "begin"})
    page.close(None)
    assert not (folder.path / NAME).exists()


def test_it_is_not_written_at_every_step(folder, monkeypatch):
    written = []
    monkeypatch.setattr(live_page, "atomic_write", lambda path, data: written.append(data))
    page = LivePage(folder)
    folder.listeners.append(page.take)
    folder.event("begin")
    for number in range(50):
        _round(folder, number + 1)
    assert len(written) <= 2
