"""Ollama's requests -> `Job`s, and answers -> Ollama's responses.

Knows the JSON of https://docs.ollama.com/api and no HTTP. Pictures stay text here, as data URLs; names and times are
arguments. What a client leaves out, or sends as null, is the server's default, not Ollama's.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from local_llava.server import durations, tools
from local_llava.server.backend import Job
from local_llava.server.defaults import ANY_OBJECT, Defaults, seed_of
from local_llava.server.errors import RequestError, unsupported
from local_llava.server.tool_reader import Arguments, CallBegun, PlainReader, Reading, Said, ToolReader
from local_llava.server.tools import Call, Toolbox
from local_llava.server.turns import Turn, conversation
from local_llava.types import Message

_MANY, _TOOLS = 4096, 128
"""Messages, pictures and calls, and functions, in one request; the context would not hold so many."""


def _integral(value: object) -> object:
    """40.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_IGNORED = "Without effect."
Ignored: TypeAlias = Annotated[Any, Field(description=_IGNORED)]
Whole: TypeAlias = Annotated[int, BeforeValidator(_integral)]


class _Wire(BaseModel):
    """Fields that are not known are ignored, as Ollama does. A number in quotes is a text."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Sampling(_Wire):
    """`options` of a request."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[Whole, Field(le=2**31 - 1, description="0 or less for all.")] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[Whole, Field(description="Negative, or missing, for another one each time.")] | None = None
    stop: Annotated[list[str], Field(fail_fast=True, max_length=64)] | str | None = None
    num_predict: Annotated[Whole, Field(ge=-2, description="0, -1, -2: as many as the server allows.")] | None = None
    num_ctx: Annotated[Whole, Field(ge=0, description="Without effect: the loaded model's counts.")] | None = None
    # In Ollama these change answers.
    presence_penalty: Ignored = None
    frequency_penalty: Ignored = None
    repeat_last_n: Ignored = None
    typical_p: Ignored = None
    tfs_z: Ignored = None
    mirostat: Ignored = None


def ignored(request: _Ask) -> list[str]:
    """Names of the options of a request that would change its answer, but are not supported."""
    given = request.options or Sampling()
    return [name for name in _WITHOUT_EFFECT if getattr(given, name)]


_WITHOUT_EFFECT = [name for name, field in Sampling.model_fields.items() if field.description == _IGNORED]


def _keep_alive(value: object) -> object:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError('must be a number of seconds, or a text such as "5m"')
    return durations.seconds(value)


Name: TypeAlias = Annotated[str, Field(max_length=1000)]
Pictures: TypeAlias = Annotated[list[str], Field(fail_fast=True, max_length=_MANY, description="base64")]
KeepAlive: TypeAlias = Annotated[float | None, BeforeValidator(_keep_alive, json_schema_input_type=float | str | None)]


class _Ask(_Wire):
    """What both ways to ask have in common."""

    model: Annotated[Name | None, Field(description="One that /api/tags lists; missing for the default one.")] = None
    stream: Annotated[bool | None, Field(description="Whether the answer comes in pieces; missing for true.")] = None
    format: Annotated[
        Literal["", "json"] | dict[str, Any] | None,
        Field(description="json for any JSON object; or a JSON schema, which the answer follows."),
    ] = None
    options: Sampling | None = None
    keep_alive: Annotated[KeepAlive, Field(description="Seconds, or a text such as 5m; negative for ever.")] = None
    think: Annotated[bool | str | None, Field(description="Only false: LLaVA models do not think aloud.")] = None
    truncate: Annotated[
        bool | None, Field(description="Whether oldest turns that outgrow the context are left out; missing for true.")
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    @property
    def streamed(self) -> bool:
        """Whether the answer comes in pieces."""
        return self.stream is not False


class GenerateRequest(_Ask):
    """POST /api/generate. With no prompt, the model is loaded; or unloaded, with `keep_alive` 0."""

    prompt: str | None = None
    images: Pictures | None = None
    system: str | None = None
    raw: Annotated[bool | None, Field(description="Whether the prompt has the chat's format already.")] = None
    suffix: Annotated[str | None, Field(description="Not supported.")] = None
    template: Annotated[str | None, Field(description="Not supported.")] = None
    context: Annotated[list[Any] | None, Field(description="Not supported: use /api/chat.")] = None


class CalledFunction(_Wire):
    """A function that the model called."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(_Wire):
    """A call of a function."""

    function: CalledFunction


class ChatMessage(_Wire):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: Pictures | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=_MANY)] | None = None
    tool_name: str | None = None


class Function(_Wire):
    """What the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="JSON schema of an object.")] = None


class Tool(_Wire):
    """What the model may use."""

    type: Literal["function"] = "function"
    function: Function


