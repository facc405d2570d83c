"""A refusal on its way out: an error in the form of the API that was asked, before any route saw the request.

Knows the two forms of errors and what ASGI needs to send one. Who is refused is decided by `guard` and `limits`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import anyio
from starlette.types import Receive, Scope, Send

from local_llava.server.errors import Failure

Headers = Sequence[tuple[bytes, bytes]]

_LINGER_S = 2.0
"""For what is still sent of a refused request. A connection that is closed amid it is reset, and then many clients see
that instead of the answer."""


def values(scope: Scope, name: bytes) -> list[bytes]:
    """What a request's headers of one name say; `name` in lower case."""
    return [value for key, value in scope["headers"] if key == name]


def error_json(path: str, failure: Failure) -> str:
    """The error in Ollama's form below /api/, in OpenAI's elsewhere, on one line."""
    return json.dumps(failure.ollama() if path.startswith("/api/") else failure.openai())


async def refuse(scope: Scope, receive: Receive, send: Send, failure: Failure, *, headers: Headers = ()) -> None:
    """Answer a request with an error, and close its connection if its body was not read.

    Args:
        scope: Of ASGI, as the next two.
        receive: Not used up: there may be a body to pass over.
        send: Nothing was sent yet.
        failure: What went wrong.
        headers: More of them.
    """
    body = error_json(scope["path"], failure).encode()
    all_headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in failure.headers.items()),
        *headers,
    ]
    unread = has_body(scope)
    if unread:
        all_headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": failure.status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body, "more_body": unread})
    if unread:
        with anyio.move_on_after(0 if values(scope, b"expect") else _LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def has_body(scope: Scope) -> bool:
    """Whether the headers announce a body."""
    return any(length != b"0" for length in values(scope, b"content-length")) or bool(
        values(scope, b"transfer-encoding")
    )
