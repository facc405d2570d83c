"""OpenAI's routes over ASGI, with a scripted model: responses, streams, errors, and clients that go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from scripted_backend import SETTINGS, NoPictures, Scripted, reply
from test_openai_tools import TOOLS
from test_openai_wire import QUESTION

from local_llava.errors import BusyError, EngineError, ImageError, PromptError, UsageError
from local_llava.server import app
from local_llava.server.backend import EngineDiedError, RestartingError
from local_llava.server.settings import ServerSettings

PICTURE = {
    "role": "user",
    "content": [
        {"type": "text", "text": "And this?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ],
}


def application(backend: Scripted, **fields: Any) -> Any:
    return app.create(backend, ServerSettings(**{"max_tokens": 1000, "ui": False, **fields}))


@asynccontextmanager
async def serving(backend: Scripted, **fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(backend, **fields), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def post(backend: Scripted, path: str, body: Any, settings: dict[str, Any] | None = None) -> httpx.Response:
    """The response to one request."""

    async def ask() -> httpx.Response:
        async with serving(backend, **(settings or {})) as client:
            return await asyncio.wait_for(client.post(path, json=body), 20)

    return asyncio.run(ask())


def chat(backend: Scripted, **fields: Any) -> httpx.Response:
    return post(backend, "/v1/chat/completions", {"model": "tiny", "messages": [QUESTION], **fields})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream that ended well."""
    assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *data, end, nothing = response.text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    assert all(event.startswith("data: ") for event in data)
    return [json.loads(event[6:]) for event in data]


def chunks(response: httpx.Response) -> list[ChatCompletionChunk]:
    return [ChatCompletionChunk.model_validate(event, strict=True) for event in events(response)]


def test_an_answer() -> None:
    backend = Scripted("Two cats.")
    response = chat(backend)
    body = ChatCompletion.model_validate_json(response.content, strict=True)
    assert response.status_code == 200 and body.model == "tiny:F32" and body.id.startswith("chatcmpl-")
    (choice,) = body.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", "Two cats.")
    assert (choice.finish_reason, choice.logprobs, choice.message.tool_calls) == ("stop", None, None)
    assert body.usage is not None and body.usage.prompt_tokens_details is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens, body.usage.total_tokens) == (30, 5, 35)
    assert body.usage.prompt_tokens_details.cached_tokens == 20
    timings = response.json()["timings"]
    assert timings["images_encoded"] == 1 and timings["decode_tokens_per_s"] == 4.0
    assert backend.names == ["tiny:F32"] and backend.closed == 1


def test_ids_differ() -> None:
    backend = Scripted()
    assert chat(backend).json()["id"] != chat(backend).json()["id"]


def test_a_stream() -> None:
    found = chunks(chat(Scripted("Two small cats."), stream=True))
    assert len({chunk.id for chunk in found}) == 1
    assert [chunk.choices[0].delta.content for chunk in found] == ["", "Two ", "small ", "cats.", None]
    assert found[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in found] == [None] * 4 + ["stop"]
    assert all(chunk.usage is None for chunk in found)


def test_a_stream_with_usage() -> None:
    response = chat(Scripted(), stream=True, stream_options={"include_usage": True})
    found = chunks(response)
    assert all(event["usage"] is None for event in events(response)[:-1])
    assert found[-1].choices == [] and found[-1].usage is not None and found[-1].usage.total_tokens == 35


def test_an_answer_that_was_cut() -> None:
    cut = reply("Two", "length")
    assert chat(Scripted(cut)).json()["choices"][0]["finish_reason"] == "length"
    assert chunks(chat(Scripted(cut), stream=True))[-1].choices[0].finish_reason == "length"


