"""The `ollama` package, as programs use it, against a real server with the built-in model."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import urllib.parse
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Literal

import ollama
import pytest
import tiny_world
from PIL import Image
from pydantic import BaseModel
from server_process import Server, running
from tiny_world import Asked

from local_llava.types import ModelFiles

SEED = 20241


@pytest.fixture(scope="module")
def server(tiny: ModelFiles) -> Iterator[Server]:
    """One with nothing rounded."""
    with running("--model", str(tiny.model), "--no-ui", "--n-ctx", "1024", "--keep-alive", "10m") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> ollama.Client:
    return ollama.Client(server.url)


@pytest.fixture(scope="module")
def model(client: ollama.Client) -> str:
    """The name of the one that the server was started with."""
    name = client.list().models[0].model
    assert name and client.generate(name).done_reason == "load"
    return name


@pytest.fixture(scope="module")
def asked() -> Asked:
    """A question with a true answer that the model knows."""
    return tiny_world.questions(SEED, 1, 1)[0]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_generate(client: ollama.Client, model: str, asked: Asked) -> None:
    answer = client.generate(model, asked.question, images=[png(asked.picture)])
    assert answer.response == asked.answer
    assert answer.model == model and answer.done and answer.done_reason == "stop"
    assert answer.created_at and datetime.fromisoformat(answer.created_at).tzinfo is not None
    assert answer.prompt_eval_count and answer.eval_count and answer.eval_duration
    assert answer.total_duration and answer.total_duration < 60e9


def test_generate_streams(client: ollama.Client, model: str, asked: Asked) -> None:
    pieces = list(client.generate(model, asked.question, images=[png(asked.picture)], stream=True))
    assert "".join(piece.response for piece in pieces) == asked.answer
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_chat_goes_on_about_a_picture(client: ollama.Client, model: str) -> None:
    first, second = tiny_world.questions(SEED + 1, 1, 2)
    picture = ollama.Image(value=png(first.picture))
    messages = [ollama.Message(role="user", content=first.question, images=[picture])]
    answer = client.chat(model, messages)
    assert answer.message.role == "assistant" and answer.message.content == first.answer
    messages += [answer.message, ollama.Message(role="user", content=second.question)]
    pieces = list(client.chat(model, messages, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces)
    assert pieces[-1].done_reason == "stop"


def test_many_clients_of_an_event_loop(server: Server, model: str) -> None:
    questions = tiny_world.questions(SEED + 2, 2, 4)

    async def ask(asking: ollama.AsyncClient, one: Asked) -> str:
        answer = await asking.generate(model, one.question, images=[png(one.picture)])
        return answer.response

    async def run() -> list[str]:
        asking = ollama.AsyncClient(server.url)
        return await asyncio.gather(*(ask(asking, one) for one in questions))

    answers = asyncio.run(run())
    right = sum(answer == one.answer for answer, one in zip(answers, questions, strict=True))
    assert right >= len(questions) - 1


class Counted(BaseModel):
    """An answer in a form."""

    colour: Literal["red", "green", "blue"]
    count: int


def test_a_schema_is_followed(client: ollama.Client, model: str, asked: Asked) -> None:
    answer = client.chat(
        model,
        [{"role": "user", "content": "What do you see?", "images": [png(asked.picture)]}],
        format=Counted.model_json_schema(),
    )
    Counted.model_validate_json(answer.message.content or "")
    answer = client.chat(model, [{"role": "user", "content": "Count."}], format="json", options={"num_predict": 200})
    assert (answer.message.content or "").lstrip().startswith("{")


def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: Where.
    """
    return f"rain in {city}"


def test_a_function_is_called(client: ollama.Client, model: str) -> None:
    question = {"role": "user", "content": "Weather?"}
    answer = client.chat(model, [question], tools=[weather], options={"num_predict": 100})
    for call in answer.message.tool_calls or ():
        assert call.function.name == "weather"
        assert weather(**call.function.arguments).startswith("rain in ")
    # A model that knows shapes may call or not; what it says is one of both, and no JSON of ours.
    assert answer.message.tool_calls or not (answer.message.content or "").startswith("{")


