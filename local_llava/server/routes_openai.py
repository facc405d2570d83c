"""OpenAI's HTTP APIs: /v1/chat/completions, /v1/completions, /v1/responses and /v1/models.

Knows HTTP. What the JSON means is read by `openai_wire`, `completions_wire` and `responses_wire`, and written by
`openai_replies`, `completions_wire` and `responses_replies`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import APIRouter, Request
from starlette.responses import Response

from local_llava.errors import LocalLlavaError
from local_llava.server import completions_wire, openai_replies, openai_wire, responses_replies, responses_wire
from local_llava.server.answering import until_gone
from local_llava.server.backend import Backend
from local_llava.server.defaults import Defaults
from local_llava.server.errors import reported
from local_llava.server.image_refs import ImagePolicy
from local_llava.server.json_body import read_json
from local_llava.server.openai_errors import ErrorBody, located
from local_llava.server.openai_replies import Stamp
from local_llava.server.openai_request import ChatRequest, CompletionRequest, Sampling
from local_llava.server.openai_wire import Asked, spread
from local_llava.server.openapi import request_body
from local_llava.server.responses_request import ResponsesRequest
from local_llava.server.settings import ServerSettings
from local_llava.server.side_by_side import replies, side_by_side
from local_llava.server.sse import DONE, EventStream, event, json_bytes
from local_llava.server.validation import parsed
from local_llava.types import Chunk, Reply

_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request, or too many at a time."},
    "5XX": {"model": ErrorBody, "description": "What is wrong with the server."},
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "All of it; or a stream of events.", "content": {"text/event-stream": {}}}
}


class _Pieces(Protocol):
    """What makes the events of a stream."""

    def push(self, choice: int, chunk: Chunk) -> list[dict[str, Any]]: ...

    def end(self) -> list[dict[str, Any]]: ...


def refusal(error: Exception) -> Response:
    """The response to an error."""
    failed = reported(error)
    return Response(json_bytes(failed.openai()), failed.status, failed.headers, "application/json")


def router(backend: Backend, settings: ServerSettings, images: ImagePolicy) -> APIRouter:
    """The routes below /v1."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"], responses=_REFUSALS)

    async def stamped(kind: str, model: str | None) -> Stamp:
        name = (await asyncio.to_thread(backend.info, model)).name  # it may read files
        return Stamp(f"{kind}{secrets.token_hex(12)}", int(time.time()), name)

    async def begin(request: Request, stamp: Stamp, asked: Asked) -> list[AsyncGenerator[Chunk, None]]:
        """All answers, none of which is begun."""
        jobs = [await until_gone(request, images.resolve(job)) for job in asked.jobs]
        return [backend.stream(stamp.model, one) for job in jobs for one in spread(job, asked.n)]

    async def all_of(request: Request, stamp: Stamp, asked: Asked) -> list[Reply]:
        answers = await begin(request, stamp, asked)
        try:
            return await until_gone(request, replies(answers))
        except LocalLlavaError as e:
            raise located(e, asked.schema_field) from e

    @api.post(
        "/chat/completions",
        summary="Continue a conversation",
        response_model=None,
        responses=_STREAMED,
        openapi_extra=request_body(ChatRequest, "OpenAI"),
    )
    async def chat_completions(request: Request) -> Response:
        body = parsed(ChatRequest, await read_json(request))
        stamp = await stamped("chatcmpl-", body.model)
        asked = openai_wire.chat(body, Defaults.of(settings))
        if not body.stream:
            return _json(openai_replies.completion(stamp, asked, await all_of(request, stamp, asked)))
        pieces = openai_replies.ChatStream(stamp, asked, _with_usage(body))
        return _stream(await begin(request, stamp, asked), pieces, asked)

    @api.post(
        "/completions",
        summary="Continue a text",
        response_model=None,
        responses=_STREAMED,
        openapi_extra=request_body(CompletionRequest, "OpenAI"),
    )
    async def completions(request: Request) -> Response:
        body = parsed(CompletionRequest, await read_json(request))
        stamp = await stamped("cmpl-", body.model)
        asked = completions_wire.completions(body, Defaults.of(settings))
        if not body.stream:
            return _json(completions_wire.completion(stamp, asked, await all_of(request, stamp, asked)))
        pieces = completions_wire.CompletionStream(stamp, asked, _with_usage(body))
        return _stream(await begin(request, stamp, asked), pieces, asked)

    @api.post(
        "/responses",
        summary="Continue a conversation, in the newer form",
        response_model=None,
        responses=_STREAMED,
        openapi_extra=request_body(ResponsesRequest, "OpenAI"),
    )
    async def responses(request: Request) -> Response:
        body = parsed(ResponsesRequest, await read_json(request))
        stamp = await stamped("resp_", body.model)
        asked = responses_wire.responses(body, Defaults.of(settings))
        if not body.stream:
            (reply,) = await all_of(request, stamp, asked)
            return _json(responses_replies.response(stamp, asked, body, reply))
        pieces = responses_replies.ResponseStream(stamp, asked, body)
        return _stream(await begin(request, stamp, asked), pieces, asked)

    @api.get("/models", summary="All models", response_model=None)
    async def models() -> Response:
        return _json(openai_replies.models(await asyncio.to_thread(backend.models)))

    @api.get("/models/{name:path}", summary="One model", response_model=None)
    async def model(name: str) -> Response:
        return _json(openai_replies.model(await asyncio.to_thread(backend.info, name)))

    return api


def _json(value: Mapping[str, Any]) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def _with_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage is True


def _stream(answers: Sequence[AsyncGenerator[Chunk, None]], pieces: _Pieces, asked: Asked) -> Response:
    """The response in pieces."""

    def broken(error: Exception) -> bytes:
        failed = reported(located(error, asked.schema_field))
        if isinstance(pieces, responses_replies.ResponseStream):
            return _event(pieces.broken(failed.message, failed.code, failed.param))
        return event(failed.openai())

    return EventStream(_events(answers, pieces), lambda e: refusal(located(e, asked.schema_field)), broken)


async def _events(answers: Sequence[AsyncGenerator[Chunk, None]], pieces: _Pieces) -> AsyncGenerator[bytes, None]:
    async with aclosing(side_by_side(answers)) as chunks:
        async for choice, chunk in chunks:
            for piece in pieces.push(choice, chunk):
                yield _event(piece)
    for piece in pieces.end():
        yield _event(piece)
    if not isinstance(pieces, responses_replies.ResponseStream):
        yield DONE


def _event(piece: dict[str, Any]) -> bytes:
    """Events of the Responses API have names, which their data say, too."""
    return event(piece, piece.get("type"))