def test_several_answers() -> None:
    backend = Scripted("One.", "Two cats.", "Three cats here.")
    body = ChatCompletion.model_validate_json(chat(backend, n=3, seed=5).content, strict=True)
    assert [choice.message.content for choice in body.choices] == ["One.", "Two cats.", "Three cats here."]
    assert [job.options["seed"] for job in backend.jobs] == [5, 6, 7]
    assert body.usage is not None and (body.usage.prompt_tokens, body.usage.completion_tokens) == (30, 15)


def test_several_answers_in_a_stream() -> None:
    backend = Scripted("One.", "Two cats.", "Three cats here.")
    found = chunks(chat(backend, n=3, stream=True, stream_options={"include_usage": True}))
    texts, ends = ["", "", ""], [0, 0, 0]
    for chunk in found[:-1]:
        (choice,) = chunk.choices
        assert not ends[choice.index]
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason is not None
    assert texts == ["One.", "Two cats.", "Three cats here."] and ends == [1, 1, 1]
    order = [chunk.choices[0].index for chunk in found[:-1]]
    assert order != sorted(order)  # side by side, not one after the other
    assert found[-1].usage is not None and found[-1].usage.completion_tokens == 15
    assert backend.closed == 3


def test_logprobs() -> None:
    body = ChatCompletion.model_validate_json(chat(Scripted(), logprobs=True, top_logprobs=2).content, strict=True)
    logprobs = body.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [(token.token, token.logprob) for token in logprobs.content] == [("Two ", -0.5), ("cats.", -0.5)]
    assert bytes(logprobs.content[0].bytes or ()) == b"Two "
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["Two ", "other"]
    streamed = chunks(chat(Scripted(), logprobs=True, stream=True))
    tokens = [t.token for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content or ()]
    assert tokens == ["Two ", "cats."]


def test_pictures_are_resolved_once_for_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, backend = NoPictures(), Scripted()
    monkeypatch.setattr(app, "ImagePolicy", lambda settings: pictures)
    assert chat(backend, messages=[PICTURE], n=2).status_code == 200
    assert len(pictures.resolved) == 1
    assert [job.messages[0].images for job in backend.jobs] == [(b"data:image/png;base64,AAAA",)] * 2


def test_pictures_that_are_not_let_in() -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
    for stream in (False, True):
        response = chat(Scripted(), messages=[message], stream=stream)
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_image"


CALLED = '{"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "now", "arguments": {}}]}'


def test_calls() -> None:
    body = ChatCompletion.model_validate_json(chat(Scripted(CALLED), tools=TOOLS).content, strict=True)
    (choice,) = body.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    calls = choice.message.tool_calls or []
    assert [(c.function.name, c.function.arguments) for c in calls if c.type == "function"] == [
        ("weather", '{"city": "Oslo"}'),
        ("now", "{}"),
    ]
    assert len({call.id for call in calls}) == 2


def test_calls_in_a_stream() -> None:
    found = chunks(chat(Scripted(CALLED), tools=TOOLS, stream=True))
    assert found[-1].choices[0].finish_reason == "tool_calls"
    calls: dict[int, list[Any]] = {}
    for chunk in found:
        assert not chunk.choices[0].delta.content
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            if call.id:
                calls[call.index] = [call.id, call.function.name, ""]
            calls[call.index][2] += call.function.arguments or ""
    assert [call[1:] for call in calls.values()] == [["weather", '{"city": "Oslo"}'], ["now", "{}"]]


