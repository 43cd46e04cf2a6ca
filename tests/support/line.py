"""A line between two machines that is slow, far or cut: a TCP proxy on loopback, in a thread of its own.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field

_PIECE, _UNDER_WAY = 16_384, 8  # bytes read at once, and pieces that a line holds before it takes no more
_LOOK_SECONDS = 0.1


@dataclass
class _Way:
    """One direction, of all connections together: when it is free again, and what went through."""

    free: float = 0.0
    carried: int = 0


@dataclass
class Line:
    """Listens on `port` of loopback and carries to `target`.

    Attributes:
        delay: seconds that each piece is under way, in each direction.
        rate: bytes a second in each direction; 0 for no bound.
        carried: bytes there and back so far.
    """

    target: int
    delay: float = 0.0
    rate: float = 0.0
    port: int = 0
    _ways: tuple[_Way, _Way] = field(default_factory=lambda: (_Way(), _Way()))
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _silent: bool = False
    _server: asyncio.Server | None = None

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.mend()

    @property
    def carried(self) -> tuple[int, int]:
        return self._ways[0].carried, self._ways[1].carried

    def cut(self) -> None:
        """Drop all connections, and refuse new ones: a firewall or a proxy that is down."""
        self._do(self._cut())

    def swallow(self) -> None:
        """Let nothing through and say nothing of it: a pulled cable."""
        self._silent = True

    def mend(self) -> None:
        """As it was; what was dropped or swallowed is gone."""
        self._do(self._mend())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, what: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(20)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._drop()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _mend(self) -> None:
        if self._silent:  # half of what was said is missing: no such connection can go on
            self._drop()
            self._silent = False
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(
                self._carry(reader, far_writer, self._ways[0]), self._carry(far_reader, writer, self._ways[1])
            )
        for each in (writer, far_writer):
            self._writers.discard(each)
            each.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Way) -> None:
        """One direction of one connection, to its end."""
        under_way = asyncio.Queue[tuple[float, bytes]](_UNDER_WAY)
        arriving = asyncio.create_task(self._arrive(under_way, writer))
        try:
            while piece := await reader.read(_PIECE):
                now = self._loop.time()
                way.free = max(now, way.free) + (len(piece) / self.rate if self.rate else 0.0)
                way.carried += len(piece)
                await under_way.put((way.free + self.delay, piece))
            await under_way.put((self._loop.time() + self.delay, b""))
            await arriving
        except OSError:
            arriving.cancel()

    async def _arrive(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                due, piece = await under_way.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                while self._silent:
                    await asyncio.sleep(_LOOK_SECONDS)
                if not piece:
                    writer.write_eof() if writer.can_write_eof() else writer.close()
                    return
                writer.write(piece)
                await writer.drain()
