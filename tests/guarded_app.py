"""A small app behind the guard, whose answers stream, hang and never end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import guarded_server
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from local_llava.server.settings import ServerSettings


class App:
    """Answers by path; what became of its answers is in `ended`."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        path = scope["path"].rsplit("/", 1)[1]
        try:
            if path in STREAMS:
                kind, pieces = STREAMS[path]
                await StreamingResponse(pieces(), media_type=kind)(scope, receive, send)
            elif path == "never":
                await asyncio.sleep(60)
            elif path == "until-gone":
                while (await receive())["type"] != "http.disconnect":
                    pass
            else:
                size, more = 0, True
                while more:
                    message = await receive()
                    size, more = size + len(message.get("body", b"")), message.get("more_body", False)
                await JSONResponse({"path": scope["path"], "size": size})(scope, receive, send)
        except BaseException as e:
            self.ended.append(f"{path}: {type(e).__name__}")
            raise
        self.ended.append(path)


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x" * (256 << 10)
        await asyncio.sleep(0)


async def big() -> AsyncIterator[bytes]:
    yield b"x" * (10 << 20)


async def halting() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"
    await asyncio.sleep(60)


STREAMS = {"endless": ("text/plain", endless), "big": ("text/plain", big), "events": ("text/event-stream", halting),
           "lines": ("application/x-ndjson", halting)}  # fmt: skip


class Running(guarded_server.Running):
    """The app above, guarded."""

    def __init__(self, settings: ServerSettings, address: str) -> None:
        self.app = App()
        super().__init__(self.app, settings, address)


@contextmanager
def running(address: str = "127.0.0.1", **values: Any) -> Iterator[Running]:
    made = Running(ServerSettings(**values), address)
    try:
        yield made
    finally:
        made.stop()
