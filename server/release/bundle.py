"""The release: a folder of its own, which can be given away as it is.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

from common.files import atomic_write, pack_arrays, sha256_file, write_json
from common.protocol import Arrays
from common.study_file import agreed_toml
from server.release.checksums import write_checksums
from server.release.documents import DESCRIBED, documents
from server.release.facts import Facts
from server.release.formats import write_npz, write_pngs
from server.release.metrics import Metrics
from server.release.publish import whole
from server.release.report import ReportInputs, render_report


def write_release(target: Path, inputs: ReportInputs, metrics: Metrics, weights: Arrays) -> Path:
    """Write everything that is released; returns the report's path. The same inputs give the same bytes.

    Args:
        target: the folder, which appears whole or not at all.
        weights: what the images were drawn from.
    """
    study = inputs.study
    with whole(target) as folder:
        atomic_write(folder / "study.toml", agreed_toml(study).encode())
        write_json(folder / "claim.json", inputs.claim.to_json())
        write_json(folder / "metrics.json", metrics.model_dump(mode="json"))
        write_npz(folder / "images.npz", inputs.synthetic)
        note = f"Synthetic image, not a patient. Study {inputs.claim.study_sha256}"
        write_pngs(folder / "images", inputs.synthetic, study.data.classes, note=note)
        atomic_write(folder / "report.html", render_report(inputs).encode())
        atomic_write(folder / "generator" / "model.safetensors", pack_arrays(weights))
        described = {name: sha256_file(folder / name) for name in DESCRIBED}
        for name, text in documents(Facts(study, inputs.claim, metrics), described).items():
            atomic_write(folder / name, text)
        write_checksums(folder)
    return target / "report.html"
