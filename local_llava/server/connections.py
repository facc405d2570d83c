"""What a connection may leave undone: headers that come in drops, answers that nobody reads, connections without end.

ASGI sees a request when its headers are there, and an answer only until it is written to a buffer; this is below it, in
the protocol that uvicorn speaks. Knows uvicorn's HTTP/1.1 (its h11 one: the other one's parts are not to be had), of
which it uses what `asyncio.Protocol` has, and whether a request is being answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from asyncio.trsock import TransportSocket
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from local_llava.server.settings import ServerSettings

MAX_CONNECTIONS = 512
"""Open at the same time; beyond that, new ones are closed at once. Many systems give a process 1024 files."""

MIN_BYTES = 16 << 10
"""That a client must take in `read_timeout_s` seconds while it is behind."""

SEND_BUFFER = 64 << 10
"""Bytes that the system holds of an answer for a client that does not take it. Left alone, it takes megabytes, and says
only when a third of them is gone that more can be written."""

_RESET = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)
"""struct linger: wait, for no time."""


def protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """For uvicorn's `Config(http=...)`."""

    class Limited(LimitedProtocol):
        seconds = settings.read_timeout_s

    return Limited


class LimitedProtocol(H11Protocol):
    """HTTP/1.1 for clients in their stride: others are dropped, and what was going on for them ends."""

    seconds: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer, self._write_timer = _Timer(self.loop, self.seconds), _Timer(self.loop, self.seconds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._drop()
            return
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # Paused as soon as something waits here, not only a large buffer: so that also the end of an answer is watched.
        transport.set_write_buffer_limits(high=0)
        self._head_timer.start(self._drop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.stop()
        self._write_timer.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_between_requests() and not self._head_timer.runs:
            self._head_timer.start(self._drop)
        super().data_received(data)
        if not self._is_between_requests():
            self._head_timer.stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timer.stop()

    @property
    def _socket(self) -> TransportSocket:
        found: TransportSocket = self.transport.get_extra_info("socket")
        return found

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_reader(self) -> None:
        self._write_timer.start(self._check_reader, self._unwritten())

    def _check_reader(self, before: int) -> None:
        if before - self._unwritten() < MIN_BYTES:
            self._drop()
        else:
            self._await_reader()

    def _drop(self) -> None:
        """End the connection with a reset, so that the system does not keep what was written, either."""
        with contextlib.suppress(OSError):  # some systems know by now that the client went
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _unwritten(self) -> int:
        return self.transport.get_write_buffer_size()


class _Timer:
    """Calls something when some time is over, unless it was stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop, self._seconds = loop, seconds
        self._handle: asyncio.TimerHandle | None = None

    @property
    def runs(self) -> bool:
        return self._handle is not None

    def start(self, call: Callable[..., None], *arguments: object) -> None:
        self.stop()
        self._handle = self._loop.call_later(self._seconds, call, *arguments)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
