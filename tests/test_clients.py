"""The server as programs use it that were written for OpenAI's: each runs for real, against `local-llava serve`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import server_process
import tiny_world
from pydantic import BaseModel, Field
from server_process import Server

QUESTION = "What do you see?"


class Count(BaseModel):
    """What a question may be answered with."""

    colour: Literal["red", "green", "blue"]
    n: int = Field(ge=0, le=9)


WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TOOL: dict[str, Any] = {"type": "function", "function": WEATHER}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with server_process.running(env={"OMP_NUM_THREADS": "1"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> bytes:
    file = io.BytesIO()
    tiny_world.picture(3).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def messages(picture: bytes) -> list[Any]:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


@pytest.fixture(scope="module")
def answer(client: openai.OpenAI, model: str, messages: list[Any]) -> str:
    """What the model says of the picture; every client must get it."""
    completion = client.chat.completions.create(model=model, messages=messages)
    text = completion.choices[0].message.content
    assert text and completion.choices[0].finish_reason == "stop"
    return text


def test_models(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError, match="nowhere"):
        client.models.retrieve("nowhere")


def test_openai_streams(client: openai.OpenAI, model: str, messages: list[Any], answer: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens  # the picture was shown before


def test_openai_async(server: Server, model: str, messages: list[Any], answer: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def streamed() -> str:
                text = ""
                stream = await client.chat.completions.create(model=model, messages=messages, stream=True)
                async for piece in stream:
                    text += piece.choices[0].delta.content or ""
                return text

            async def whole() -> str:
                completion = await client.chat.completions.create(model=model, messages=messages)
                return completion.choices[0].message.content or ""

            return list(await asyncio.gather(streamed(), whole(), streamed(), whole()))

    assert asyncio.run(ask()) == [answer] * 4


def test_openai_options(client: openai.OpenAI, model: str, messages: list[Any], answer: str) -> None:
    def texts(**options: Any) -> list[str]:
        completion = client.chat.completions.create(model=model, messages=messages, **options)
        return [choice.message.content or "" for choice in completion.choices]

    first = answer.split()[0]
    (cut,) = texts(stop=first[1:])
    assert cut == first[:1]
    (short,) = texts(max_completion_tokens=1)
    assert answer.startswith(short)
    # Each with a seed of its own. That they are the same again is not promised in company: docs/engine.md.
    drawn = texts(n=4, temperature=2.0, top_p=1.0, seed=1, extra_body={"min_p": 0.0, "top_k": 0}, max_tokens=12)
    assert len(drawn) == 4 and len(set(drawn)) > 1
    completion = client.chat.completions.create(model=model, messages=messages, logprobs=True, top_logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for token in logprobs.content:  # greedy: the likeliest was taken
        assert token.logprob == max(top.logprob for top in token.top_logprobs) and len(token.top_logprobs) == 3


def test_openai_parses(client: openai.OpenAI, model: str, messages: list[Any]) -> None:
    completion = client.chat.completions.parse(model=model, messages=messages, response_format=Count)
    assert isinstance(completion.choices[0].message.parsed, Count)
    with client.chat.completions.stream(model=model, messages=messages, response_format=Count) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == completion.choices[0].message.parsed
    anything = client.chat.completions.create(
        model=model, messages=messages, response_format={"type": "json_object"}, max_tokens=40
    )
    assert isinstance(json.loads(anything.choices[0].message.content or ""), dict)


def test_openai_calls_functions(client: openai.OpenAI, model: str, messages: list[Any]) -> None:
    tools: Any = [TOOL]
    completion = client.chat.completions.create(model=model, messages=messages, tools=tools, tool_choice="required")
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls" and message.tool_calls
    for call in message.tool_calls:
        assert call.type == "function" and call.function.name == "weather"
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 7
    results = [{"role": "tool", "tool_call_id": call.id, "content": "Sunny."} for call in message.tool_calls]
    history: list[Any] = [*messages, message.model_dump(exclude_none=True), *results]
    said = client.chat.completions.create(model=model, messages=history, tools=tools, tool_choice="none")
    assert said.choices[0].message.content and not said.choices[0].message.tool_calls
    free = client.chat.completions.create(model=model, messages=history, tools=tools, max_tokens=60)
    assert (free.choices[0].message.content is None) == bool(free.choices[0].message.tool_calls)
    with client.chat.completions.stream(
        model=model, messages=messages, tools=tools, tool_choice={"type": "function", "function": {"name": "weather"}}
    ) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_openai_responses(client: openai.OpenAI, model: str, messages: list[Any], answer: str) -> None:
    text, shown = messages[0]["content"]
    content = [
        {"type": "input_text", "text": text["text"]},
        {"type": "input_image", "image_url": shown["image_url"]["url"], "detail": "auto"},
    ]
    asked: Any = [{"role": "user", "content": content}]
    response = client.responses.create(model=model, input=asked)
    assert response.output_text == answer and response.status == "completed"
    with client.responses.stream(model=model, input=asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == answer == stream.get_final_response().output_text
    assert isinstance(client.responses.parse(model=model, input=asked, text_format=Count).output_parsed, Count)
    tool: Any = {"type": "function", "strict": True, **WEATHER}
    calling = client.responses.create(model=model, input=asked, tools=[tool], tool_choice="required")
    calls = [item for item in calling.output if item.type == "function_call"]
    assert calls and all(json.loads(call.arguments)["city"] in ("Oslo", "Rome") for call in calls)
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."} for call in calls]
    history: Any = [*asked, *(item.model_dump(exclude_none=True) for item in calling.output), *outputs]
    assert client.responses.create(model=model, input=history, instructions="Be brief.").output_text
    with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
        client.responses.create(model=model, input="And now?", previous_response_id=response.id)


def test_openai_completions(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt="There are two red", max_tokens=5, logprobs=1)
    assert whole.choices[0].text and whole.choices[0].logprobs
    stream = client.completions.create(model=model, prompt="There are two red", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == whole.choices[0].text


def test_openai_errors(client: openai.OpenAI, model: str, messages: list[Any]) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="gpt-4o", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(model=model, messages=messages, temperature=-1)
    assert wrong.value.param == "temperature"
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError, match="picture"):
            broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
            ask(model=model, messages=[{"role": "user", "content": broken}], stream=stream)  # type: ignore[call-overload]
        with pytest.raises(openai.BadRequestError) as schema:
            form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
            ask(model=model, messages=messages, stream=stream, response_format=form)
        assert schema.value.param == "response_format" and "'not'" in str(schema.value)
    with pytest.raises(openai.BadRequestError) as long:
        ask(model=model, messages=[{"role": "user", "content": "word " * 20_000}])
    assert long.value.code == "context_length_exceeded"


def test_a_client_that_goes_leaves_room(client: openai.OpenAI, server: Server, model: str, answer: str) -> None:
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": _ENDLESS}},
        max_tokens=2000,
    ) as stream:
        next(iter(stream))
    end = time.monotonic() + 20
    while server.health()["answering"]:
        assert time.monotonic() < end, "nobody reads the answer, but it is given"
        time.sleep(0.05)


_ENDLESS: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string", "minLength": 5000}}}


def test_langchain(server: Server, model: str, messages: list[Any], answer: str) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=model, temperature=0)  # type: ignore[arg-type]
    asked = [HumanMessage(content=messages[0]["content"])]
    assert chat.invoke(asked).content == answer
    assert "".join(str(piece.content) for piece in chat.stream(asked)) == answer
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Count, method=method).invoke(asked), Count)  # type: ignore[arg-type]
    called: Any = chat.bind_tools([TOOL], tool_choice="any").invoke(asked)
    assert {call["name"] for call in called.tool_calls} == {"weather"}


def test_llm(server: Server, model: str, picture: bytes, answer: str, tmp_path: Path) -> None:
    known = {
        "model_id": "local",
        "model_name": model,
        "api_base": f"{server.url}/v1",
        "vision": True,
        "supports_schema": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([known]))  # JSON is YAML
    shown = tmp_path / "picture.png"
    shown.write_bytes(picture)
    asked = ["-m", "local", QUESTION, "-a", str(shown)]
    assert _llm(tmp_path, *asked).strip() == answer
    Count.model_validate_json(_llm(tmp_path, *asked, "--no-stream", "--schema", json.dumps(Count.model_json_schema())))


def _llm(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env={**os.environ, "LLM_USER_PATH": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server: Server, model: str, messages: list[Any], answer: str, tmp_path: Path) -> None:
    body = tmp_path / "body.json"

    def curl(path: str, *arguments: str) -> str:
        command = ["curl", "-sS", "--fail-with-body", f"{server.url}{path}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    body.write_text(json.dumps({"model": model, "messages": messages}))
    sent = ["-H", "Content-Type: application/json", "-d", f"@{body}"]
    assert json.loads(curl("/v1/chat/completions", *sent))["choices"][0]["message"]["content"] == answer
    body.write_text(json.dumps({"messages": messages, "stream": True}))
    *events, done, rest = curl("/v1/chat/completions", "-N", *sent).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(piece.get("content") or "" for piece in pieces) == answer
    assert json.loads(curl("/v1/models"))["data"][0]["id"] == model
