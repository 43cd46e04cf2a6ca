"""The CSV of results: whole rows only, nothing lost, the newest counts."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.utility.results import COLUMNS, Result, append, load, newest
from common.errors import DataError, StorageError

ROW = Result(
    dataset="pneumoniamnist", epsilon=8.0, recipe="default", seed=1, status="ok", finished="2026-01-02 03:04",
    code="c0de", commit="abc", dirty="no", ruler=1, study_sha256="5a", budget_minutes=45.0, minutes=20.5,
    hardware="a machine, with a comma", test_auc=0.9, settings='{"a":{"b":"c, \\"d\\""}}',
)  # fmt: skip

_WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Z")), min_size=1, max_size=20)
_NUMBERS = st.floats(-1e6, 1e6).map(lambda value: float(f"{value:.6g}"))


@st.composite
def results(draw) -> Result:
    values: dict[str, Any] = {}
    for field in fields(Result):
        kind = str(field.type)
        one = _NUMBERS if kind.startswith("float") else st.integers(0, 10**9) if kind.startswith("int") else _WORDS
        one = st.sampled_from(["ok", "over budget"]) if field.name == "status" else one
        values[field.name] = draw(st.none() | one if kind.endswith("None") else one)
    return Result(**values)


@settings(max_examples=30)
@given(st.lists(results(), min_size=1, max_size=4))
def test_what_is_appended_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "results.csv"
    for row in rows:
        append(path, row)
    assert load(path) == (rows, 0)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_was_cut_off_is_passed_over_and_mended_by_the_next(tmp_path, cut):
    path = tmp_path / "results.csv"
    append(path, ROW)
    append(path, replace(ROW, seed=2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert load(path) == ([ROW], 1)
    append(path, replace(ROW, seed=3))
    assert load(path) == ([ROW, replace(ROW, seed=3)], 0)


def test_a_failed_write_leaves_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    append(path, ROW)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.files.os.replace", full)
    with pytest.raises(StorageError):
        append(path, replace(ROW, seed=2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.csv"]


def test_a_figure_that_is_not_finite_is_no_figure(tmp_path):
    path = tmp_path / "results.csv"
    append(path, replace(ROW, kid=math.nan, test_f1=math.inf))
    assert load(path)[0] == [ROW]


def test_a_spoilt_line_costs_only_itself(tmp_path):
    path = tmp_path / "results.csv"
    append(path, ROW)
    good = path.read_text()
    for bad in ("nonsense\n", good.split("\n")[1].replace(",ok,", ",perhaps,") + "\n", '"open\n'):
        path.write_text(good + bad)
        assert load(path) == ([ROW], 1)


def test_a_file_of_other_columns_is_refused_and_kept(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("dataset,colour\nx,red\n")
    for action in (lambda: load(path), lambda: append(path, ROW)):
        with pytest.raises(DataError, match="columns"):
            action()
    assert path.read_text() == "dataset,colour\nx,red\n"


def test_a_column_that_came_later_is_empty_in_older_rows(tmp_path):
    path = tmp_path / "results.csv"
    old = [name for name in COLUMNS if name != "kid"]
    values = [getattr(ROW, name) for name in old]
    cells = ['"' + str(value).replace('"', '""') + '"' if value is not None else "" for value in values]
    path.write_text(",".join(old) + "\n" + ",".join(cells) + "\n")
    assert load(path) == ([ROW], 0)


def test_no_file_is_no_result(tmp_path):
    assert load(tmp_path / "none.csv") == ([], 0)


def test_the_newest_row_of_a_seed_counts():
    rows = [ROW, replace(ROW, seed=2), replace(ROW, code="new"), replace(ROW, epsilon=1.0)]
    assert newest(rows) == [rows[2], rows[1], rows[3]]
    assert cast(Any, newest([])) == []
