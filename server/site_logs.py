"""What simulated sites write in their own logs, shown to their owner: who runs a simulation owns its sites.

SPDX-License-Identifier: Apache-2.0

At a hospital the coordinator reads only "the site's own log says why" (`client/service.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from common.errors import Refused, ReplyError
from common.text import printable

_LONGEST = 400  # characters of one message
_HEAD = re.compile(r"\d{4}-\d\d-\d\dT\S+ (\w+)$")  # time and kind; what follows is indented
_TOLD = {kind.__name__ for kind in (ReplyError, Refused, *Refused.__subclasses__())}  # the server is told these
_CLASS = re.compile(r"^(\w+\.)*\w+: ")  # as a traceback's last line begins


class SiteLogs:
    """Follows the logs of simulated sites from now on."""

    def __init__(self, sites: list[Path]) -> None:
        self._read = {site: _size(_log(site)) for site in sites}
        self._said = set[tuple[str, str]]()

    def news(self) -> Iterator[tuple[str, str]]:
        """(site, message) of each new entry; the same message of a site is told once."""
        for site, before in self._read.items():
            size = _size(_log(site))
            if size == before:
                continue
            self._read[site] = size
            for message in _messages(_text(_log(site), before if size > before else 0)):
                told = (site.stem, message)
                if told not in self._said:
                    self._said.add(told)
                    yield told


def _log(site: Path) -> Path:
    return site.with_suffix("") / "site.log"  # its state folder is called after it (`server/launch.py`)


def _size(log: Path) -> int:
    with suppress(OSError):
        return log.stat().st_size
    return 0


def _text(log: Path, start: int) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
    return ""


def _messages(text: str) -> list[str]:
    """The last line of each entry that the server was not told."""
    entries = list[tuple[str, str]]()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            entries.append((head[1], ""))
        elif entries and line.strip():
            entries[-1] = (entries[-1][0], _CLASS.sub("", line.strip()))
    untold = [said for kind, said in entries if said and kind not in _TOLD]
    return [printable(said)[:_LONGEST] for said in untold]
