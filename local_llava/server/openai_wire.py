"""Requests of OpenAI's chat API -> `Job`s.

Knows what the fields of `openai_request` ask of the engine, and no HTTP; chance is an argument. What a client leaves
out is the server's default, not OpenAI's: such an answer is not as long as it likes, but has 512 tokens at most
(`--default-tokens`), since one that may come to need the whole context keeps others waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from local_llava.server import openai_request as wire
from local_llava.server.backend import Job
from local_llava.server.defaults import ANY_OBJECT, Defaults, seed_of
from local_llava.server.errors import RequestError, unsupported
from local_llava.server.tool_reader import PlainReader, Reading, ToolReader
from local_llava.server.tools import Call, Tool, Toolbox
from local_llava.server.turns import Turn, conversation

Choice: TypeAlias = Literal["none", "auto", "required", "one"]
"""Whether functions may or must be called."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    jobs: tuple[Job, ...]
    n: int = 1
    """Answers to each of them."""
    toolbox: Toolbox | None = None
    stop: tuple[str, ...] = ()
    """Texts that end an answer where functions can be called; where none can, the engine knows them."""

    schema_field: str | None = None
    """The request's field that asks for JSON of some form; errors name it."""

    @property
    def n_answers(self) -> int:
        """Answers to all jobs."""
        return len(self.jobs) * self.n

    def reader(self) -> Reading:
        """For one answer."""
        if self.toolbox is None:
            return PlainReader()
        return ToolReader(json_answer=self.toolbox.answer is not None, stop=self.stop)


def chat(request: wire.ChatRequest, defaults: Defaults) -> Asked:
    """What `/v1/chat/completions` asks.

    Raises:
        RequestError: A field has a value that is not accepted; the message names it.
    """
    _refuse_unsupported(request)
    schema = _schema(request.response_format)
    toolbox = toolbox_of(
        [
            function_of(f.name, f.description, f.parameters, f"tools[{i}].function.parameters")
            for i, f in enumerate(tool.function for tool in request.tools or ())
        ],
        *_choice(request.tool_choice),
        parallel=request.parallel_tool_calls is not False,
        answer=schema,
        answer_where="response_format.json_schema.schema",
    )
    options = sampling(request, defaults)
    stop = stops(request)
    if request.logprobs:
        if toolbox is not None:
            raise unsupported("logprobs", "cannot be given where functions can be called")
        options["logprobs"] = request.top_logprobs or 0
    elif request.top_logprobs is not None:
        raise unsupported("top_logprobs", "needs logprobs to be true")
    if request.max_completion_tokens is not None:
        options["max_tokens"] = min(request.max_completion_tokens, defaults.max_tokens)
    for name in ("preprocess", "overflow"):
        if getattr(request, name) is not None:
            options[name] = getattr(request, name)
    if toolbox is not None:
        schema = toolbox.schema()
    elif stop:
        options["stop"] = stop
    if schema is not None:
        options["json_schema"] = schema
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(request.messages)]
    job = Job(conversation(turns, toolbox, defaults.system), options)
    field = "response_format" if toolbox is None else "tools"
    return Asked((job,), request.n or 1, toolbox, stop if toolbox is not None else (), field)


def spread(job: Job, n: int) -> list[Job]:
    """Several answers to one question: the first with the request's seed, the others with those that follow it."""
    return [replace(job, options={**job.options, "seed": seed_of(job.options["seed"] + i)}) for i in range(n)]


def sampling(request: wire.Sampling, defaults: Defaults) -> dict[str, Any]:
    """Fields of `Options`, without stop texts.

    Raises:
        RequestError: A field asks for what is not supported.
    """
    for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
        if getattr(request, name):
            raise unsupported(name, "is not supported; repeat_penalty is what there is against repetition")
    names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
    options = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.max_tokens is not None:
        options["max_tokens"] = min(request.max_tokens, defaults.max_tokens)
    options["seed"] = seed_of(defaults.seed if request.seed is None else request.seed)
    return options


