"""The grid: the most valuable rows first, no row twice, and every override is a setting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.utility import grid
from benchmarks.utility.grid import DATASETS, NEARLY_NO_NOISE, QUICK, RECIPES, Row, epsilon_label, full_grid, quick_grid
from common.errors import StudyError

MODIFIED = [recipe for recipe in RECIPES if recipe != "default"]


def test_no_row_is_there_twice():
    for rows in (full_grid(), quick_grid()):
        assert len({row.identity for row in rows}) == len(rows)
        assert all("/" not in row.identity for row in rows)


def test_the_default_at_the_bars_epsilon_comes_first_on_every_set_with_three_seeds():
    first = full_grid()[:9]
    assert {(row.dataset, row.seed) for row in first} == {(name, seed) for name in DATASETS for seed in (1, 2, 3)}
    assert {(row.epsilon, row.recipe) for row in first} == {(8.0, "default")}


def test_moments_only_has_the_defaults_seeds_where_the_bars_are():
    seeds = {recipe: {(row.dataset, row.seed) for row in full_grid() if (row.epsilon, row.recipe) == (8.0, recipe)}
             for recipe in ("default", "moments")}  # fmt: skip
    assert seeds["moments"] == seeds["default"] and len(seeds["default"]) == 3 * len(DATASETS)


def test_every_epsilon_meets_every_recipe_on_every_set():
    cells = {(row.dataset, row.epsilon, row.recipe) for row in full_grid()}
    assert cells == {(d, e, r) for d in DATASETS for e in (1.0, 3.0, 8.0, NEARLY_NO_NOISE) for r in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_is_the_study_file_with_its_own_epsilon_seed_and_recipe(recipe):
    study = Row("pneumoniamnist", 3.0, recipe, 2, quick=True).study()
    assert (study.privacy.epsilon, study.study.seed, study.study.name) == (3.0, 2, "pneumonia")
    assert (study.training.rounds == 0) == (recipe == "moments")
    assert (study.privacy.moments_share == 0) == (recipe == "dp-sgd")


def test_quick_rows_are_small_and_full_rows_are_the_study_files():
    assert all(row.quick and len(row.overrides) > len(QUICK) for row in quick_grid())
    assert not any(set(row.overrides) & set(QUICK) for row in full_grid())
    assert [row.not_available() for row in quick_grid()] == ["", ""]


def test_every_full_row_can_be_run_or_says_why_not():
    reasons = {row.not_available() for row in full_grid()} - {""}
    assert all(reason.startswith(("not available yet: ", "left out: ")) for reason in reasons)
    assert not any(str(grid.REPOSITORY) in reason for reason in reasons)
    assert all(not row.not_available() for row in full_grid() if row.recipe == "default")


def test_a_recipe_of_a_key_that_is_not_there_is_left_out_with_the_reason(monkeypatch):
    recipe = replace(RECIPES["moments"], overrides=("training.colour=1",))
    monkeypatch.setitem(RECIPES, "moments", recipe)
    row = quick_grid()[1]
    assert row.recipe == "moments" and "colour" in row.not_available()


def test_a_recipe_that_changes_nothing_is_left_out(monkeypatch):
    monkeypatch.setitem(RECIPES, "moments", replace(RECIPES["moments"], overrides=()))
    assert quick_grid()[1].not_available() == "left out: the same as default"


def test_a_study_file_that_is_wrong_is_an_error_and_no_reason_to_leave_rows_out(monkeypatch):
    monkeypatch.setattr(grid, "QUICK", ("training.colour=1",))
    for row in quick_grid():
        with pytest.raises(StudyError, match="colour"):
            row.not_available()


def test_the_least_private_row_is_not_called_endless():
    assert epsilon_label(8.0) == "8" and "nearly no noise" in epsilon_label(NEARLY_NO_NOISE)
