"""How a deployment stands, for Prometheus: a page of numbers on loopback.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import datetime

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.errors import DataError
from server.deployment.folder import Deployment
from server.deployment.status import Status, status_of

_KEEP_SECONDS = 15.0  # Flower is asked by a command of its own, which takes a second or two


def serve_metrics(deployment: Deployment, port: int) -> None:
    """Answer at http://127.0.0.1:port/metrics from now on, until this process ends.

    Raises:
        DataError: the port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(_Deployment(deployment))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or "no port"
        raise DataError(
            f"port {port} cannot be used ({why})", where="--metrics-port", remedy="Give another."
        ) from error


class _Deployment(Collector):
    def __init__(self, deployment: Deployment) -> None:
        self._deployment, self._lock = deployment, threading.Lock()
        self._found: Status | None = None
        self._at = 0.0

    def describe(self) -> Iterator[Metric]:  # without it the registry would ask at once
        return iter(())

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if self._found is None or time.monotonic() - self._at > _KEEP_SECONDS:
                self._found, self._at = status_of(self._deployment), time.monotonic()
            found = self._found
        return measures(found)


def measures(found: Status) -> Iterator[Metric]:
    """Its numbers; none of them was not on `deploy status` already."""
    yield GaugeMetricFamily("synthward_up", "whether Flower's SuperLink answers", value=float(found.services == "up"))
    days = float(found.certificate_days)
    yield GaugeMetricFamily("synthward_certificate_days", "until the certificate expires", value=days)
    carriers = GaugeMetricFamily("synthward_carrier_online", "1 where it is connected", labels=["carrier"])
    for carrier in found.carriers:
        carriers.add_metric([carrier.name], float(carrier.state == "online"))
    yield carriers
    if found.run is None:
        return
    run = found.run
    name = run.folder.rpartition("/")[2]
    state = GaugeMetricFamily(
        "synthward_run", "the newest run, in this state and stage", labels=["run", "state", "stage"]
    )
    state.add_metric([name, run.state, run.stage], 1.0)
    yield state
    for what, value in (("done", run.done), ("total", run.total)):
        steps = GaugeMetricFamily(f"synthward_run_steps_{what}", "steps of the newest stage", labels=["run", "stage"])
        steps.add_metric([name, run.stage], float(value))
        yield steps
    event = GaugeMetricFamily("synthward_run_last_event_seconds", "Unix time of its last event", labels=["run"])
    event.add_metric([name], _seconds(run.at))
    yield event
    epsilon = GaugeMetricFamily("synthward_site_epsilon", "as the site last reported it", labels=["run", "site"])
    heard = GaugeMetricFamily("synthward_site_last_answer_seconds", "Unix time of it", labels=["run", "site"])
    for site, spent in run.epsilon.items():
        epsilon.add_metric([name, site], spent)
    for site, at in run.heard.items():
        heard.add_metric([name, site], _seconds(at))
    yield from (epsilon, heard)


def _seconds(at: str) -> float:
    """Of an event's time; 0 where there is none."""
    return datetime.fromisoformat(at).timestamp() if at else 0.0
