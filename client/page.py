"""The data-protection officer's page: read-only, on this machine only.

SPDX-License-Identifier: Apache-2.0

Plain HTTP on the loopback address, GET and HEAD only, no script, no cookie, nothing loaded from elsewhere. Study names
and refusal texts come from the coordinator, so every value is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from client.account import Account, account_of
from client.page_template import TEMPLATE
from client.privacy.policy import SitePolicy
from client.registry import open_ledger
from client.site import load_site_config
from common.errors import SynthwardError
from common.mechanisms import PARTITIONS

HOST = "127.0.0.1"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 240, 46, 34
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
}  # fmt: skip


@dataclass(frozen=True)
class SiteView:
    """One site on the page; `problem` says in words why there is no account."""

    name: str
    policy: SitePolicy | None
    account: Account | None
    problem: str


def view(path: Path) -> SiteView:
    """Read one site; a ledger that is missing or was changed is shown as such, never raised."""
    name, policy = path.stem, None
    try:
        config = load_site_config(path)
        name, policy = config.name, config.policy
        with closing(open_ledger(name, config.state, config.registry)) as ledger:
            return SiteView(name, policy, account_of(name, ledger, policy), "")
    except SynthwardError as error:
        return SiteView(name, policy, None, str(error))


def render(sites: Sequence[Path]) -> str:
    """The page as HTML."""
    views = [view(path) for path in sites]
    charts = {v.name: chart(v.account) for v in views if v.account is not None and v.account.curve}
    return _template().render(views=views, charts=charts)


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(TEMPLATE)


def chart(account: Account) -> str:
    """Epsilon of all studies against the number of requests, with the ceiling, as SVG; bands show study and stage."""
    from markupsafe import Markup, escape

    last = max(1, account.curve[-1].reservation) if account.curve else 1
    top = 1.1 * max([account.ceiling, *(value for point in account.curve for value in point.epsilon.values())])

    def x(reservation: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 8) * reservation / last

    def y(epsilon: float) -> float:
        return (_HEIGHT - _BOTTOM) * (1 - epsilon / top) + 4

    parts = []
    for index, (study, stage, first, end) in enumerate(account.bands):
        left, width = x(first - 1), x(end) - x(first - 1)
        shade = "#f3f5f8" if index % 2 else "#e7ecf2"
        parts.append(f'<rect x="{left:.1f}" y="4" width="{width:.1f}" height="{_HEIGHT - _BOTTOM:.1f}" fill="{shade}">'
                     f"<title>{escape(study)}: {escape(stage)}</title></rect>")  # fmt: skip
        if width > 7 * len(stage):
            parts.append(f'<text x="{left + width / 2:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">'
                         f"{escape(stage)}</text>")  # fmt: skip
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y(account.ceiling):.1f}" y2="{y(account.ceiling):.1f}" '
                 f'stroke="#a33" stroke-dasharray="6 4"/><text x="{_LEFT + 6}" y="{y(account.ceiling) - 5:.1f}" '
                 f'fill="#a33">ceiling {account.ceiling:g}</text>')  # fmt: skip
    for partition, colour in zip(PARTITIONS, ("#1f4e79", "#b8860b"), strict=True):
        values = [(0, 0.0), *((p.reservation, p.epsilon[partition]) for p in account.curve)]
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in values)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for tick in (0.0, account.ceiling / 2, account.ceiling):
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 2}" text-anchor="end">{last} answers, oldest first</text>')
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#445">{"".join(parts)}</svg>'
    )


def server(sites: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server on the loopback address, ready for `serve_forever`; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "synthward-site", ""

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            # A page elsewhere could point a name of its own at 127.0.0.1 and read us through the officer's browser.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN, "this page answers to 127.0.0.1 and localhost only")
            elif self.path != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
            else:
                data = render(sites).encode()
                self.send_response(HTTPStatus.OK)
                for name, value in {**_HEADERS, "Content-Type": "text/html; charset=utf-8"}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            # Any other method than GET and HEAD is "not implemented" to the base class; say what it is.
            code = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else code
            super().send_error(code, message, explain)

        def log_message(self, format: str, *args: object) -> None:  # noqa: ARG002
            return

    return ThreadingHTTPServer((HOST, port), Handler)
