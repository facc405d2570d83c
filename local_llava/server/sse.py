"""Server-sent events, as OpenAI's APIs stream answers.

Knows their form (https://html.spec.whatwg.org/multipage/server-sent-events.html) and what ASGI asks of a response that
takes its time. Knows no API.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from local_llava.server.answering import ClientGoneError, until_gone

DONE = b"data: [DONE]\n\n"
"""What ends the streams of some APIs."""


def json_bytes(value: Any) -> bytes:
    """JSON on one line."""
    # A client's text may hold half of a surrogate pair where nothing has looked at it.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event.

    Args:
        data: Sent as JSON.
        name: Type of the event, for APIs that have several.
    """
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + json_bytes(data) + b"\n\n"


class EventStream(Response):
    """A response that is sent as it comes about.

    Nothing is sent before the first event is there: what fails until then is a response of its own, with its status.
    When the client goes, the events are closed at once, also where they are waited for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        refused: Callable[[Exception], Response],
        broken: Callable[[Exception], bytes],
    ) -> None:
        """
        Args:
            events: At least one.
            refused: The response to an error before the first event.
            broken: The last event after an error.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Its length is not known before its end.
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self._events, self._refused, self._broken = events, refused, broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGoneError, OSError):  # servers say it in either way
            await until_gone(Request(scope, receive), self._deliver(scope, receive, send))

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async with aclosing(self._events) as events:
            while True:
                try:
                    body = await anext(events, None)
                except Exception as e:
                    if not begun:
                        await self._refused(e)(scope, receive, send)
                        return
                    await send({"type": "http.response.body", "body": self._broken(e), "more_body": True})
                    break
                if body is None:
                    break
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
