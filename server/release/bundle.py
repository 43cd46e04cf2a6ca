"""The release folder: what leaves the study, with checksums.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from common.errors import CheckpointError
from common.files import atomic_write, sha256_file, storage_error, write_json
from server.release.formats import write_npz, write_pngs
from server.release.report import ReportInputs, render_report

CHECKSUMS = "SHA256SUMS"
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # it can be read in no other way
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
    for path in (*files, folder / CHECKSUMS):
        with suppress(OSError):  # some file systems have no modes
            path.chmod(0o666 & ~_UMASK)  # it is there to be given away, and every file of it alike
    return folder / "report.html"


def verify_checksums(folder: Path) -> list[str]:
    """What is wrong with a release's files, one line each; an empty list when all is as written.

    Raises:
        CheckpointError: there is no SHA256SUMS: no finished release; or the file is none of ours.
        StorageError: it is there and cannot be read.
    """
    sums = folder / CHECKSUMS
    try:
        lines = [line.partition("  ") for line in sums.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no finished release here (no {CHECKSUMS})", where=str(folder),
            remedy="Give the folder that was released, or finish the run.",
        ) from error  # fmt: skip
    except NotADirectoryError as error:
        raise CheckpointError("is a file", where=str(folder), remedy="Give the folder that was released.") from error
    except OSError as error:
        raise storage_error(error, sums) from error
    except UnicodeDecodeError as error:
        raise CheckpointError("not a list of checksums", where=str(sums), remedy="Ask for the release anew.") from error
    problems = [problem for digest, _, name in lines if (problem := _problem(folder, digest, name))]
    listed = {name for _, _, name in lines}
    extra = {p.relative_to(folder).as_posix() for p in (folder / "synthetic").rglob("*") if p.is_file()} - listed
    return problems + [f"{name} is not listed" for name in (*sorted(set(_RELEASED) - listed), *sorted(extra))]


def _problem(folder: Path, digest: str, name: str) -> str:
    """What is wrong with one file; empty where nothing is."""
    path = folder / name
    try:
        if not name or not path.resolve().is_relative_to(folder.resolve()):
            return f"{CHECKSUMS} has a line for no file of the release"
        if not path.is_file():
            return f"{name} is missing"
        return "" if sha256_file(path) == digest else f"{name} was changed"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