def test_an_answer_where_functions_could_be_called() -> None:
    backend = Scripted('{"answer": "Two cats. Three."}')
    body = chat(backend, tools=TOOLS, stop=[" Three"]).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Two cats.", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    found = chunks(chat(backend, tools=TOOLS, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in found]
    assert "".join(filter(None, pieces)) == "Two cats. Three." and len(pieces) > 3


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (UsageError("temperature must be 0 to 100"), 400, "invalid_request_error", "invalid_value", None),
        (UsageError("schema: 'not' at # is not supported"), 400, "invalid_request_error", "invalid_schema", "tools"),
        (PromptError("too long"), 400, "invalid_request_error", "context_length_exceeded", "messages"),
        (ImageError("no picture"), 400, "invalid_request_error", "invalid_image", "messages"),
        (BusyError("64 wait"), 429, "rate_limit_error", "rate_limit_exceeded", None),
        (RestartingError("it dies", 7.6), 503, "server_error", "model_restarting", None),
        (EngineDiedError("it died"), 503, "server_error", "model_died", None),
        (EngineError("no memory"), 503, "server_error", "engine_error", None),
        (ZeroDivisionError("secret"), 500, "server_error", "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(stream: bool, error: Exception, status: int, kind: str, code: str, param: str | None) -> None:
    response = chat(Scripted(error), stream=stream, tools=TOOLS)
    assert response.status_code == status and response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    fields = response.json()["error"]
    assert (fields["type"], fields["code"], fields["param"]) == (kind, code, param)
    assert "secret" not in response.text
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    if isinstance(error, RestartingError):
        assert response.headers["retry-after"] == "8"


def test_an_error_in_the_middle_of_a_stream() -> None:
    backend = Scripted(["Two ", EngineDiedError("it died")])
    response = chat(backend, stream=True)
    assert response.status_code == 200 and "[DONE]" not in response.text
    last = json.loads(response.text.rstrip().split("\n\n")[-1][6:])
    assert last["error"]["message"] == "it died" and last["error"]["code"] == "model_died"


def test_an_error_of_one_of_several_answers_ends_all() -> None:
    backend = Scripted(["One", None], ["Two ", EngineError("no memory")], ["Three", None])
    assert chat(backend, n=3).status_code == 503
    assert (backend.open, backend.closed) == (0, 3)


def test_wrong_requests() -> None:
    backend = Scripted()
    response = chat(backend, temperature=5)
    assert response.status_code == 400
    assert response.json() == {
        "error": {
            "message": "temperature: should be less than or equal to 2",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "invalid_value",
        }
    }
    unknown = chat(backend, model="gpt-4o")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert not backend.jobs


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": NaN}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_bodies_that_are_no_json(path: str, body: bytes) -> None:
    async def send() -> httpx.Response:
        async with serving(Scripted()) as client:
            return await client.post(path, content=body, headers={"Content-Type": "application/json"})

    response = asyncio.run(send())
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_seeds_differ_unless_one_is_given() -> None:
    backend = Scripted()
    for _ in range(4):
        chat(backend)
    assert len({job.options["seed"] for job in backend.jobs}) > 1
    backend = Scripted()
    for _ in range(2):
        post(backend, "/v1/chat/completions", {"messages": [QUESTION]}, {"options": {"seed": 3, "system": "Be kind."}})
    assert [job.options["seed"] for job in backend.jobs] == [3, 3]
    assert backend.jobs[0].messages[0].text == "Be kind."


def test_models() -> None:
    async def fetch() -> tuple[httpx.Response, ...]:
        async with serving(Scripted()) as client:
            paths = ("/v1/models", "/v1/models/tiny:F32", "/v1/models/some/other")
            return tuple([await client.get(path) for path in paths])

    listed, one, none = asyncio.run(fetch())
    expected = {"id": "tiny:F32", "object": "model", "created": 1_700_000_000, "owned_by": "local-llava"}
    assert listed.json() == {"object": "list", "data": [expected]}
    assert Model.model_validate(one.json(), strict=True).id == "tiny:F32" and one.json() == expected
    assert none.status_code == 404 and none.json()["error"]["code"] == "model_not_found"


def complete(backend: Scripted, **fields: Any) -> httpx.Response:
    return post(backend, "/v1/completions", {"prompt": "Once", **fields})


def test_completions() -> None:
    backend = Scripted("upon a time", "there was", "a cat", "an end")
    body = Completion.model_validate_json(complete(backend, prompt=["a", "b"], n=2, seed=1).content, strict=True)
    assert [(c.index, c.text) for c in body.choices] == [
        (0, "upon a time"),
        (1, "there was"),
        (2, "a cat"),
        (3, "an end"),
    ]
    assert [(job.messages[0].text, job.options["seed"], job.raw) for job in backend.jobs] == [
        ("a", 1, True),
        ("a", 2, True),
        ("b", 1, True),
        ("b", 2, True),
    ]
    assert body.usage is not None and (body.usage.prompt_tokens, body.usage.completion_tokens) == (60, 20)


def test_completions_with_logprobs() -> None:
    body = Completion.model_validate_json(complete(Scripted("upon a"), logprobs=2).content, strict=True)
    logprobs = body.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["upon ", "a"], [0, 5])
    assert logprobs.top_logprobs == [{"upon ": -0.5, "other": -1.5}, {"a": -0.5, "other": -1.5}]
    pieces = [event["choices"][0] for event in events(complete(Scripted("upon a"), logprobs=0, stream=True))]
    offsets = [piece["logprobs"]["text_offset"] for piece in pieces if piece["logprobs"]]
    assert offsets == [[0], [5]]


