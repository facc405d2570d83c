"""Requests for fuzz_server.py: right ones, what hypothesis makes of them, and ones that cost more than they look."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from hypothesis import strategies as st
from picture_files import photo, saved

PNG = saved(photo(8, 8), "PNG")
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"

Path: TypeAlias = tuple[Any, ...]

_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer", "minimum": 0}, "next": {"$ref": "#/$defs/a"}},
    "required": ["name"],
    "$defs": {"a": {"anyOf": [{"type": "null"}, {"enum": ["x", 1]}]}},
    "additionalProperties": False,
}
_FUNCTION = {"name": "weather", "description": "d", "parameters": _SCHEMA, "strict": True}
_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"name": "Oslo"}'}}

CHAT = "/v1/chat/completions"
RIGHT: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": [{"role": "user", "content": "What is it?"}], "stream": True, "seed": 1, "max_tokens": 5},
        {
            "model": "tiny:F32",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is it?"},
                        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
                        {"type": "image_url", "image_url": DATA_URL},
                    ],
                },
            ],
            "n": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["a", "b"], "logprobs": True, "top_logprobs": 2,
            "max_completion_tokens": 7, "stream": True, "stream_options": {"include_usage": True},
        },
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            ],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": "auto", "parallel_tool_calls": False,
        },
        {
            "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "JSON"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA, "strict": True}},
        },
    ],
    "/v1/completions": [{"prompt": ["a", "b"], "n": 2, "logprobs": 1, "echo": False, "stream": True, "stop": "x"}],
    "/v1/responses": [
        {"input": "What is it?", "instructions": "Be brief.", "max_output_tokens": 20, "stream": True},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "?"},
                                             {"type": "input_image", "image_url": DATA_URL, "detail": "auto"}]},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ],
            "tools": [{"type": "function", **_FUNCTION}],
            "text": {"format": {"type": "json_schema", "name": "a", "schema": _SCHEMA}},
            "top_logprobs": 1, "include": ["message.output_text.logprobs"], "metadata": {"a": "b"},
        },
    ],
    "/api/generate": [
        {"model": "tiny", "prompt": "What is it?", "images": [DATA_URL.partition(",")[2]], "system": "s",
        "stream": False,
         "options": {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "seed": 3, "stop": ["a"], "num_predict": 5,
         "num_ctx": 9},
         "keep_alive": "5m", "format": _SCHEMA},
        {"prompt": "raw", "raw": True, "keep_alive": 0},
    ],
    "/api/chat": [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "Weather?", "images": [DATA_URL.partition(",")[2]]},
                {"role": "assistant", "content": "", "tool_calls": [
                    {"function": {"name": "weather", "arguments": {"name": "Oslo"}}}]},
                {"role": "tool", "tool_name": "weather", "content": "rain"},
            ],
            "tools": [{"type": "function", "function": _FUNCTION}],
            "logprobs": True, "top_logprobs": 2, "think": False,
        },
        {"messages": [{"role": "user", "content": "JSON"}], "format": "json", "keep_alive": -1},
    ],
    "/api/show": [{"model": "tiny"}],
}  # fmt: skip
"""Bodies that are accepted, by path."""


def nested(depth: int, kind: str = "[") -> Any:
    """Lists or objects in each other."""
    value: Any = None
    for _ in range(depth):
        value = [value] if kind == "[" else {"a": value}
    return value


_DEEP_SCHEMA: Any = {"type": "integer"}
for _ in range(45):
    _DEEP_SCHEMA = {"type": "object", "properties": {"a": _DEEP_SCHEMA},
    "additionalProperties": {"anyOf": [_DEEP_SCHEMA]}} \
        if len(json.dumps(_DEEP_SCHEMA)) < 20_000 else {"type": "array", "items": _DEEP_SCHEMA}  # fmt: skip

_ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, 10**4000, -(10**4000), 0.0,
    -0.0, 1e-320, 1.5, 1e308, -1e308, float("inf"), float("-inf"), "", " ", "\0", "a\0b", "\n", "\u2028", "\ufffe",
    "\U0010ffff", "\u202e", "0", "null", "x" * 70_000, "[" * 100_000, '{"a":' * 50_000, "1" * 5000, "\\", '"',
    "{{ x }}", "{% for x in y %}", "<image>", "<__media__>", "<|eot_id|>", "%s%n", "../../etc/passwd",
    "http://127.0.0.1/", "file:///etc/passwd", "data:", "data:,", "data:;base64,", "data:;base64,A", f"{DATA_URL}=",
    "data:image/png;base64,iVBORw0KGgo=", "5m", "1e999h", "-0s", "user", "tool", "tiny:latest", [], {}, [[]], [None],
    {"": None}, {"type": "text"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"type": ["object", "null"]},
    {"pattern": "(a+)+$"}, {"enum": []}, {"minLength": 10**9}, {"minItems": 10**4000}, {"multipleOf": 1e-320},
    nested(150), nested(150, "{"), _DEEP_SCHEMA,
]  # fmt: skip

_TEXT = st.text(max_size=40)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXT, inner, max_size=4)),
    max_leaves=12,
)
VALUES = st.one_of(st.sampled_from(_ODD).map(copy.deepcopy), _JSON)
"""What JSON can hold."""


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where values are in a value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    """A path, and a body for it with a few things changed."""
    path = draw(st.sampled_from(sorted(RIGHT)))
    body: Any = copy.deepcopy(draw(st.sampled_from(RIGHT[path])))
    for _ in range(draw(st.integers(0, 3))):
        body = _changed(draw, body)
    return path, body


def _changed(draw: st.DrawFn, body: Any) -> Any:
    place = draw(st.sampled_from(list(places(body))))
    if not place:
        return draw(VALUES)
    holder = body
    for step in place[:-1]:
        holder = holder[step]
    last = place[-1]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "copy", "add"]))
    if how == "replace":
        holder[last] = draw(VALUES)
    elif how == "remove":
        del holder[last]
    elif how == "wrap":
        holder[last] = [holder[last]]
    elif how == "copy":  # from another place of another request, so that kinds of things meet
        other = draw(st.sampled_from(RIGHT[draw(st.sampled_from(sorted(RIGHT)))]))
        value: Any = other
        for step in draw(st.sampled_from(list(places(other)))):
            value = value[step]
        holder[last] = copy.deepcopy(value)
    elif isinstance(holder, dict):
        holder[draw(_TEXT)] = draw(VALUES)
    else:
        holder.append(copy.deepcopy(holder[last]))
    return body


data_urls = st.one_of(
    st.builds("data:{}".format, st.text(max_size=60)),
    st.builds("{}data:{},{}".format, st.sampled_from(["", " "]), st.sampled_from(["", ";base64", "image/png;BASE64",
    "x" * 9000]), st.text()),
    st.builds(lambda raw, cut: f"data:;base64,{base64.b64encode(raw).decode()[cut:]}", st.binary(max_size=90),
    st.integers(0, 5)),
    st.builds(lambda raw: "data:," + "".join(f"%{b:02x}" for b in raw) + "%", st.binary(max_size=60)),
    st.text(max_size=60),
    st.sampled_from(["http://", "file:", "FILE:///", "//", "data",
    "\\\\?\\"]).flatmap(lambda start: st.builds(f"{{}}{start}{{}}".format, st.just(""), st.text(max_size=40))),
)  # fmt: skip
"""What may stand for a picture."""


def bulk(size: int) -> Iterator[tuple[str, str, Any]]:
    """Bodies of about `size` bytes that may cost more than their length: a name, a path, a body."""
    user = {"role": "user", "content": "x"}

    def chat(n: int, **fields: Any) -> dict[str, Any]:
        return {"messages": [user] * n, "max_tokens": 1, **fields}

    n = size // 40
    calls = [{**_CALL, "id": str(i)} for i in range(size // 180)]
    results = [{"role": "tool", "tool_call_id": str(i), "content": "r"} for i in range(size // 180)]
    yield "messages of one role", CHAT, chat(n)
    yield "messages by turns", CHAT, {"messages": [user, {"role": "assistant", "content": "y"}] * (n // 2) + [user]}
    yield "system messages", CHAT, {"messages": [{"role": "system", "content": "x"}] * n}
    yield "wrong messages", CHAT, {"messages": [{"role": "user"}] * n}
    yield "messages that are none", CHAT, {"messages": [0] * (size // 2)}
    yield "parts", CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * n}]}
    yield "wrong parts", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}] * n}]}
    yield (
        "pictures",
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}] * n}]},
    )
    yield "calls and results", CHAT, {"messages": [{"role": "assistant", "tool_calls": calls}, *results]}
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(size // 60)]
    yield "tools", CHAT, chat(1, tools=tools)
    yield "tools of one name", CHAT, chat(1, tools=tools[:1] * len(tools))
    choice = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(size // 120)]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": choice}}
    yield "allowed tools", CHAT, chat(1, tools=tools[: len(choice)], tool_choice=allowed)
    yield "a long text", CHAT, {"messages": [{"role": "user", "content": "word " * (size // 5)}]}
    yield "a long text without spaces", CHAT, {"messages": [{"role": "user", "content": "x" * size}]}
    yield "a long text of arguments", CHAT, {"messages": [
        user, {"role": "assistant", "tool_calls": [{**_CALL, "function": {"name": "f", "arguments": "[" * size}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"}]}  # fmt: skip
    yield "stop texts", CHAT, chat(1, stop=["x"] * n)
    yield "a long stop text", CHAT, chat(1, stop="x" * size)
    yield "a long name", CHAT, chat(1, model="x" * size)
    yield "fields that are not known", CHAT, chat(1, **{f"f{i}": 0 for i in range(size // 12)})
    properties = {f"p{i}": {"type": "string"} for i in range(size // 25)}
    for title, schema in {
        "properties of a schema": {"type": "object", "properties": properties, "required": list(properties)},
        "values of a schema": {"enum": [f"v{i}" for i in range(size // 10)]},
        "a long pattern": {"type": "string", "pattern": "(a|b)*" * (size // 6)},
        "forms of a schema": {"anyOf": [{"const": i} for i in range(size // 16)]},
    }.items():
        yield (
            title,
            CHAT,
            chat(1, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}),
        )
        yield f"{title}, Ollama", "/api/generate", {"prompt": "x", "format": schema, "stream": False}
    yield "prompts", "/v1/completions", {"prompt": ["x"] * n}
    yield "token ids", "/v1/completions", {"prompt": [1] * (size // 3)}
    yield "items", "/v1/responses", {"input": [{"role": "user", "content": "x"}] * n}
    yield "wrong items", "/v1/responses", {"input": [{"type": "function_call"}] * n}
    yield "turns, Ollama", "/api/chat", {"messages": [user] * n, "stream": False}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}] * n}
    yield (
        "results, Ollama",
        "/api/chat",
        {"messages": [called, *[{"role": "tool", "content": "x"}] * n], "stream": False},
    )
    yield "pictures, Ollama", "/api/generate", {"prompt": "x", "images": [""] * (size // 3)}
    yield "a long picture", "/api/generate", {"prompt": "x", "images": ["A" * size]}
    yield "a long duration", "/api/generate", {"prompt": "x", "keep_alive": "1h" * (size // 2)}
    yield (
        "options, Ollama",
        "/api/generate",
        {"prompt": "x", "stream": False, "options": {f"o{i}": 0 for i in range(size // 12)}},
    )