def test_options(client: ollama.Client, model: str, asked: Asked) -> None:
    pictures = [png(asked.picture)]
    short = client.generate(model, "What do you see?", images=pictures, options={"num_predict": 2})
    assert short.done_reason == "length" and short.eval_count == 2
    hot = ollama.Options(temperature=1.5, seed=3, num_ctx=2048, num_predict=12)
    answers = {client.generate(model, "What do you see?", images=pictures, options=hot).response for _ in range(2)}
    assert len(answers) == 1
    # Without a seed, each gets its own.
    wild = {"temperature": 50.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0, "num_predict": 8}
    answers = {client.generate(model, "What do you see?", images=pictures, options=wild).response for _ in range(3)}
    assert len(answers) > 1
    whole = client.generate(model, asked.question, images=pictures).response
    begun, stop = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    assert client.generate(model, asked.question, images=pictures, options={"stop": [stop]}).response == begun


def test_a_raw_prompt_has_no_format_around_it(client: ollama.Client, model: str) -> None:
    plain = client.generate(model, "What", options={"num_predict": 1})
    raw = client.generate(model, "What", raw=True, options={"num_predict": 1})
    assert (raw.prompt_eval_count or 0) < (plain.prompt_eval_count or 0)


def test_errors_are_the_packages_own(client: ollama.Client, model: str) -> None:
    with pytest.raises(ollama.ResponseError, match="no-such-model") as caught:
        client.generate("no-such-model", "a")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="num_predict") as caught:
        client.generate(model, "a", options={"num_predict": -7})
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match=r"format: .*nothing") as caught:
        client.generate(model, "a", format={"type": "nothing"})
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="not a picture") as caught:
        client.generate(model, "a", images=[ollama.Image(value=b"no picture")], stream=False)
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="context") as caught:
        list(client.generate(model, "word " * 3000, stream=True))
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="local-llava pull") as caught:
        client.pull("llava")
    assert caught.value.status_code == 501


def test_models_are_listed_and_shown(client: ollama.Client, model: str, tiny: ModelFiles) -> None:
    listed = client.list().models
    assert listed[0].model == model and listed[0].size == sum(tiny.sizes)
    assert listed[0].details and listed[0].details.quantization_level == "F32"
    shown = client.show(model)
    assert shown.template and shown.modelinfo and "vision" in (shown.capabilities or ())
    (loaded,) = client.ps().models
    assert loaded.context_length == 1024
    assert loaded.expires_at and 0 < (loaded.expires_at - datetime.now(timezone.utc)).total_seconds() <= 600


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(server: Server, model: str, stream: bool) -> None:
    def cancelled() -> float:
        text = server.request("/metrics")[1].decode()
        found = [line for line in text.splitlines() if line.startswith('local_llava_answers_total{end="cancelled"')]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    before = cancelled()
    long = {"model": model, "prompt": "Go on.", "format": {"type": "array", "items": {"const": "a"}, "minItems": 200}}
    host = urllib.parse.urlsplit(server.url).netloc
    connection = http.client.HTTPConnection(host)
    connection.request("POST", "/api/generate", json.dumps({**long, "stream": stream, "options": {"num_predict": 900}}))
    tiny_world.wait_until(lambda: server.health()["answering"] == 1, timeout=10)
    connection.close()
    tiny_world.wait_until(lambda: cancelled() == before + 1, timeout=10)
    assert server.health()["answering"] == 0


def test_keep_alive_unloads_and_the_next_question_loads(client: ollama.Client, model: str, asked: Asked) -> None:
    assert client.generate(model, keep_alive=0).done_reason == "unload"
    tiny_world.wait_until(lambda: not client.ps().models, timeout=20)
    answer = client.generate(model, asked.question, images=[png(asked.picture)], keep_alive=-1)
    assert answer.response == asked.answer and answer.load_duration
    (loaded,) = client.ps().models
    assert loaded.expires_at and loaded.expires_at.year == 9999
