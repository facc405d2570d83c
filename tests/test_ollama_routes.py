"""Ollama's HTTP API, /health, /metrics and the root, with models that answer what a test tells them to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from scripted_backend import SETTINGS, Scripted, reply

from local_llava.errors import BusyError, ImageError, PromptError
from local_llava.server import app
from local_llava.server.backend import EngineDiedError, Health, Job, RestartingError, StoppingError
from local_llava.server.metrics import Counted, Metrics
from local_llava.server.settings import ServerSettings


class Remembering(Scripted):
    """Also what becomes of the model."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(*answers)
        self.kept: list[float | None] = []
        self.loads: list[float | None] = []
        self.status = "ok"

    def stream(self, name: str | None, job: Job, *, keep_alive_s: float | None = None) -> Any:
        self.kept.append(keep_alive_s)
        return super().stream(name, job)

    async def load(self, name: str | None, *, keep_alive_s: float | None = None) -> None:
        await super().load(name)
        self.loads.append(keep_alive_s)

    def health(self) -> Health:
        return Health(self.status, ("tiny:F32",), self.open, 3, "it died")


@asynccontextmanager
async def client(
    backend: Scripted, settings: ServerSettings = SETTINGS, **values: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Asks an app without a socket between."""
    metrics = Metrics()
    made = Counted(app.create(backend, settings, metrics=metrics, **values), metrics)
    transport = httpx.ASGITransport(made, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asking:
        yield asking


def ask(backend: Scripted, path: str, body: Any, **values: Any) -> httpx.Response:
    """One POST."""

    async def run() -> httpx.Response:
        async with client(backend, **values) as asking:
            return await asking.post(path, json=body)

    return asyncio.run(run())


def get(
    backend: Scripted, path: str, method: str = "GET", settings: ServerSettings = SETTINGS, **values: Any
) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(backend, settings, **values) as asking:
            return await asking.request(method, path)

    return asyncio.run(run())


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


QUESTION = {"model": "tiny", "prompt": "What?"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}]}


def test_generate_streams_lines() -> None:
    said = lines(ask(Scripted("Two cats."), "/api/generate", QUESTION))
    assert [line["response"] for line in said] == ["Two ", "cats.", ""]
    assert [line["done"] for line in said] == [False, False, True]
    assert all(line["model"] == "tiny" for line in said) and said[-1]["eval_count"] == 5


def test_generate_gives_all_at_once() -> None:
    response = ask(Scripted("Two cats."), "/api/generate", {**QUESTION, "stream": False})
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert body["response"] == "Two cats." and body["done"] is True and body["done_reason"] == "stop"
    assert body["total_duration"] > 0


def test_chat_streams_and_gives_all_at_once() -> None:
    said = lines(ask(Scripted("Two cats."), "/api/chat", CHAT))
    assert "".join(line["message"]["content"] for line in said) == "Two cats."
    body = ask(Scripted("Two cats."), "/api/chat", {**CHAT, "stream": False}).json()
    assert body["message"] == {"role": "assistant", "content": "Two cats."}


def test_logprobs_come_with_their_pieces() -> None:
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2}
    said = lines(ask(Scripted("Two cats."), "/api/chat", asked))
    assert [[p["token"] for p in line.get("logprobs", ())] for line in said] == [["Two "], ["cats."], []]
    body = ask(Scripted("Two cats."), "/api/chat", {**asked, "stream": False}).json()
    assert len(body["logprobs"]) == 2 and len(body["logprobs"][0]["top_logprobs"]) == 2


def test_calls_of_functions_come_in_one_line() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = '{"calls": [{"name": "f", "arguments": {"a": 1}}]}'
    said = lines(ask(Scripted(answer), "/api/chat", {**CHAT, "tools": tools}))
    calls = [line["message"].get("tool_calls") for line in said]
    assert calls == [[{"function": {"name": "f", "arguments": {"a": 1}}}], None]
    assert said[-1]["done_reason"] == "stop"


def test_the_model_has_other_names() -> None:
    backend = Scripted()
    for name in ("tiny", "tiny:latest", "tiny:F32", "", None):
        assert ask(backend, "/api/generate", {"model": name, "prompt": "a", "stream": False}).status_code == 200
    assert backend.names == ["tiny:F32"] * 5
    missing = ask(backend, "/api/generate", {"model": "huge", "prompt": "a"})
    assert missing.status_code == 404 and list(missing.json()) == ["error"] and "huge" in missing.json()["error"]


@pytest.mark.parametrize(
    ("given", "kept"), [("5m", 300.0), (0, 0.0), (-1, -1.0), ("-1", -1.0), (None, None), (90, 90.0)]
)
def test_keep_alive(given: Any, kept: float | None) -> None:
    backend = Remembering()
    ask(backend, "/api/generate", {**QUESTION, "keep_alive": given})
    assert backend.kept == [kept] and backend.loads == []


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_without_a_question_the_model_is_loaded_or_unloaded(path: str) -> None:
    backend = Remembering()
    body = ask(backend, path, {"model": "tiny"}).json()
    assert body["done"] is True and body["done_reason"] == "load"
    assert ask(backend, path, {"model": "tiny", "keep_alive": 0}).json()["done_reason"] == "unload"
    assert backend.loads == [None, 0.0] and backend.jobs == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (PromptError("too long"), 400, None),
        (ImageError("no picture"), 400, None),
        (BusyError("many wait"), 429, "2"),
        (EngineDiedError("it died"), 503, "2"),
        (RestartingError("again", 7.2), 503, "8"),
        (StoppingError("ends"), 503, "10"),
        (ZeroDivisionError("secret"), 500, None),
    ],
)
def test_errors_before_the_answer_have_a_status(error: Exception, status: int, retry: str | None, stream: bool) -> None:
    response = ask(Scripted(error), "/api/chat", {**CHAT, "stream": stream})
    assert response.status_code == status and list(response.json()) == ["error"]
    assert response.headers.get("retry-after") == retry and "secret" not in response.text


def test_an_error_amid_a_stream_is_its_last_line() -> None:
    said = lines(ask(Scripted(["Two ", EngineDiedError("it died")]), "/api/generate", QUESTION))
    assert said[-1] == {"error": "it died"} and "Two " in [line.get("response") for line in said]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b"", 400), (b'{"prompt": 1}', 400), (b'{"prompt": "\\ud800"}', 400)],
)
def test_bodies_that_are_no_requests(body: bytes, status: int) -> None:
    async def run() -> httpx.Response:
        async with client(Scripted()) as asking:
            return await asking.post("/api/generate", content=body, headers={"Content-Type": "text/plain"})

    response = asyncio.run(run())
    assert response.status_code == status and list(response.json()) == ["error"]


def test_too_many_pictures_are_refused() -> None:
    response = ask(Scripted(), "/api/generate", {**QUESTION, "images": ["QUJD"] * 99})
    assert response.status_code == 400 and "99 pictures" in response.json()["error"]


def test_pictures_reach_the_model_as_bytes() -> None:
    backend = Scripted()
    ask(backend, "/api/generate", {**QUESTION, "images": ["QUJD"]})
    assert backend.jobs[0].messages[0].images == (b"ABC",)
    assert ask(backend, "/api/generate", {**QUESTION, "images": ["/etc/passwd"]}).status_code in (200, 400)
    shown = [image for job in backend.jobs for image in job.messages[0].images]
    assert all(isinstance(image, bytes) and b"root" not in image for image in shown)


def test_options_that_are_ignored_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with client(Scripted()) as asking:
            for _ in range(2):
                await asking.post("/api/generate", json={**QUESTION, "options": {"mirostat": 2}})

    asyncio.run(run())
    assert [r.getMessage() for r in caplog.records if "mirostat" in r.getMessage()] == [
        "Ollama's option mirostat is not supported, and ignored"
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer(stream: bool) -> None:
    backend = Scripted([None])

    async def run() -> None:
        async with client(backend) as asking:
            asked = asyncio.create_task(asking.post("/api/chat", json={**CHAT, "stream": stream}))
            await asyncio.wait_for(backend.waiting.wait(), 5)
            assert backend.open == 1
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(run())
    assert backend.open == 0 and backend.closed == 1


def test_what_is_on_this_computer() -> None:
    backend = Scripted()
    (model,) = get(backend, "/api/tags").json()["models"]
    assert model["name"] == model["model"] == "tiny:F32" and model["details"]["format"] == "gguf"
    assert get(backend, "/api/ps").json() == {"models": []}
    assert get(backend, "/api/version").json()["version"].count(".") == 2
    for body in ({"model": "tiny"}, {"name": "tiny:latest"}):
        assert ask(backend, "/api/show", body).json()["details"]["quantization_level"] == "F32"
    assert ask(backend, "/api/show", {"model": "huge"}).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("POST", "/api/pull", "local-llava pull"),
        ("DELETE", "/api/delete", "local-llava rm"),
        ("POST", "/api/create", "local-llava convert"),
        ("POST", "/api/embed", "no embeddings"),
        ("POST", "/api/blobs/sha256:ab", "local-llava convert"),
    ],
)
def test_what_is_not_offered_says_what_there_is(method: str, path: str, instead: str) -> None:
    response = get(Scripted(), path, method)
    assert response.status_code == 501 and instead in response.json()["error"]


def test_paths_and_methods_that_there_are_not() -> None:
    assert get(Scripted(), "/api/nothing").json() == {"error": "there is nothing at /api/nothing"}
    response = get(Scripted(), "/api/chat")
    assert response.status_code == 405 and response.headers["allow"] == "POST" and "error" in response.json()
    assert get(Scripted(), "/v2/nothing").json()["error"]["type"] == "not_found_error"


def test_the_root_is_known_to_clients_of_ollama() -> None:
    response = get(Scripted(), "/")
    assert response.status_code == 200 and "Ollama is running" in response.text
    assert get(Scripted(), "/", "HEAD").status_code == 200


def test_health() -> None:
    backend = Remembering()
    response = get(backend, "/health")
    assert (
        response.status_code == 200 and response.json()["loaded"] == ["tiny:F32"] and response.json()["restarts"] == 3
    )
    for status, code in (("restarting", 200), ("failing", 503)):
        backend.status = status
        response = get(backend, "/health")
        assert (response.status_code, response.json()["status"]) == (code, status)
        assert response.json()["detail"] == "it died"
    response = get(backend, "/health", stopping=lambda: True)
    assert (response.status_code, response.json()["status"]) == (503, "stopping")


def test_metrics() -> None:
    backend = Remembering(reply("Two cats.", "length"), BusyError("many wait"), [None])

    async def run() -> dict[str, float]:
        async with client(backend) as asking:
            await asking.post("/api/generate", json={**QUESTION, "images": ["QUJD"] * 3})
            await asking.post("/api/chat", json=CHAT)
            await asking.get("/nothing/at/all")
            asked = asyncio.create_task(asking.post("/api/chat", json=CHAT))
            await asyncio.wait_for(backend.waiting.wait(), 5)
            text = (await asking.get("/metrics")).text
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            text += (await asking.get("/metrics")).text.replace("local_llava_", "then_")
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    found = asyncio.run(run())
    model = 'model="tiny:F32"'
    for name, value in {
        f"local_llava_prompt_tokens_total{{{model}}}": 30,
        f"local_llava_reused_tokens_total{{{model}}}": 20,
        f"local_llava_completion_tokens_total{{{model}}}": 5,
        f"local_llava_images_encoded_total{{{model}}}": 1,
        f"local_llava_images_reused_total{{{model}}}": 2,
        f'local_llava_cache_hits_total{{{model},where="memory"}}': 1,
        f'local_llava_answers_total{{end="length",{model}}}': 1,
        f'local_llava_answers_total{{end="rate_limit_exceeded",{model}}}': 1,
        f"local_llava_time_to_first_token_seconds_count{{{model}}}": 1,
        f"local_llava_answer_seconds_count{{{model}}}": 1,
        "local_llava_answers_waiting": 1,
        "local_llava_answers_writing": 0,
        "local_llava_models_loaded": 1,
        "local_llava_restarts_total": 3,
        "local_llava_up": 1,
        'local_llava_requests_total{api="ollama",method="POST",route="/api/generate",status="200"}': 1,
        'local_llava_requests_total{api="ollama",method="POST",route="/api/chat",status="429"}': 1,
        'local_llava_requests_total{api="server",method="GET",route="other",status="404"}': 1,
        "then_answers_waiting": 0,
        f'then_answers_total{{end="cancelled",{model}}}': 1,
    }.items():
        assert found.get(name) == value, name


def test_openapi_is_whole_and_the_docs_need_no_network() -> None:
    schema = get(Scripted(), "/openapi.json").json()
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert name in schema["components"]["schemas"], name
    assert "x-definitions" not in text and '"422"' not in text
    body = schema["paths"]["/api/chat"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Ollama.ChatRequest"}
    page = get(Scripted(), "/docs").text
    assert "/api/generate" in page and "keep_alive" in page
    assert "<script" not in page and "http://" not in page and "https://" not in page