class ChatRequest(_Ask):
    """POST /api/chat. With no messages, the model is loaded; or unloaded, with `keep_alive` 0."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, max_length=_MANY)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=_TOOLS)] | None = None


class ModelRequest(_Wire):
    """POST /api/show."""

    model: Annotated[Name | None, Field(description="Missing for the default one.")] = None
    name: Annotated[Name | None, Field(description="The older name of `model`.")] = None


def generate_job(request: GenerateRequest, defaults: Defaults) -> tuple[Job, Hearing]:
    """What `/api/generate` asks with its prompt, and what hears the answer.

    Raises:
        RequestError: A field has a value that is not accepted; the message names it.
    """
    for name in ("suffix", "template"):
        if getattr(request, name):
            raise unsupported(name, "is not supported: the chat's format is in the model's file; leave it out")
    if request.context:
        raise unsupported("context", "is not supported: send the conversation's messages to /api/chat")
    if request.raw and request.system:
        raise unsupported("system", "is not accepted with raw, which takes the prompt as it is")
    messages = [Message("user", request.prompt or "", _pictures(request.images))]
    if request.system:
        messages.insert(0, Message("system", request.system))
    return Job(messages, _fields(request, defaults), raw=bool(request.raw)), Hearing(PlainReader())


def chat_job(request: ChatRequest, defaults: Defaults) -> tuple[Job, Hearing]:
    """What `/api/chat` asks with its messages, and what hears the answer. Errors are those of `generate_job`."""
    fields = _fields(request, defaults)
    toolbox: Toolbox | None = None
    reader: Reading = PlainReader()
    if request.tools:
        answer = fields.pop("json_schema", None)
        toolbox = Toolbox(
            [_tool(tool, i) for i, tool in enumerate(request.tools)], answer=answer, answer_where="format"
        )
        reader = ToolReader(json_answer=answer is not None, stop=fields.pop("stop", ()))
        fields["json_schema"] = toolbox.schema()
        # The tokens of what the client gets to see are not those that the model wrote.
        fields.pop("logprobs", None)
    messages = conversation(_turns(request.messages or ()), toolbox, defaults.system)
    return Job(messages, fields), Hearing(reader)


class Hearing:
    """An answer as it comes: what it says to the client, and what it calls."""

    def __init__(self, reader: Reading) -> None:
        self._reader = reader
        self._calls: list[list[str]] = []

    def push(self, text: str) -> str:
        """What the next piece of the model's text says."""
        said = ""
        for event in self._reader.push(text):
            match event:
                case Said():
                    said += event.text
                case CallBegun():
                    self._calls.append([event.name, ""])
                case Arguments():
                    self._calls[event.index][1] += event.text
        return said

    def calls(self) -> list[ToolCall]:
        """The calls that are complete."""
        complete = []
        for name, arguments in self._calls:
            with contextlib.suppress(ValueError):  # the answer ended in the middle of it
                complete.append(ToolCall(function=CalledFunction(name=name, arguments=json.loads(arguments))))
        return complete


def _turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Results are those of the calls before them: by the function's name, or in their order."""
    if sum(len(message.tool_calls or ()) for message in messages) > _MANY:
        raise RequestError(f"messages: at most {_MANY} calls are accepted", param="messages", code="invalid_value")
    turns: list[Turn] = []
    waiting: dict[str, str] = {}  # calls without a result: id, name
    by_name: dict[str, deque[str]] = {}
    for i, message in enumerate(messages):
        where, call_id = f"messages[{i}]", ""
        calls = tuple(
            Call(f"{i}.{k}", call.function.name, json.dumps(call.function.arguments, ensure_ascii=False))
            for k, call in enumerate(message.tool_calls or () if message.role == "assistant" else ())
        )
        for call in calls:
            waiting[call.id] = call.name
            by_name.setdefault(call.name, deque()).append(call.id)
        if message.role == "tool":
            name = message.tool_name or next(iter(waiting.values()), "")
            of_name = by_name.get(name)
            if not of_name:
                raise RequestError(f"{where}: it is the result of no call before it", param=where, code="invalid_value")
            call_id = of_name.popleft()
            del waiting[call_id]
        turns.append(
            Turn(message.role, where, message.content or "", _pictures(message.images), calls=calls, call_id=call_id)
        )
    return turns


def _tool(tool: Tool, i: int) -> tools.Tool:
    function, where = tool.function, f"tools[{i}].function.parameters"
    return tools.Tool(function.name, function.description or "", function.parameters or ANY_OBJECT, where)


def _pictures(images: Sequence[str] | None) -> tuple[str, ...]:
    """base64 as data URLs; nothing else gets through, so that no picture is taken for a path or an address."""
    return tuple(text if text.startswith("data:") else f"data:;base64,{text}" for text in images or ())


def _fields(request: _Ask, defaults: Defaults) -> dict[str, Any]:
    """Fields of `Options`."""
    if request.think:
        raise unsupported("think", "must be false: LLaVA models do not think aloud")
    sampling = request.options or Sampling()
    fields = {name: getattr(sampling, name) for name in ("temperature", "top_p", "min_p", "repeat_penalty")}
    fields["top_k"] = None if sampling.top_k is None else max(sampling.top_k, 0)
    stop = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop
    fields["stop"] = tuple(text for text in stop or () if text) or None
    seed = defaults.seed if sampling.seed is None or sampling.seed < 0 else sampling.seed
    fields["seed"] = seed_of(seed)
    n = sampling.num_predict
    fields["max_tokens"] = None if n is None else min(n, defaults.max_tokens) if n > 0 else defaults.max_tokens
    fields["json_schema"] = ANY_OBJECT if request.format == "json" else request.format or None
    fields["overflow"] = "error" if request.truncate is False else "drop_oldest"
    fields["logprobs"] = request.top_logprobs or 0 if request.logprobs else None
    return {name: value for name, value in fields.items() if value is not None}
