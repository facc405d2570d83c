"""The Python API on tiny-llava: chat, streams, event loops, options, reuse."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import json_schemas
import jsonschema
import numpy as np
import pydantic
import pytest
from gguf_bytes import TinyLLM
from llava_checkpoints import TINY, random_model, save
from PIL import Image

from local_llava import EngineError, Llava, Options, PromptError, UsageError
from local_llava.convert import convert
from local_llava.llm import LLM
from local_llava.schema.compiler import compile_schema
from local_llava.types import ModelFiles

QUESTION = "What do you see?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("pair"), quant="F32", mmproj_quant="F32")


@pytest.fixture(scope="module")
def llava(files: ModelFiles) -> Iterator[Llava]:
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=1) as llava:
        yield llava


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return picture(3)


def picture(seed: int) -> Image.Image:
    import scenes

    scene, _ = next(scenes.sample_scenes(seed, held_out=True))
    return scenes.draw(scene)


def test_stream_gives_the_answer_piece_by_piece(llava: Llava, scene: Image.Image) -> None:
    reply = llava.ask(QUESTION, scene)
    chunks = list(llava.stream(QUESTION, scene))
    assert "".join(c.text for c in chunks) == reply.text and reply.finish_reason == "stop"
    assert tuple(t for c in chunks for t in c.tokens) == reply.tokens
    assert [c.reply is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
    last = chunks[-1].reply
    assert last is not None and last.text == reply.text and last.tokens == reply.tokens


def test_closing_a_stream_stops_the_work(llava: Llava, scene: Image.Image) -> None:
    whole = llava.ask(QUESTION, scene)
    stream = llava.stream(QUESTION, scene)
    first = next(stream)
    stream.close()
    again = llava.ask(QUESTION, scene)
    assert again.text == whole.text and whole.text.startswith(first.text)


def test_a_question_while_a_stream_is_open(llava: Llava, scene: Image.Image) -> None:
    stream = llava.stream(QUESTION, scene)
    start = next(stream)
    inner = llava.ask(QUESTION, picture(8))
    rest = start.text + "".join(c.text for c in stream)
    assert rest == llava.ask(QUESTION, scene).text != inner.text


def test_event_loops(llava: Llava, scene: Image.Image) -> None:
    pictures = [scene, picture(8), picture(9)]
    expected = [llava.ask(QUESTION, p).text for p in pictures]

    async def main() -> None:
        replies = await asyncio.gather(*(llava.aask(QUESTION, p) for p in pictures))
        assert [r.text for r in replies] == expected
        async with aclosing(llava.astream(QUESTION, scene)) as chunks:
            async for chunk in chunks:
                assert expected[0].startswith(chunk.text)
                break
        task = asyncio.create_task(llava.aask(QUESTION, scene, max_tokens=200))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        chat = await llava.achat([{"role": "user", "content": QUESTION}], scene)
        assert chat.text == expected[0]
        with pytest.raises(UsageError):
            await llava.aask(QUESTION, scene, seed=-1)

    asyncio.run(main())


def test_a_context_that_cannot_be_cut_is_made_anew(
    llava: Llava, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp may refuse to forget a part; then all is forgotten, pictures that were held included."""
    first = llava.ask(QUESTION, scene, max_tokens=5)
    keep = llava._llm.keep

    def refuse(sequence: int, n: int) -> bool:
        keep(sequence, 0)
        return False

    monkeypatch.setattr(llava._llm, "keep", refuse)
    again = llava.ask(QUESTION, scene, max_tokens=5)
    assert again.tokens == first.tokens and again.timings.images_encoded == 0


def test_more_pictures_than_are_kept(files: ModelFiles) -> None:
    with Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        reply = llava.ask(QUESTION, [picture(i) for i in range(10, 20)])
        assert reply.timings.images_encoded == 10


def test_logprobs_are_those_of_the_model(llava: Llava, scene: Image.Image) -> None:
    logits = llava.logits(QUESTION, scene).astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    reply = llava.ask(QUESTION, scene, logprobs=3, temperature=2.0, top_k=5, repeat_penalty=1.3, seed=4)
    assert reply.logprobs is not None and len(reply.logprobs) == len(reply.tokens)
    first = reply.logprobs[0]
    assert abs(first.logprob - expected[first.token]) < 1e-3
    assert [i for i, _, _ in first.top] == np.argsort(-expected)[:3].tolist()
    assert llava.ask(QUESTION, scene, logprobs=0).logprobs[0].top == ()  # type: ignore[index]
    assert "".join(t.text for t in reply.logprobs) == reply.text


