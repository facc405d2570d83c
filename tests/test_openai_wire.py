"""Requests of OpenAI's chat and completions APIs -> what the engine is asked."""

from __future__ import annotations

import time
from typing import Any

import pytest

from local_llava.server.backend import Job
from local_llava.server.completions_wire import completions
from local_llava.server.defaults import Defaults
from local_llava.server.errors import RequestError
from local_llava.server.openai_request import MAX_CHOICES, ChatRequest, CompletionRequest
from local_llava.server.openai_wire import Asked, chat, spread
from local_llava.server.validation import parsed
from local_llava.types import Message, Options

DEFAULTS = Defaults(max_tokens=1000, seed=7)
QUESTION = {"role": "user", "content": "What is this?"}


def asked(defaults: Defaults = DEFAULTS, **fields: Any) -> Asked:
    return chat(parsed(ChatRequest, {"messages": [QUESTION], **fields}), defaults)


def job(**fields: Any) -> Job:
    (only,) = asked(**fields).jobs
    # Whatever is asked of the engine must be options that it has.
    Options().updated(only.options, loaded=True)
    return only


def test_a_question_takes_the_servers_defaults() -> None:
    assert job() == Job([Message("user", "What is this?")], {"seed": 7})


def test_sampling() -> None:
    fields = {"temperature": 1, "top_p": 0.5, "top_k": 3, "min_p": 0, "repeat_penalty": 1.1, "seed": 5, "stop": "."}
    assert job(**fields, preprocess="pad", overflow="drop_oldest").options == {
        **fields,
        "stop": (".",),
        "preprocess": "pad",
        "overflow": "drop_oldest",
    }
    assert job(stop=["a", "b"]).options["stop"] == ("a", "b")
    assert job(logprobs=True).options["logprobs"] == 0
    assert job(logprobs=True, top_logprobs=3).options["logprobs"] == 3
    assert "logprobs" not in job(logprobs=False).options


def test_null_is_as_good_as_missing() -> None:
    names = [name for name in ChatRequest.model_fields if name != "messages"]
    assert job(**dict.fromkeys(names)) == job()


def test_unknown_fields_are_ignored() -> None:
    unknown = {"user": "me", "store": True, "service_tier": "auto", "reasoning_effort": "low", "never_heard_of": [1]}
    message = {**QUESTION, "name": "Ann", "cache_control": {"type": "ephemeral"}}
    assert job(**unknown, messages=[message], stream=True, stream_options={"include_obfuscation": False}) == job()


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**32, 2**63, -(2**63), 0])
def test_any_seed_is_one(seed: int) -> None:
    assert 0 <= job(seed=seed).options["seed"] <= 2**32 - 2


def test_tokens_are_capped() -> None:
    assert job(max_tokens=10).options["max_tokens"] == 10
    assert job(max_tokens=5000).options["max_tokens"] == 1000
    assert job(max_completion_tokens=5000).options["max_tokens"] == 1000
    assert job(max_tokens=10, max_completion_tokens=20).options["max_tokens"] == 20


def test_answers_to_one_question_have_seeds_of_their_own() -> None:
    several = asked(n=3, seed=2**32 - 3)
    assert several.n_answers == 3
    seeds = [one.options["seed"] for one in spread(several.jobs[0], several.n)]
    assert seeds == [2**32 - 3, 2**32 - 2, 0]


def test_parts_and_pictures() -> None:
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "high"}},
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "text", "text": "this?"},
    ]
    assert job(messages=[{"role": "user", "content": content}]).messages == [
        Message("user", "What is\nthis?", ("data:image/png;base64,AA==", "https://example.org/a.png"))
    ]


def turns(*messages: dict[str, Any] | tuple[str, str], **fields: Any) -> list[tuple[str, str]]:
    told = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return [(m.role, m.text) for m in job(messages=told, **fields).messages]


def test_leading_system_messages_become_one_prompt() -> None:
    messages = [("system", "Be brief."), ("developer", "Be kind."), ("user", "Hi")]
    assert turns(*messages) == [("system", "Be brief.\n\nBe kind."), ("user", "Hi")]


def test_later_system_messages_are_part_of_the_users_turn() -> None:
    messages = [("user", "Hi"), ("assistant", "Hello"), ("system", "Be brief."), ("user", "Who?"), ("system", "Now.")]
    assert turns(*messages) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Be brief.\n\nWho?\n\nNow.")]


def test_a_system_prompt_alone_is_a_question() -> None:
    assert turns(("system", "Say hello.")) == [("user", "Say hello.")]
    assert turns(("system", "Be brief."), ("system", "Say hello.")) == [
        ("system", "Be brief."),
        ("user", "Say hello."),
    ]


def test_messages_in_a_row_become_one_turn() -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,a"}}]},
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": [{"type": "text", "text": "cat."}, {"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,b"}}]},
    ]
    assert job(messages=messages).messages == [
        Message("user", "What is this?", ("data:,a",)),
        Message("assistant", "A\n\ncat.\nNo."),
        Message("user", "", ("data:,b",)),
    ]


