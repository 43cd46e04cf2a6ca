"""RUN/live.html: how a run stands, in a browser that looks again every few seconds.

SPDX-License-Identifier: Apache-2.0

A file and no service: whoever may read the run folder may see it, and nothing listens for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from common.errors import StorageError
from common.files import atomic_write
from server.checkpoints import RunFolder
from server.run_status import FAILED, FINISHED, RUNNING, STOPPED, RunStatus, told_by

NAME = "live.html"
_EVERY_SECONDS = 2.0
_STAGES = ("canary", "enrol", "features", "moments", "pretrain", "train", "generate", "classify", "validate", "release")
_WIDE, _HIGH = 600, 120  # of the curve, pixels
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if run.state == "running" %}<meta http-equiv="refresh" content="5">{% endif %}

<title>{{ run.state }}: {{ name }}</title>
<style>
:root { color-scheme: light dark; --ink:#1c2430; --soft:#55606e; --line:#d5dce4; --card:#fff; --page:#f4f6f9; --accent:#0b5c8a; }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e8edf3; --soft:#a5b0bd; --line:#38424e; --card:#1b222b; --page:#11161c; --accent:#6cb8e6; }
}
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width:820px; margin:0 auto; padding:20px 16px 48px; }
h1 { font-size:1.4rem; margin:0; overflow-wrap:anywhere; } h2 { font-size:1.1rem; margin:0 0 8px; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:16px; margin:14px 0; }
progress { width:100%; height:14px; accent-color:var(--accent); } .soft { color:var(--soft); }
.scroll { overflow-x:auto; } table { border-collapse:collapse; width:100%; }
th, td { text-align:left; padding:5px 10px 5px 0; border-bottom:1px solid var(--line); } a { color:var(--accent); }
svg { width:100%; height:auto; } polyline { fill:none; stroke:var(--accent); stroke-width:2; }
</style>
</head>
<body><main>
<h1>{{ name }}</h1>
<p class="soft">{{ run.state }} · last event {{ run.at[:19]|replace("T", " ") }} UTC{% if run.state == "running" %} · looks again every 5 seconds{% endif %}</p>
{% if report %}<p><a href="{{ report }}">The report</a></p>{% endif %}
{% if run.error %}<section role="alert"><h2>It failed</h2><p>{{ run.error }}</p></section>{% endif %}
<section aria-live="polite"><h2>{{ run.stage or "begins" }}{% if run.total %} {{ run.done }} of {{ run.total }}{% endif %}</h2>
{% if run.total %}<progress max="{{ run.total }}" value="{{ run.done }}" aria-label="steps of {{ run.stage }}"></progress>{% endif %}
<p>{{ run.text }}{% if run.state == "running" and run.seconds_left %} · about {{ [1, (run.seconds_left / 60)|round|int]|max }} min left in this stage{% endif %}</p>
<p class="soft">{% for stage in stages %}{% if stage == run.stage %}<b>{{ stage }}</b>{% else %}{{ stage }}{% endif %}{{ " → " if not loop.last }}{% endfor %}</p></section>
{% if run.sites %}<section><h2>Sites</h2><div class="scroll"><table>
<tr><th scope="col">site</th><th scope="col">epsilon so far (training records)</th><th scope="col">last answer, UTC</th><th scope="col">left out of the newest round</th></tr>
{% for site in run.sites %}<tr><td>{{ site }}</td><td>{{ "%.3f"|format(run.epsilon[site]) if site in run.epsilon }}</td><td>{{ run.heard.get(site, "")[11:19] }}</td><td>{{ run.left_out.get(site, "") }}</td></tr>
{% endfor %}</table></div></section>{% endif %}
{% if curve %}<section><h2>Loss (noisy)</h2><svg viewBox="0 0 {{ wide }} {{ high }}" role="img" aria-label="loss of each round, from {{ "%.3f"|format(run.losses[0]) }} to {{ "%.3f"|format(run.losses[-1]) }}"><polyline points="{{ curve }}"/></svg>
<p class="soft">round 1: {{ "%.3f"|format(run.losses[0]) }} · round {{ run.losses|length }}: {{ "%.3f"|format(run.losses[-1]) }}</p></section>{% endif %}
{% if run.warnings %}<section><h2>Warnings</h2><ul>{% for text in run.warnings %}<li>{{ text }}</li>{% endfor %}</ul></section>{% endif %}
</main></body></html>
"""


class LivePage:
    """Writes the page again after the run's events, no more often than every two seconds.

    Args:
        folder: the run's; what it has been through before is read once.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._file = folder.path / NAME
        self._name = folder.path.name
        self._run = told_by(folder.events(), folder=str(folder.path), state=RUNNING)
        self._written = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """The next event of this run."""
        self._run.take(event)
        if event.get("event") != "step" or time.monotonic() - self._written > _EVERY_SECONDS:
            self._write("")

    def close(self, report: Path | None) -> None:
        """The run's process ends; `report` where it came to its release."""
        if report is not None:
            self._run.state = FINISHED
        elif self._run.state == RUNNING:
            self._run.state = FAILED if self._run.error else STOPPED
        self._write("" if report is None else report.relative_to(self._file.parent).as_posix())

    def _write(self, report: str) -> None:
        self._written = time.monotonic()
        with suppress(StorageError):  # a full disk is the run's matter, not the page's
            atomic_write(self._file, render(self._run, name=self._name, report=report).encode())


def render(run: RunStatus, *, name: str, report: str = "") -> str:
    """The page as HTML, with no script and no request to anywhere."""
    return _template().render(
        run=run, name=name, report=report, stages=_STAGES, curve=_points(run.losses), wide=_WIDE, high=_HIGH
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE)


def _points(losses: list[float]) -> str:
    """The curve's corners; empty while there are fewer than two rounds."""
    if len(losses) < 2:
        return ""
    low, high = min(losses), max(losses)
    across, span = (_WIDE - 8) / (len(losses) - 1), (high - low) or 1.0
    return " ".join(
        f"{4 + number * across:.1f},{4 + (_HIGH - 8) * (high - loss) / span:.1f}" for number, loss in enumerate(losses)
    )
