"""Answers, models and errors -> Ollama's responses.

Knows the JSON of https://docs.ollama.com/api and no HTTP; names and times are arguments. Fields that are None are left
out of the JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from local_llava.server.backend import ModelInfo
from local_llava.server.ollama_wire import ToolCall
from local_llava.types import Reply, TokenLogprob

API_VERSION = "0.12.0"
"""The version of Ollama whose API is spoken. Clients ask for it, to know what they may send."""

_NEVER = "9999-12-31T23:59:59Z"


class _Wire(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class TopLogprob(_Wire):
    """One of the likeliest tokens at its place."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    """How likely a token was."""

    top_logprobs: list[TopLogprob] | None = None


class AnswerMessage(_Wire):
    """The model's turn, or a piece of it."""

    role: str = "assistant"
    content: str = ""
    tool_calls: list[ToolCall] | None = None


class _Line(_Wire):
    """What each line of a stream has, and the one response without."""

    model: str
    created_at: str
    done: bool
    done_reason: str | None = None
    total_duration: int | None = Field(None, description="Nanoseconds, as all durations.")
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: list[Logprob] | None = None


class GenerateLine(_Line):
    """Of `/api/generate`."""

    response: str = ""


class ChatLine(_Line):
    """Of `/api/chat`."""

    message: AnswerMessage = Field(default_factory=AnswerMessage)


class Details(_Wire):
    """What kind of model it is."""

    parent_model: str = ""
    format: str = "gguf"
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Listed(_Wire):
    """A model on this computer."""

    name: str
    model: str
    modified_at: str | None = None
    size: int
    digest: str
    details: Details
    expires_at: str | None = None
    size_vram: int | None = None
    context_length: int | None = None


class Models(_Wire):
    """Of `/api/tags` and `/api/ps`."""

    models: list[Listed]


class Shown(_Wire):
    """Of `/api/show`."""

    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(_Wire):
    """Of `/api/version`."""

    version: str
    """Of Ollama's API."""
    local_llava: str
    """Of this program."""


class Error(_Wire):
    """What went wrong."""

    error: str


def line(
    chat: bool,
    model: str,
    now: float,
    text: str = "",
    *,
    calls: Sequence[ToolCall] = (),
    logprobs: Sequence[TokenLogprob] | None = None,
    reply: Reply | None = None,
    total_s: float = 0.0,
    reason: str | None = None,
) -> GenerateLine | ChatLine:
    """A piece of an answer, or all of it.

    Args:
        chat: Whether it is asked through `/api/chat`.
        model: As the client named it.
        now: Seconds since 1970.
        text: What the answer says, or goes on to say.
        calls: Functions that the model called.
        logprobs: Of the tokens of `text`, if they were asked for.
        reply: The answer, if this is the end of it.
        total_s: Seconds that it took, at its end.
        reason: Why it ended, if not for what `reply` says.
    """
    values: dict[str, Any] = {"model": model, "created_at": _time(now), "done": reply is not None or reason is not None}
    if values["done"]:
        values["done_reason"] = reason or (reply.finish_reason if reply else None)
    if reply is not None:
        values |= _costs(reply, total_s)
    if logprobs is not None:
        values["logprobs"] = [_logprob(token) for token in logprobs]
    if not chat:
        return GenerateLine(**values, response=text)
    return ChatLine(**values, message=AnswerMessage(content=text, tool_calls=list(calls) or None))


def _costs(reply: Reply, total_s: float) -> dict[str, int]:
    t = reply.timings
    # What is left of the time went into loading the model, if that had to be, and into passing things on.
    load_s = max(0.0, total_s - t.waited_s - t.prefill_s - t.decode_s)
    return {
        "total_duration": _ns(total_s),
        "load_duration": _ns(load_s),
        "prompt_eval_count": t.prompt_tokens,
        "prompt_eval_duration": _ns(t.prefill_s),
        "eval_count": t.completion_tokens,
        "eval_duration": _ns(t.decode_s),
    }


def _logprob(token: TokenLogprob) -> Logprob:
    top = [_top(text, logprob) for _, text, logprob in token.top]
    return Logprob(**_top(token.text, token.logprob).model_dump(), top_logprobs=top or None)


def _top(text: str, logprob: float) -> TopLogprob:
    # JSON has no number for the logarithm of nothing.
    return TopLogprob(token=text, logprob=max(logprob, -9999.0), bytes=list(text.encode(errors="replace")))


def tags(models: Sequence[ModelInfo]) -> Models:
    """All models."""
    return Models(models=[_listed(model, modified_at=_time(model.modified)) for model in models])


def running(models: Sequence[ModelInfo]) -> Models:
    """Those in memory."""
    return Models(
        models=[
            _listed(
                model,
                expires_at=_NEVER if model.expires is None else _time(model.expires),
                size_vram=0,
                context_length=model.n_ctx,
            )
            for model in models
            if model.loaded
        ]
    )


def shown(model: ModelInfo) -> Shown:
    """All of one model."""
    info: dict[str, Any] = {"general.architecture": model.family, "general.parameter_count": model.parameters}
    if model.n_ctx:
        info[f"{model.family}.context_length"] = model.n_ctx
    return Shown(
        template=model.template,
        details=_details(model),
        model_info=info,
        capabilities=["completion", "vision", "tools"],
        modified_at=_time(model.modified),
    )


def _listed(model: ModelInfo, **times: Any) -> Listed:
    return Listed(
        name=model.name, model=model.name, size=model.size, digest=model.digest, details=_details(model), **times
    )


def _details(model: ModelInfo) -> Details:
    return Details(
        family=model.family,
        families=[model.family, "clip"],
        parameter_size=_parameters(model.parameters),
        quantization_level=model.quant,
    )


def _parameters(n: int) -> str:
    """8.0B for 8030000000."""
    if not n:
        return ""
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return _NEVER


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
