"""Requests of OpenAI's Responses API -> `Job`s.

Knows what the fields of `responses_request` ask of the engine, and no HTTP. Nothing is stored: a client sends the whole
conversation each time, and what of it was read before is known to the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from local_llava.server import responses_request as wire
from local_llava.server.backend import Job
from local_llava.server.defaults import ANY_OBJECT, Defaults, seed_of
from local_llava.server.errors import RequestError, unsupported
from local_llava.server.openai_request import JsonFormat
from local_llava.server.openai_wire import Asked, Choice, function_of, toolbox_of
from local_llava.server.tools import Call
from local_llava.server.turns import Turn, conversation

LOGPROBS = "message.output_text.logprobs"
"""What asks for them in `include`."""

_STORED = {
    "previous_response_id": "is not supported: responses are not stored; send the whole conversation as input",
    "conversation": "is not supported: conversations are not stored; send all of it as input",
    "prompt": "is not supported: prompts are not stored; use instructions and input",
    "background": "is not supported: responses are not stored; leave it out",
}


def responses(request: wire.ResponsesRequest, defaults: Defaults) -> Asked:
    """What `/v1/responses` asks.

    Raises:
        RequestError: A field has a value that is not accepted; the message names it.
    """
    for name, reason in _STORED.items():
        if getattr(request, name):
            raise unsupported(name, reason)
    schema = _schema(request.text)
    toolbox = toolbox_of(
        [
            function_of(tool.name, tool.description, tool.parameters, f"tools[{i}].parameters")
            for i, tool in enumerate(request.tools or ())
        ],
        *_choice(request.tool_choice),
        parallel=request.parallel_tool_calls is not False,
        answer=schema,
        answer_where="text.format.schema",
    )
    options: dict[str, Any] = {"seed": seed_of(defaults.seed)}
    for name in ("temperature", "top_p"):
        if getattr(request, name) is not None:
            options[name] = getattr(request, name)
    if request.max_output_tokens is not None:
        options["max_tokens"] = min(request.max_output_tokens, defaults.max_tokens)
    if request.truncation == "auto":
        options["overflow"] = "drop_oldest"
    if request.top_logprobs is not None or LOGPROBS in (request.include or ()):
        if toolbox is not None:
            raise unsupported("top_logprobs", "and logprobs cannot be given where functions can be called")
        options["logprobs"] = request.top_logprobs or 0
    if toolbox is not None:
        schema = toolbox.schema()
    if schema is not None:
        options["json_schema"] = schema
    job = Job(conversation(_turns(request), toolbox, defaults.system), options)
    return Asked((job,), toolbox=toolbox, schema_field="text.format" if toolbox is None else "tools")


def _schema(text: wire.TextSettings | None) -> dict[str, Any] | None:
    form = None if text is None else text.format
    if isinstance(form, JsonFormat):
        return ANY_OBJECT
    return form.json_schema if isinstance(form, wire.SchemaFormat) else None


def _choice(choice: wire.ToolChoice | None) -> tuple[Choice, list[str] | None]:
    if isinstance(choice, wire.NamedFunction):
        return "one", [choice.name]
    if isinstance(choice, wire.AllowedFunctions):
        return choice.mode, [tool.name for tool in choice.tools]
    return choice or "auto", None


def _turns(request: wire.ResponsesRequest) -> list[Turn]:
    turns = [] if request.instructions is None else [Turn("system", "instructions", request.instructions)]
    if isinstance(request.input, str):
        return [*turns, Turn("user", "input", request.input)]
    for i, item in enumerate(request.input):
        where = f"input[{i}]"
        if isinstance(item, wire.FunctionCallOutput):
            text, images = _content(item.output, f"{where}.output")
            turns.append(Turn("tool", where, text, images, call_id=item.call_id))
        elif isinstance(item, wire.InputMessage):
            text, images = _content(item.content, f"{where}.content")
            role = "system" if item.role == "developer" else item.role
            if images and role != "user":
                raise RequestError(
                    f"{where}.content: only the user can show pictures", param=f"{where}.content", code="invalid_value"
                )
            turns.append(Turn(role, where, text, images))
        else:
            call = Call(item.call_id, item.name, item.arguments)
            # Calls in a row are of one answer.
            before = turns.pop() if turns and turns[-1].calls else Turn("assistant", where)
            turns.append(Turn("assistant", where, calls=(*before.calls, call)))
    return turns


def _content(content: str | Sequence[Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Text and pictures."""
    if isinstance(content, str):
        return content, ()
    texts: list[str] = []
    images: list[str] = []
    for i, part in enumerate(content):
        if isinstance(part, wire.InputText):
            texts.append(part.text)
        elif isinstance(part, wire.Refusal):
            texts.append(part.refusal)
        elif part.image_url:
            images.append(part.image_url)
        else:
            field = f"{where}[{i}].image_url"
            raise RequestError(
                f"{field}: it is required; files are not stored", param=field, code="missing_required_parameter"
            )
    return "\n".join(texts), tuple(images)
