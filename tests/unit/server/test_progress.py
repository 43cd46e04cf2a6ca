"""What the coordinator sees: the time left follows the pace of this process, also after a resume."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import psutil
import pytest

import server.progress as progress_module
from server import pipeline
from server.checkpoints import RunFolder
from server.progress import Progress
from support.studies import agreement, tiny_study


@pytest.mark.parametrize(("before", "done", "total", "left"), [(0, 100, 300, "0:20"), (14, 16, 30, "1:10")])
def test_the_time_left_follows_the_pace_since_the_stage_began(tmp_path, monkeypatch, before, done, total, left):
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    folder = RunFolder.create(tmp_path, tiny_study(), agreement().plan)
    out = io.StringIO()
    progress = Progress(folder, out)
    progress.stage("train", "begins", done=before)
    clock[0] = 110.0
    progress.step("train", done, total, "text", loss=0.5)
    assert f"{left} left" in out.getvalue()
    assert folder.events()[-1]["loss"] == 0.5
    progress.warn("careful", site="a")
    assert folder.events()[-1] == {**folder.events()[-1], "event": "warning", "text": "careful", "site": "a"}


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_the_same_lines_with_a_bar_below_and_a_sites_words_are_no_markup(tmp_path):
    folder = RunFolder.create(tmp_path, tiny_study(), agreement().plan)
    out = _Terminal()
    progress = Progress(folder, out)
    progress.stage("train", "2 rounds")
    progress.step("train", 1, 2, "loss 0.5")
    progress.warn("site-1: [bold]no[/bold] :smile:")
    progress.step("train", 2, 2, "loss 0.4")
    progress.close()
    for words in ("2 rounds", "1/2  loss 0.5", "[bold]no[/bold] :smile:", "2/2  loss 0.4"):
        assert words in out.getvalue()
    assert [event["event"] for event in folder.events()] == ["stage", "step", "warning", "step"]


def test_the_peak_of_memory_is_that_of_all_processes_of_the_run():
    with pipeline._peak_memory(every_seconds=0.05) as largest:
        child = subprocess.Popen([sys.executable, "-c", "x = bytearray(150_000_000); print(1, flush=True); input()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.5)
        child.communicate("\n")
    assert largest[0] > psutil.Process().memory_info().rss + 100_000_000
