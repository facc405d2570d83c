"""How much a request may take: bytes, time, and places beside the others that are answered.

Knows ASGI and the form of errors. What a connection may leave undone below ASGI (headers that come in drops, answers
that nobody reads) is limited by `connections`.
"""

from __future__ import annotations

import logging
from collections import deque

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_llava.errors import BusyError
from local_llava.server.errors import Failure, RequestError, failure
from local_llava.server.refusals import error_json, has_body, refuse, values

log = logging.getLogger("local_llava")

_ASKING = ("/v1/", "/api/")
"""Below these, a POST asks a model. All else is answered however much is going on."""

HELD_BODIES = 4
"""How many bodies of the greatest length may be in memory together; pictures are by far the most of them."""


class InFlight:
    """A limit to the requests that are answered or wait."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._n = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith(_ASKING):
            await self._app(scope, receive, send)
        elif self._n >= self._most:
            busy = BusyError(f"{self._n} requests are answered or wait already; try again later")
            await refuse(scope, receive, send, failure(busy))
        else:
            self._n += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._n -= 1


class TimeLimit:
    """A limit to the time of a whole answer. What works on it is cancelled then, and the client is told so."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        kind: bytes | None = None
        complete = False

        async def noted(message: Message) -> None:
            nonlocal kind, complete
            await send(message)
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)

        with anyio.move_on_after(self._seconds) as limit:
            await self._app(scope, receive, noted)
        if not limit.cancelled_caught or complete:
            return
        late = failure(TimeoutError(f"the answer took longer than {self._seconds:g} seconds"))
        log.warning("%s %s: %s", scope["method"], scope["path"], late.message)
        if kind is None:
            await refuse(scope, receive, send, late)
        else:
            await _end_stream(scope, send, kind, late)


async def _end_stream(scope: Scope, send: Send, kind: bytes, late: Failure) -> None:
    """Say in a stream that has begun why it ends here.

    Raises:
        TimeoutError: It is no stream of events or lines: the connection is broken off, so that nobody takes what came
            for all.
    """
    line = error_json(scope["path"], late)
    if kind.startswith(b"text/event-stream"):
        line = f"data: {line}\n\n"
    elif kind.startswith(b"application/x-ndjson"):
        line = f"{line}\n"
    else:
        raise TimeoutError(late.message)
    await send({"type": "http.response.body", "body": line.encode(), "more_body": False})


class WholeBodies:
    """Passes a request on when all of its body is there. Limits its length, its time, and what is held of all.

    The routes need it whole anyhow; so the limits are in one place, and what is refused costs no more than its bytes.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        """
        Args:
            app: What is behind.
            most: Bytes of a body.
            seconds: For all of it to arrive.
        """
        self._app, self._most, self._seconds = app, most, seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_body(scope):
            await self._app(scope, receive, send)
            return
        body = _Body()
        try:
            refusal = await self._read(scope, receive, body)
            if refusal is not None:
                body.pieces.clear()
                await refuse(scope, receive, send, failure(refusal))
            elif body.complete:
                await self._app(scope, body.replayed(receive), send)
        finally:
            self._held -= body.size

    async def _read(self, scope: Scope, receive: Receive, body: _Body) -> Exception | None:
        """Read a body; if it may not go on, why. It is not complete if the client went."""
        too_large = RequestError(f"the request is larger than {self._most} bytes", status=413)
        too_many = BusyError("other large requests fill the room for them; try again later")
        length = values(scope, b"content-length")
        if length and int(length[0]) > self._most:
            return too_large
        with anyio.move_on_after(self._seconds):
            while not body.complete:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                piece = message.get("body", b"")
                body.pieces.append(piece)
                body.size += len(piece)
                self._held += len(piece)
                if body.size > self._most:
                    return too_large
                if self._held > HELD_BODIES * self._most:
                    return too_many
                body.complete = not message.get("more_body", False)
            return None
        return RequestError(f"the request took longer than {self._seconds:g} seconds to arrive", status=408)


class _Body:
    """What came of a body."""

    def __init__(self) -> None:
        self.pieces: deque[bytes] = deque()
        self.size = 0
        self.complete = False

    def replayed(self, receive: Receive) -> Receive:
        """Gives what came, and then what comes: that the client went."""

        async def replay() -> Message:
            if self.pieces:
                piece = self.pieces.popleft()
                return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}
            return await receive()

        return replay
