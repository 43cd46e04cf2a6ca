"""Every command that a message, a help text or a page of the docs tells a reader to type is taken by the real parsers.

A command that is only named ("see synthward-site init") has to be there; one that is written with anything behind it
has to be whole, since that is what a reader types.
"""

from __future__ import annotations

import ast
import re
import shlex

import click
import pytest
import typer

from client.cli import app as site_app
from server.cli import app as server_app
from support.paths import REPOSITORY

COMMANDS = {"synthward": typer.main.get_command(server_app), "synthward-site": typer.main.get_command(site_app)}
TYPED = re.compile(
    r"(`?)(?<![\w./-])(synthward(?:-site)?) +([a-z][a-z-]*)((?: +(?:\"[^\"]*\"|'[^']*'|[^\s`\"'#|;,()]+))*)"
)


def _strings(tree):
    """Every string of a module, whatever is put into it as X."""
    parts = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            yield node, "".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node, node.value


def _texts():
    """(where, text) of every string in the code, and of every page."""
    for folder in ("common", "client", "server"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node, text in _strings(ast.parse(path.read_text())):
                yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", text
    for path in [REPOSITORY / "README.md", REPOSITORY / "Makefile", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            yield f"{path.relative_to(REPOSITORY)}:{number}", line


def _typed():
    for where, text in _texts():
        for mark, program, command, rest in TYPED.findall(text):
            if mark or program != "synthward" or command in COMMANDS[program].commands:  # else the project's own name
                yield where, program, command, rest


def test_there_are_such_commands_to_look_at():
    found = {(program, command) for _, program, command, _ in _typed()}
    assert {("synthward", "run"), ("synthward-site", "verify-ledger"), ("synthward-site", "approve")} <= found


@pytest.mark.parametrize("program", COMMANDS)
def test_every_command_that_is_named_exists_and_one_that_is_written_out_is_whole(program):
    group = COMMANDS[program]
    assert isinstance(group, click.Group)
    for where, named, command, rest in _typed():
        if named != program:
            continue
        assert command in group.commands, f"{where}: no '{program} {command}'"
        if rest.strip():
            _parse(group.commands[command], rest, where)


def _parse(command, words, where):
    if isinstance(command, click.Group):  # `synthward deploy ...`
        name, _, words = words.strip().partition(" ")
        assert name in command.commands, f"{where}: no '{command.name} {name}'"
        if words.strip():
            _parse(command.commands[name], words, where)
        return
    try:
        command.make_context(command.name, shlex.split(words)).close()
    except (click.ClickException, ValueError) as error:
        pytest.fail(f"{where}: '{command.name}{words}' is not taken: {error}")


@pytest.mark.parametrize(("typed", "whole"), [
    ("init FOLDER --host localhost", True), ("init FOLDER", False), ("admit FOLDER a.pub --fingerprint X", True),
    ("admit FOLDER a.pub", False), ("up FOLDER --port 3", False), ("begin FOLDER", False),
])  # fmt: skip
def test_it_can_fail_for_commands_of_a_group_too(typed, whole):
    ((_, program, command, rest),) = [("", *found[1:]) for found in TYPED.findall(f"`synthward deploy {typed}`")]
    if whole:
        _parse(COMMANDS[program].commands[command], rest, "here")
    else:
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            _parse(COMMANDS[program].commands[command], rest, "here")


@pytest.mark.parametrize(
    ("typed", "whole"),
    [('approve SITE.toml --study STUDY.toml --by "Dr. A. Example"', True),
     ("approve SITE.toml STUDY.toml --by NAME", False), ("approve SITE.toml --study STUDY.toml", False),
     ("check --picture FILE.png", False), ("explain site.toml", False),
     ("serve site.toml --sokets x", False), ("verify-ledger site.toml", True)],
)  # fmt: skip
def test_this_test_can_fail(typed, whole):
    """Among them the examples of public bug reports: options of another command, an argument in an option's place."""
    ((_, program, command, rest),) = [("", *found[1:]) for found in TYPED.findall(f"`synthward-site {typed}`")]
    group = COMMANDS[program]
    assert isinstance(group, click.Group)
    if whole:
        _parse(group.commands[command], rest, "here")
    else:
        with pytest.raises(pytest.fail.Exception):
            _parse(group.commands[command], rest, "here")
