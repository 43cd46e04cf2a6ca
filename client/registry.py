"""Which ledgers there are on this machine, so that no record is counted in two of them unseen.

SPDX-License-Identifier: Apache-2.0

A small JSON file outside every state folder: a state folder that is lost, moved or copied is still known here. It holds
names and paths, nothing of records. It is the machine user's own, or wherever the site file says (`registry`).
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from client.privacy.ledger import Ledger, NoLedger
from common.errors import CheckpointError, StorageError
from common.files import read_json, storage_error, write_json
from common.locks import held
from common.settings import Settings


class Known(Settings):
    """One ledger.

    Attributes:
        site: the site's name.
        state: its state folder, absolute.
        ledger: the ledger's identity (`Ledger.identity`).
        hash, entries: its newest entry when it was last looked at: an older one shows that a backup was restored.
    """

    site: str
    state: str
    ledger: str
    hash: str
    entries: int

    @classmethod
    def of(cls, site: str, ledger: Ledger) -> Known:
        number, newest = ledger.head()
        return cls(
            site=site, state=str(ledger.state.resolve()), ledger=ledger.identity, hash=newest, entries=number
        )  # fmt: skip


class Registry:
    """The list in one file; a file that is not there is an empty list.

    Args:
        path: where it is; None for the user's own.

    Raises:
        StorageError: the user has no home for a list of its own.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path or _state_home() / "synthward" / "ledgers.json"

    def known(self) -> list[Known]:
        """Every ledger that was begun or approved for on this machine.

        Raises:
            StorageError: the file cannot be read.
        """
        try:
            rows = read_json(self.path) if self.path.exists() else []
            return [Known.model_validate(row) for row in rows]
        except (CheckpointError, OSError, TypeError, ValueError) as error:  # pydantic's own is a ValueError
            raise StorageError(
                "the list of this machine's ledgers cannot be read", where=str(self.path),
                remedy="Restore it from backup, or move it away and approve once at every site: that lists them again.",
            ) from error  # fmt: skip

    def begin(self, site: str, state: Path) -> None:
        """Make the site's ledger and list it; for `synthward-site init` alone.

        Raises:
            StorageError: this machine has, or had, a ledger of that name or in that folder; or it cannot be written.
        """
        with self.locked():
            for known in self.known():
                if known.site == site or Path(known.state) == state.resolve():
                    raise StorageError(
                        f"site {known.site} has a ledger at {known.state}", where=str(self.path),
                        remedy="Use it: restore its state folder from backup if it is lost, or set `state` to where it"
                        " is now. Other records of another site need another name.",
                    )  # fmt: skip
            with closing(Ledger.create(state)) as ledger:
                self._write([*self.known(), Known.of(site, ledger)])

    def place(self, site: str, ledger: Ledger) -> None:
        """List an open ledger where and as it is now; inside `locked`.

        Raises:
            StorageError: it is also at the place where it was before, so that one of the two is a copy; it has not the
                entries that it had when it was last looked at; or another ledger bears the site's name.
        """
        here, rest = Known.of(site, ledger), []
        for known in self.known():
            if known.ledger == here.ledger:
                _require_same(known, here, ledger)
            elif known.site == site and _identity(Path(known.state)) == known.ledger:
                raise StorageError(
                    f"site {site} has another ledger at {known.state}", where=here.state,
                    remedy="One name is one site: give this site file the name that its ledger was begun with.",
                )  # fmt: skip
            else:
                rest.append(known)
        self._write([*rest, here])

    def require_not_older(self, ledger: Ledger) -> None:
        """See that a ledger, wherever it lies, has every entry that it had when it was last looked at.

        Raises:
            StorageError: it has not.
        """
        for known in self.known():
            if known.ledger == ledger.identity:
                _require_newer(known, ledger)

    def others(self, ledger: Ledger) -> list[Known]:
        """Every listed ledger but this one."""
        return [known for known in self.known() if known.ledger != ledger.identity]

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Alone on this machine until the block ends.

        Raises:
            StorageError: the list's folder cannot be written; or, where we are not to wait, another process has it.
        """
        busy = StorageError("another process has the list of this machine's ledgers", where=str(self.path))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(error, self.path) from error
        with held(self.path.with_suffix(".lock"), busy=None if wait else busy):
            yield

    def _write(self, rows: list[Known]) -> None:
        write_json(self.path, [row.model_dump() for row in sorted(rows, key=lambda row: (row.site, row.state))])


def _state_home() -> Path:
    """The user's own folder for such files (XDG base directories), also where HOME is not set."""
    given = os.path.expanduser(os.environ.get("XDG_STATE_HOME", ""))
    if os.path.isabs(given):
        return Path(given)
    try:
        home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError as error:
        raise StorageError(
            "this user has no home folder for the list of this machine's ledgers", where="registry",
            remedy='Write registry = "FILE.json" into the site file, above its first table, or set HOME.',
        ) from error  # fmt: skip
    return Path(home) / ".local" / "state"


def _require_same(known: Known, here: Known, ledger: Ledger) -> None:
    if known.state != here.state and _identity(Path(known.state)) == here.ledger:
        raise StorageError(
            f"this ledger is a copy of the one at {known.state}", where=here.state,
            remedy="Two copies would each count a part: keep the one that was used last, remove the other.",
        )  # fmt: skip
    _require_newer(known, ledger)


def holds(ledger: Ledger, number: int, digest: str) -> bool:
    """Whether the entry of a number has that hash: else entries are lost, or the ledger is another one."""
    return [entry.hash for entry in ledger.chain.entries("number = ?", number)] == [digest]


def _require_newer(known: Known, ledger: Ledger) -> None:
    if not holds(ledger, known.entries, known.hash):
        raise StorageError(
            f"the ledger had {known.entries} entries before and lacks some of them: an older backup was restored",
            where=str(ledger.state.resolve()),
            remedy="Restore the newest one; what was spent since an older one cannot be known.",
        )  # fmt: skip


def open_ledger(site: str, state: Path, registry: Path | None) -> Ledger:
    """A site's ledger; where it is missing, the error also says where the machine knows one of that name.

    Raises:
        StorageError: as for `Ledger.open`.
    """
    try:
        return Ledger.open(state)
    except NoLedger as error:
        try:
            places = [known.state for known in Registry(registry).known() if known.site == site]
            places = [place for place in places if Path(place) != state.resolve()]
        except (StorageError, OSError):  # it was only to help
            places = []
        if not places:
            raise
        raise NoLedger(
            f"there is no ledger here, and site {site} has one at {places[0]}", where=str(state),
            remedy="Set `state` to where the folder is now, or restore it from backup; see docs/site.md.",
        ) from error  # fmt: skip


def _identity(state: Path) -> str:
    """Of the ledger in a folder; empty where none can be opened."""
    try:
        with closing(Ledger.open(state)) as ledger:
            return ledger.identity
    except StorageError:
        return ""
