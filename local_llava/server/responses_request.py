"""The requests of OpenAI's Responses API as clients send them, checked field by field.

Knows names, types and ranges; see `openai_request`. What a request asks of the engine is read by `responses_wire`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from local_llava.server.openai_request import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    NAME,
    JsonFormat,
    TextFormat,
    ToolMode,
    Wire,
)


class InputText(Wire):
    type: Literal["input_text", "output_text"]
    text: str


class InputImage(Wire):
    type: Literal["input_image"]
    image_url: Annotated[str | None, Field(description="A data URL; others as the server is set up to accept.")] = None
    file_id: Annotated[str | None, Field(description="Not supported: send the picture as a data URL.")] = None
    detail: Annotated[Literal["auto", "low", "high", "original"] | None, Field(description="Without effect.")] = None


class Refusal(Wire):
    type: Literal["refusal"]
    refusal: str


Part: TypeAlias = Annotated[InputText | InputImage | Refusal, Field(discriminator="type")]
Parts: TypeAlias = Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)]


class InputMessage(Wire):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts


class FunctionCall(Wire):
    type: Literal["function_call"]
    call_id: str
    name: Annotated[str, Field(pattern=NAME)]
    arguments: Annotated[str, Field(description="JSON.")]


class FunctionCallOutput(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Parts


def _kind(item: object) -> str | None:
    """Of an item of the input; one that does not say is a message."""
    if isinstance(item, Mapping):
        kind = item.get("type", "message")
        return kind if isinstance(kind, str) else None
    return getattr(item, "type", None)


Item: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Wire):
    type: Literal["function"]
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="JSON schema of an object.")] = None
    strict: Annotated[bool | None, Field(description="Without effect: arguments always follow the schema.")] = None


class NamedFunction(Wire):
    type: Literal["function"]
    name: str


class AllowedFunctions(Wire):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


ToolChoice: TypeAlias = ToolMode | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]


class SchemaFormat(Wire):
    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Annotated[bool | None, Field(description="Without effect: answers always follow the schema.")] = None


class TextSettings(Wire):
    format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Wire):
    """POST /v1/responses."""

    model: Annotated[str | None, Field(description="A name that /v1/models lists; missing for the default one.")] = None
    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Field(description="auto leaves out the oldest turns of a conversation that outgrows the context."),
    ] = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    background: bool | None = None
    previous_response_id: Annotated[str | None, Field(description="Not supported: no response is stored.")] = None
    conversation: Annotated[Any, Field(description="Not supported: no conversation is stored.")] = None
    prompt: Annotated[Any, Field(description="Not supported: no prompt is stored.")] = None
