"""`synthward release`: a run's release, given away once everything about it holds.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from pydantic import ValidationError

from common.commands import need
from common.errors import CheckpointError, StorageError, StudyError
from common.study import ReleaseConfig
from server.checkpoints import RunFolder
from server.release.checksums import listed_files, write_checksums
from server.release.facts import Facts
from server.release.publish import whole
from server.release.reading import plain, sha256
from server.release.stored_set import Shape, named_images
from server.release.verification import UID_ROOT, verified

_PIECE = 1 << 20
_ROUNDED = 1e-4  # epsilons of rounds are kept with four digits


def give_away(run: Path, out: Path | None, *, dicom: bool, uid_root: str) -> Path:
    """Copy a run's release to a folder of its own, which is there whole or not at all; returns that folder.

    Args:
        out: where to; None for a folder beside the run's.
        dicom: write the set as DICOM, too.
        uid_root: of the DICOM files; empty for the study's own.

    Raises:
        CheckpointError: not a finished run, or the release is not what was written, or not what the run has kept.
        StudyError: a limit of the study is not met, or DICOM was asked for without a root.
        StorageError: the folder is there already, or cannot be written.
        ModuleNotFoundError: DICOM was asked for without pydicom.
    """
    if dicom:
        need("pydicom")
    folder = RunFolder.open(run)
    target = out or run.resolve().parent / f"{run.resolve().name}-release"
    if target.is_symlink() or target.exists():
        raise StorageError("is there already", where=str(target), remedy="Give the name of a new folder, with --out.")
    if target.resolve().is_relative_to(run.resolve()):
        raise StorageError("is inside the run folder", where=str(target), remedy="Give a folder elsewhere.")
    facts = gate(folder)
    root = _root(uid_root, facts) if dicom else ""
    with whole(target) as partial:
        for name, digest in listed_files(folder.release).items():
            _copy(folder.release / name, partial / name, digest)
        if dicom:
            _write_dicom(partial, facts, root)
        write_checksums(partial)
    return target


def gate(folder: RunFolder) -> Facts:
    """The facts of a run's release, where it may be given away.

    Raises:
        CheckpointError: it is not finished, its files are not as written, or its claim is not what the run has kept.
        StudyError: a limit that the study sets is not met.
    """
    where = str(folder.path)
    if not folder.finished:
        raise CheckpointError("the run is not finished", where=where,
                              remedy=f"Go on with it: synthward run --resume {shlex.quote(where)}")  # fmt: skip
    facts = verified(folder.release)
    if folder.study().sha256 != facts.study.sha256:
        raise CheckpointError("the release is of another study than the run", where=where, remedy="Do not release it.")
    _as_reported(folder, facts)
    if facts.unmet:
        raise StudyError("; ".join(facts.unmet), where=f"{where}: the study's own limits",
                         remedy="It is not given away; a new study can do better, or set other limits.")  # fmt: skip
    return facts


def _as_reported(folder: RunFolder, facts: Facts) -> None:
    """Hold the claim against what the run wrote down of the sites' ledgers, at its end and after each round."""
    kept, last = folder.result("release"), folder.last_checkpoint()
    reported = kept.get("reported") if isinstance(kept, dict) else None
    claimed = {site.site: site for site in facts.claim.sites}
    disagree = reported != {name: site.model_dump(mode="json") for name, site in claimed.items()}
    for name, epsilon in last.rows[-1].epsilon.items() if last and last.rows else ():
        disagree |= name not in claimed or not epsilon <= claimed[name].epsilon_train + _ROUNDED
    if disagree:
        raise CheckpointError("the claim is not what the sites' ledgers reported to this run", where=str(folder.path),
                              remedy="Do not release it; ask the sites for their ledgers.")  # fmt: skip


def _root(asked: str, facts: Facts) -> str:
    try:
        root = ReleaseConfig(uid_root=asked).uid_root or facts.study.release.uid_root
    except ValidationError as error:
        raise StudyError("no root of DICOM UIDs", where=f"--uid-root {asked}",
                         remedy="Numbers with points between them, 30 letters at most.") from error  # fmt: skip
    if not root:
        raise StudyError("DICOM files need the root of your own UIDs", where="--dicom",
                         remedy="Give --uid-root, or release.uid_root in the study.")  # fmt: skip
    return root


def _copy(source: Path, target: Path, digest: str) -> None:
    """Copy a file that is known by its SHA-256.

    Raises:
        CheckpointError: it has changed since it was looked at.
    """
    found = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with plain(source) as file, target.open("xb") as copy:
        while piece := file.read(_PIECE):
            found.update(piece)
            copy.write(piece)
    if found.hexdigest() != digest:
        raise CheckpointError("changed while it was copied", where=str(source), remedy="Look who writes to it.")


def _write_dicom(partial: Path, facts: Facts, root: str) -> None:
    from server.release.dicom import dicom_files  # late: pydicom is an extra

    path = partial / "images.npz"
    images = named_images(path, Shape.of(facts.study), facts.study.data.classes)
    for name, data in dicom_files(images, facts, root=root, digest=sha256(path)):
        file = partial / "dicom" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (partial / UID_ROOT).write_text(f"{root}\n")
