"""The container files say what docs/containers.md promises. `make docker-test` builds and runs them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from support import images
from support.paths import REPOSITORY

DOCKER = REPOSITORY / "docker"
KINDS = {"carrier": "1502:1500", "site": "1501:1500", "coordinator": "1503:1503"}
HOSPITAL, COORDINATOR = ("compose.hospital.yaml", "compose.coordinator.yaml")
FILES = ("compose.yaml", HOSPITAL, COORDINATOR)
STAGE = re.compile(r"FROM (\S+) AS (\S+)")


def _stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """By stage: what it is made from, and its (instruction, rest)."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    rows: list[tuple[str, str]] = []
    for line in lines:
        if found := STAGE.fullmatch(line):
            rows = []
            stages[found[2]] = (found[1], rows)
        else:
            word, _, rest = line.partition(" ")
            rows.append((word, rest.strip()))
    return stages


STAGES = _stages()


def _services(name: str) -> dict[str, dict]:
    return yaml.safe_load((DOCKER / name).read_text())["services"]


def _kind(service: str) -> str:
    return service.partition("-")[0]


SERVICES = [(file, name) for file in FILES for name in _services(file)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_starts_an_installed_command_as_its_own_fixed_user_and_is_looked_after(kind):
    rows = dict(STAGES[kind][1])
    (command,) = json.loads(rows["ENTRYPOINT"])
    assert shutil.which(command, path=str(Path(sys.executable).parent))
    assert all(isinstance(part, str) for part in json.loads(rows["CMD"]))
    assert rows["USER"] == KINDS[kind]
    assert f'CMD ["python", "/opt/health.py", "{kind}"]' in rows["HEALTHCHECK"]
    for mounted in json.loads(rows["VOLUME"]):
        made = [rest for stage in ("user", kind) for word, rest in STAGES[stage][1] if word == "RUN"]
        assert any(f"install -d -o {KINDS[kind].split(':')[0]}" in run and mounted in run for run in made) or (
            kind == "carrier" and mounted == "/run/synthward"  # the site's, which it may only enter
        )


def test_every_image_is_made_from_one_base_of_a_fixed_release():
    base = re.findall(r"^ARG BASE=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert len(base) == 1
    assert re.fullmatch(r"python:3\.1[12]-slim-[a-z]+", base[0])
    assert {origin for origin, _ in STAGES.values()} <= {"${BASE}", *STAGES}


def test_what_is_copied_is_there_and_is_let_through_by_the_ignore_file():
    patterns = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"  # all else needs a line of its own
    allowed = {line[1:] for line in patterns if line.startswith("!")}
    copied = {
        source for _, rows in STAGES.values() for word, rest in rows if word == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    }  # fmt: skip
    assert copied == allowed
    assert all((REPOSITORY / source).exists() for source in copied)


def test_the_labels_say_the_projects_version_and_license():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', str(STAGES["user"][1])))
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]


def test_each_machine_installs_its_own_extra(tmp_path):
    """install.sh, with a pip that says what it was asked for."""
    for kind, wanted in (("carrier", "."), ("site", ".[site]"), ("coordinator", ".[coordinator]")):
        asked, code, _ = _installed(tmp_path / kind, kind, TORCH="cuda")
        assert (code, [words[-1] for words in asked]) == (0, [wanted])


def test_a_site_gets_a_cpu_torch_or_the_build_says_what_to_give(tmp_path):
    asked, code, _ = _installed(tmp_path / "a", "site", TORCH="cpu", TORCH_INDEX="index")
    assert code == 0
    assert re.fullmatch(r"torch==[\d.]+\+cpu", asked[0][-1])
    assert all("--extra-index-url index" in " ".join(words) for words in asked)
    asked, code, error = _installed(tmp_path / "b", "site", TORCH="cpu", fails="yes")
    assert (code, len(asked)) == (1, 1)
    assert "TORCH_INDEX=ADDRESS" in error


def _installed(folder, kind, fails="", **environment):
    """(what pip was asked to install, exit code, errors) of install.sh, with a pip that only writes it down."""
    (folder / "bin").mkdir(parents=True)
    (folder / "home" / "lib").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/asked"\ntest -z "{fails}"\n')
    python.chmod(0o755)
    script = (DOCKER / "install.sh").read_text().replace("/opt/synthward", f"{folder}/home")
    ended = subprocess.run(["sh", "-c", script, "install.sh", kind], cwd=REPOSITORY, capture_output=True, text=True,
                           check=False, env={"PATH": f"{folder}/bin:/usr/bin:/bin", **environment})  # fmt: skip
    asked = [line.split() for line in (folder / "asked").read_text().splitlines()]
    return asked, ended.returncode, ended.stderr


def test_what_a_machine_lacks_to_build_the_images_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_path", lambda: str(tmp_path))
    assert images.lacking() == "needs buildah and debootstrap (apt install buildah debootstrap)"
    for tool in ("buildah", "debootstrap"):
        (tmp_path / tool).write_text("")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setattr(images.os, "geteuid", lambda: 1000)
    assert "root" in images.lacking()
    monkeypatch.setattr(images.os, "geteuid", lambda: 0)
    assert images.lacking() == ""


@pytest.mark.parametrize(("file", "name"), SERVICES)
def test_a_service_is_built_from_a_stage_and_locked_in(file, name):
    service = _services(file)[name]
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert service["build"]["target"] == _kind(name)
    assert f"-{_kind(name)}:" in service["image"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [place.partition(":")[0] for place in service["tmpfs"]] == ["/tmp"]
    mounted = {volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in service["volumes"]}
    volumes = set(json.loads(dict(STAGES[_kind(name)][1])["VOLUME"]))
    assert mounted == volumes | {"/studies"}
    assert all(v.endswith(":ro") for v in service["volumes"] if "/studies" in v)


def test_who_is_in_which_file():
    assert set(_services(HOSPITAL)) == {"site", "carrier"}
    assert set(_services(COORDINATOR)) == {"coordinator"}
    assert set(_services("compose.yaml")) == {"coordinator"} | {
        f"{k}-{n}" for k in ("site", "carrier") for n in (1, 2, 3)
    }


def test_only_the_coordinators_proxy_is_published_and_nothing_where_all_are_on_one_machine():
    published = {(file, name) for file, name in SERVICES if "ports" in _services(file)[name]}
    assert published == {(COORDINATOR, "coordinator")}
    (port,) = _services(COORDINATOR)["coordinator"]["ports"]
    assert port.count("${SYNTHWARD_PORT:-8443}") == 2  # the invitation says the port, so it is one inside and outside


@pytest.mark.parametrize(("file", "number"), [(HOSPITAL, ""), *(("compose.yaml", f"-{n}") for n in (1, 2, 3))])
def test_the_container_with_the_images_has_no_network_and_the_one_with_a_network_has_no_images(file, number):
    services = _services(file)
    site, carrier = services[f"site{number}"], services[f"carrier{number}"]
    assert site["network_mode"] == "none"
    assert "network_mode" not in carrier
    sources = [
        {volume.rsplit(":/", 1)[0] for volume in part["volumes"] if ":ro" not in volume} for part in (site, carrier)
    ]
    assert sources[0] & sources[1] == {f"sockets{number}"}
    assert not [volume for volume in carrier["volumes"] if volume.endswith(":/site")]


def test_hospitals_on_one_machine_share_nothing():
    services = _services("compose.yaml")
    own = {n: {v for kind in ("site", "carrier") for v in services[f"{kind}-{n}"]["volumes"] if ":ro" not in v}
           for n in (1, 2, 3)}  # fmt: skip
    assert not own[1] & own[2] and not own[2] & own[3] and not own[1] & own[3]
    assert all(len(volumes) == 3 for volumes in own.values())


def test_the_example_of_settings_names_what_the_compose_files_read_with_their_defaults():
    used: dict[str, set[str]] = {}
    for file in FILES:
        for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", (DOCKER / file).read_text()):
            used.setdefault(name, set()).add(default)
    said = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    assert {name: {value} for name, value in said.items()} == used
