"""Which runs the utility benchmark is made of, and what each gives to `synthward run`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import StudyError
from common.study import Study
from common.study_file import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
NEARLY_NO_NOISE = 1000.0  # the largest epsilon that a study may ask for; it is a finite one and is called by its value


@dataclass(frozen=True)
class Dataset:
    """One set of real images.

    Attributes:
        study: file name under configs/.
        minutes: wall time that a run may take on two cores.
        shareable: its licence lets others have the images.
    """

    name: str
    study: str
    minutes: float
    shareable: bool

    @property
    def file(self) -> str:
        return f"{self.name}.npz"


@dataclass(frozen=True)
class Recipe:
    """One way to spend the budget: what it is, and how it differs from the study file."""

    name: str
    says: str
    overrides: tuple[str, ...] = ()


DATASETS = {
    entry.name: entry
    for entry in (
        Dataset("pneumoniamnist", "pneumonia.toml", 45, shareable=True),
        Dataset("fundus4", "fundus.toml", 60, shareable=False),
        Dataset("colonpath4", "histology.toml", 60, shareable=False),
    )
}
RECIPES = {
    entry.name: entry
    for entry in (
        Recipe("default", "the study file as it is"),
        Recipe("moments", "no round of training: its share goes to the class moments", ("training.rounds=0",)),
        Recipe(
            "dp-sgd",
            "neither moments nor features: all goes to the rounds",
            ("privacy.moments_share=0", "privacy.features_share=0"),
        ),
    )
}
# Small enough for two cores and ten minutes; what comes out shows that the path holds, and nothing about quality.
QUICK = (
    "pretrain.images=256", "pretrain.steps=40", "training.rounds=3", "training.local_steps=1",
    "generation.images=240", "generation.steps=6", "validation.steps=60", "validation.reference_steps=20",
)  # fmt: skip
_QUICK_MINUTES = 8.0


@dataclass(frozen=True)
class Row:
    """One run: a set, an epsilon, a recipe and a seed (of weights, of sampling, and of the deal to the sites)."""

    dataset: str
    epsilon: float
    recipe: str
    seed: int
    quick: bool = False

    @property
    def identity(self) -> str:
        """The run's name: unique in its grid, and fit for a folder."""
        return f"{self.dataset}-eps{self.epsilon:g}-{self.recipe}-seed{self.seed}"

    @property
    def budget_minutes(self) -> float:
        """Wall time that the run may take on two cores."""
        return _QUICK_MINUTES if self.quick else DATASETS[self.dataset].minutes

    @property
    def study_file(self) -> Path:
        return REPOSITORY / "configs" / DATASETS[self.dataset].study

    @property
    def overrides(self) -> tuple[str, ...]:
        """`section.key=value` each; a later one wins, so the recipe's come last."""
        own = (f"privacy.epsilon={self.epsilon:g}", f"study.seed={self.seed}", "simulation.own_reference=false")
        return (*(QUICK if self.quick else ()), *own, *RECIPES[self.recipe].overrides)

    def study(self) -> Study:
        """The study of this run.

        Raises:
            StudyError: this version of the software cannot run it; the error says why.
        """
        return load_study(self.study_file, self.overrides)

    def not_available(self) -> str:
        """Why the row is left out, or nothing.

        Raises:
            StudyError: the study file itself cannot be used; that is no reason to leave a row out.
        """
        usual = replace(self, recipe="default").study()
        try:
            same = self.recipe != "default" and self.study().sha256 == usual.sha256
        except StudyError as error:
            return f"not available yet: {error}".replace(f"{REPOSITORY}{os.sep}", "")
        return "left out: the same as default" if same else ""


def epsilon_label(epsilon: float) -> str:
    """Epsilon as it is written everywhere."""
    return f"{epsilon:g} (nearly no noise)" if epsilon == NEARLY_NO_NOISE else f"{epsilon:g}"


def full_grid() -> list[Row]:
    """Every run, the most valuable first, so that a grid which is stopped early still says something."""
    rows = [Row(name, 8.0, "default", seed) for seed in (1, 2, 3) for name in DATASETS]
    rows += [Row(name, 8.0, recipe, 1) for recipe in RECIPES if recipe != "default" for name in DATASETS]
    # The default is held against moments only, and a draw of noise moves both: as many seeds of each.
    rows += [Row(name, 8.0, "moments", seed) for seed in (2, 3) for name in DATASETS]
    rows += [
        Row(name, epsilon, recipe, 1) for epsilon in (1.0, NEARLY_NO_NOISE, 3.0) for recipe in RECIPES
        for name in DATASETS
    ]  # fmt: skip
    return rows


def quick_grid() -> list[Row]:
    """Two small runs."""
    return [Row("pneumoniamnist", 8.0, recipe, 1, quick=True) for recipe in ("default", "moments")]
