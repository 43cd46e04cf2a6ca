"""The carrier's commands of `synthward-site`: join, carry, doctor.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.commands import told_to_stop

Folder = Annotated[Path, typer.Argument(help="the carrier's folder", metavar="FOLDER")]

_SOCKET = Path("/run/synthward/site.sock")


def add_to(app: typer.Typer) -> None:
    """Make them commands of a command line."""
    for command in (join, carry, doctor):
        app.command()(command)


def join(
    folder: Annotated[Path, typer.Argument(help="a folder for the carrier, new or joined before", metavar="FOLDER")],
    invitation: Annotated[Path, typer.Option(help="as the coordinator sent it", metavar="invitation.json")],
    fingerprint: Annotated[
        str | None,
        typer.Option(help="of the invitation, as the coordinator reads it out by telephone; needed the first time"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="what the coordinator is to call this hospital")] = None,
    socket: Annotated[
        Path | None, typer.Option(help="of `synthward-site serve`; /run/synthward/site.sock if not given")
    ] = None,
) -> None:
    """Make the carrier's key and settings. The key stays here; the coordinator gets NAME.pub.

    With a newer invitation for the same folder: the key stays, what is believed is replaced, and the coordinator's
    signature is enough.

    Examples:

      synthward-site join carrier --invitation invitation.json --fingerprint "1f2e 3d4c ..." --name hospital-a

      synthward-site join carrier --invitation invitation.json
    """
    from client.carrier import folder as folders
    from common.errors import DataError
    from common.invitation import load_invitation, require_same

    before = folders.load_carrier(folder) if (folder / "carrier.toml").exists() else None
    given = load_invitation(invitation)
    if fingerprint is not None:
        remedy = "Do not join; ask the coordinator by telephone what they sent."
        require_same(fingerprint, given.fingerprint, where=str(invitation), remedy=remedy)
    elif before is not None:
        folders.require_next(before, given, where=str(invitation))
    else:
        raise DataError("needed the first time", where="--fingerprint",
                        remedy="The coordinator reads it out by telephone: do not copy it from a message.")  # fmt: skip
    if before is None and name is None:
        raise DataError("needed the first time", where="--name", remedy="As --name hospital-a.")
    carrier = folders.join(
        folder, given, name=name or (before.config.name if before else ""),
        socket=socket or (before.config.socket if before else _SOCKET),
    )  # fmt: skip
    print(f"{carrier.path}: joined {given.coordinator}; it answers to {len(given.bundles)} app bundle(s)")
    print(f"  socket       {carrier.config.socket} (--socket gives another)")
    if before is not None:
        print("its key is the one from before; restart `synthward-site carry`")
        return
    print(f"{carrier.public}: send this to the coordinator, and read to them by telephone:")
    print(f"  fingerprint  {carrier.fingerprint}")
    print(f"Then: synthward-site carry {folder}")


def carry(folder: Folder) -> None:
    """Carry requests and answers between the coordinator and `synthward-site serve`, until stopped.

    Run it as a user of its own, which may open the site's socket and nothing else of the site.

    Example: synthward-site carry carrier
    """
    from client.carrier.carry import carry as keep_carrying
    from client.carrier.folder import load_carrier

    keep_carrying(load_carrier(folder), told_to_stop(), _say)
    _say("stopped")


def doctor(folder: Folder) -> None:
    """Check what a carrier needs: key, clock, disk, memory, the way to the coordinator, the site's socket.

    Exit code 1 when something is amiss.

    Example: synthward-site doctor carrier
    """
    from client.carrier.doctor import findings
    from client.carrier.folder import load_carrier

    amiss = 0
    for finding in findings(load_carrier(folder)):
        print(finding.line, flush=True)
        amiss += not finding.good
    if amiss:
        raise SystemExit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
