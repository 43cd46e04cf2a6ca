"""One process holds a lock; what else can go wrong is not blamed on another process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from threading import Event, Thread

import pytest

from common.errors import DataError, StorageError
from common.locks import held

BUSY = DataError("somebody has it")


def test_a_lock_is_held_by_one_and_free_again_after_it(tmp_path):
    lock = tmp_path / "a.lock"
    with held(lock, busy=BUSY):
        with pytest.raises(DataError, match="somebody has it"), held(lock, busy=BUSY):
            pass
        with held(tmp_path / "b.lock", busy=BUSY):
            pass
    with held(lock, busy=BUSY):
        pass
    assert lock.stat().st_mode & 0o077 == 0


def test_without_busy_one_waits(tmp_path):
    lock, inside = tmp_path / "a.lock", Event()

    def second():
        with held(lock):
            inside.set()

    with held(lock):
        thread = Thread(target=second)
        thread.start()
        assert not inside.wait(0.2)
    assert inside.wait(10)
    thread.join()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = f"""
        import os, pathlib
        from common.locks import held
        with held(pathlib.Path({str(tmp_path / "a.lock")!r})):
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == -9
    with held(tmp_path / "a.lock", busy=BUSY):
        pass


def test_a_lock_that_cannot_be_made_is_no_other_process(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for lock in (tmp_path / "missing" / "a.lock", tmp_path / "link"):
        with pytest.raises(StorageError, match="cannot be locked"):
            held(lock, busy=BUSY).__enter__()
    assert not (tmp_path / "elsewhere").exists()
