"""OpenAI's Responses API: what is asked, and what comes back, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_backend import Scripted, reply
from test_openai_routes import CALLED, post
from test_openai_tools import CITY, NOTHING, WEATHER

from local_llava.errors import EngineError, UsageError
from local_llava.schema.compiler import compile_schema
from local_llava.server.backend import EngineDiedError, Job
from local_llava.server.defaults import Defaults
from local_llava.server.errors import RequestError
from local_llava.server.openai_wire import Asked
from local_llava.server.responses_request import ResponsesRequest
from local_llava.server.responses_wire import responses
from local_llava.server.tools import Toolbox
from local_llava.server.validation import parsed
from local_llava.types import Message, Options

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "description": "Tells the weather.", "parameters": CITY, "strict": True},
    {"type": "function", "name": "now"},
]


def asked(**fields: Any) -> Asked:
    return responses(parsed(ResponsesRequest, {"input": "What is this?", **fields}), Defaults(1000, 7))


def job(**fields: Any) -> Job:
    (only,) = asked(**fields).jobs
    Options().updated(only.options, loaded=True)
    return only


def test_a_question() -> None:
    assert job() == Job([Message("user", "What is this?")], {"seed": 7})
    unknown = {"store": True, "user": "me", "reasoning": {"effort": "low"}, "service_tier": "auto"}
    assert job(**unknown, background=False, text={"verbosity": "low"}) == job()
    names = [name for name in ResponsesRequest.model_fields if name != "input"]
    assert job(**dict.fromkeys(names)) == job()


def test_options() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 5000, "truncation": "auto", "top_logprobs": 2}
    assert job(**fields).options == {
        "seed": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 1000,
        "overflow": "drop_oldest",
        "logprobs": 2,
    }
    assert job(include=["message.output_text.logprobs"]).options["logprobs"] == 0
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    assert job(text={"format": form}).options["json_schema"] == schema
    assert job(text={"format": {"type": "json_object"}}).options["json_schema"] == {"type": "object"}


def test_items() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": "data:,a", "detail": "auto"},
                {"type": "input_text", "text": "What is this?"},
            ],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "A map.", "annotations": []}],
        },
        {"role": "user", "content": "How warm is it there?"},
        {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call", "call_id": "b", "name": "now", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "a", "output": "5 degrees"},
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "noon"}, {"type": "input_image", "image_url": "data:,b"}],
        },
    ]
    assert job(input=items, instructions="Be brief.").messages == [
        Message("system", "Be brief.\n\nBe kind."),
        Message("user", "What is this?", ("data:,a",)),
        Message("assistant", "A map."),
        Message("user", "How warm is it there?"),
        Message(
            "assistant",
            '{"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]}',
        ),
        Message("user", "Result of weather: 5 degrees\n\nResult of now: noon", ("data:,b",)),
    ]


def test_functions() -> None:
    tools = [
        Toolbox([tool], mode).schema()  # type: ignore[arg-type]
        for tool, mode in ((NOTHING, "one"), (WEATHER, "required"))
    ]
    names = [{"type": "function", "name": "now"}, {"type": "function", "name": "weather"}]
    some = {"type": "allowed_tools", "mode": "required", "tools": names[1:]}
    found = [job(tools=TOOLS, tool_choice=choice).options["json_schema"] for choice in (names[0], some)]
    assert [schema["properties"]["calls"]["items"]["anyOf"][0]["properties"]["name"] for schema in found] == [
        {"const": "now"},
        {"const": "weather"},
    ]
    assert [schema["properties"]["calls"]["maxItems"] for schema in found] == [
        schema["properties"]["calls"]["maxItems"] for schema in tools
    ]
    for schema in (*found, job(tools=TOOLS).options["json_schema"]):
        compile_schema(schema)
    assert "json_schema" not in job(tools=TOOLS, tool_choice="none").options


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "string or a valid list"),
        ({"input": []}, "input", "not be empty"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "'system', 'developer'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'function_call_output'"),
        ({"input": [5]}, "input[0].type", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type",
            "'input_image'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "input[0].content[0].image_url",
            "files are not stored",
        ),
        (
            {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": "data:,a"}]}]},
            "input[0].content",
            "only the user can show",
        ),
        ({"input": [{"role": "assistant", "content": "I"}]}, "input[0]", "last message must be"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[0]", "'a' is the id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation as input"),
        ({"conversation": "conv_1"}, "conversation", "not stored"),
        ({"prompt": {"id": "p"}}, "prompt", "not stored"),
        ({"background": True}, "background", "not stored"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": TOOLS, "top_logprobs": 1}, "top_logprobs", "functions can be called"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'f', which is none of tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "required"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    assert caught.value.param == param and words in str(caught.value)


def respond(backend: Scripted, **fields: Any) -> Any:
    return post(backend, "/v1/responses", {"input": "What is this?", **fields})


def whole(backend: Scripted, **fields: Any) -> Response:
    response = respond(backend, **fields)
    assert response.status_code == 200, response.text
    return Response.model_validate_json(response.content, strict=True)


def events(backend: Scripted, **fields: Any) -> list[Any]:
    """The events of a stream: each of a type that the openai package knows, numbered, under its name."""
    response = respond(backend, stream=True, **fields)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *blocks, nothing = response.text.split("\n\n")
    assert nothing == ""
    found = []
    for i, block in enumerate(blocks):
        name, data = block.split("\n")
        found.append(EVENT.validate_json(data.removeprefix("data: "), strict=True))
        assert name == f"event: {found[-1].type}" and found[-1].sequence_number == i
    return found


def test_a_response() -> None:
    response = whole(Scripted("Two cats."), instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    assert response.status == "completed" and response.output_text == "Two cats." and response.model == "tiny:F32"
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens == 20
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (30, 5, 35)
    (item,) = response.output
    assert isinstance(item, ResponseOutputMessage) and item.status == "completed"


def test_a_response_that_was_cut() -> None:
    response = whole(Scripted(reply("Two", "length")))
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens" and response.output_text == "Two"
    assert events(Scripted(reply("Two", "length")))[-1].type == "response.incomplete"


def test_a_response_with_logprobs() -> None:
    item = whole(Scripted(), include=["message.output_text.logprobs"], top_logprobs=2).output[0]
    assert isinstance(item, ResponseOutputMessage) and item.content[0].type == "output_text"
    logprobs = item.content[0].logprobs or []
    assert [(token.token, len(token.top_logprobs)) for token in logprobs] == [("Two ", 2), ("cats.", 2)]


def test_the_events_of_a_text() -> None:
    found = events(Scripted("Two cats."))
    assert [event.type.removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.delta for event in found[4:6]] == ["Two ", "cats."]
    assert found[0].response.status == "in_progress" and found[0].response.output == []
    assert found[2].item.content == [] and found[3].part.text == ""  # as it was then
    assert found[6].text == found[7].part.text == found[-1].response.output_text == "Two cats."
    assert len({event.item_id for event in found[3:8]}) == 1
    assert found[-1].response.usage.total_tokens == 35


def test_an_answer_of_nothing_is_a_message() -> None:
    assert whole(Scripted("")).output_text == ""
    assert events(Scripted(""))[-2].item.content[0].text == ""


def test_the_events_of_calls() -> None:
    found = events(Scripted(CALLED), tools=TOOLS)
    kinds = [event.type.removeprefix("response.") for event in found]
    assert kinds[2] == "output_item.added" and kinds.count("output_item.done") == 2 and kinds[-1] == "completed"
    arguments = ["", ""]
    for event in found:
        if event.type == "response.function_call_arguments.delta":
            arguments[event.output_index] += event.delta
    assert arguments == ['{"city": "Oslo"}', "{}"]
    done = [event.arguments for event in found if event.type == "response.function_call_arguments.done"]
    assert done == arguments
    calls = found[-1].response.output
    assert [(call.name, call.arguments, call.status) for call in calls] == [
        ("weather", '{"city": "Oslo"}', "completed"),
        ("now", "{}", "completed"),
    ]
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 2


def test_calls_in_a_response() -> None:
    response = whole(Scripted(CALLED), tools=TOOLS, tool_choice="required")
    assert all(isinstance(item, ResponseFunctionToolCall) for item in response.output)
    assert response.tool_choice == "required" and len(response.tools) == 2
    said = whole(Scripted('{"answer": "Two cats."}'), tools=TOOLS)
    assert said.output_text == "Two cats."


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_event(stream: bool) -> None:
    response = respond(Scripted(EngineError("no memory")), stream=stream)
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_error"
    form = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    response = respond(Scripted(UsageError("schema: 'not' at #")), stream=stream, text={"format": form})
    assert response.status_code == 400 and response.json()["error"]["param"] == "text.format"


def test_an_error_in_the_middle_is_an_event() -> None:
    response = respond(Scripted(["Two ", EngineDiedError("it died")]), stream=True)
    name, data = response.text.rstrip().split("\n\n")[-1].split("\n")
    fields = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and EVENT.validate_python(fields).message == "it died"
    assert fields["error"]["message"] == "it died" and fields["sequence_number"] > 4