def test_every_option_of_sampling_acts(llava: Llava, scene: Image.Image) -> None:
    """At a temperature so high that the model's own preference hardly counts."""
    hot: dict[str, Any] = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 40}

    def tokens(**options: Any) -> tuple[int, ...]:
        return llava.ask(QUESTION, scene, **{**hot, **options}).tokens

    greedy = llava.ask(QUESTION, scene, max_tokens=40).tokens
    free = tokens(seed=1)
    assert free != greedy and tokens(seed=1) == free != tokens(seed=2)
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 0.001}):
        assert tokens(seed=1, **narrow) == greedy
    # " a" comes three times in the greedy answer, which a penalty that strong cannot leave so.
    assert len(greedy) > len(set(greedy))
    once = llava.ask(QUESTION, scene, max_tokens=12, repeat_penalty=100.0).tokens
    assert len(once) == len(set(once))


def test_stop_texts(llava: Llava, scene: Image.Image) -> None:
    whole = llava.ask(QUESTION, scene).text
    middle = whole[5:9]
    reply = llava.ask(QUESTION, scene, stop=[middle, "never"])
    assert reply.text == whole[: whole.index(middle)] and reply.finish_reason == "stop"
    assert llava.ask(QUESTION, scene, stop="never").text == whole


def test_limits_of_the_answer(llava: Llava, scene: Image.Image) -> None:
    reply = llava.ask(QUESTION, scene, max_tokens=2)
    assert len(reply.tokens) == 2 and reply.finish_reason == "length"


