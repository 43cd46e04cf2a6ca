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


@pytest.mark.parametrize(
    ("ending", "code"), [("pass", 0), ("raise Stopped(1)", 129), ("raise DataError('no', where='x')", 2)]
)
def test_the_exit_code_is_the_commands_own(ending, code):
    """A pipe whose reader has gone, as a terminal that was closed: Python alone would end with 120."""
    reader, writer = os.pipe()
    os.close(reader)
    program = PROGRAM.format(ending=ending)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=writer, cwd=REPOSITORY,
                               check=False, timeout=120, env=environment)  # fmt: skip
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
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = PROGRAM.format(ending="pass")
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
                               cwd=REPOSITORY, check=False, timeout=120, env=environment)  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "no space left" in ended.stderr


def test_no_message_moves_the_terminal():
    program = PROGRAM.format(ending="raise DataError('\\x1b[2J\\u202efoul', where='x')")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False,
                           timeout=120, env={**os.environ, "PYTHONIOENCODING": "utf-8"})  # fmt: skip
    assert ended.returncode == 2 and "foul" in ended.stderr
    assert "\x1b" not in ended.stderr and "\u202e" not in ended.stderr
