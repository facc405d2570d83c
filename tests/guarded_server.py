"""The guard around an app, as a server in a thread; and a client that can send anything."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from local_llava.server import connections, guard
from local_llava.server.settings import ServerSettings


class Running:
    """An app, guarded, as a server of its own."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, address: str = "127.0.0.1") -> None:
        self.socket = socket.create_server((address, 0))
        self.port: int = self.socket.getsockname()[1]
        config = uvicorn.Config(
            guard.guarded(app, settings), http=connections.protocol(settings), ws="none", lifespan="off",
            proxy_headers=False, log_config=None, timeout_graceful_shutdown=1)  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    @property
    def n_connections(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection((address, self.port), timeout=10)

    def ask(
        self, path: str = "/v1/x", method: str = "GET", body: Any = None, address: str = "127.0.0.1", **headers: str
    ) -> Answer:
        """What the server answers; of `headers`, `_` stands for `-`."""
        connection = http.client.HTTPConnection(address, self.port, timeout=10)
        named = {name.replace("_", "-"): value.replace("PORT", str(self.port)) for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, named, encode_chunked=isinstance(body, Iterator))
            return Answer(connection.getresponse())

    def raw(self, request: str) -> tuple[int, str]:
        """The status and all of the answer to some bytes; 0 for none."""
        with self.connect() as connection:
            connection.sendall(request.replace("\n", "\r\n").encode("latin-1"))
            with contextlib.suppress(OSError):  # the server may have closed it
                connection.shutdown(socket.SHUT_WR)
            answer = everything(connection)
        return int(answer[9:12] or 0), answer.decode("latin-1")

    def wait(self, until: Callable[[], bool], seconds: float = 5) -> bool:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            time.sleep(0.01)
        return until()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of an error in OpenAI's form."""
        message = self.json["error"]["message"]
        assert isinstance(message, str) and message.isprintable()
        return message


def everything(connection: socket.socket) -> bytes:
    """What comes until the connection is closed, or reset."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received
