"""The generator's own settings, beside its weights: enough to know what they are without this program.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Any

from common.study import Study

FORMAT = "synthward-generator/1"


def generator_config(study: Study) -> dict[str, Any]:
    """What config.json holds: the network, what it draws, and how it is sampled."""
    whole = study.agreed()
    generation = {name: whole["generation"][name] for name in ("sampler", "steps", "guidance")}
    return {
        "format": FORMAT, "study_sha256": study.sha256, "weights": "model.safetensors", "dtype": "float32",
        "modality": whole["study"]["modality"], "data": whole["data"], "network": whole["network"],
        "diffusion": whole["diffusion"], "generation": generation,
    }  # fmt: skip
