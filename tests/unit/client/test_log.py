"""The site's own log, and what becomes of its words where it cannot be written."""

from __future__ import annotations

import os

import pytest

from client.log import NAME, write_error, write_note
from common.errors import DataError


def _full_disk(state):
    """Also no plain file; a disk of a few MB needs root (tests/e2e/test_stops.py)."""
    (state / NAME).symlink_to("/dev/full")


@pytest.mark.parametrize("spoil", [_full_disk, lambda state: os.mkfifo(state / NAME), lambda state: state.rmdir()])
def test_what_a_log_cannot_take_is_said_to_whoever_serves(tmp_path, capsys, spoil):
    state = tmp_path / "state"
    state.mkdir()
    spoil(state)
    write_error(state, DataError("no such file\n\x1b[2Jwarning: forged", where="images.npz"))
    line = capsys.readouterr().err
    assert line.startswith("warning: ") and line.count("\n") == 1 and "\x1b" not in line
    assert str(state / NAME) in line
    assert "It would say: DataError: images.npz: no such file" in line
    write_error(state, DataError("no such file\n\x1b[2Jwarning: forged", where="images.npz"))
    assert capsys.readouterr().err == "", "said again: where standard error goes the disk may be as full"


def test_what_is_written_is_not_said_twice(tmp_path, capsys):
    write_note(tmp_path, "something to look at")
    assert "Note: something to look at" in (tmp_path / NAME).read_text()
    assert capsys.readouterr().err == ""
