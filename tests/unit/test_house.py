"""The house keeps its shape: caps, faces, one version, studies that load."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

from common.study_file import load_study
from support.paths import REPOSITORY

PACKAGES = ("common", "client", "server")
FILES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
PRIVACY = (REPOSITORY / "docs" / "privacy.md").read_text()
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


def _code_lines(path: Path) -> int:
    """Lines with code on them: no docstring, no comment, no blank line."""
    text = path.read_text()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in silent]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - prose)


def test_the_files_that_a_privacy_reviewer_must_read_are_named_and_few():
    """The table of docs/privacy.md: what bounds a sum, adds noise, counts the loss, and lets an answer go."""
    section = PRIVACY.split("## What to read")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", section, re.MULTILINE)
    lines = {name: _code_lines(REPOSITORY / name) for name, _ in rows}
    assert all(abs(int(said) - lines[name]) <= 10 for name, said in rows), lines
    assert sum(lines.values()) <= 650
    assert {f"client/privacy/{name}.py" for name in ("gate", "mechanism", "randomness", "gradients", "ledger")} <= set(
        lines
    )
    rest = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "client" / "privacy").glob("[a-z]*.py")}
    assert all(f"`{name}`" in section for name in rest), "a file of client/privacy is in the list, or it says why not"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs").rglob("*.md")), ids=lambda p: p.name)
def test_every_file_that_the_docs_name_is_there(path):
    text = path.read_text()
    if re.search(r"superseded by", text[:400]):
        return
    for name in re.findall(r"`((?:[a-z][\w.-]*/)+[\w.-]+\.(?:py|json|md|toml))[:`]", text):
        assert any((base / name).exists() for base in (REPOSITORY, REPOSITORY / "tests")), name
    for number in re.findall(r"docs/adr/(\d{4})", text):
        assert list((REPOSITORY / "docs" / "adr").glob(f"{number}-*.md")), number


def test_a_decision_fits_a_page():
    decisions = sorted((REPOSITORY / "docs" / "adr").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{number:04d}" for number in range(1, len(decisions) + 1)]
    assert all(len(path.read_text().splitlines()) <= 50 for path in decisions)


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
    from server.engine import CLIENT_APP, SERVER_APP

    components = PROJECT["tool"]["flwr"]["app"]["components"]
    assert (components["serverapp"], components["clientapp"]) == (SERVER_APP, CLIENT_APP)


def test_the_site_example_is_a_site_file():
    from client.site import load_site_config

    assert load_site_config(REPOSITORY / "configs" / "site.example.toml").name == "hospital-a"


def _imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_nothing_of_ours_pickles_under_any_name():
    pickles = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    under_cover = re.compile(r"torch\.(load|save)\(|allow_pickle\s*=\s*True")
    for path in FILES:
        text = path.read_text()
        assert not {name.split(".")[0] for name in _imported(ast.parse(text))} & pickles, path
        assert not under_cover.search(text), path


@pytest.mark.parametrize(
    ("key", "holders"),
    [("client.privacy.mechanism._KEY", {"client/privacy/local_steps.py"}), ("common.bounded._KEY", set())],
)
def test_the_keys_of_bounded_and_noisy_numbers_are_in_few_hands(key, holders):
    found = {path for path in FILES if key in _imported(ast.parse(path.read_text()))}
    assert {path.relative_to(REPOSITORY).as_posix() for path in found} == holders


def test_only_the_gate_makes_what_may_leave():
    """The type is imported for annotations; the call and the key stay in one file."""
    makers = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
        if "Released" in names or "client.privacy.gate._KEY" in _imported(tree):
            makers.add(path.relative_to(REPOSITORY).as_posix())
    assert makers == {"client/privacy/gate.py"}


def test_constraints_pin_every_direct_dependency_to_one_plain_version():
    """A local version such as 2.13.0+cpu would exist on one machine only."""
    pinned = set()
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)==[0-9][0-9A-Za-z.]*", line)
        assert match, line
        pinned.add(re.sub(r"[-_.]+", "-", match[1]).lower())
    extras = PROJECT["project"]["optional-dependencies"]
    direct = [wanted for group in (PROJECT["project"]["dependencies"], *extras.values()) for wanted in group]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", wanted, maxsplit=1)[0]).lower() for wanted in direct}
    names.remove("synthward")  # an extra that holds another
    assert len(names) >= 20
    assert names <= pinned


@pytest.mark.parametrize(
    ("place", "code", "banned"),
    [
        ("server/probe.py", "import pickle\n\nprint(pickle)\n", True),
        ("client/probe.py", "import pickle\n\nprint(pickle)\n", True),
        ("client/privacy/probe.py", "import torch\n\nprint(torch.randn_like(torch.zeros(2)))\n", True),
        ("client/data/probe.py", "import numpy as np\n\nprint(np.random.normal())\n", True),
        ("client/probe.py", "import torch\n\nprint(torch.zeros(2))\n", False),
    ],
)
def test_the_linter_refuses_banned_names_where_they_are_banned(place, code, banned):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", place, "-"],
        cwd=REPOSITORY, input=code, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ("TID251" in result.stdout) == banned, result.stdout + result.stderr
    assert result.returncode == int(banned), result.stdout + result.stderr