def test_the_servers_system_prompt_is_for_conversations_without_one() -> None:
    defaults = Defaults(1000, 7, "Be brief.")
    (one,) = asked(defaults).jobs
    assert one.messages[0] == Message("system", "Be brief.")
    (other,) = asked(defaults, messages=[{"role": "system", "content": "Be long."}, QUESTION]).jobs
    assert other.messages[0] == Message("system", "Be long.")


def test_json() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    named = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert "json_schema" not in job(response_format={"type": "text"}).options
    assert job(response_format={"type": "json_object"}).options["json_schema"] == {"type": "object"}
    assert job(response_format=named).options["json_schema"] == schema
    assert asked(response_format=named).schema_field == "response_format"
    del named["json_schema"]["schema"]  # type: ignore[attr-defined]
    assert job(response_format=named).options["json_schema"] == {"type": "object"}


def shows(image_url: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": image_url}]}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": None}, "messages", "list"),
        ({"messages": []}, "messages", "not be empty"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": [QUESTION, {"role": "user"}]}, "messages[1].content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a valid list"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "not be empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "audio"}]}]},
            "messages[0].content[1].type",
            "'text', 'image_url'",
        ),
        (
            {"messages": [shows({})]},
            "messages[0].content[0].image_url.url",
            "required",
        ),
        (
            {"messages": [shows({"url": 5})]},
            "messages[0].content[0].image_url.url",
            "string",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": 1}}]}
                ]
            },
            "messages[0].content[0].image_url.detail",
            "'low'",
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "messages[1].content", "tool_calls"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "I"}]}, "messages[1]", "last message must be"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "1"}]}, "messages[0]", "'x' is the id of no"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "integer"),
        ({"n": MAX_CHOICES + 1}, "n", f"less than or equal to {MAX_CHOICES}"),
        ({"seed": "x"}, "seed", "integer"),
        ({"stop": ""}, "stop", "not be empty"),
        ({"stop": ["a", ""]}, "stop[1]", "not be empty"),
        ({"stop": 5}, "stop", "string or a valid list"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"presence_penalty": -0.5}, "presence_penalty", "not supported"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", '["text"]'),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": "x"}}},
            "response_format.json_schema.schema",
            "a JSON object",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [TOOL, TOOL]}, "tools", "names that differ"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128 items"),
        ({"messages": [QUESTION, {"role": "user"}, 5]}, "messages[1].content", "required"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "schema of an object",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "'required' or a JSON object"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "'other', which is none of tools",
        ),
        ({"tools": [TOOL], "logprobs": True}, "logprobs", "cannot be given where functions can be called"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert words in str(caught.value) and str(caught.value).startswith((f"{param}: ", f"{param} "))


def test_a_million_errors_take_no_time() -> None:
    started = time.perf_counter()
    for fields in (
        {"messages": [{}] * 1_000_000},
        {"messages": [{"role": "user", "content": [5] * 1_000_000}]},
        {"messages": [QUESTION] * 1_000_000},
        {"tools": [5] * 1_000_000},
        {"stop": [5] * 1_000_000},
        {"modalities": [5] * 1_000_000},
    ):
        with pytest.raises(RequestError):
            asked(**fields)
    with pytest.raises(RequestError):
        complete(prompt=[5] * 1_000_000)
    assert time.perf_counter() - started < 5


def test_neutral_values_of_what_is_not_supported() -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "modalities": ["text"]}
    assert job(**neutral, functions=[], function_call="auto", tools=[], tool_choice="auto") == job()


def complete(**fields: Any) -> Asked:
    return completions(parsed(CompletionRequest, {"prompt": "Once", **fields}), DEFAULTS)


def test_prompts_are_raw() -> None:
    (one,) = complete(logprobs=2, stop="\n", temperature=0).jobs
    assert one == Job(
        [Message("user", "Once")],
        {"seed": 7, "max_tokens": 16, "logprobs": 2, "stop": ("\n",), "temperature": 0},
        raw=True,
    )
    several = complete(prompt=["a", "b"], n=2, max_tokens=2000)
    assert [job.messages[0].text for job in several.jobs] == ["a", "b"]
    assert several.n_answers == 4 and several.jobs[0].options["max_tokens"] == 1000
    assert complete(best_of=1, echo=False, suffix="") == complete()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "string or a valid list"),
        ({"prompt": [1, 2]}, "prompt[0]", "string"),
        ({"prompt": [[1, 2]]}, "prompt[0]", "string"),
        ({"prompt": []}, "prompt", "not be empty"),
        ({"prompt": ["a"] * 17}, "prompt", "at most 16"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt", "18 answers"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "as large as n"),
        ({"logprobs": True}, "logprobs", "integer"),
    ],
)
def test_completions_that_cannot_be(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        complete(**fields)
    assert caught.value.param == param
