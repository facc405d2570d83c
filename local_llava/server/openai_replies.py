"""Answers of the engine -> responses of OpenAI's chat API, whole or in pieces.

Knows the JSON of https://platform.openai.com/docs/api-reference/chat and no HTTP; ids and times are arguments. Beyond
OpenAI's fields, a response that holds one answer has `timings`: what it cost, and what of it was known before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from local_llava.server.backend import ModelInfo
from local_llava.server.openai_wire import Asked
from local_llava.server.tool_reader import Arguments, CallBegun, Event, Said
from local_llava.server.tools import Call
from local_llava.types import Chunk, Reply, TokenLogprob

_LEAST_LOGPROB = -9999.0
"""What OpenAI reports where a probability is 0; JSON has no number for its logarithm."""


@dataclass(frozen=True)
class Stamp:
    """What all parts of a response have in common."""

    id: str
    """Ends in an underscore or hyphen and what no other response has."""
    created: int
    """Seconds since 1970."""
    model: str

    def call_id(self, choice: int, index: int) -> str:
        """Of a call in one of the answers."""
        return f"call_{self.unique}{choice}{index:02}"

    @property
    def unique(self) -> str:
        """What no other response has."""
        return self.id[max(self.id.rfind("-"), self.id.rfind("_")) + 1 :]


@dataclass(frozen=True)
class Parts:
    """An answer as the client sees it."""

    text: str | None
    """None where the model called functions and said nothing."""
    calls: tuple[Call, ...] = ()


def parts(events: Iterable[Event], stamp: Stamp, choice: int = 0) -> Parts:
    """All pieces of an answer, together."""
    text: str | None = None
    calls: list[Call] = []
    for event in events:
        if isinstance(event, Said):
            text = (text or "") + event.text
        elif isinstance(event, CallBegun):
            calls.append(Call(stamp.call_id(choice, event.index), event.name, ""))
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + event.text)
    return Parts(text if text is not None or calls else "", tuple(calls))


def completion(stamp: Stamp, asked: Asked, replies: Sequence[Reply]) -> dict[str, Any]:
    """The whole response."""
    choices = []
    for i, reply in enumerate(replies):
        found = parts(asked.reader().push(reply.text), stamp, i)
        message: dict[str, Any] = {"role": "assistant", "content": found.text, "refusal": None}
        if found.calls:
            message["tool_calls"] = [{**_call(call.name, call.arguments), "id": call.id} for call in found.calls]
        choices.append(
            {
                "index": i,
                "message": message,
                "logprobs": None if reply.logprobs is None else {"content": logprobs(reply.logprobs), "refusal": None},
                "finish_reason": "tool_calls" if found.calls else reply.finish_reason,
            }
        )
    response = {**_head(stamp, "chat.completion"), "choices": choices, "usage": usage(replies)}
    return {**response, "timings": timings(replies[0])} if len(replies) == 1 else response


class ChatStream:
    """A response in pieces, of one or several answers."""

    def __init__(self, stamp: Stamp, asked: Asked, include_usage: bool) -> None:
        """
        Args:
            stamp: Of all pieces.
            asked: What was asked.
            include_usage: Whether the last piece tells the tokens of all answers.
        """
        self._stamp, self._include_usage = stamp, include_usage
        self._readers = [asked.reader() for _ in range(asked.n_answers)]
        self._begun, self._called = [False] * asked.n_answers, [False] * asked.n_answers
        self._replies: dict[int, Reply] = {}

    def push(self, choice: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The pieces that a piece of one answer makes."""
        events = self._readers[choice].push(chunk.text)
        deltas = [self._delta(choice, event) for event in events]
        if chunk.logprobs and not deltas:  # of a token that is half a character, or may be the beginning of a stop text
            deltas = [{"content": ""}]
        if not self._begun[choice]:
            self._begun[choice] = True
            deltas.insert(0, {"role": "assistant", "content": "", "refusal": None})
        pieces = [self._piece(choice, delta) for delta in deltas]
        if chunk.logprobs:
            pieces[-1]["choices"][0]["logprobs"] = {"content": logprobs(chunk.logprobs), "refusal": None}
        if chunk.reply is not None:
            pieces.append(self._last(choice, chunk.reply))
        return pieces

    def end(self) -> list[dict[str, Any]]:
        """What comes after all answers."""
        if not self._include_usage:
            return []
        replies = [self._replies[i] for i in sorted(self._replies)]
        return [{**_head(self._stamp, "chat.completion.chunk"), "choices": [], "usage": usage(replies)}]

    def _delta(self, choice: int, event: Event) -> dict[str, Any]:
        if isinstance(event, Said):
            return {"content": event.text}
        if isinstance(event, Arguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        self._called[choice] = True
        call = {"index": event.index, "id": self._stamp.call_id(choice, event.index), **_call(event.name, "")}
        return {"tool_calls": [call]}

    def _last(self, choice: int, reply: Reply) -> dict[str, Any]:
        self._replies[choice] = reply
        piece = self._piece(choice, {}, "tool_calls" if self._called[choice] else reply.finish_reason)
        return {**piece, "timings": timings(reply)} if len(self._readers) == 1 else piece

    def _piece(self, choice: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        chosen = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        piece = {**_head(self._stamp, "chat.completion.chunk"), "choices": [chosen]}
        return {**piece, "usage": None} if self._include_usage else piece


def usage(replies: Sequence[Reply]) -> dict[str, Any]:
    """Tokens of a response. A prompt that several answers have in common counts once."""
    prompt = max(reply.timings.prompt_tokens for reply in replies)
    completion = sum(reply.timings.completion_tokens for reply in replies)
    details = {
        "cached_tokens": min(reply.timings.reused_tokens for reply in replies),
        "image_tokens": max(reply.timings.image_tokens for reply in replies),
    }
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }


def timings(reply: Reply) -> dict[str, Any]:
    """The fields of `Timings`, with speeds, and how many messages were left out of the conversation."""
    return {
        **asdict(reply.timings),
        "prefill_tokens_per_s": reply.timings.prefill_tokens_per_s,
        "decode_tokens_per_s": reply.timings.decode_tokens_per_s,
        "dropped_messages": reply.dropped,
    }


def logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Of each token."""
    return [
        {
            **_logprob(token.text, token.logprob),
            "top_logprobs": [_logprob(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]


def models(listed: Sequence[ModelInfo]) -> dict[str, Any]:
    """Of `/v1/models`."""
    return {"object": "list", "data": [model(info) for info in listed]}


def model(info: ModelInfo) -> dict[str, Any]:
    """Of `/v1/models/{id}`."""
    return {"id": info.name, "object": "model", "created": int(info.modified), "owned_by": "local-llava"}


def finite(logprob: float) -> float:
    """A logarithm that JSON has a number for."""
    return max(logprob, _LEAST_LOGPROB)


def _head(stamp: Stamp, kind: str) -> dict[str, Any]:
    return {"id": stamp.id, "object": kind, "created": stamp.created, "model": stamp.model}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character is shown as U+FFFD: its bytes are not known.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": finite(logprob), "bytes": known}
