"""Ollama's HTTP API: /api/generate, /api/chat, and what is on this computer.

Knows HTTP. What the JSON means is `ollama_wire`'s and `ollama_replies`'.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from local_llava import __version__
from local_llava.errors import UsageError
from local_llava.server import ollama_replies, ollama_wire, openapi
from local_llava.server.answering import until_gone
from local_llava.server.backend import Backend
from local_llava.server.defaults import Defaults
from local_llava.server.errors import Failure, RequestError, reported
from local_llava.server.image_refs import ImagePolicy
from local_llava.server.json_body import read_json
from local_llava.server.ollama_wire import ChatRequest, GenerateRequest, Hearing, ModelRequest
from local_llava.server.settings import ServerSettings
from local_llava.server.side_by_side import replies
from local_llava.server.sse import EventStream, json_bytes
from local_llava.server.validation import parsed
from local_llava.types import Chunk, Reply

log = logging.getLogger("local_llava")

_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ollama_replies.Error, "description": "What is wrong with the request, or too many at a time."},
    "5XX": {"model": ollama_replies.Error, "description": "What is wrong with the server."},
}
_NOT_HERE = {
    ("POST", "/pull"): "`local-llava pull NAME` downloads models",
    ("POST", "/push"): "models are not sent anywhere",
    ("POST", "/create"): "`local-llava convert` makes models",
    ("POST", "/copy"): "models have one name here",
    ("DELETE", "/delete"): "`local-llava rm NAME` removes models",
    ("POST", "/embed"): "LLaVA models give no embeddings of texts",
    ("POST", "/embeddings"): "LLaVA models give no embeddings of texts",
    ("HEAD", "/blobs/{digest}"): "`local-llava convert` makes models",
    ("POST", "/blobs/{digest}"): "`local-llava convert` makes models",
}
"""What else Ollama's API has, and what there is instead."""


@dataclass
class _Answer:
    """One answer on its way, as its lines name it."""

    chat: bool
    model: str
    """As the client named it."""
    started: float
    """By the clock of `time.perf_counter`."""
    hearing: Hearing

    def line(self, text: str = "", **values: Any) -> bytes:
        """A line of the stream, or the only one."""
        return _as_json(ollama_replies.line(self.chat, self.model, time.time(), text, **values))

    async def lines(self, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[bytes, None]:
        """All lines of the stream."""
        async with aclosing(chunks):
            async for chunk in chunks:
                said = self.hearing.push(chunk.text)
                if said or chunk.logprobs:
                    yield self.line(said, logprobs=chunk.logprobs or None)
                if chunk.reply is not None:
                    if calls := self.hearing.calls():
                        yield self.line(calls=calls)
                    yield self.line(reply=chunk.reply, total_s=time.perf_counter() - self.started)

    def whole(self, reply: Reply) -> bytes:
        """The only line, where the client did not ask for a stream."""
        said = self.hearing.push(reply.text)
        calls = self.hearing.calls()
        took = time.perf_counter() - self.started
        return self.line(said, calls=calls, logprobs=reply.logprobs, reply=reply, total_s=took)


class _Lines(EventStream):
    media_type = "application/x-ndjson"


def router(backend: Backend, settings: ServerSettings, images: ImagePolicy) -> APIRouter:
    """The routes below /api."""
    api = APIRouter(prefix="/api", tags=["Ollama"], responses=_REFUSALS)
    warned: set[str] = set()

    def defaults(body: GenerateRequest | ChatRequest) -> Defaults:
        for name in ollama_wire.ignored(body):
            if name not in warned:
                warned.add(name)
                log.warning("Ollama's option %s is not supported, and ignored", name)
        return Defaults.of(settings)

    async def respond(request: Request, body: GenerateRequest | ChatRequest) -> Response:
        started = time.perf_counter()
        model = (await asyncio.to_thread(backend.info, body.model)).name
        chat, named = isinstance(body, ChatRequest), body.model or model
        if not (body.messages if isinstance(body, ChatRequest) else body.prompt):
            await until_gone(request, backend.load(model, keep_alive_s=body.keep_alive))
            reason = "unload" if body.keep_alive == 0 else "load"
            return _response(ollama_replies.line(chat, named, time.time(), reason=reason))
        if isinstance(body, ChatRequest):
            job, hearing = ollama_wire.chat_job(body, defaults(body))
        else:
            job, hearing = ollama_wire.generate_job(body, defaults(body))
        job = await until_gone(request, images.resolve(job))
        answer = _Answer(chat, named, started, hearing)
        chunks = backend.stream(model, job, keep_alive_s=body.keep_alive)
        if body.stream is False:
            (reply,) = await until_gone(request, replies([chunks]))
            return Response(answer.whole(reply), media_type="application/json")
        return _Lines(answer.lines(chunks), refusal, _broken)

    @api.post(
        "/generate",
        summary="Ask a question",
        response_model=None,
        responses=_lines_of(ollama_replies.GenerateLine),
        openapi_extra=openapi.request_body(GenerateRequest, "Ollama"),
    )
    async def generate(request: Request) -> Response:
        return await respond(request, parsed(GenerateRequest, await read_json(request)))

    @api.post(
        "/chat",
        summary="Continue a conversation",
        response_model=None,
        responses=_lines_of(ollama_replies.ChatLine),
        openapi_extra=openapi.request_body(ChatRequest, "Ollama"),
    )
    async def chat(request: Request) -> Response:
        return await respond(request, parsed(ChatRequest, await read_json(request)))

    @api.get("/tags", summary="All models", responses=_one(ollama_replies.Models), response_model=None)
    async def tags() -> Response:
        return _response(ollama_replies.tags(await asyncio.to_thread(backend.models)))

    @api.get("/ps", summary="Models in memory", responses=_one(ollama_replies.Models), response_model=None)
    async def ps() -> Response:
        return _response(ollama_replies.running(await asyncio.to_thread(backend.models)))

    @api.post(
        "/show",
        summary="One model",
        response_model=None,
        responses=_one(ollama_replies.Shown),
        openapi_extra=openapi.request_body(ModelRequest, "Ollama"),
    )
    async def show(request: Request) -> Response:
        body = parsed(ModelRequest, await read_json(request))
        model = await asyncio.to_thread(backend.info, body.model or body.name)
        return _response(ollama_replies.shown(model))

    @api.get("/version", summary="Version of the API", responses=_one(ollama_replies.Version), response_model=None)
    async def version() -> Response:
        return _response(ollama_replies.Version(version=ollama_replies.API_VERSION, local_llava=__version__))

    for (method, path), instead in _NOT_HERE.items():
        api.add_api_route(path, _absent(f"/api{path}", instead), methods=[method], include_in_schema=False)
    return api


def refusal(error: Exception) -> Response:
    """The response to an error."""
    failed = _failure(error)
    return Response(_error(failed), failed.status, failed.headers, "application/json")


def _broken(error: Exception) -> bytes:
    """The last line of a stream after an error."""
    return _error(_failure(error))


def _error(failed: Failure) -> bytes:
    return json_bytes(failed.ollama()) + b"\n"


def _failure(error: Exception) -> Failure:
    text = str(error)
    if isinstance(error, UsageError) and text.startswith("schema: ") and "#/$defs/tools[" not in text:
        error = RequestError(f"format: {text.removeprefix('schema: ')}", param="format", code="invalid_value")
    return reported(error)


def _absent(path: str, instead: str) -> Callable[[], Coroutine[Any, Any, None]]:
    async def refuse() -> None:
        raise RequestError(f"{path} is not offered: {instead}", status=501, code="not_offered")

    return refuse


def _as_json(value: BaseModel) -> bytes:
    return value.model_dump_json(exclude_none=True).encode() + b"\n"


def _response(value: BaseModel) -> Response:
    return Response(_as_json(value), media_type="application/json")


def _one(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}}


def _lines_of(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """One value, or a stream with one in each line."""
    return {
        200: {"model": model, "content": {_Lines.media_type: {}}, "description": "All of it; or a stream of lines."}
    }
