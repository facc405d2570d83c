"""The requests of OpenAI's chat API as clients send them, checked field by field.

Knows names, types and ranges. What a request asks of the engine is read by `openai_wire`. Fields that are not named
here are ignored; those that are must be right, since a wrong one would otherwise be a wrong answer later.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 16
"""Answers to one request (`n`)."""

MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 4096, 1024, 128
"""In one request: of a conversation, of a message, and functions."""

NAME = r"^[a-zA-Z0-9_-]{1,64}$"
"""Of functions and schemas."""


class Wire(BaseModel):
    """A JSON object of a request. A number in quotes is a text, as in JSON.

    Of each list, the first wrong item is reported: a million of errors would take their time.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class RefusalPart(Wire):
    type: Literal["refusal"]
    refusal: str


class ImageURL(Wire):
    url: Annotated[str, Field(min_length=1, description="A data URL; others as the server is set up to accept.")]
    detail: Annotated[
        Literal["auto", "low", "high", "original"] | None,
        Field(description="Without effect: a model sees every picture in the detail that it was trained on."),
    ] = None


class ImagePart(Wire):
    type: Literal["image_url"]
    image_url: ImageURL | Annotated[str, Field(min_length=1)]


UserPart: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]
AssistantPart: TypeAlias = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Wire):
    name: Annotated[str, Field(pattern=NAME)]
    arguments: Annotated[str, Field(description="JSON.")]


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Wire):
    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class UserMessage(Wire):
    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]


class AssistantMessage(Wire):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantPart], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None


class ToolMessage(Wire):
    role: Literal["tool"]
    tool_call_id: str
    content: str | Annotated[list[UserPart], Field(fail_fast=True, max_length=MAX_PARTS)]


Message: TypeAlias = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Wire):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="JSON schema of an object.")] = None
    strict: Annotated[bool | None, Field(description="Without effect: arguments always follow the schema.")] = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Wire):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolMode: TypeAlias = Literal["none", "auto", "required"]
ToolChoice: TypeAlias = ToolMode | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]


class TextFormat(Wire):
    type: Literal["text"]


class JsonFormat(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: Annotated[bool | None, Field(description="Without effect: answers always follow the schema.")] = None


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat: TypeAlias = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Wire):
    include_usage: bool | None = None


class Sampling(Wire):
    """What `/v1/chat/completions` and `/v1/completions` share."""

    model: Annotated[str | None, Field(description="A name that /v1/models lists; missing for the default one.")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=16)]
        | None
    ) = None
    seed: int | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Any] | None = None
    # Not OpenAI's, but named as in llama.cpp's server and here in `Options`.
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None
    functions: Annotated[Any, Field(description="Not supported: use tools.")] = None
    function_call: Annotated[Any, Field(description="Not supported: use tool_choice.")] = None
    # Not OpenAI's; see `Options`.
    preprocess: Literal["checkpoint", "pad", "crop"] | None = None
    overflow: Literal["error", "drop_oldest"] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
