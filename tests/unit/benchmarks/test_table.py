"""The benchmark's README: what people wrote stays, verdicts are computed, pictures show synthetic images only."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from benchmarks.utility.cells import cells_of, figure, spread
from benchmarks.utility.grid import RECIPES, Row
from benchmarks.utility.pictures import Point, over_epsilon, sheet
from benchmarks.utility.results import Result
from benchmarks.utility.run import HOME
from benchmarks.utility.table import BEGIN, END, between_markers, differences, markdown_table, render, write_report
from common.errors import DataError
from common.images import ImageSet
from server.release.formats import write_npz


def result(dataset="pneumoniamnist", epsilon=8.0, recipe="default", seed=1, **values) -> Result:
    study = Row("pneumoniamnist", epsilon, recipe, seed, quick=True).study()
    given = {
        "status": "ok", "finished": "2026-01-02 03:04", "code": "c0de", "commit": "abc", "dirty": "no", "ruler": 1,
        "study_sha256": study.sha256, "budget_minutes": 45.0, "minutes": 20.0, "hardware": "a machine",
        "epsilon_spent": 7.991, "test_auc": 0.93, "test_auc_low": 0.91, "test_auc_high": 0.95, "test_f1": 0.86,
        "kid": 0.5, "two_sample": 0.8, "real_auc": 0.97, "floor_kid": 0.01,
        "settings": json.dumps(study.model_dump(mode="json")), **values,
    }  # fmt: skip
    return Result(dataset=dataset, epsilon=epsilon, recipe=recipe, seed=seed, **given)


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_what_people_wrote_around_the_table_stays():
    before = f"# Title\n\nBefore.\n{BEGIN}\nold\n{END}\nAfter: kept.\n"
    after = between_markers(before, "new\n", where="x")
    assert after == f"# Title\n\nBefore.\n{BEGIN}\nnew\n{END}\nAfter: kept.\n"
    assert between_markers(after, "new", where="x") == after


def test_the_committed_page_can_take_a_table():
    before = (HOME / "README.md").read_text()
    after = between_markers(before, "new", where="x")
    assert after.startswith(before[: before.index(BEGIN)]) and f"{BEGIN}\nnew\n{END}" in after


def test_a_text_without_markers_gets_them_at_its_end():
    assert between_markers("# Title\n", "new", where="x") == f"# Title\n\n{BEGIN}\nnew\n{END}\n"


@pytest.mark.parametrize("spoilt", [f"a {BEGIN} b", f"{END} a {BEGIN}", f"{BEGIN}{END}{END}", f"{END}"])
def test_spoilt_markers_are_an_error_and_nothing_is_written(tmp_path, spoilt):
    (tmp_path / "README.md").write_text(spoilt)
    with pytest.raises(DataError, match="markers"):
        write_report(tmp_path, [], tmp_path)
    assert (tmp_path / "README.md").read_text() == spoilt


@pytest.mark.parametrize(("aucs", "verdict"), [((0.93, 0.94, 0.95), "met"), ((0.93, 0.93, 0.95), "missed")])
def test_a_bar_is_held_against_the_mean_of_the_defaults_seeds(aucs, verdict):
    rows = [result(seed=seed, test_auc=auc) for seed, auc in enumerate(aucs, 1)]
    rows.append(result(recipe="moments", test_auc=0.99))
    text = render(cells_of(rows))
    (line,) = lines_with(text, "| pneumoniamnist | 8 | AUC ≥ 0.94 |")
    assert line.endswith(f"| 3 | {verdict} |")
    (line,) = lines_with(text, "| pneumoniamnist | 1 | AUC ≥ 0.90 |")
    assert line.endswith("| not run |")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"minutes": 44.0}, "met"), ({"minutes": 46.0}, "missed"), ({"status": "over budget", "minutes": 1}, "missed")],
)
def test_the_minutes_have_a_bar_too(changes, verdict):
    (line,) = lines_with(render(cells_of([result(**changes), result(seed=2)])), "at most 45 minutes")
    assert line.endswith(f"| {verdict} |")


def test_the_default_is_held_against_moments_alone():
    rows = [result(kid=0.4, two_sample=0.9, test_auc=0.93), result(recipe="moments", kid=0.5, two_sample=0.8)]
    text = render(cells_of(rows)).partition("moments only")[2]
    assert lines_with(text, "KID")[0].endswith("| 0.4000 | 0.5000 | met |")
    assert lines_with(text, "two-sample")[0].endswith("| 0.900 | 0.800 | missed |")
    assert lines_with(text, "| AUC |")[0].endswith("| 0.930 | 0.930 | met |")


def test_a_cell_shows_the_mean_with_the_seeds_range_or_one_seeds_own_interval():
    (alone,) = cells_of([result()])
    assert alone.text("test_auc") == "0.930 [0.910, 0.950]" and alone.text("test_f1") == "0.860"
    assert alone.text("recall") == "–"
    (cell,) = cells_of([result(seed=2, test_auc=0.96), result(test_auc=0.9), result(seed=3, status="over budget")])
    assert cell.text("test_auc") == "0.930 [0.900, 0.960]"
    assert [len(cell.finished), len(cell.over_budget)] == [2, 1]
    assert spread([], "test_auc") == (None, None)


def test_only_the_newest_row_of_a_seed_counts_and_unknown_rows_do_not():
    cells = cells_of([result(test_auc=0.1), result(test_auc=0.9), result(dataset="other"), result(recipe="moments")])
    assert [(cell.recipe, cell.mean("test_auc")) for cell in cells] == [("default", 0.9), ("moments", 0.93)]


def test_cells_stand_in_the_order_of_sets_epsilons_and_recipes():
    rows = [result(recipe="moments"), result("fundus4"), result(epsilon=1.0), result()]
    order = [cell.results[0].cell for cell in cells_of(rows)]
    assert order == [("pneumoniamnist", 8.0, "default"), ("pneumoniamnist", 8.0, "moments"),
                     ("pneumoniamnist", 1.0, "default"), ("fundus4", 8.0, "default")]  # fmt: skip


def test_settings_are_told_as_differences_from_the_study_file():
    row = Row("pneumoniamnist", 3.0, "moments", 2)
    settings = json.dumps(row.study().model_dump(mode="json"))
    told = differences(result(epsilon=3.0, recipe="moments", seed=2, settings=settings))
    assert set(told.split(", ")) == {
        "`privacy.epsilon=3`", "`study.seed=2`", "`training.rounds=0`", "`simulation.own_reference=false`"
    }  # fmt: skip
    gone = json.loads(settings) | {"old_section": {"key": 1.5}}
    assert "`old_section.key=1.5`" in differences(replace(result(), settings=json.dumps(gone)))


def test_a_changed_software_is_marked_behind_its_commit():
    for dirty, shown in (("no", "| abc |"), ("yes", "| abc+ |"), ("unknown", "| abc |")):
        assert lines_with(render(cells_of([result(dirty=dirty)])), "| 8 | default | 1 |")[0].endswith(shown)


def test_without_a_run_the_page_says_so():
    assert render([]) == "No run yet.\n"
    assert "- default: " in render(cells_of([result()]))


def test_a_table_is_markdown_whatever_is_in_a_cell():
    assert markdown_table(("a", "b"), [("1|2", "3")]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
    assert (figure(-0.00001, 4), figure(-0.1, 1), figure(1.0)) == ("0.0000", "-0.1", "1.000")


def test_a_plot_is_whole_and_the_same_every_time():
    lines = {"default": [Point(8, 0.9, 0.8, 0.95), Point(1, 0.7)], "moments": [Point(1000, 0.6)]}
    svg = over_epsilon(lines, ylabel="AUC", level=("real images", 0.97))
    assert svg == over_epsilon(lines, ylabel="AUC", level=("real images", 0.97))
    assert svg != over_epsilon(lines, ylabel="AUC")
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def some_images(value: int) -> ImageSet:
    return ImageSet(np.full((4, 1, 28, 28), value, dtype=np.uint8), np.array([0, 1, 0, 1]))


def test_a_sheet_has_a_row_for_each_entry_and_room_for_its_caption():
    one = Image.open(io.BytesIO(sheet([("a", some_images(90), 0)], "epsilon 8")))
    two = Image.open(io.BytesIO(sheet([("a", some_images(90), 0), ("b", some_images(200), 1)], "epsilon 8 " * 60)))
    assert two.width == one.width and two.height > one.height + 64
    colours = {colour for _, colour in two.getcolors(1 << 16) or []}
    assert {(90, 90, 90), (200, 200, 200)} <= colours


def keep_release(out, entry: Result, value: int) -> None:
    row = Row(entry.dataset, entry.epsilon, entry.recipe, entry.seed)
    run = out / row.identity / f"{entry.code}-{entry.study_sha256[:12]}" / "pneumonia-1"
    write_npz(run / "release" / "images.npz", some_images(value))
    (run / "study.sha256").write_text(entry.study_sha256)


def test_the_report_has_its_pictures_and_a_sheet_of_every_recipe_at_one_epsilon(tmp_path):
    rows = [result(), result(recipe="moments"), result(epsilon=1.0)]
    keep_release(tmp_path / "out", rows[0], 90)
    keep_release(tmp_path / "out", rows[1], 200)
    readme = write_report(tmp_path / "report", rows, tmp_path / "out")
    text = readme.read_text()
    for name in ("pneumoniamnist-auc.svg", "pneumoniamnist-kid.svg", "pneumoniamnist-sheet.png"):
        assert f"]({name})" in text and (readme.parent / name).stat().st_size > 500
    page = Image.open(readme.parent / "pneumoniamnist-sheet.png")
    assert {(90, 90, 90), (200, 200, 200)} <= {colour for _, colour in page.getcolors(1 << 16) or []}
    before = {path.name: path.read_bytes() for path in readme.parent.iterdir()}
    write_report(tmp_path / "report", rows, tmp_path / "gone")
    assert {path.name: path.read_bytes() for path in readme.parent.iterdir()} == before, "an older sheet stays"


def test_no_sheet_is_made_of_a_set_that_may_not_be_shared(tmp_path):
    entry = result("fundus4")
    keep_release(tmp_path / "out", entry, 90)
    write_report(tmp_path, [entry], tmp_path / "out")
    assert not list(tmp_path.glob("*.png")) and list(tmp_path.glob("fundus4-*.svg"))


def test_every_recipe_is_explained():
    text = render(cells_of([result()]))
    assert all(f"- {recipe.name}: {recipe.says}" in text for recipe in RECIPES.values())
