"""What `flwr build` would ship to every site: our code and study files, and nothing else.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from common.study_file import load_study
from support.paths import REPOSITORY

MAX_BYTES = 1_000_000
CLIENT = {"client/__init__.py", "client/app.py"}  # none of the code that opens a site's images, ledger or policy
# Planted in the copy: what a working tree has lying about, each under a name that Flower would bundle by default.
STRAYS = (
    "labels.json", "data/labels.json", "client/data/labels.json", "client/data/notes.md", "server/results.yaml",
    "runs/demo/study.toml", "site.toml", "tests/unit/planted.py", "notes.py",
)  # fmt: skip


def tracked() -> list[str]:
    """Files of the tree as git sees it: tracked, or new and not ignored."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("the bundle is built from a git checkout, and this is none")
    listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return sorted(name for name in set(listed.split("\0")) if name and (REPOSITORY / name).is_file())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, tree / name)
    for name in STRAYS:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("stray = 1\n", encoding="utf-8")
    flwr = Path(sys.executable).parent / "flwr"
    if not flwr.exists():
        pytest.skip("no flwr command beside this Python")
    home = tmp_path_factory.mktemp("flower")
    result = subprocess.run(
        [str(flwr), "build"], cwd=tree, env={**os.environ, "FLWR_HOME": str(home)}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    built = list(tree.glob("*.fab"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(built) == 1, result.stdout + result.stderr
    return zipfile.ZipFile(built[0])


def test_the_bundle_has_the_shared_and_the_servers_code_and_every_study_file(bundle: zipfile.ZipFile):
    names = set(bundle.namelist())
    code = {name for name in tracked() if name.split("/")[0] in ("common", "server") and name.endswith(".py")}
    studies = {name for name in tracked() if PurePosixPath(name).match("configs/*.toml")} - {
        "configs/site.example.toml"
    }
    assert len(code) >= 40
    assert len(studies) >= 2
    assert code | studies | CLIENT | {"pyproject.toml", "LICENSE"} <= names


def test_the_bundle_has_nothing_else(bundle: zipfile.ZipFile):
    """No tests, no documents, no data, no site file, even when they lie in the tree."""
    allowed = {"pyproject.toml", "LICENSE", *CLIENT}
    others = [
        name for name in bundle.namelist()
        if name not in allowed and name != "common/claim.schema.json" and not name.startswith(".info/")
        and not (name.split("/")[0] in ("common", "server") and name.endswith(".py"))
        and not PurePosixPath(name).match("configs/*.toml")
    ]  # fmt: skip
    assert others == []
    assert "configs/site.example.toml" not in bundle.namelist()


def test_the_bundle_is_small(bundle: zipfile.ZipFile):
    assert bundle.filename is not None
    assert 10_000 < Path(bundle.filename).stat().st_size < MAX_BYTES


def test_the_bundle_names_apps_that_it_holds(bundle: zipfile.ZipFile, tmp_path: Path):
    settings = tomllib.loads(bundle.read("pyproject.toml").decode())["tool"]["flwr"]["app"]
    assert settings["publisher"] == "synthward"
    assert settings["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert {"server/app.py", "client/app.py"} <= set(bundle.namelist())
    assert settings["config"]["run-dir"] == ""
    (tmp_path / "study.toml").write_bytes(bundle.read(settings["config"]["study"]))
    load_study(tmp_path / "study.toml")


def test_the_simulation_loads_the_apps_that_the_bundle_names():
    from server import engine

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["flwr"]["app"]["components"] == {
        "serverapp": engine.SERVER_APP, "clientapp": engine.CLIENT_APP,
    }  # fmt: skip
