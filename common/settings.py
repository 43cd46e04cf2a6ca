"""Base of all settings files, and the one line that says what is wrong with one.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import difflib
import tomllib
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from common.errors import SynthwardError

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_KIND = "own_kind"  # of our own error
_LONGEST_SHOWN = 80  # of a value in a message
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
    except (ValueError, RecursionError) as cause:  # also of a number of thousands of digits, and of endless brackets
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

    @model_validator(mode="before")
    @classmethod
    def _of_its_own_kind(cls, raw: Any) -> Any:
        """No text or truth value passes for a number, and nothing for a truth value: they may mean something else."""
        for key, value in raw.items() if isinstance(raw, dict) else ():
            field = cls.model_fields.get(key)
            kinds = set[Any]() if field is None else {field.annotation, *get_args(field.annotation)}
            if bool in kinds and not isinstance(value, bool):
                raise PydanticCustomError(_KIND, "must be true or false, without quotes", {"key": key, "value": value})
            counted = any(type(kind) is int for kind in kinds)  # as in Literal[1, 3], where True would pass for 1
            if (counted and isinstance(value, bool)) or (kinds & {int, float} and isinstance(value, str | bool)):
                raise PydanticCustomError(_KIND, "must be a number, without quotes", {"key": key, "value": value})
        return raw


M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], raw: Any, *, where: str, error: type[SynthwardError]) -> M:
    """Settings as a model.

    Args:
        where: the file, or what else they come from; the field is put behind it.
        error: the kind that is raised where one of them cannot be used.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as cause:
        field, what, remedy = settings_error_line(cause, model)
        raise error(what, where=f"{where}{field}", remedy=remedy) from cause


def settings_error_line(error: ValidationError, model: type[BaseModel]) -> tuple[str, str, str]:
    """(field, what, remedy) of the first problem that pydantic found, in the words of the file's owner.

    A misspelt key also shows as a missing one: the key that is there is named, with the nearest right one.
    """
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    place = _Place.of(model, first["loc"])
    kind, facts, value = first["type"], first.get("ctx", {}), first["input"]
    if kind == _KIND:
        place, value = _Place.of(model, (*first["loc"], facts["key"])), facts["value"]
    if kind == "extra_forbidden":
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, place.known, n=1, cutoff=0.5)
        remedy = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(place.known))}."
        return place.path, f"unknown key '{_short(key)}'", remedy
    if kind == "missing":
        return place.path, "missing", "Add it."
    if kind.startswith("union_tag"):
        field = f"{place.path}.{str(facts['discriminator']).strip(chr(39))}"
        if kind == "union_tag_not_found":
            return field, "missing", "Add it."
        return field, f"must be one of {facts['expected_tags']} (got {_shown(facts['tag'])})", "Fix the value."
    what = first["msg"].removeprefix("Value error, ")
    if kind == "value_error" and isinstance(value, dict):  # a rule over several fields names its own first
        field, _, what = what.partition(": ")
        return ".".join(filter(None, (place.path, field))), what, "Change one of them."
    return place.path, f"{_words(kind, facts, what)} (got {_shown(value)})", "Fix the value."


_KINDS = {  # pydantic's kinds of error, as far as its own words are a programmer's; by how they begin
    "int_": "must be a whole number, without quotes",
    "float_": "must be a number, without quotes",
    "finite_number": "must be a finite number",
    "string_type": "must be text, in quotes",
    "path_type": "must be a path, in quotes",
    "tuple_type": "must be a list, in brackets",
    "list_type": "must be a list, in brackets",
    "model_": "must be a section of its own, with its settings below it",
    "string_too_short": "must have at least {min_length} letter(s)",
    "string_too_long": "must have at most {max_length} letters",
    "too_short": "must have at least {min_length} of its kind",
    "too_long": "must have at most {max_length} of its kind",
}
_PATTERNS = {  # what text has to be; any other pattern only keeps letters out that cannot be shown
    r"^[a-z0-9][a-z0-9-]{0,39}$": "must be of lower case letters, digits and hyphens, 40 at most, no hyphen first",
    r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$": "must be of letters (A to Z), digits, _ and -, 40 at most, no _ or - first",
    r"^$|^[A-Za-z0-9][A-Za-z0-9.+-]*$": "must be an SPDX identifier, as CC-BY-4.0",
    r"^$|^https://[!-~]+$": "must be an address that begins with https://, without blanks",
    r"^$|^[0-2](\.(0|[1-9][0-9]*))+$": "must be numbers with points between them, as 1.2.826.0.1.3680043.10.1",
    r"^[0-9a-f]{64}$": "must be 64 hexadecimal digits in lower case",
}


def _words(kind: str, facts: dict[str, Any], message: str) -> str:
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(facts["pattern"], "has a letter that cannot be shown, or none")
    known = next((words for begin, words in _KINDS.items() if kind.startswith(begin)), None)
    return known.format(**facts) if known else message.replace("Input should be", "must be")


def _shown(value: object) -> str:
    try:
        return _short(repr(value[:_LONGEST_SHOWN] if isinstance(value, str | list) else value))
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a very long number"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


@dataclass(frozen=True)
class _Place:
    """Where in a file a problem is.

    Attributes:
        path: keys from the top, joined by dots, and no others: pydantic also names which of several models it took.
        known: keys of the section that the last of them stands in.
    """

    path: str
    known: list[str]

    @classmethod
    def of(cls, model: type[BaseModel], loc: tuple[int | str, ...]) -> _Place:
        here, keys, known = [model], list[str](), list(model.model_fields)
        for part in loc:
            tagged = [option for option in here if _tag(option) == part]
            if len(here) > 1 and tagged:
                here = tagged
                continue
            keys.append(_short(str(part)))
            info = next((o.model_fields[str(part)] for o in here if str(part) in o.model_fields), None)
            known = [key for option in here for key in option.model_fields]
            here = [] if info is None else _models(info.annotation)
        return cls(".".join(keys), known)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's value can be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tag(model: type[BaseModel]) -> str | None:
    """What tells a model apart from the others that can stand in its place: a field that can be one word only."""
    own = [field.annotation for field in model.model_fields.values() if get_origin(field.annotation) is Literal]
    return next((str(get_args(literal)[0]) for literal in own if len(get_args(literal)) == 1), None)
