"""How a command ends where nobody reads what it writes any more."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from support.paths import REPOSITORY

CLOSED = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}
PROGRAM = """
import sys
from common.commands import Stopped, run
from common.errors import DataError
def app(**_):
    print("written, but not out yet")
    {ending}
run(app, program="p", interrupted="interrupted")
"""


def _ended(ending, *, stdout, stderr, **environment):
    """The program, with output that is buffered as at a user's, whatever is set here."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    words = [sys.executable, "-c", PROGRAM.format(ending=ending)]
    return subprocess.run(words, stdout=stdout, stderr=stderr, text=True,
                          cwd=REPOSITORY, check=False, timeout=120, env=environment)  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "code"), [("pass", 0), ("raise Stopped(1)", 129), ("raise DataError('no', where='x')", 2)]
)
def test_the_exit_code_is_the_commands_own(ending, code):
    """A pipe whose reader has gone, as a terminal that was closed: Python alone would end with 120."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = _ended(ending, stdout=writer, stderr=writer)
    finally:
        os.close(writer)
    assert ended.returncode == code


@pytest.mark.parametrize("closed", CLOSED.values(), ids=CLOSED)
def test_a_stream_that_was_never_open_changes_nothing(closed):
    words = f"exec {shlex.quote(sys.executable)} -m server.cli verify nothing-here {closed}"
    ended = subprocess.run(
        ["sh", "-c", words], capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=120
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_an_output_that_a_full_disk_has_cut_off_is_no_success():
    with open("/dev/full", "w") as full:
        ended = _ended("pass", stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "no space left" in ended.stderr


def test_no_message_moves_the_terminal():
    foul = "raise DataError('\\x1b[2J\\u202efoul', where='x')"
    ended = _ended(foul, stdout=subprocess.PIPE, stderr=subprocess.PIPE, PYTHONIOENCODING="utf-8")
    assert ended.returncode == 2 and "foul" in ended.stderr
    assert "\x1b" not in ended.stderr and "\u202e" not in ended.stderr
