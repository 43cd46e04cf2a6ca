"""`synthward verify`: whether a release is what it says, and what it then says, in plain words. No network, no site.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import tomllib
from importlib.util import find_spec
from pathlib import Path

import torch
from pydantic import ValidationError

from common.claims import Claim
from common.errors import CheckpointError, ReplyError, SynthwardError
from common.files import unpack_arrays
from common.model.diffusion_model import DiffusionModel
from common.model.weights import fitting
from common.study import ReleaseConfig, Study
from common.study_file import agreed_toml, parse_study
from common.text import printable
from server.release.arithmetic import claim_problems
from server.release.checksums import SIGNATURES, listed_files, verify_checksums
from server.release.documents import DESCRIBED, documents, writer
from server.release.facts import Facts
from server.release.metrics import Metrics
from server.release.reading import ASK_ANEW, listing, read, read_json, sha256
from server.release.stored_set import Shape, named_images, set_problems

UID_ROOT = "dicom/uid-root.txt"
_KILOBYTE, _MEGABYTE = 1 << 10, 1 << 20
_MOST_TOLD = 10


def release_folder(path: Path) -> Path:
    """The release itself, where `path` is one or the run folder of one."""
    return path / "release" if (path / "plan.json").is_file() else path


def verified(folder: Path) -> Facts:
    """A release's facts, once its files are as written and say nothing that the others contradict.

    Raises:
        CheckpointError: no finished release; or what is wrong, each file by its name.
        SynthwardError: a file in it cannot be read at all.
    """
    _refuse(folder, verify_checksums(folder))
    facts = read_facts(folder)  # now that all of it is known to be of plain files
    _refuse(folder, content_problems(folder, facts))
    return facts


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = len(problems) - _MOST_TOLD
        told = "; ".join(problems[:_MOST_TOLD]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(told, where=str(folder), remedy=ASK_ANEW)


def read_facts(folder: Path) -> Facts:
    """Study, claim and metrics of a release, each checked by itself.

    Raises:
        SynthwardError: one of them is not what it should be; it is named.
    """
    return Facts(_study(folder / "study.toml"), _claim(folder / "claim.json"), _metrics(folder / "metrics.json"))


def _study(path: Path) -> Study:
    data = read(path, most=_MEGABYTE)
    try:
        raw = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not TOML", where=str(path), remedy=ASK_ANEW) from error
    return parse_study(raw, where=str(path))


def _claim(path: Path) -> Claim:
    raw = read_json(path, most=4 * _MEGABYTE)
    try:
        return Claim.from_json(raw)
    except (ArithmeticError, ValueError, RecursionError) as error:  # figures that no text can be made of
        raise CheckpointError("not a claim that this version can read", where=str(path), remedy=ASK_ANEW) from error
    except SynthwardError as error:
        raise type(error)(error.what, where=str(path), remedy=error.remedy) from error


def _metrics(path: Path) -> Metrics:
    try:
        return Metrics.model_validate(read_json(path, most=64 * _MEGABYTE))
    except (ValidationError, RecursionError) as error:
        raise CheckpointError("not the metrics of a release", where=str(path), remedy=ASK_ANEW) from error


def content_problems(folder: Path, facts: Facts) -> list[str]:
    """What the files of a release say against one another, one line each. Every step bounds the next."""
    study, metrics = facts.study, facts.metrics
    classes, counts = study.data.classes, tuple(metrics.classes.values())
    if problems := claim_problems(facts.claim, study, metrics):
        return problems
    if tuple(metrics.classes) != classes or sum(counts) != metrics.images or metrics.images != study.generation.images:
        return ["metrics.json has other classes or images than study.toml asks for"]
    problems = set_problems(folder, Shape.of(study), classes, counts)
    problems = problems or _weights_problems(folder, study) or _document_problems(folder, facts)
    return problems or _dicom_problems(folder, facts)


def _weights_problems(folder: Path, study: Study) -> list[str]:
    """Whether the weights are the study's network's; one that is only described takes no memory."""
    name = "generator/model.safetensors"
    with torch.device("meta"):
        wanted = DiffusionModel(study).state_dict()
    try:
        most = 4 * sum(tensor.numel() for tensor in wanted.values()) + _MEGABYTE
        fitting(unpack_arrays(read(folder / name, most=most), where=name), wanted, where=name)
    except (CheckpointError, ReplyError) as error:
        return [f"{name} does not load: {error.what}"]
    return []


def _document_problems(folder: Path, facts: Facts) -> list[str]:
    """Whether cards and claim say what the figures give; only of what this very code wrote."""
    if facts.metrics.writer != writer():
        return []
    sums = listed_files(folder)
    expected = documents(facts, {name: sums[name] for name in DESCRIBED})
    for name, value in (("claim.json", facts.claim.to_json()), ("metrics.json", facts.metrics.model_dump(mode="json"))):
        expected[name] = (json.dumps(value, indent=2) + "\n").encode()
    expected["study.toml"] = agreed_toml(facts.study).encode()
    return [
        f"{name} does not say what claim.json and metrics.json give" for name, text in expected.items()
        if read(folder / name, most=len(text) + _MEGABYTE) != text
    ]  # fmt: skip


def _dicom_problems(folder: Path, facts: Facts) -> list[str]:
    """Whether dicom/ is the set under the root that it names, byte for byte; not looked at where pydicom is missing."""
    found = {name for name in listed_files(folder) if name.startswith("dicom/")}
    if not found or not _can_read_dicom() or facts.metrics.writer != writer():  # other code may write other bytes
        return []
    from server.release.dicom import dicom_files  # late: pydicom is an extra

    try:
        root = ReleaseConfig(uid_root=read(folder / UID_ROOT, most=_KILOBYTE).decode().strip()).uid_root
    except (CheckpointError, ValueError):
        return [f"{UID_ROOT} is no root of UIDs"]
    path = folder / "images.npz"
    images = named_images(path, Shape.of(facts.study), facts.study.data.classes)
    found.remove(UID_ROOT)
    for name, data in dicom_files(images, facts, root=root, digest=sha256(path)):
        if f"dicom/{name}" not in found or read(folder / "dicom" / name, most=len(data) + _KILOBYTE) != data:
            return [f"dicom/{name} is not the image that images.npz has in its place"]
        found.remove(f"dicom/{name}")
    return [f"{name} is none of the set" for name in sorted(found)]


def _can_read_dicom() -> bool:
    return find_spec("pydicom") is not None


def in_words(folder: Path, facts: Facts) -> str:
    """What was found good, what is promised by it, and by whom."""
    claim, names = facts.claim, listing(folder).sizes
    unread = any(name.startswith("dicom/") for name in names) and not _can_read_dicom()
    signed = sum(name.startswith(SIGNATURES) for name in names)
    ledgers = [site.site for site in claim.sites if site.basis == "ledger"]
    plans = [site.site for site in claim.sites if site.basis == "plan"]
    lines = [
        f"{folder}: every released file is as it was written ({len(names)} files)",
        f"{facts.metrics.images} images of {len(facts.study.data.classes)} classes, the same as npz, PNG and table; "
        "weights that load; figures that follow from the claim's own parameters"
        + ("" if facts.metrics.writer == writer() else "; written by other code than this, so the words of its cards, "
           "and DICOM files, were not compared")
        + ("; dicom/ was not looked into, since pydicom is not here" if unread else ""),
        "", claim.statement, "",
        f"Who promises it: {' and '.join(filter(None, (_by(ledgers, 'the ledger of'), _by(plans, 'the plan of'))))}, "
        "for the site's own records alone. Checksums and arithmetic show that nothing here was changed by accident and "
        "that the figures fit; they do not show who wrote it, or that a site's ledger told the truth. "
        + (f"{SIGNATURES} has {signed} file(s), which this version does not look at." if signed else
           "Nobody has signed it."),
    ]  # fmt: skip
    lines += [f"Below its study's own limits: {line}" for line in facts.unmet]
    return "\n".join(printable(line) for line in lines)


def _by(sites: list[str], whose: str) -> str:
    return f"{whose} {', '.join(sites)}" if sites else ""
