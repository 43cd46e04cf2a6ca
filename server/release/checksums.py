"""SHA256SUMS: written over every file of a release, and compared with whatever lies in a folder.

SPDX-License-Identifier: Apache-2.0

The format is that of `sha256sum`, so a reader without this program can check it, too. It says that files are as they
were written, not by whom: who can change a file can change the list. `signatures/` is in no list, since it signs it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from common.errors import CheckpointError
from common.files import atomic_write, storage_error
from server.release.documents import DESCRIBED, NAMES
from server.release.reading import Listing, listing, plain, sha256

CHECKSUMS = "SHA256SUMS"
SIGNATURES = "signatures/"
REQUIRED = (*DESCRIBED, *NAMES, "report.html", "study.toml")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\x00-\x1f\x7f]+)")
_LONGEST_NAME = 4096
_MEGABYTE = 1 << 20
_LARGEST = {  # bytes; nothing of a kind comes near it, and no reader is kept busy by a sparse file of terabytes
    ".npz": 256 << 30, ".safetensors": 16 << 30, ".csv": 1 << 30, ".png": 16 << 20, ".dcm": 16 << 20,
}  # fmt: skip
_ELSE = 64 * _MEGABYTE


def write_checksums(folder: Path) -> None:
    """List every file in a folder but signatures, in the order of their names."""
    names = sorted(name for name in listing(folder).sizes if name != CHECKSUMS and not name.startswith(SIGNATURES))
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names]
    atomic_write(folder / CHECKSUMS, "".join(lines).encode())


def verify_checksums(folder: Path) -> list[str]:
    """What is wrong with a release's files, one line each; an empty list when all is as written.

    Raises:
        CheckpointError: there is no SHA256SUMS: no finished release; or the file is none of ours.
        StorageError: it is there and cannot be read.
    """
    if folder.is_file():
        raise CheckpointError("is a file", where=str(folder), remedy="Give the folder that was released.")
    try:
        found = listing(folder) if folder.is_dir() else None
    except OSError as error:
        raise storage_error(error, folder) from error
    if found is None or not os.path.lexists(folder / CHECKSUMS):
        raise CheckpointError(
            f"no finished release here (no {CHECKSUMS})", where=str(folder),
            remedy="Give the folder that was released, or finish the run.",
        )  # fmt: skip
    listed, problems = _listed(folder, found.sizes)
    problems += [line for name, digest in listed.items() if (line := _problem(folder, name, digest, found))]
    problems += [f"{name} is {kind}" for name, kind in sorted(found.odd.items()) if name not in listed]
    extra = found.sizes.keys() - listed.keys() - {CHECKSUMS}
    unlisted = {name for name in extra if not name.startswith(SIGNATURES)} | (set(REQUIRED) - listed.keys())
    return problems + [f"{name} is not listed" for name in sorted(unlisted)]


def listed_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder that `verify_checksums` has found good."""
    return _listed(folder, listing(folder).sizes)[0]


def _listed(folder: Path, sizes: dict[str, int]) -> tuple[dict[str, str], list[str]]:
    """(SHA-256 by file, what is wrong with the list itself)."""
    sums, listed, problems = folder / CHECKSUMS, dict[str, str](), list[str]()
    # No list of these files can be longer, but for those that are missing now.
    most = _MEGABYTE + 2 * sum(70 + 4 * len(name) for name in sizes)
    try:
        with plain(sums) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise storage_error(error, sums) from error
    if len(data) > most:
        raise CheckpointError("far longer than the files here need", where=str(sums), remedy="Ask for it anew.")
    try:
        *lines, rest = data.decode().split("\n")  # splitlines would take other letters for line ends, too
    except UnicodeDecodeError as error:
        raise CheckpointError("not a list of checksums", where=str(sums), remedy="Ask for the release anew.") from error
    if rest:
        problems.append(f"{CHECKSUMS} is cut short")
    for line in (*lines, *([rest] if rest else [])):
        match = _LINE.fullmatch(line)
        if match is None or not _inside(match[2]):
            problems.append(f"{CHECKSUMS} has a line for no file of the release")
        elif match[2] in listed:
            problems.append(f"{match[2]} is listed twice")
        else:
            listed[match[2]] = match[1]
    return listed, list(dict.fromkeys(problems))


def _inside(name: str) -> bool:
    """Whether a name is one way, and only one, to a file inside the folder."""
    path = PurePosixPath(name)
    plain_way = len(name) <= _LONGEST_NAME and not path.is_absolute() and ".." not in path.parts
    return plain_way and path.as_posix() == name and name not in (".", CHECKSUMS)


def _problem(folder: Path, name: str, digest: str, found: Listing) -> str:
    """What is wrong with one listed file; empty where nothing is."""
    for way in (name, *(parent.as_posix() for parent in PurePosixPath(name).parents)):
        if way in found.odd:
            return f"{name} is {'' if way == name else 'behind '}{found.odd[way]}"
    if name not in found.sizes:
        return f"{name} is missing"
    if found.sizes[name] > _LARGEST.get(PurePosixPath(name).suffix, _ELSE):
        return f"{name} is larger than any file of its kind ({found.sizes[name]:,} bytes)"
    try:
        return "" if sha256(folder / name) == digest else f"{name} was changed"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
