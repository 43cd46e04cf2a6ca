"""The container files are well-formed and name commands and files that exist. (No engine runs them here.)"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.paths import REPOSITORY

DOCKER = REPOSITORY / "docker"
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}


@pytest.mark.parametrize("name", ["server", "client", "carrier"])
def test_a_dockerfile_is_well_formed_and_starts_an_installed_command(name):
    lines = (DOCKER / f"{name}.Dockerfile").read_text().splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert rows[0][0] == "FROM"
    assert {row[0] for row in rows} <= INSTRUCTIONS
    by_name = dict(rows)
    entry = json.loads(by_name["ENTRYPOINT"])
    command = entry[0] if len(entry) == 1 else re.match(r"exec (\S+) ", entry[2])[1]
    assert shutil.which(command, path=str(Path(sys.executable).parent))
    assert all(isinstance(part, str) for part in json.loads(by_name["CMD"]))
    assert by_name["USER"] != "root"
    for copied in (row[1].split()[:-1] for row in rows if row[0] == "COPY"):
        for source in copied:
            assert (REPOSITORY / source).exists(), source


def test_the_compose_file_starts_one_coordinator_and_three_sites_and_publishes_on_loopback_only():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    sites, carriers = ({f"{kind}-{n}" for n in (1, 2, 3)} for kind in ("site", "carrier"))
    assert set(services) == {"coordinator"} | sites | carriers
    for service in services.values():
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        for port in service.get("ports", []):
            assert re.match(r"127\.0\.0\.1:", port)


def test_the_container_with_the_images_has_no_network_and_the_one_with_a_network_has_no_images():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for number in (1, 2, 3):
        site, carrier = services[f"site-{number}"], services[f"carrier-{number}"]
        assert site["network_mode"] == "none"
        assert [v for v in carrier["volumes"] if "sites" in v] == []
        shared = {v.split(":")[0] for v in site["volumes"]} & {v.split(":")[0] for v in carrier["volumes"]}
        assert shared == {f"sockets-{number}"}


def test_a_carrier_is_told_the_name_and_the_socket_of_its_site(tmp_path):
    lines = (DOCKER / "carrier.Dockerfile").read_text().splitlines()
    parts = {word: json.loads(line.removeprefix(word)) for line in lines for word in ("ENTRYPOINT", "CMD")
             if line.startswith(word)}  # fmt: skip
    said = tmp_path / "flower-supernode"
    said.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    said.chmod(0o755)
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for number in (1, 2, 3):
        own = compose[f"carrier-{number}"]["environment"]
        words = subprocess.run([*parts["ENTRYPOINT"], *parts["CMD"]], capture_output=True, text=True, check=True,
                               env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **own}).stdout.splitlines()  # fmt: skip
        assert words[:2] == ["--node-config", f'site="/run/synthward/site.sock" name="site-{number}"']
        assert words[2:] == parts["CMD"]
