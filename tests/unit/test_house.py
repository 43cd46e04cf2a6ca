"""The house keeps its shape: caps, faces, one version, studies that load."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from common.study import load_study
from support.paths import REPOSITORY

PACKAGES = ("common", "client", "server")
FILES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
VAULT = ("policy", "ledger", "gate", "mechanism", "randomness")
STUDIES = sorted(path for path in (REPOSITORY / "configs").rglob("*.toml") if not path.name.startswith("site"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_there_are_files_to_check():
    assert len(FILES) > 40
    assert len(STUDIES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_a_file_is_a_room_and_a_function_fits_a_screen(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
    if path.name == "__init__.py":
        assert not tree.body, "faces stay empty, so that commands start fast"
    else:
        assert ast.get_docstring(tree)
    assert "SPDX-License-Identifier: Apache-2.0" in text


def test_the_vault_is_read_in_one_sitting():
    lines = [len((REPOSITORY / "client" / "privacy" / f"{name}.py").read_text().splitlines()) for name in VAULT]
    assert sum(lines) <= 600


def test_test_folders_are_no_packages():
    for suite in ("unit", "integration", "statistical", "e2e"):
        assert not list((REPOSITORY / "tests" / suite).rglob("__init__.py"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.name)
def test_every_study_loads_and_says_its_command_time_and_figures(path):
    study = load_study(path)
    head = path.read_text().splitlines()[:3]
    assert all(line.startswith("#") for line in head)
    assert path.name in head[0]
    assert "two cores" in head[1]
    assert study.privacy.epsilon <= 8
    assert study.privacy.delta <= 1e-5


def test_the_changelog_has_the_projects_version_on_top():
    versions = re.findall(r"^## \[([\d.]+)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PROJECT["project"]["version"]


def test_the_launcher_loads_the_apps_that_flower_is_told_of():
    from server.launch import CLIENT_APP, SERVER_APP

    components = PROJECT["tool"]["flwr"]["app"]["components"]
    assert (components["serverapp"], components["clientapp"]) == (SERVER_APP, CLIENT_APP)


def test_the_site_example_is_a_site_file():
    from client.site import load_site_config

    assert load_site_config(REPOSITORY / "configs" / "site.example.toml").name == "hospital-a"
