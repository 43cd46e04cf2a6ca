"""Whether what this container is for answers; exit code 0 or 1, and one line that says why not.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import ssl
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SOCKETS, CARRIER, DEPLOYMENT = Path("/run/synthward"), Path("/carrier"), Path("/deployment")
SECONDS = 8.0


class Ill(Exception):
    """What does not answer."""


def site(sockets: Path = SOCKETS) -> None:
    """Every socket of the site's process speaks gRPC. Nothing is asked of it, so nothing is logged or counted."""
    import grpc

    found = sorted(sockets.glob("*.sock"))
    if not found:
        raise Ill(f"{sockets}: no socket; is `synthward-site serve` running?")
    for socket in found:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=SECONDS)
            except grpc.FutureTimeoutError as error:
                raise Ill(f"{socket}: nobody answers") from error


def carrier() -> None:
    """The SuperNode runs and answers on loopback. It ends, and is started again, while the coordinator refuses it."""
    ports = [words[words.index("--port") + 1] for words in commands("flower-supernode") if "--port" in words]
    if not ports:
        raise Ill("no SuperNode runs; what the container says tells why")
    for port in ports:
        answer(f"http://127.0.0.1:{port}/health")


def coordinator(folder: Path = DEPLOYMENT) -> None:
    """The proxy answers hospitals, and the SuperLink behind it answers too."""
    addresses = tomllib.loads((folder / "deployment.toml").read_text())
    context = ssl.create_default_context(cafile=folder / "authority.crt")
    answer(f"https://localhost:{addresses.get('superlink_port', 18443)}/health", context)
    # Unsigned, so refused; but by the SuperLink, and not by a proxy that does not reach it (502).
    answer(f"https://localhost:{addresses.get('port', 8443)}/v1/fleet/send-node-heartbeat", context, refused=True)


def answer(address: str, context: ssl.SSLContext | None = None, *, refused: bool = False) -> None:
    """See that somebody answers there, and well; or with a refusal where that is right."""
    request = urllib.request.Request(address, data=b"" if refused else None)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS, context=context) as reply:
            code = reply.status
    except urllib.error.HTTPError as error:
        code = error.code
    except OSError as error:
        raise Ill(f"{address}: {getattr(error, 'reason', error)}") from error
    if code >= 500 or (code >= 400) != refused:
        raise Ill(f"{address}: HTTP {code}")


def commands(program: str) -> Iterator[list[str]]:
    """The command lines of this user's processes that run a program."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.stat().st_uid != os.getuid():
                continue
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if any(Path(word).name == program for word in words[:2]):
            yield words


def main(kind: str) -> int:
    """Look, and say it."""
    try:
        {"site": site, "carrier": carrier, "coordinator": coordinator}[kind]()
    except (Ill, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
