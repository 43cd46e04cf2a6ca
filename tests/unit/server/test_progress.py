"""What the coordinator sees: the time left follows the pace of this process, also after a resume."""

from __future__ import annotations

import io

import pytest

import server.progress as progress_module
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
