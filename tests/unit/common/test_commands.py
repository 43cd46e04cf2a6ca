"""How a command ends where nobody reads what it writes any more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support.paths import REPOSITORY

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
