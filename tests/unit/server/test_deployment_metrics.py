"""A deployment's numbers, as Prometheus reads them."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest

from common.errors import DataError
from server.deployment import metrics
from server.deployment.folder import Addresses, Deployment
from server.deployment.metrics import serve_metrics
from server.deployment.status import CarrierStatus, Status
from server.run_status import RunStatus
from support.deployment import free_port

RUN = RunStatus(
    folder="/somewhere/secret/runs/demo-1", state="running", at="2026-01-02T03:04:05.000+00:00", stage="train", done=2,
    total=9, epsilon={"site-1": 1.5}, heard={"site-1": "2026-01-02T03:04:04.000+00:00"},
)  # fmt: skip
CARRIERS = [CarrierStatus(name="site-1", fingerprint="f", state="online"),
            CarrierStatus(name="site-2", fingerprint="f", state="offline")]  # fmt: skip


def _served(monkeypatch, tmp_path, *found: Status) -> tuple[str, list]:
    asked, port = [], free_port()

    def status_of(deployment):
        asked.append(deployment)
        return found[min(len(asked), len(found)) - 1]

    monkeypatch.setattr(metrics, "status_of", status_of)
    serve_metrics(Deployment(tmp_path, Addresses(host="localhost")), port)
    return f"http://127.0.0.1:{port}/metrics", asked


def _read(url: str) -> list[str]:
    with urlopen(url, timeout=10) as answer:
        return answer.read().decode().splitlines()


def test_every_number_of_the_status_is_there_and_no_path(monkeypatch, tmp_path):
    url, asked = _served(monkeypatch, tmp_path, Status(services="up", certificate_days=90, carriers=CARRIERS, run=RUN))
    assert asked == []  # nothing is asked of Flower before somebody looks
    lines = _read(url)
    for line in (
        "synthward_up 1.0", "synthward_certificate_days 90.0", 'synthward_carrier_online{carrier="site-1"} 1.0',
        'synthward_carrier_online{carrier="site-2"} 0.0',
        'synthward_run{run="demo-1",stage="train",state="running"} 1.0',
        'synthward_run_steps_done{run="demo-1",stage="train"} 2.0',
        'synthward_run_steps_total{run="demo-1",stage="train"} 9.0',
        'synthward_site_epsilon{run="demo-1",site="site-1"} 1.5',
        'synthward_run_last_event_seconds{run="demo-1"} 1.767323045e+09',
    ):  # fmt: skip
        assert line in lines, line
    assert "secret" not in "\n".join(lines)
    _read(url)
    assert len(asked) == 1  # kept for a while


def test_without_a_run_or_a_superlink_it_answers_too(monkeypatch, tmp_path):
    down = Status(services="down: the SuperLink does not answer", certificate_days=-1, carriers=[], run=None)
    url, _ = _served(monkeypatch, tmp_path, down, down)
    assert "synthward_up 0.0" in _read(url) and "synthward_certificate_days -1.0" in _read(url)


@pytest.mark.parametrize("port", [None, 99999])
def test_a_port_that_cannot_be_used_is_one_line(tmp_path, port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DataError, match=r"--metrics-port: port \d+ cannot be used \(.+\)\. Give another"):
            serve_metrics(Deployment(tmp_path, Addresses(host="localhost")), port or taken.getsockname()[1])