def test_the_context_is_used_to_its_end(files: ModelFiles) -> None:
    with Llava.load(files.model, files.mmproj, n_ctx=24, n_threads=1) as llava:
        n_prompt = len(llava.prompt_tokens("a b"))
        # Control tokens only end an answer where a turn may end, so that it runs on.
        reply = llava.ask("a b", temperature=100.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
        assert reply.finish_reason in ("length", "stop")
        if reply.finish_reason == "length":
            assert n_prompt + len(reply.tokens) == 25, "the last one need not be evaluated"
        with pytest.raises(PromptError, match=r"the prompt has \d+ tokens, the context 24"):
            llava.ask("a b c d e f g h i j k l m n o p q r s t")


def test_preprocessing_is_chosen_for_an_answer(llava: Llava, scene: Image.Image) -> None:
    wide = Image.new("RGB", (scene.width * 3, scene.height), "white")
    wide.paste(scene, (0, 0))
    crop, pad = (llava.ask(QUESTION, wide, preprocess=p) for p in ("crop", "pad"))
    assert crop.text != pad.text
    assert llava.ask(QUESTION, wide).text == llava.ask(QUESTION, wide, preprocess="checkpoint").text


def test_defaults_come_from_loading(files: ModelFiles, scene: Image.Image) -> None:
    with Llava.load(files.model, files.mmproj, max_tokens=3, system="Be brief.", n_threads=1) as llava:
        assert len(llava.ask(QUESTION, scene).tokens) == 3
        assert len(llava.ask(QUESTION, scene, max_tokens=4).tokens) == 4
        assert llava.options == Options(max_tokens=3, system="Be brief.", n_threads=1)
    with pytest.raises(UsageError, match="the model is closed"):
        llava.ask(QUESTION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": 1}, "no option is called 'colour'; there are flash_attention, image_cache,"),
        ({"n_ctx": 64}, "n_ctx is settled when the model is loaded"),
        ({"temperature": -1}, "temperature must be 0 to 100, not -1"),
        ({"temperature": float("nan")}, "temperature must be 0 to 100, not nan"),
        ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
        ({"max_tokens": True}, "max_tokens must be a whole number, not True"),
        ({"stop": ["a", ""]}, "stop must be texts that are not empty"),
        ({"stop": 5}, "stop must be"),
        ({"system": 5}, "system must be text, not int"),
        ({"logprobs": 21}, "logprobs must be 0 to 20, not 21"),
        ({"preprocess": "stretch"}, "preprocess must be one of checkpoint, pad, crop, not 'stretch'"),
    ],
)
def test_bad_options(llava: Llava, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        llava.ask(QUESTION, **options)
    assert message in str(error.value)


def test_several_pictures_are_warned_of_once(files: ModelFiles, caplog: pytest.LogCaptureFixture) -> None:
    with Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        for _ in range(2):
            llava.ask(QUESTION, [picture(1), picture(2)], max_tokens=1)
    assert [r.message for r in caplog.records if "trained on one" in r.message] == [
        "2 pictures in one conversation: LLaVA was trained on one, and may mix them up"
    ]


# --- schemas ---


def test_a_random_model_follows_200_schemas(tmp_path: Path, scene: Image.Image) -> None:
    """With a picture, at temperature 1, under two budgets; what max_tokens is too small for is refused beforehand."""
    files = convert(save(random_model({"max_position_embeddings": 2048}), tmp_path / "checkpoint"), tmp_path / "out")
    made = ((f"made {seed}", json_schemas.make(seed)) for seed in range(10_000))
    schemas = {**json_schemas.BY_HAND}
    while len(schemas) < 200:
        name, schema = next(made)
        with contextlib.suppress(UsageError):
            compile_schema(schema)
            schemas[name] = schema
    n_refused = 0
    with Llava.load(files.model, files.mmproj, n_threads=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) as llava:
        for i, (name, schema) in enumerate(schemas.items()):
            options = {"json_schema": schema, "seed": i, "max_tokens": (600, 60)[i % 2]}
            try:
                reply = llava.ask("Read the picture.", scene, **options)
            except UsageError as e:
                assert "max_tokens" in str(e), name
                n_refused += 1
                continue
            assert reply.finish_reason == "stop", name
            assert reply.parsed == json.loads(reply.text), name
            jsonschema.validate(reply.parsed, schema)
    assert n_refused < 20


def test_pydantic_models_come_back_as_instances(llava: Llava, scene: Image.Image) -> None:
    class Shape(pydantic.BaseModel):
        kind: Literal["circle", "square", "star"]
        size: int = pydantic.Field(ge=1, le=9)

    class Scene(pydantic.BaseModel):
        shapes: list[Shape] = pydantic.Field(min_length=1, max_length=3)
        note: str | None = None

    reply = llava.ask(QUESTION, scene, json_schema=Scene, temperature=1.0)
    assert isinstance(reply.parsed, Scene) and reply.finish_reason == "stop"
    shapes = llava.ask(QUESTION, scene, json_schema=pydantic.TypeAdapter(tuple[Shape, Shape])).parsed
    assert [type(s) for s in shapes] == [Shape, Shape]
    assert isinstance(llava.ask(QUESTION, scene, json_schema=dict[str, Shape], temperature=1.0).parsed, dict)

    class Never(pydantic.BaseModel):
        n: int

        @pydantic.field_validator("n")
        @classmethod
        def refuse(cls, n: int) -> int:
            raise ValueError("never")

    assert llava.ask(QUESTION, scene, json_schema=Never).parsed is None
    cut = llava.ask(QUESTION, scene, json_schema={"type": "string"}, stop=['"'])
    assert cut.parsed is None, "a stop text cut it off"
    with pytest.raises(UsageError, match="not"):
        llava.ask(QUESTION, scene, json_schema={"not": {}})


def test_validators_run_where_the_caller_is(llava: Llava, scene: Image.Image) -> None:
    """They may take long, ask the model themselves or fail: no other answer waits for it."""
    threads = []

    class Count(pydantic.BaseModel):
        n: int = pydantic.Field(ge=0, le=9)

        @pydantic.field_validator("n")
        @classmethod
        def check(cls, n: int) -> int:
            threads.append(threading.current_thread())
            return n + 10 * len(llava.ask(QUESTION, scene, max_tokens=1).tokens)

    class Broken(Count):
        @pydantic.field_validator("n")
        @classmethod
        def check(cls, n: int) -> int:
            raise RuntimeError("on purpose")

    assert llava.ask(QUESTION, scene, json_schema=Count).parsed.n >= 10
    assert threads == [threading.current_thread()]
    loop_thread = threading.current_thread()
    assert asyncio.run(llava.aask(QUESTION, scene, json_schema=Count)).parsed.n >= 10
    assert threads[1] not in (loop_thread, llava._worker._thread)
    with pytest.raises(RuntimeError, match="on purpose"):
        llava.ask(QUESTION, scene, json_schema=Broken)
    assert llava.ask(QUESTION, scene, max_tokens=1).tokens


# --- loading ---


def test_llama_cpps_own_reason_is_told(tmp_path: Path) -> None:
    """It logs several lines for a file that it does not load; the first one names what is wrong."""
    model = TinyLLM()
    model.entries["tokenizer.ggml.normalizer.lowercase"] = ("str", "x")
    path = tmp_path / "m.gguf"
    path.write_bytes(model.bytes)
    with pytest.raises(EngineError, match=r"m\.gguf: llama\.cpp cannot load it: .*normalizer\.lowercase"):
        LLM.load(path, n_cells=256, n_threads=1)
