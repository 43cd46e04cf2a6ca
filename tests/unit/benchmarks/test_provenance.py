"""A figure's origin: the software's files as they are, git's word on them, the machine."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.utility.provenance import code_version, commit, hardware


@pytest.fixture
def clone(tmp_path):
    for folder in ("common", "client", "server", "configs", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("A = 1\n")
    return tmp_path


@pytest.mark.parametrize("folder", ["common", "client", "server"])
def test_every_change_of_the_software_is_another_version(clone, folder):
    versions = {code_version(clone)}
    (clone / folder / "a.py").write_text("A = 2\n")
    versions.add(code_version(clone))
    (clone / folder / "a.py").rename(clone / folder / "b.py")
    versions.add(code_version(clone))
    assert len(versions) == 3


def test_what_no_run_depends_on_is_no_other_version(clone):
    before = code_version(clone)
    (clone / "docs" / "a.py").write_text("A = 2\n")
    (clone / "common" / "notes.txt").write_text("x")
    assert code_version(clone) == before


def test_the_commit_says_whether_the_software_differs_from_it(clone):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=")
        done = subprocess.run(["git", "-C", str(clone), *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "a")
    assert commit(clone) == (git("rev-parse", "HEAD")[:12], "no")
    (clone / "docs" / "a.py").write_text("A = 2\n")
    assert commit(clone)[1] == "no"
    (clone / "server" / "a.py").write_text("A = 2\n")
    assert commit(clone)[1] == "yes"


def test_outside_of_a_clone_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) == ("unknown", "unknown")


def test_the_machine_is_one_line():
    line = hardware()
    assert "cores" in line and "\n" not in line
