"""The report as a reader sees it, in a real browser."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from server.release.report import render_report
from support.browser import browse
from support.reports import report_inputs
from support.studies import tiny_study


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_report(report_inputs(tiny_study(data={"classes": ["clear", "<b>opacity</b>"]}))))
    return path


@pytest.mark.parametrize("width", [1200, 400])
def test_the_report_renders_in_a_browser_wide_and_narrow(page, tmp_path, width):
    shot = tmp_path / "shot.png"
    browse(page, f"--screenshot={shot}", f"--window-size={width},1400")
    assert shot.exists()
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    assert pixels.shape[1] == width
    assert pixels.std() > 10
    assert len(np.unique(pixels)) > 50


def test_the_page_says_the_figures_and_escapes_what_it_is_given(page, tmp_path):
    dom = browse(page, "--dump-dom").stdout
    figures = ("7.25", "0.876 [0.800, 0.900]", "0.765", "12.5", "1234 MB")
    for words in (*figures, "the plan (upper bound", "round 2: site-2", "&lt;b&gt;opacity&lt;/b&gt;"):
        assert words in dom
    assert "<b>opacity</b>" not in dom
    assert "PHANTOMS." not in dom
