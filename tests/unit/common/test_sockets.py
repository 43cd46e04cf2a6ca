"""The socket of a site: every path reaches it, and none is taken from a process that lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from common.errors import StorageError
from common.sockets import LONGEST, address_of, taken


@pytest.fixture
def short():
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "name", ["plain", "a b", "a#b", "a?b=c", "a%20b", "%", "ü", "a;b", "a:b", "a\udce9b", "~", "a&b"]
)
def test_whatever_the_path_is_a_caller_reaches_who_listens(short, name):
    path = short / name / "site.sock"
    path.parent.mkdir()
    server = grpc.server(ThreadPoolExecutor(1))
    echo = grpc.unary_unary_rpc_method_handler(lambda data, _: data + b"!")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"C": echo}),))
    server.add_insecure_port(address_of(path))
    server.start()
    try:
        assert path.is_socket()
        with grpc.insecure_channel(address_of(path)) as channel:
            assert channel.unary_unary("/a.B/C")(b"x", timeout=20) == b"x!"
        with pytest.raises(StorageError, match="another process answers there"), taken(path):
            pass
    finally:
        server.stop(None).wait()


def test_the_socket_of_a_dead_process_is_free_and_no_other_file_is(short):
    path = short / "site.sock"
    with taken(path):
        pass
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with taken(path):
        pass
    path.unlink()
    path.write_text("a file")
    with pytest.raises(StorageError, match="is no socket"), taken(path):
        pass
    assert path.read_text() == "a file"


def test_of_two_that_begin_at_the_same_moment_one_has_it(short):
    path = short / "new" / "site.sock"
    with taken(path):
        with pytest.raises(StorageError, match="another process answers there"), taken(path):
            pass
        with taken(path.with_name("other.sock")):
            pass
    with taken(path):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(short):
    (short / ".site.sock.lock").symlink_to(short / "elsewhere")
    with pytest.raises(StorageError, match="cannot listen there"), taken(short / "site.sock"):
        pass
    assert not (short / "elsewhere").exists()


def test_a_folder_that_cannot_be_written_is_named(short):
    (short / "file").touch()
    with pytest.raises(StorageError, match="cannot listen there"), taken(short / "file" / "site.sock"):
        pass


def test_a_path_is_as_long_as_a_socket_allows(short):
    room = LONGEST - len(os.fsencode(short)) - 1
    with taken(short / ("x" * room)):
        pass
    for name in ("x" * (room + 1), "ü" * (room // 2 + 1)):
        with pytest.raises(StorageError, match="bytes, 107 at most"), taken(short / name):
            pass


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o177])
def test_the_folders_that_are_made_let_the_group_pass_and_nobody_else(short, umask):
    before = os.umask(umask)
    try:
        with taken(short / "a" / "b" / "site.sock"):
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (short / "a", short / "a" / "b")]
    finally:
        os.umask(before)
    assert modes == [0o750, 0o750]


def test_a_listener_with_a_full_backlog_is_busy_and_not_gone(short):
    """Before: connecting to it gave EAGAIN, which was taken for nobody."""
    path = short / "site.sock"
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as callers:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(3):
            caller = callers.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.connect(str(path))
        with pytest.raises(StorageError, match="another process answers there"), taken(path):
            pass


def test_a_disk_without_locks_is_not_called_another_process(short, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(StorageError, match=r"cannot listen there \(cannot be locked \(No locks available"):
        taken(short / "site.sock").__enter__()
