"""What simulated sites write in their own logs, shown to their owner: who runs a simulation owns its sites.

SPDX-License-Identifier: Apache-2.0

At a hospital the coordinator reads only "the site's own log says why" (`client/service.py`). `client/log.py` writes it.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from common.errors import Refused, ReplyError, SynthwardError
from common.text import printable

_HEAD = re.compile(r"\d{4}-\d\d-\d\dT\S+ (\w+): (.*)$")  # time, kind, words; what follows is indented
_TOLD = {kind.__name__ for kind in (ReplyError, Refused, *Refused.__subclasses__())}  # the server is told these
_OURS = {kind.__name__ for kind in SynthwardError.__subclasses__()} | {"Note"}  # their words are enough


class SiteLogs:
    """Follows the logs of simulated sites from now on."""

    def __init__(self, sites: list[Path]) -> None:
        self._read = {site: _state(_log(site)) for site in sites}
        self._said = set[tuple[str, str]]()

    def news(self) -> Iterator[tuple[str, str]]:
        """(site, message) of each new entry; the same message of a site is told once."""
        for site, before in self._read.items():
            now = _state(_log(site))
            if now == before:
                continue
            text, _, half = _added(_log(site), before, now).rpartition("\n")
            self._read[site] = (now[0], now[1] - len(half.encode(errors="replace")))  # the rest when it is written
            for message in _messages(text):
                told = (site.stem, message)
                if told not in self._said:
                    self._said.add(told)
                    yield told


def _log(site: Path) -> Path:
    return site.with_suffix("") / "site.log"  # its state folder is called after it (`server/launch.py`)


def _state(log: Path) -> tuple[int, int]:
    """(number of the file, its bytes)."""
    with suppress(OSError):
        found = log.lstat()
        return (found.st_ino, found.st_size) if stat.S_ISREG(found.st_mode) else (0, 0)
    return 0, 0


def _added(log: Path, before: tuple[int, int], now: tuple[int, int]) -> str:
    """What was written since; a log that has become too long is begun anew, and the old one put aside."""
    old = log.with_suffix(".log.1")
    if now[0] == before[0] and now[1] > before[1]:
        return _text(log, before[1])
    return (_text(old, before[1]) if _state(old)[0] == before[0] else "") + _text(log, 0)


def _text(log: Path, start: int) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
    return ""


def _messages(text: str) -> list[str]:
    """The head of each entry that the server was not told."""
    heads = [head.groups() for head in map(_HEAD.match, text.splitlines()) if head]
    return [printable(words if kind in _OURS else f"{kind}: {words}") for kind, words in heads if kind not in _TOLD]
