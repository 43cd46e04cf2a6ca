"""Whose files a site's files are: one user's, whoever types the command.

SPDX-License-Identifier: Apache-2.0

A ledger of which root has written a part cannot be read by the user who serves it, and root has another list of the
machine's ledgers. So root acts as the owner of the state folder, and anybody else is told to.
"""

from __future__ import annotations

import os
import pwd
import sys
from contextlib import suppress
from pathlib import Path

from common.errors import StorageError


def act_as_owner(path: Path, site: Path | None = None) -> None:
    """Go on as the user whom a state folder belongs to, or the nearest folder above it that is there; for good.

    Nothing changes where that is this user, or root owns it.

    Args:
        site: the site file; where the folder is root's and empty, or yet to be made in one of root's, the file's owner
            is the site's user.

    Raises:
        StorageError: it is another user, and this one is not root.
    """
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    found, me = there.stat(), os.geteuid()
    if me == found.st_uid == 0 and site is not None and site.exists() and (there != path or _empty(path)):
        there, found = site, site.stat()
    if found.st_uid in (me, 0):
        return
    name = _name(found.st_uid)
    if me != 0:
        if there != path:  # nothing of a site's is there yet: whether it may be written will show
            return
        raise StorageError(
            f"belongs to user {name}, and this command runs as {_name(me)}", where=str(path),
            remedy=f"Run it as {name}: everything of a site belongs to one user.",
        )  # fmt: skip
    print(f"acting as user {name}, to whom {there} belongs", file=sys.stderr, flush=True)
    home = str(there if there.is_dir() else there.parent)
    group, groups = found.st_gid, [found.st_gid]
    with suppress(KeyError):  # a user of this machine has a group, a home and a name of its own
        known = pwd.getpwuid(found.st_uid)
        group, home, groups = known.pw_gid, known.pw_dir, os.getgrouplist(known.pw_name, known.pw_gid)
    os.setgroups(groups)
    os.setgid(group)
    os.setuid(found.st_uid)
    for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "TMPDIR"):
        os.environ.pop(variable, None)  # they are root's: above all its own list of ledgers
    os.environ |= {"HOME": home, "USER": name, "LOGNAME": name}


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
