"""Whether a coordinator can be reached, as a hospital meets it, and if not, why in plain words.

SPDX-License-Identifier: Apache-2.0

Nothing of a hospital is sent: an empty request, which Flower refuses as it is not signed, tells that Flower is there.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FLEET = "/v1/fleet/send-node-heartbeat"
_SECONDS = 10.0
_EXPIRED, _NOT_YET, _OTHER_NAME = 10, 9, {62, 64}  # OpenSSL's X509_V_ERR_*
# Flower refuses a signature that is more than five minutes old, or that is to be made in five seconds.
_BEHIND_SECONDS, _AHEAD_SECONDS = 300.0, 4.0


@dataclass(frozen=True)
class Reached:
    """What came of it.

    Attributes:
        problem, remedy: why it cannot be reached; empty when it can.
        status: of the HTTP answer; 0 where there was none.
        days: until its certificate expires.
        clock: seconds by which its clock is at least ahead of this one (or, below zero, behind).
    """

    problem: str = ""
    remedy: str = ""
    status: int = 0
    days: float = 0.0
    clock: float = 0.0

    @property
    def told(self) -> str:
        return f"answers; its certificate is good for {self.days:.0f} days"


def reach(address: str, authority: str, *, path: str = FLEET, by: str | None = None) -> Reached:
    """Try it.

    Args:
        address: host:port.
        authority: certificate (PEM) of the only authority that is believed.
        path: what is asked for.
        by: another address of the same machine to connect to.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        if not authority.isascii() or not authority.strip():  # of nothing, Python would make the system's authorities
            raise ValueError("no certificate")
        context = ssl.create_default_context(cadata=authority)
    except (ssl.SSLError, ValueError):  # empty, or no text
        return Reached("the authority's certificate cannot be read", "Join again with the coordinator's invitation.")
    try:
        with (
            socket.create_connection((by or host, int(port)), timeout=_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            late = threading.Timer(_SECONDS, lambda: _end(secure))  # a timeout is of each piece, not of the whole
            late.start()
            try:
                found = _asked(secure, host, path)
                if late.finished.is_set():  # what was cut off here may look whole
                    raise TimeoutError
                return found
            finally:
                late.cancel()
    except ssl.SSLCertVerificationError as error:
        return _not_believed(error, address)
    except (socket.gaierror, UnicodeError):  # of a part that is empty or too long
        return Reached(f"no machine is called {host}", "Is the name right, and does this machine find it (DNS)?")
    except TimeoutError:
        return Reached(
            f"{address} does not answer within {_SECONDS:.0f} s", "Is a firewall between? Outgoing, this port."
        )
    except (OSError, OverflowError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        return Reached(
            f"{address} cannot be reached ({why})", "Ask the coordinator whether `synthward deploy up` runs."
        )


def _end(connection: socket.socket) -> None:
    """End it for whoever reads from it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _asked(secure: ssl.SSLSocket, host: str, path: str) -> Reached:
    peer = secure.getpeercert() or {}
    days = (ssl.cert_time_to_seconds(str(peer["notAfter"])) - datetime.now(UTC).timestamp()) / 86400
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    began = time.monotonic()
    secure.sendall(head.encode())
    answer = http.client.HTTPResponse(secure)
    answer.begin()
    clock = _ahead(answer.headers["Date"], time.monotonic() - began)
    if answer.status >= 500:
        return Reached(f"its proxy answers, but Flower behind it does not ({answer.status})",
                       "Ask the coordinator for `synthward deploy status`.", answer.status, days, clock)  # fmt: skip
    if not -_AHEAD_SECONDS < clock < _BEHIND_SECONDS:
        which = "behind" if clock > 0 else "ahead of"
        return Reached(f"the clocks differ: this machine's is {abs(clock):.0f} s {which} the coordinator's",
                       "Set the one that is wrong (NTP); until then Flower refuses this carrier's signatures.",
                       answer.status, days, clock)  # fmt: skip
    return Reached("", "", answer.status, days, clock)


def _ahead(date: str | None, seconds: float) -> float:
    """Seconds by which a clock is at least ahead of this one; 0 where it tells no time, whatever else it tells.

    Args:
        seconds: how long ago it was asked. When it looked is not known, nor which part of its second it was in: of what
            is possible the least is taken, so that a slow line is no wrong clock.
    """
    try:
        told = parsedate_to_datetime(str(date))
        least = (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, least) + min(0.0, least + seconds + 1.0)


def _not_believed(error: ssl.SSLCertVerificationError, address: str) -> Reached:
    if error.verify_code in (_EXPIRED, _NOT_YET):
        return Reached(f"the certificate of {address} has expired, or this clock is wrong",
                       "Ask the coordinator for `synthward deploy renew`; look at this machine's clock.")  # fmt: skip
    if error.verify_code in _OTHER_NAME:
        return Reached(f"the certificate is not for {address}", "Ask the coordinator which name the invitation has.")
    return Reached(f"{address} shows a certificate of another authority: it is not who invited this hospital",
                   "Do not go on; ask the coordinator by telephone for the invitation's fingerprint.")  # fmt: skip