def stops(request: wire.Sampling) -> tuple[str, ...]:
    """Texts that end an answer."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def function_of(name: str, description: str | None, parameters: Mapping[str, Any] | None, where: str) -> Tool:
    """A function of the client's.

    Args:
        name: Its name.
        description: What it does.
        parameters: JSON schema of its arguments; None where it takes none.
        where: Their field.

    Raises:
        RequestError: Its parameters are no object's.
    """
    schema = {"type": "object", "properties": {}} if parameters is None else {"type": "object", **parameters}
    if schema["type"] != "object":
        raise unsupported(where, 'must be the schema of an object: its type must be "object"')
    return Tool(name, description or "", schema, where)


def toolbox_of(
    tools: Sequence[Tool],
    choice: Choice,
    names: Sequence[str] | None,
    *,
    parallel: bool,
    answer: dict[str, Any] | None,
    answer_where: str,
) -> Toolbox | None:
    """What may be called; None where nothing may.

    Args:
        tools: All functions of the request.
        choice: Whether the model may choose.
        names: Those that it may choose among; None for all.
        parallel: Whether there may be several calls.
        answer: Schema of the answer, if it has one.
        answer_where: Its field.

    Raises:
        RequestError: A function that is named is none of `tools`, or two have one name.
    """
    known = [tool.name for tool in tools]
    if len(set(known)) < len(known):
        raise unsupported("tools", "must have names that differ")
    if choice == "none" or (not tools and choice == "auto"):
        return None
    unknown = [name for name in names or () if name not in known]
    if unknown or not tools:
        raise unsupported(
            "tool_choice", f"names {unknown[0]!a:.80}, which is none of tools" if unknown else "needs tools"
        )
    chosen = [tool for tool in tools if names is None or tool.name in names]
    return Toolbox(chosen, choice, parallel, answer, answer_where)


def _choice(choice: wire.ToolChoice | None) -> tuple[Choice, list[str] | None]:
    if isinstance(choice, wire.NamedTool):
        return "one", [choice.function.name]
    if isinstance(choice, wire.AllowedToolsChoice):
        return choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
    return choice or "auto", None


def _refuse_unsupported(request: wire.ChatRequest) -> None:
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(request, name) not in (None, [], "none", "auto"):
            raise unsupported(name, f"is not supported: use {instead}")
    if request.modalities is not None and request.modalities != ["text"]:
        raise unsupported("modalities", 'must be ["text"]')


def _schema(response_format: Any) -> dict[str, Any] | None:
    if isinstance(response_format, wire.JsonFormat):
        return ANY_OBJECT
    if isinstance(response_format, wire.SchemaFormat):
        schema = response_format.json_schema.json_schema
        return ANY_OBJECT if schema is None else schema
    return None


def _turn(message: wire.Message, where: str) -> Turn:
    if isinstance(message, wire.AssistantMessage):
        calls = [Call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        text = _text(message.content) or message.refusal or ""
        if message.content is None and message.refusal is None and not calls:
            raise RequestError(
                f"{where}.content: it is required where there are no tool_calls",
                param=f"{where}.content",
                code="missing_required_parameter",
            )
        return Turn("assistant", where, text, calls=tuple(calls))
    text = _text(message.content)
    if isinstance(message, wire.SystemMessage):
        return Turn("system", where, text)
    images = [] if isinstance(message.content, str) else [p for p in message.content if isinstance(p, wire.ImagePart)]
    urls = tuple(p.image_url if isinstance(p.image_url, str) else p.image_url.url for p in images)
    if isinstance(message, wire.ToolMessage):
        return Turn("tool", where, text, urls, call_id=message.tool_call_id)
    return Turn("user", where, text, urls)


def _text(content: str | Sequence[wire.TextPart | wire.RefusalPart | wire.ImagePart] | None) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    said = (part for part in content if not isinstance(part, wire.ImagePart))
    return "\n".join(part.text if isinstance(part, wire.TextPart) else part.refusal for part in said)
