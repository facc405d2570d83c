"""The server as a process: a socket, uvicorn, the models, and signals that end it in good order.

Knows what is inside only as an ASGI app and a `ModelManager`. Prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from local_llava.errors import LocalLlavaError, UsageError
from local_llava.server import app, connections, guard
from local_llava.server.metrics import Counted, Metrics
from local_llava.server.model_manager import ModelManager
from local_llava.server.settings import ServerSettings

log = logging.getLogger("local_llava")

_BACKLOG = 256
_KEEP_ALIVE_S = 30
"""That a connection without a request is kept open for the client's next one."""
_LAST_BYTES_S = 3
"""For connections to take the end of their answers, when all are given."""


def serve(settings: ServerSettings, on_listening: Callable[[str], None]) -> None:
    """Serve until the process is told to end, by SIGTERM or SIGINT: then answers under way are finished, and new ones
    refused. A second signal ends it at once.

    Args:
        settings: Checked here before anything is loaded.
        on_listening: Called with the URL when the server can be asked.

    Raises:
        UsageError: The address cannot be listened on, or may not be.
        LocalLlavaError: The default model cannot be used.
    """
    with contextlib.closing(bound(settings)) as listener:
        asyncio.run(_serve(settings, listener, on_listening))


class _Signals:
    """What the process was told."""

    def __init__(self) -> None:
        self.end, self.at_once = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @contextlib.contextmanager
    def listened_to(self) -> Iterator[None]:
        """While this is open, signals are heard instead of ending the process."""
        names = (name for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
        numbers = [getattr(signal, name) for name in names]
        before = {number: signal.signal(number, self._heard) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        if self.end.is_set():
            self.at_once.set()
        self.end.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn, without its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(settings: ServerSettings, listener: socket.socket, on_listening: Callable[[str], None]) -> None:
    signals, metrics = _Signals(), Metrics()
    with signals.listened_to():
        manager = ModelManager(settings)
        inside = app.create(manager, settings, metrics=metrics, stopping=signals.end.is_set)
        server = _Uvicorn(_config(Counted(guard.guarded(inside, settings), metrics), settings))
        serving = asyncio.ensure_future(_listening(server, manager, listener, settings, on_listening))
        try:
            if await _unless(signals.end, asyncio.shield(serving)):
                return
            log.info("stopping: answers under way are finished; a second signal ends them")
            await _unless(signals.at_once, manager.stop(settings.request_timeout_s))
            await manager.stop(0)
            server.should_exit = True
            await asyncio.wait((serving,), timeout=_LAST_BYTES_S + 1)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await manager.stop(0)


async def _listening(
    server: uvicorn.Server,
    manager: ModelManager,
    listener: socket.socket,
    settings: ServerSettings,
    on_listening: Callable[[str], None],
) -> None:
    """Answer requests until the server is told to exit, or this is cancelled."""
    await manager.start()
    listen(listener, settings)
    on_listening(url(listener))
    loading = asyncio.ensure_future(_load(manager, settings))
    try:
        await server.serve([listener])
    finally:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


async def _load(manager: ModelManager, settings: ServerSettings) -> None:
    """Have the default model in memory before somebody waits for it."""
    if settings.keep_alive_s == 0:
        return
    try:
        await manager.load(None)
    except LocalLlavaError as e:
        log.warning("the default model could not be loaded: %s", " ".join(str(e).split()))


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> bool:
    """Whether something was done before an event ended the wait for it; if not, it is cancelled.

    Raises:
        Exception: What it raised.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def _config(served: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        served,
        http=connections.protocol(settings),
        ws="none",
        lifespan="on",
        # The log is configured by whoever runs this.
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_BYTES_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


def bound(settings: ServerSettings) -> socket.socket:
    """The address of the settings, taken; connections are refused until `listen`.

    Raises:
        UsageError: It cannot be had, or may not be.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not a name"
        raise UsageError(
            f"--host {settings.host!r:.80}: {reason}; accepted is an address or name of this computer"
        ) from e
    open_to_all = settings.api_key is None and not settings.allow_network
    # A name such as localhost may stand for several addresses; the first is meant, and all are what it promises.
    if open_to_all and not all(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found
    ):
        raise UsageError(
            f"--host {settings.host} is open to other computers: set a key with --api-key or LOCAL_LLAVA_API_KEY, "
            "or let anyone in with --allow-network"
        )
    found.sort(key=lambda one: one[0] != socket.AF_INET)  # which clients try first that know localhost as 127.0.0.1
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # there, it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(settings.host != "::"))
        listener.bind(address)
    except OSError as e:
        listener.close()
        raise _not_to_be_had(settings, e) from e
    return listener


def listen(listener: socket.socket, settings: ServerSettings) -> None:
    """Let connections come.

    Raises:
        UsageError: Another server began to, after both had taken the address.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as e:
        raise _not_to_be_had(settings, e) from e


def _not_to_be_had(settings: ServerSettings, error: OSError) -> UsageError:
    where = f"port {settings.port} of {settings.host}"
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"{where} is in use by another program; choose another with --port, or 0 for any that is free"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"--host {settings.host} is no address of this computer")
    return UsageError(f"{where} cannot be listened on: {error.strerror}; choose another with --port")


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
