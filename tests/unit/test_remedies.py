"""Every command that a message, a help text or a page of the docs tells a reader to type is one that there is."""

from __future__ import annotations

import ast
import re

import click
import pytest
import typer

from client.cli import app as site_app
from server.cli import app as server_app
from support.paths import REPOSITORY

COMMANDS = {"synthward": typer.main.get_command(server_app), "synthward-site": typer.main.get_command(site_app)}
TYPED = re.compile(r"(`?)(?<![\w./-])(synthward(?:-site)?) +([a-z][a-z-]*)((?: +[^\s`\"'#|;,()]+)*)")


def _texts():
    """(where, text) of every string in the code, and of every page."""
    for folder in ("common", "client", "server"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node.value
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
def test_every_command_and_option_that_is_named_exists(program):
    group = COMMANDS[program]
    assert isinstance(group, click.Group)
    for where, named, command, rest in _typed():
        if named != program:
            continue
        assert command in group.commands, f"{where}: no '{program} {command}'"
        known = {option for parameter in group.commands[command].params for option in (*parameter.opts, "--help")}
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest):
            assert option in known, f"{where}: '{program} {command}' has no {option}"
