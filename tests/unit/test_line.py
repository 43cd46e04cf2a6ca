"""The test's own line: what it says of delay, rate and cuts is so, else the tests that use it show nothing."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from support.line import Line


@pytest.fixture
def echo():
    """Port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(65536):
                    connection.sendall(piece)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def _there_and_back(connection: socket.socket, size: int) -> float:
    began, left = time.monotonic(), size
    threading.Thread(target=connection.sendall, args=(b"x" * size,), daemon=True).start()
    while left:
        piece = connection.recv(65536)
        assert piece
        left -= len(piece)
    return time.monotonic() - began


def test_delay_and_rate_are_kept(echo):
    line = Line(echo, delay=0.2, rate=100e3)
    try:
        with socket.create_connection(("127.0.0.1", line.port), timeout=10) as connection:
            assert 0.4 <= _there_and_back(connection, 10) < 1.5
            assert 1.3 <= _there_and_back(connection, 100_000) < 4.0
        assert line.carried == (100_010, 100_010)
    finally:
        line.close()


def test_a_cut_line_drops_and_refuses_and_a_mended_one_carries_again(echo):
    line = Line(echo)
    try:
        connection = socket.create_connection(("127.0.0.1", line.port), timeout=10)
        _there_and_back(connection, 10)
        line.cut()
        try:
            connection.sendall(b"x")
            got = connection.recv(1)
        except OSError:
            got = b""
        assert got == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", line.port), timeout=10)
        line.mend()
        with socket.create_connection(("127.0.0.1", line.port), timeout=10) as again:
            _there_and_back(again, 10)
    finally:
        line.close()


def test_a_line_that_swallows_says_nothing(echo):
    line = Line(echo)
    try:
        with socket.create_connection(("127.0.0.1", line.port), timeout=10) as connection:
            _there_and_back(connection, 10)
            line.swallow()
            connection.sendall(b"x")
            connection.settimeout(1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
    finally:
        line.close()
