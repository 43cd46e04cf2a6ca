"""What a carrier, a site and a coordinator install: the base asks for nothing heavy, and what is missing is named."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.commands import EXTRAS, OF_EXTRAS
from support.paths import REPOSITORY

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
SITE_COMMANDS = [
    ["check", "site.toml", "--study", "{study}"], ["explain", "site.toml", "{study}"],
    ["serve", "site.toml", "--sockets", "."], ["page", "site.toml"], ["init", "site.toml", "--name", "h"],
]  # fmt: skip
COMMANDS = [("client", *words) for words in SITE_COMMANDS] + [("server", "run", "{study}"), ("server", "verify", ".")]


def _without_extras(code, cwd=REPOSITORY, missing=OF_EXTRAS):
    program = f"{WITHOUT.format(missing=sorted(missing))}sys.path.insert(0, {str(REPOSITORY)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    "code", ["import client.app", "sys.argv = ['x', '--help']\nfrom client.cli import main\nmain()",
             "sys.argv = ['x', '--help']\nfrom server.cli import main\nmain()"],
)  # fmt: skip
def test_a_carrier_runs_without_any_extra(code):
    ended = _without_extras(code)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_whose_extra_is_missing_says_which_in_one_line(command, tmp_path):
    side, *words = (word.format(study=REPOSITORY / "configs" / "demo.toml") for word in command)
    ended = _without_extras(f"sys.argv = {['x', *words]!r}\nfrom {side}.cli import main\nmain()", cwd=tmp_path)
    assert ended.returncode == 2
    extra = {"client": "site", "server": "coordinator"}[side]
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: this command needs ") and line.endswith(f"pip install 'synthward[{extra}]'")
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_a_sites_install_ends_before_it_has_made_a_folder(tmp_path):
    study = str(REPOSITORY / "configs" / "demo.toml")
    code = f"sys.argv = ['x', 'run', {study!r}]\nfrom server.cli import main\nmain()"
    ended = _without_extras(code, cwd=tmp_path, missing={"matplotlib"})
    assert (ended.returncode, list(tmp_path.iterdir())) == (2, [])
    assert ended.stderr.endswith("pip install 'synthward[coordinator]'\n")


def test_dicom_has_an_extra_of_its_own_and_its_absence_is_told_before_anything_is_made(tmp_path):
    code = "sys.argv = ['x', 'release', '.', '--dicom']\nfrom server.cli import main\nmain()"
    ended = _without_extras(code, cwd=tmp_path, missing={"pydicom"})
    assert (ended.returncode, list(tmp_path.iterdir())) == (2, [])
    assert ended.stderr.endswith("pip install 'synthward[dicom]'\n")


def test_a_missing_module_of_no_extra_is_a_defect_and_keeps_its_trace():
    code = """
import typer
from common.commands import run
app = typer.Typer()
@app.command()
def go():
    import no_such_module
@app.command()
def stay(): ...
sys.argv = ["x", "go"]
run(app, program="synthward", interrupted="")
"""
    ended = _without_extras(code)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_the_programs_name_extras_that_exist():
    assert set(EXTRAS.values()) <= set(_project_requirements())


def _project_requirements() -> dict[str, list[str]]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def _all_of(names: list[str]) -> set[str]:
    """The distributions, and all that they need in turn."""
    found, todo = set[str](), [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found or name == "synthward":
            continue
        found.add(name)
        for need in map(Requirement, requires(name) or ()):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*wanted.extras, "")):
                todo.append(need)
    return found


def test_every_module_that_only_an_extra_brings_is_known_as_such():
    base, by_module = _all_of(_project_requirements()[""]), packages_distributions()
    imported = set()
    for package in ("common", "client", "server"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.partition(".")[0] for name in names}
    brings = {module: {canonicalize_name(name) for name in names} for module, names in by_module.items()}
    others = {module for module in imported - {"common", "client", "server"} if module in brings}
    assert {"torch", "flwr"} <= others
    assert {module for module in others if not brings[module] & base} <= OF_EXTRAS
    assert {module for module in OF_EXTRAS if brings[module] & base} == set()


def test_what_reads_a_ledger_loads_no_torch():
    """`budget`, `init`, `backup`: half a second in place of two."""
    code = "import client.account, client.backup, client.beginning, client.page, sys; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.stdout == "False\n", ended.stderr
