"""Small studies that a test can afford.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

from common.accounting import plan_study
from common.protocol import Agreement
from common.study import Study
from common.study_file import parse_study

TINY: dict[str, dict[str, Any]] = {
    "study": {"name": "tiny", "modality": "radiology", "seed": 3},
    "data": {"image_size": 16, "channels": 1, "classes": ["clear", "opacity"]},
    "network": {"width": 8, "depths": [0, 1], "heads": [1, 2], "window": 4},
    "diffusion": {"noise_multiplicity": 1},
    "moments": {"components": 4},
    "pretrain": {"images": 64, "steps": 2, "batch_size": 8},
    "training": {
        "rounds": 2,
        "algorithm": "fedavg",
        "local_steps": 2,
        "parameters": "all",
        "sample_rate": 0.2,
        "max_grad_norm": 1.0,
    },
    "privacy": {"epsilon": 8.0, "delta": 1e-5, "accountant": "rdp"},
    "federation": {"min_sites": 2, "timeout_seconds": 120},
    "generation": {"images": 24, "steps": 4, "batch_size": 12},
    "validation": {"steps": 4, "batch_size": 16, "reference_steps": 2, "bins": 8},
    "simulation": {"sites": 3, "phantoms_per_site": 80},
}


def tiny_study(**sections: dict[str, Any]) -> Study:
    """The tiny study with some settings changed: tiny_study(training={"rounds": 3})."""
    raw = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {**TINY, **sections}}
    return parse_study(raw, where="tiny")


def tiny_toml(**sections: dict[str, Any]) -> str:
    """The same as a study file's text."""
    from common.study_file import study_toml

    return study_toml(tiny_study(**sections))


def agreement(study: Study | None = None) -> Agreement:
    """A study with its solved plan."""
    study = study or tiny_study()
    return Agreement(study=study, plan=plan_study(study))
