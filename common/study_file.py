"""The study file on the disk: read, overridden, checked, written.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from common.errors import StudyError
from common.settings import read_toml, settings_error_line
from common.study import Study

_BARE_POINT = re.compile(r"[+-]?(\d+\.|\.\d+)")  # a number that TOML does not take: no digit on one side


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read, override and check a study file.

    Args:
        path: the TOML file.
        overrides: ``section.key=value`` each, the value in TOML syntax (a bare word is taken as a string).

    Raises:
        StudyError: the file is missing, not TOML, or a key or value cannot be used; one line, nearest key named.
    """
    raw = read_toml(path, what="study", error=StudyError)
    for override in overrides:
        _apply_override(raw, override)
    return parse_study(raw, where=str(path))


def parse_study(raw: dict[str, Any], *, where: str) -> Study:
    """Check settings that are already read (from TOML or from a message)."""
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise _study_error(error, where) from error


def _study_error(error: ValidationError, where: str) -> StudyError:
    field, what, remedy = settings_error_line(error, Study)
    return StudyError(what, where=f"{where}: {field}", remedy=remedy)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise StudyError(
            f"cannot read '{override}'", where="--set", remedy="Write section.key=value, as in training.rounds=2."
        )
    value = _value(text.strip())
    section = raw.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise StudyError(f"'{parts[0]}' is not a section", where="--set", remedy="Write section.key=value.")
    section[parts[1]] = value


def _value(text: str) -> Any:
    """As TOML has it, or as a person types it: `.5`, `True`, and words without quotes."""
    with suppress(ValueError, RecursionError):
        return tomllib.loads(f"value = {text}")["value"]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return float(text) if _BARE_POINT.fullmatch(text) else text


def study_toml(study: Study) -> str:
    """The settings as TOML, every default written out; reads back as the same study."""
    settings = study.model_dump(mode="json", exclude_none=True)
    return f"# Settings as run; SHA-256 {study.sha256}\n" + tomli_w.dumps(settings)


def agreed_toml(study: Study) -> str:
    """The same of what all parties agreed on: no path of a machine, and nothing of a simulation."""
    return study_toml(parse_study(study.agreed(), where="study"))
