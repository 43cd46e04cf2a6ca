"""Base of all settings files, and the one line that says what is wrong with one.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import difflib
import tomllib
import unicodedata
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import SynthwardError

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_FINE = "\n\t\u200c\u200d"
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters that show nothing


def read_toml(path: Path, *, what: str, error: type[SynthwardError]) -> dict[str, Any]:
    """Read a settings file.

    Args:
        what: what it is called in the message, as "study".
        error: the kind that is raised where it is missing, not TOML, or not text.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Notepad begins a file with a mark
    except OSError as cause:
        raise error(
            f"cannot read the {what} file ({cause.strerror})",
            where=str(path),
            remedy=f"Give the path of a {what} TOML.",
        ) from cause  # fmt: skip
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise error(f"not valid TOML: {cause}", where=str(path), remedy="Fix that line.") from cause


def harmless(text: str) -> str:
    """Text as it is, where no terminal or page can take a part of it for a command, or show it as something else.

    Line ends and tabs are fine, and so are blanks of any width and the joiners that some scripts need.

    Raises:
        ValueError: a control character, a mark that turns the order of letters, or one that cannot be seen.
    """
    for letter in text:
        if letter in _BLANKS or (unicodedata.category(letter) in _UNSEEN and letter not in _FINE):
            raise ValueError(f"a character that cannot be shown (U+{ord(letter):04X})")
    return text


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def settings_error_line(error: ValidationError, model: type[BaseModel]) -> tuple[str, str, str]:
    """(field, what, remedy) of the first problem that pydantic found, with the nearest right key for a misspelt one."""
    problems = error.errors()  # a misspelt key also shows as a missing one: name the key that is there
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = _keys_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        remedy = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
        return field, f"unknown key '{key}'", remedy
    if first["type"] == "missing":
        return field, "missing", "Add it."
    what = first["msg"].removeprefix("Value error, ")
    if not field:  # a rule over several fields names its own field first
        field, _, what = what.partition(": ")
        return field, what, "Change one of them."
    return field, f"{what} (got {first['input']!r})", "Fix the value."


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    current: type[BaseModel] = model
    for part in loc:
        info = current.model_fields.get(str(part))
        if info is None:
            return []
        options = [info.annotation, *get_args(info.annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return []
        current = nested[0]
    return list(current.model_fields)
