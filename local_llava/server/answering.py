"""Work for an HTTP client: it ends when the client goes.

Knows how ASGI tells that a client went. Knows no API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection before it was answered. Nobody is left to be told."""


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, unless the client goes before: then it is cancelled.

    Args:
        request: Its body must have been read.
        work: What the client waits for.

    Raises:
        ClientGoneError: The client went.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