def test_completions_in_a_stream() -> None:
    found = events(complete(Scripted("upon a time"), stream=True, stream_options={"include_usage": True}))
    pieces = [event["choices"][0] for event in found[:-1]]
    assert [piece["text"] for piece in pieces] == ["upon ", "a ", "time", ""]
    assert [piece["finish_reason"] for piece in pieces] == [None, None, None, "stop"]
    assert found[-1]["choices"] == [] and found[-1]["usage"]["total_tokens"] == 35


async def leave(backend: Scripted, path: str, body: Any, pieces: int, answers: int = 1) -> list[dict[str, Any]]:
    """What a client got that goes while it waits for what never comes.

    Args:
        pieces: Pieces of the response's body that it waits for first.
        answers: Answers that must be under way first.
    """
    sent: list[dict[str, Any]] = []
    enough, gone = asyncio.Event(), asyncio.Event()

    async def under_way() -> None:
        while backend.open < answers:
            await asyncio.sleep(0.001)

    to_read = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if to_read:
            return to_read.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if sum(message["type"] == "http.response.body" for message in sent) >= pieces:
            enough.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
    }
    serve: Callable[..., Coroutine[Any, Any, None]] = application(backend)
    task = asyncio.ensure_future(serve(scope, receive, send))
    await asyncio.wait_for(under_way(), 5)
    await asyncio.wait_for(backend.waiting.wait(), 5)
    if pieces:
        await asyncio.wait_for(enough.wait(), 5)
    gone.set()
    await asyncio.wait_for(task, 5)
    return sent


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [[], ["Two cats"]])
def test_a_client_that_goes_frees_its_answers(n: int, stream: bool, before: list[str]) -> None:
    backend = Scripted([*before, None])
    body = {"messages": [QUESTION], "n": n, "stream": stream}
    sent = asyncio.run(leave(backend, "/v1/chat/completions", body, 2 if stream and before else 0, n))
    assert (backend.open, backend.closed) == (0, n)
    if stream and before:
        assert sent[0]["status"] == 200 and b"data: " in sent[1]["body"]
    else:
        assert all(message.get("status", 499) == 499 for message in sent)


@pytest.mark.parametrize(("path", "asking"), [("/v1/completions", "prompt"), ("/v1/responses", "input")])
def test_a_client_that_goes_frees_the_answers_of_other_apis(path: str, asking: str) -> None:
    backend = Scripted(["Two ", None])
    asyncio.run(leave(backend, path, {asking: "a", "stream": True}, 1))
    assert (backend.open, backend.closed) == (0, 1)


def test_settings_limit_tokens() -> None:
    backend = Scripted()
    chat(backend, max_tokens=10**9)
    assert backend.jobs[0].options["max_tokens"] == SETTINGS.max_tokens
