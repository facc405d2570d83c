"""Functions that models may call: what they must write, and what is read out of it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_openai_wire import QUESTION, asked, job

from local_llava.errors import UsageError
from local_llava.schema.compiler import compile_schema
from local_llava.server.errors import RequestError
from local_llava.server.openai_errors import located
from local_llava.server.tool_reader import Arguments, CallBegun, Event, PlainReader, Said, ToolReader
from local_llava.server.tools import MAX_CALLS, Call, Tool, Toolbox, called, embedded
from local_llava.types import Message

CITY = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "city": {"$ref": "#/definitions/place"},
        "unit": {"enum": ["C", "F"], "default": {"$ref": "not a reference"}},
    },
    "required": ["city"],
    "definitions": {"place": {"type": "string", "maxLength": 20}},
}
WEATHER = Tool("weather", "Tells the weather.", CITY, "tools[0].function.parameters")
NOTHING = Tool("now", "", {"type": "object", "properties": {}}, "tools[1].function.parameters")


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """As jsonschema sees it; and the engine takes the schema."""
    compile_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def calls(*made: tuple[str, Any]) -> dict[str, Any]:
    return {"calls": [{"name": name, "arguments": arguments} for name, arguments in made]}


def test_what_may_be_written() -> None:
    schema = Toolbox([WEATHER, NOTHING]).schema()
    assert accepts(schema, {"answer": "Hi"})
    assert accepts(schema, calls(("weather", {"city": "Oslo"})))
    assert accepts(schema, calls(("now", {}), ("weather", {"city": "Oslo", "unit": "C"})))
    assert not accepts(schema, calls())
    assert not accepts(schema, calls(("weather", {})))
    assert not accepts(schema, calls(("weather", {"city": "x" * 21})))
    assert not accepts(schema, calls(("now", {"city": "Oslo"})) | {"answer": "Hi"})
    assert not accepts(schema, calls(*[("now", {})] * (MAX_CALLS + 1)))
    assert not accepts(schema, calls(("other", {})))


def test_how_much_may_be_chosen() -> None:
    required = Toolbox([WEATHER, NOTHING], "required").schema()
    assert accepts(required, calls(("now", {}), ("now", {}))) and not accepts(required, {"answer": "Hi"})
    one = Toolbox([NOTHING], "one").schema()
    assert accepts(one, calls(("now", {}))) and not accepts(one, calls(("now", {}), ("now", {})))
    alone = Toolbox([NOTHING], parallel=False).schema()
    assert accepts(alone, {"answer": "Hi"}) and not accepts(alone, calls(("now", {}), ("now", {})))
    of_json = Toolbox([NOTHING], answer={"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}).schema()
    assert accepts(of_json, {"answer": 5}) and not accepts(of_json, {"answer": "Hi"})


def test_a_schema_within_a_schema() -> None:
    moved = embedded(
        {
            "$id": "here",
            "properties": {"$ref": {"$ref": "#/$defs/a"}, "const": {"items": [{"$ref": "#"}]}},
            "const": {"$ref": "#/$defs/a"},
            "$defs": {"a": {"$ref": "elsewhere"}},
        },
        "x",
    )
    assert moved == {
        "properties": {"$ref": {"$ref": "#/$defs/x/$defs/a"}, "const": {"items": [{"$ref": "#/$defs/x"}]}},
        "const": {"$ref": "#/$defs/a"},
        "$defs": {"a": {"$ref": "elsewhere"}},
    }


def test_an_unsupported_schema_is_named_by_its_field() -> None:
    bad = Tool("f", "", {"type": "object", "properties": {"a": {"contains": 1}}}, "tools[3].function.parameters")
    with pytest.raises(UsageError) as caught:
        compile_schema(Toolbox([bad]).schema())
    error = located(caught.value, "tools")
    assert isinstance(error, RequestError) and error.param == "tools[3].function.parameters"
    assert "'contains' at #/$defs/tools[3].function.parameters/properties/a is not supported" in str(error)
    plain = located(UsageError("schema: x at #/$defs/a.b"), "response_format")
    assert isinstance(plain, RequestError) and plain.param == "response_format"
    assert isinstance(located(UsageError("temperature"), None), UsageError)


def read(text: str, reader: ToolReader, size: int = 1) -> list[Event]:
    return [event for i in range(0, len(text), size) for event in reader.push(text[i : i + size])]


def told(events: list[Event]) -> tuple[str | None, list[tuple[str, str]]]:
    said = [event.text for event in events if isinstance(event, Said)]
    made: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegun):
            assert event.index == len(made)
            made.append((event.name, ""))
        elif isinstance(event, Arguments):
            made[event.index] = (made[event.index][0], made[event.index][1] + event.text)
    return "".join(said) if said else None, made


quickly = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)


@quickly
@given(st.text(), st.integers(1, 9), st.booleans())
def test_what_is_said_comes_as_it_is_written(text: str, size: int, plain: bool) -> None:
    written = json.dumps({"answer": text}, ensure_ascii=plain)
    assert told(read(written, ToolReader(), size)) == (text or None, [])
    whole, last = "", written.index(": ") + 3
    reader = ToolReader()
    reader.push(written[:last])
    for letter in json.dumps(text, ensure_ascii=False)[1:-1]:
        whole += "".join(event.text for event in reader.push(letter) if isinstance(event, Said))
    assert whole == text  # also before the end of the JSON is there


@quickly
@given(st.lists(st.tuples(st.text(max_size=5), OBJECTS), min_size=1, max_size=3), st.integers(1, 9))
def test_calls_come_as_they_are_written(made: list[tuple[str, Any]], size: int) -> None:
    text = json.dumps(calls(*made), ensure_ascii=False)
    said, found = told(read(text, ToolReader(), size))
    assert said is None
    assert [(name, json.loads(arguments)) for name, arguments in found] == made
    # What the client sends back is shown to the model in the same form.
    assert called([Call("", name, arguments) for name, arguments in found]) == text


@quickly
@given(VALUES, st.integers(1, 9))
def test_an_answer_of_json_is_passed_on(value: Any, size: int) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert told(read(f'{{"answer": {text}}}', ToolReader(json_answer=True), size)) == (text, [])


@pytest.mark.parametrize("size", [1, 4, 100])
def test_stop_texts_end_what_is_said(size: int) -> None:
    assert told(read('{"answer": "One. Two. Three."}', ToolReader(stop=["Two"]), size)) == ("One. ", [])
    assert told(read('{"answer": "One. T"}', ToolReader(stop=["Two"]), size)) == ("One. T", [])


def test_where_no_function_can_be_called_nothing_is_read() -> None:
    assert PlainReader().push('{"answer": ') == [Said('{"answer": ')]
    assert PlainReader().push("") == []


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": "A map."},
    {"role": "user", "content": "How warm is it there?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "5 degrees"}]},
]


def test_the_model_is_told_what_it_may_call() -> None:
    one = job(tools=TOOLS, messages=HISTORY[:2])
    assert [m.role for m in one.messages] == ["system", "user"]
    told = one.messages[0].text
    assert told.startswith("Be brief.\n\nThese functions can be called.")
    assert '{"name": "weather", "description": "Tells the weather.", "parameters": {' in told
    assert '{"calls": [' in told and '{"answer": ' in told
    assert '{"answer": ' not in job(tools=TOOLS, tool_choice="required").messages[0].text
    assert one.options["json_schema"] == Toolbox([WEATHER, NOTHING]).schema()


def test_what_was_called_is_shown_as_the_model_wrote_it() -> None:
    assert job(tools=TOOLS, messages=HISTORY).messages[2:] == [
        Message("assistant", '{"answer": "A map."}'),
        Message("user", "How warm is it there?"),
        Message(
            "assistant",
            '{"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]}',
        ),
        Message("user", "Result of now: noon\n\nResult of weather: 5 degrees"),
    ]


def test_without_tools_the_history_is_text() -> None:
    messages = job(messages=HISTORY).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[0].text == "Be brief." and messages[2].text == "A map."
    assert messages[4].text.startswith('{"calls": [{"name": "weather"')
    assert job(messages=HISTORY, tools=TOOLS, tool_choice="none").messages == messages


def test_arguments_that_are_no_json_stay_text() -> None:
    assert called([Call("a", "f", "{oops")]) == '{"calls": [{"name": "f", "arguments": "{oops"}]}'


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("auto", "auto", ["weather", "now"]),
        (None, "auto", ["weather", "now"]),
        ("required", "required", ["weather", "now"]),
        ({"type": "function", "function": {"name": "now"}}, "one", ["now"]),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
            },
            "required",
            ["now"],
        ),
    ],
)
def test_choices(choice: Any, mode: str, names: list[str]) -> None:
    toolbox = asked(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).toolbox
    assert toolbox is not None and not toolbox.parallel
    assert toolbox.mode == mode and [tool.name for tool in toolbox.tools] == names


def test_stop_texts_and_schemas_of_answers_beside_tools() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    both = asked(tools=TOOLS, stop="END", response_format=form)
    assert "stop" not in both.jobs[0].options and both.stop == ("END",)
    assert both.toolbox is not None and both.toolbox.answer == schema
    assert told(read('{"answer": {"n": 5}}', both.reader())) == ('{"n": 5}', [])  # type: ignore[arg-type]
    compile_schema(both.jobs[0].options["json_schema"])
