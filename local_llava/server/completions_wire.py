"""OpenAI's older API of completions: requests -> `Job`s, answers -> responses.

A prompt is taken as it is, without the chat's format around it. Knows the JSON of
https://platform.openai.com/docs/api-reference/completions and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from local_llava.server.backend import Job
from local_llava.server.defaults import Defaults
from local_llava.server.errors import unsupported
from local_llava.server.openai_replies import Stamp, finite, timings, usage
from local_llava.server.openai_request import MAX_CHOICES, CompletionRequest
from local_llava.server.openai_wire import Asked, sampling, stops
from local_llava.types import Chunk, Message, Reply, TokenLogprob

DEFAULT_MAX_TOKENS = 16
"""Of this API: what is only continued may go on for ever."""


def completions(request: CompletionRequest, defaults: Defaults) -> Asked:
    """What `/v1/completions` asks.

    Raises:
        RequestError: A field has a value that is not accepted; the message names it.
    """
    n = request.n or 1
    for name in ("echo", "suffix"):
        if getattr(request, name):
            raise unsupported(name, "is not supported: leave it out")
    if request.best_of not in (None, n):
        raise unsupported("best_of", "must be as large as n: all answers are returned")
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if len(texts) * n > MAX_CHOICES:
        raise unsupported(
            "prompt", f"asks for {len(texts) * n} answers; at most {MAX_CHOICES} are given to one request"
        )
    options = sampling(request, defaults)
    options.setdefault("max_tokens", min(DEFAULT_MAX_TOKENS, defaults.max_tokens))
    if stop := stops(request):
        options["stop"] = stop
    if request.logprobs is not None:
        options["logprobs"] = request.logprobs
    return Asked(tuple(Job([Message("user", text)], options, raw=True) for text in texts), n)


def completion(stamp: Stamp, asked: Asked, replies: Sequence[Reply]) -> dict[str, Any]:
    """The whole response."""
    choices = [
        {
            "index": i,
            "text": reply.text,
            "logprobs": None if reply.logprobs is None else _logprobs(reply.logprobs, 0),
            "finish_reason": reply.finish_reason,
        }
        for i, reply in enumerate(replies)
    ]
    response = {**_head(stamp), "choices": choices, "usage": usage_of(asked, replies)}
    return {**response, "timings": timings(replies[0])} if len(replies) == 1 else response


class CompletionStream:
    """A response in pieces, of one or several answers."""

    def __init__(self, stamp: Stamp, asked: Asked, include_usage: bool) -> None:
        """
        Args:
            stamp: Of all pieces.
            asked: What was asked.
            include_usage: Whether the last piece tells the tokens of all answers.
        """
        self._stamp, self._asked, self._include_usage = stamp, asked, include_usage
        self._offsets = [0] * asked.n_answers
        self._replies: dict[int, Reply] = {}

    def push(self, choice: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The pieces that a piece of one answer makes."""
        pieces = []
        if chunk.text or chunk.logprobs:
            logprobs = _logprobs(chunk.logprobs, self._offsets[choice]) if chunk.logprobs else None
            self._offsets[choice] += sum(len(token.text) for token in chunk.logprobs)
            pieces.append(self._piece(choice, chunk.text, logprobs, None))
        if chunk.reply is not None:
            self._replies[choice] = chunk.reply
            last = self._piece(choice, "", None, chunk.reply.finish_reason)
            pieces.append({**last, "timings": timings(chunk.reply)} if len(self._offsets) == 1 else last)
        return pieces

    def end(self) -> list[dict[str, Any]]:
        """What comes after all answers."""
        if not self._include_usage:
            return []
        replies = [self._replies[i] for i in sorted(self._replies)]
        return [{**_head(self._stamp), "choices": [], "usage": usage_of(self._asked, replies)}]

    def _piece(self, choice: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        chosen = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        piece = {**_head(self._stamp), "choices": [chosen]}
        return {**piece, "usage": None} if self._include_usage else piece


def usage_of(asked: Asked, replies: Sequence[Reply]) -> dict[str, Any]:
    """Tokens of a response. Each prompt counts once, however many answers it got."""
    each = [usage(replies[i : i + asked.n]) for i in range(0, len(replies), asked.n)]
    total = {name: sum(part[name] for part in each) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    cached = sum(part["prompt_tokens_details"]["cached_tokens"] for part in each)
    return {**total, "prompt_tokens_details": {"cached_tokens": cached}}


def _head(stamp: Stamp) -> dict[str, Any]:
    return {"id": stamp.id, "object": "text_completion", "created": stamp.created, "model": stamp.model}


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{text: finite(logprob) for _, text, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }
