"""Ollama's JSON: what requests ask, and what responses say."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_backend import TIMINGS, reply

from local_llava.server import durations, ollama_replies, ollama_wire
from local_llava.server.backend import Job, ModelInfo
from local_llava.server.defaults import Defaults
from local_llava.server.errors import RequestError
from local_llava.server.ollama_wire import ChatRequest, GenerateRequest, Hearing, ToolCall
from local_llava.server.validation import parsed
from local_llava.types import Message, Options, TokenLogprob

GIVEN = Defaults(max_tokens=1000, seed=77)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def generate(**body: Any) -> Job:
    """What /api/generate asks."""
    return ollama_wire.generate_job(parsed(GenerateRequest, {"prompt": "What?", **body}), GIVEN)[0]


def chat(*messages: dict[str, Any], given: Defaults = GIVEN, **body: Any) -> tuple[Job, Hearing]:
    """What /api/chat asks, and what hears the answer."""
    return ollama_wire.chat_job(parsed(ChatRequest, {"messages": list(messages), **body}), given)


def user(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def test_generate_asks_one_question_about_its_pictures() -> None:
    job = generate(images=["QUJD", "REVG"], system="Be short.")
    pictures = ("data:;base64,QUJD", "data:;base64,REVG")
    assert list(job.messages) == [Message("system", "Be short."), Message("user", "What?", pictures)]
    assert job.options == {"seed": 77, "overflow": "drop_oldest"} and not job.raw


def test_no_picture_is_taken_for_a_path_or_an_address() -> None:
    (message,) = generate(
        images=["/etc/passwd", "http://169.254.169.254/", "-", "clipboard:", "data:;base64,QUJD"]
    ).messages
    assert all(image.startswith("data:") for image in message.images)
    assert message.images[4] == "data:;base64,QUJD"


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "min_p": 0, "repeat_penalty": 1.1}, {}),
        ({"temperature": 1}, {}),
        ({"top_k": 20.0}, {"top_k": 20}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"seed": 5}, {}),
        ({"seed": -1}, {"seed": 77}),
        ({"seed": 2**32 - 1}, {"seed": 0}),
        ({"stop": ["a", "", "b"]}, {"stop": ("a", "b")}),
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"stop": [""]}, {"stop": None}),
        ({"num_predict": 7}, {"num_predict": None, "max_tokens": 7}),
        ({"num_predict": 5000}, {"num_predict": None, "max_tokens": 1000}),
        ({"num_predict": -1}, {"num_predict": None, "max_tokens": 1000}),
        ({"num_predict": -2}, {"num_predict": None, "max_tokens": 1000}),
        ({"num_ctx": 4096, "num_gpu": 1, "mirostat": 0}, {"num_ctx": None, "num_gpu": None, "mirostat": None}),
        (None, {}),
    ],
)
def test_options(options: dict[str, Any] | None, fields: dict[str, Any]) -> None:
    expected = {"seed": 77, "overflow": "drop_oldest", **(options or {}), **fields}
    job = generate(options=options)
    assert job.options == {name: value for name, value in expected.items() if value is not None}
    Options().updated(job.options, loaded=True)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"top_p": 1.5}}, "options.top_p"),
        ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        ({"options": {"seed": 1.5}}, "options.seed"),
        ({"options": {"num_predict": -3}}, "options.num_predict"),
        ({"options": {"num_ctx": -1}}, "options.num_ctx"),
        ({"options": []}, "options"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"keep_alive": []}, "keep_alive"),
        ({"format": "yaml"}, "format"),
        ({"format": 3}, "format"),
        ({"think": True}, "think"),
        ({"think": "high"}, "think"),
        ({"suffix": "b"}, "suffix"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1, 2]}, "context"),
        ({"raw": True, "system": "s"}, "system"),
        ({"images": "QUJD"}, "images"),
        ({"images": [1]}, "images[0]"),
        ({"prompt": 1}, "prompt"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"model": 7}, "model"),
        ({"model": "a" * 2000}, "model"),
        ({"images": ["a"] * 5000}, "images"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        generate(**body)
    assert caught.value.param == field and caught.value.status == 400
    assert field in str(caught.value) and "\n" not in str(caught.value)


def test_what_clients_send_without_meaning_it_is_accepted() -> None:
    job = generate(suffix="", template="", context=[], system="", format="", images=None, think=False, raw=None, foo=1)
    assert list(job.messages) == [Message("user", "What?")] and "json_schema" not in job.options


def test_a_raw_prompt_is_passed_on_as_it_is() -> None:
    job = generate(prompt="<s>What", raw=True)
    assert job.raw and list(job.messages) == [Message("user", "<s>What")]


def test_a_format_is_a_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert generate(format="json").options["json_schema"] == {"type": "object"}
    assert generate(format=schema).options["json_schema"] == schema


def test_truncate_false_refuses_long_conversations() -> None:
    assert generate(truncate=False).options["overflow"] == "error"


def test_logprobs() -> None:
    assert generate(logprobs=True).options["logprobs"] == 0
    assert generate(logprobs=True, top_logprobs=3).options["logprobs"] == 3
    assert "logprobs" not in generate(top_logprobs=3).options


def test_options_without_effect_are_told() -> None:
    request = parsed(GenerateRequest, {"options": {"mirostat": 2, "presence_penalty": 0, "num_thread": 3, "tfs_z": 1}})
    assert ollama_wire.ignored(request) == ["tfs_z", "mirostat"]
    assert ollama_wire.ignored(parsed(GenerateRequest, {})) == []


def test_chat_asks_a_conversation() -> None:
    job, _ = chat(
        {"role": "system", "content": "Be short."},
        user("What?", images=["QUJD"]),
        {"role": "assistant", "content": "A cat."},
        user("Sure?"),
    )
    assert list(job.messages) == [
        Message("system", "Be short."),
        Message("user", "What?", ("data:;base64,QUJD",)),
        Message("assistant", "A cat."),
        Message("user", "Sure?"),
    ]


def test_chat_takes_the_servers_system_prompt() -> None:
    given = Defaults(max_tokens=1000, seed=1, system="Be kind.")
    assert chat(user("What?"), given=given)[0].messages[0] == Message("system", "Be kind.")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "narrator", "content": "x"}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "user", "content": 3}, "messages[1].content"),
        ({"role": "user", "content": "x", "images": {}}, "messages[1].images"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[1].tool_calls[0].function.name"),
        ({"role": "tool", "content": "3"}, "messages[1]"),
        ({"role": "assistant", "content": "I think"}, "messages[1]"),
    ],
)
def test_a_wrong_message_is_named(message: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(user("What?"), message)
    assert caught.value.param == field


def test_functions_are_called() -> None:
    job, hearing = chat(user("Weather in Oslo?"), tools=[WEATHER], options={"stop": ["x"]}, logprobs=True)
    assert job.options["json_schema"]["$defs"] and "stop" not in job.options and "logprobs" not in job.options
    assert '"weather"' in job.messages[0].text and job.messages[0].role == "system"
    answer = '{"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "weather", "arguments": {"ci'
    assert [hearing.push(letter) for letter in answer] == [""] * len(answer)
    (call,) = hearing.calls()
    assert call.model_dump() == {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_an_answer_beside_functions_is_only_its_text() -> None:
    _, hearing = chat(user("Hello"), tools=[WEATHER], options={"stop": ["!"]})
    assert "".join(hearing.push(letter) for letter in '{"answer": "Good day! Sir"}') == "Good day"
    assert hearing.calls() == []


def test_results_belong_to_calls_by_name_or_in_order() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"city": "Oslo"}}}

    asked = {"role": "assistant", "content": "", "tool_calls": [call("weather"), call("time")]}
    job, _ = chat(
        user("Oslo?"),
        asked,
        {"role": "tool", "tool_name": "time", "content": "noon"},
        {"role": "tool", "content": "rain"},
        tools=[WEATHER],
    )
    assert job.messages[-1] == Message("user", "Result of time: noon\n\nResult of weather: rain")
    with pytest.raises(RequestError, match=r"messages\[2\]: it is the result of no call"):
        chat(user("Oslo?"), asked, {"role": "tool", "tool_name": "date", "content": "1"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("300", 300),
        (" 30s ", 30),
        ("250ms", 0.25),
        ("10us", 1e-5),
        ("2d", 172800),
        ("0", 0),
        (0, 0),
        (12.5, 12.5),
        ("-1", -1),
        ("-5m", -1),
        (-3, -1),
        ("999999h", -1),
        (math.inf, -1),
    ],
)
def test_durations(text: str | float, expected: float) -> None:
    assert durations.seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "soon", "5 m", "m", "1e3", "5m3", "--1", "\u0665m", "5min", "nan", "." * 99, "1" * 99, "1h" * 99]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        durations.seconds(text)


def test_numbers_that_are_no_time() -> None:
    assert durations.seconds(10**400) == durations.FOREVER
    with pytest.raises(ValueError, match="must be a number"):
        durations.seconds(math.nan)


@given(st.floats(0, 1e8, allow_nan=False))
@settings(max_examples=50, deadline=None)
def test_durations_of_go(seconds: float) -> None:
    """Go writes durations as 1h2m3.5s."""
    whole = int(seconds)
    text = f"{whole // 3600}h{whole % 3600 // 60}m{whole % 60 + (seconds - whole):.3f}s"
    assert durations.seconds(text) == pytest.approx(seconds, abs=1e-2)


def test_a_line_of_a_stream() -> None:
    line = json.loads(ollama_replies.line(False, "tiny", 1.5, "Two").model_dump_json(exclude_none=True))
    assert line == {"model": "tiny", "created_at": "1970-01-01T00:00:01.500000Z", "response": "Two", "done": False}
    line = json.loads(ollama_replies.line(True, "tiny", 1.5, "Two").model_dump_json(exclude_none=True))
    assert line["message"] == {"role": "assistant", "content": "Two"} and "response" not in line


def test_the_last_line_tells_costs_in_nanoseconds() -> None:
    line = json.loads(
        ollama_replies.line(True, "tiny", 0, reply=reply("Two.", "length"), total_s=2.0).model_dump_json(
            exclude_none=True
        )
    )
    assert line["done"] is True and line["done_reason"] == "length"
    assert line["total_duration"] == 2_000_000_000 and line["load_duration"] == 500_000_000
    assert line["prompt_eval_count"] == TIMINGS.prompt_tokens and line["prompt_eval_duration"] == 500_000_000
    assert line["eval_count"] == 5 and line["eval_duration"] == 1_000_000_000


def test_calls_and_logprobs_of_a_line() -> None:
    call = ToolCall.model_validate({"function": {"name": "f", "arguments": {"a": 1}}})
    tokens = [TokenLogprob(1, "é", -0.5, ((1, "é", -0.5), (2, "x", -math.inf)))]
    line = json.loads(ollama_replies.line(True, "t", 0, "é", calls=[call], logprobs=tokens).model_dump_json())
    assert line["message"]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]
    assert line["logprobs"][0]["bytes"] == [195, 169]
    assert [top["logprob"] for top in line["logprobs"][0]["top_logprobs"]] == [-0.5, -9999.0]


def test_models() -> None:
    loaded = ModelInfo("a:Q4_K_M", 5, 0.0, "ab", "Q4_K_M", "llama", 8_030_000_000, True, None, 4096, "{{ x }}")
    idle = ModelInfo("b:F16", 6, 1.0, "cd", "F16", "phi3", 6_200_000)
    tags = ollama_replies.tags([loaded, idle]).models
    assert [m.name for m in tags] == ["a:Q4_K_M", "b:F16"]
    assert [m.details.parameter_size for m in tags] == ["8.0B", "6.2M"]
    (running,) = ollama_replies.running([loaded, idle]).models
    assert running.expires_at == "9999-12-31T23:59:59Z" and running.context_length == 4096
    shown = ollama_replies.shown(loaded)
    assert shown.model_info["llama.context_length"] == 4096 and "vision" in shown.capabilities
    assert shown.template == "{{ x }}" and shown.details.families == ["llama", "clip"]
