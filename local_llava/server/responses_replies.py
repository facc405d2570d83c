"""Answers of the engine -> responses of OpenAI's Responses API, whole or as events.

Knows the JSON of https://platform.openai.com/docs/api-reference/responses and no HTTP; ids and times are arguments. The
whole response is the one that the last event of a stream has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from local_llava.server.openai_replies import Stamp, logprobs, timings
from local_llava.server.openai_wire import Asked
from local_llava.server.responses_request import ResponsesRequest
from local_llava.server.tool_reader import Arguments, CallBegun, Event, Said
from local_llava.types import Chunk, Reply, TokenLogprob


def response(stamp: Stamp, asked: Asked, request: ResponsesRequest, reply: Reply) -> dict[str, Any]:
    """The whole response."""
    events = ResponseStream(stamp, asked, request).push(
        0, Chunk(reply.text, logprobs=reply.logprobs or (), reply=reply)
    )
    whole: dict[str, Any] = events[-1]["response"]
    return whole


class ResponseStream:
    """A response as events."""

    def __init__(self, stamp: Stamp, asked: Asked, request: ResponsesRequest) -> None:
        """
        Args:
            stamp: Of the response.
            asked: What was asked.
            request: In which words.
        """
        self._stamp, self._request = stamp, request
        names = {"text", "tools", "tool_choice"}
        self._echo = request.model_dump(mode="json", by_alias=True, exclude_none=True, include=names)
        self._reader = asked.reader()
        self._events: list[dict[str, Any]] = []
        self._n_sent = 0
        self._output: list[dict[str, Any]] = []
        """The items so far, the last of which may be under way."""

    def push(self, _: int, chunk: Chunk) -> list[dict[str, Any]]:
        """The events that a piece of the answer makes."""
        if not self._n_sent:
            for kind in ("response.created", "response.in_progress"):
                self._emit(kind, response=self._response("in_progress"))
        events = self._reader.push(chunk.text)
        if chunk.logprobs and not events:  # of a token that is half a character
            events = [Said("")]
        for event in events:
            self._take(event, chunk.logprobs)
        if chunk.reply is not None:
            self._finish(chunk.reply)
        emitted, self._events = self._events, []
        return emitted

    def end(self) -> list[dict[str, Any]]:
        """What comes after the answer: nothing."""
        return []

    def broken(self, message: str, code: str | None, param: str | None) -> dict[str, Any]:
        """What comes in place of the rest, after an error.

        `error` is what makes the openai package raise it; the fields beside it are those of the API's documentation.
        """
        fields = {"message": message, "code": code, "param": param}
        self._emit("error", **fields, error={"type": "server_error", **fields})
        return self._events.pop()

    def _take(self, event: Event, tokens: Sequence[TokenLogprob]) -> None:
        if isinstance(event, Said):
            item = self._message()
            part = item["content"][0]
            part["text"] += event.text
            known = _logprobs(tokens)
            part["logprobs"] += known
            self._emit("response.output_text.delta", **self._place(content=0), delta=event.text, logprobs=known)
        elif isinstance(event, CallBegun):
            self._close()
            call = {"id": f"fc_{self._stamp.unique}{event.index:02}", "type": "function_call", "status": "in_progress"}
            self._open({**call, "call_id": self._stamp.call_id(0, event.index), "name": event.name, "arguments": ""})
        elif isinstance(event, Arguments):
            self._output[-1]["arguments"] += event.text
            self._emit("response.function_call_arguments.delta", **self._place(), delta=event.text)

    def _message(self) -> dict[str, Any]:
        """The message under way."""
        if not self._output:
            item = {"id": f"msg_{self._stamp.unique}", "type": "message", "status": "in_progress", "role": "assistant"}
            self._open({**item, "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._output[-1]["content"].append(part)
            self._emit("response.content_part.added", **self._place(content=0), part=_copied(part))
        return self._output[-1]

    def _open(self, item: dict[str, Any]) -> None:
        self._output.append(item)
        self._emit("response.output_item.added", output_index=len(self._output) - 1, item=_copied(item))

    def _close(self, status: str = "completed") -> None:
        """End the item under way."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            place = self._place(content=0)
            self._emit("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            self._emit("response.content_part.done", **place, part=_copied(part))
        else:
            said = {"name": item["name"], "arguments": item["arguments"]}
            self._emit("response.function_call_arguments.done", **self._place(), **said)
        self._emit("response.output_item.done", output_index=len(self._output) - 1, item=_copied(item))

    def _finish(self, reply: Reply) -> None:
        if not self._output:
            self._message()
        status = "completed" if reply.finish_reason == "stop" else "incomplete"
        self._close(status)
        self._emit(f"response.{status}", response=self._response(status, reply))

    def _place(self, content: int | None = None) -> dict[str, Any]:
        """Of the item under way."""
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return place if content is None else {**place, "content_index": content}

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._n_sent, **fields})
        self._n_sent += 1

    def _response(self, status: str, reply: Reply | None = None) -> dict[str, Any]:
        request, echoed = self._request, self._echo
        form = echoed.get("text", {}).get("format", {"type": "text"})
        tools = [{"description": None, "parameters": None, "strict": None, **tool} for tool in echoed.get("tools", [])]
        response = {
            "id": self._stamp.id,
            "object": "response",
            "created_at": self._stamp.created,
            "model": self._stamp.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "output": [_copied(item) for item in self._output],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": form},
            "tool_choice": echoed.get("tool_choice", "auto"),
            "tools": tools,
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
        }
        return response if reply is None else {**response, "usage": _usage(reply), "timings": timings(reply)}


def _usage(reply: Reply) -> dict[str, Any]:
    cost = reply.timings
    return {
        "input_tokens": cost.prompt_tokens,
        # All that is read is kept, as long as there is room.
        "input_tokens_details": {"cached_tokens": cost.reused_tokens, "cache_write_tokens": cost.prefilled_tokens},
        "output_tokens": cost.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": cost.prompt_tokens + cost.completion_tokens,
    }


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Of each token; bytes that are not known are none, since null is not allowed here."""
    found = logprobs(tokens)
    for token in (each for known in found for each in (known, *known["top_logprobs"])):
        token["bytes"] = token["bytes"] or []
    return found


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is now; its parts go on growing."""
    copy = dict(item)
    if "content" in copy:
        copy["content"] = [dict(part) for part in copy["content"]]
    return copy
