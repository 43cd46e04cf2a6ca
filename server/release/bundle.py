"""The release folder: what leaves the study, with checksums.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common.errors import CheckpointError
from common.files import atomic_write, sha256_file, write_json
from server.release.formats import write_npz, write_pngs
from server.release.report import ReportInputs, render_report

CHECKSUMS = "SHA256SUMS"
_RELEASED = ("report.html", "privacy.json", "metrics.json", "study.toml", "study.sha256")


def write_release(folder: Path, inputs: ReportInputs) -> Path:
    """Write the synthetic set, privacy.json, report.html and SHA256SUMS; returns the report's path.

    metrics.json, study.toml and study.sha256 are already there. Safe to repeat.
    """
    synthetic = folder / "synthetic"
    shutil.rmtree(synthetic / "png", ignore_errors=True)  # of an earlier, unfinished try
    write_npz(synthetic / "synthetic.npz", inputs.synthetic)
    note = f"Synthetic image, not a patient. Study {inputs.claim.study_sha256}"
    write_pngs(synthetic / "png", inputs.synthetic, inputs.study.data.classes, note=note)
    write_json(folder / "privacy.json", inputs.claim.to_json())
    atomic_write(folder / "report.html", render_report(inputs).encode())
    files = [folder / name for name in _RELEASED] + sorted(p for p in synthetic.rglob("*") if p.is_file())
    lines = [f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}" for path in files]
    atomic_write(folder / CHECKSUMS, ("\n".join(lines) + "\n").encode())
    return folder / "report.html"


def verify_checksums(folder: Path) -> list[str]:
    """What is wrong with a release's files, one line each; an empty list when all is as written.

    Raises:
        CheckpointError: there is no SHA256SUMS: no finished release.
    """
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(
            "no finished release here (no SHA256SUMS)", where=str(folder), remedy="Finish it with --resume."
        ) from error
    problems, listed = [], set()
    for line in lines:
        digest, _, name = line.partition("  ")
        listed.add(name)
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256_file(path) != digest:
            problems.append(f"{name} was changed")
    extra = {p.relative_to(folder).as_posix() for p in (folder / "synthetic").rglob("*") if p.is_file()} - listed
    return problems + [f"{name} is not listed" for name in sorted(extra)]
