"""A GPU gives what the CPU gives: with all layers on it, some, or none; with prefixes copied, kept and restored.

Not collected by `make test`, which has no GPU. With a build of llama-cpp-python for one:

    pytest tests/gpu/check_offload.py

`scripts/vulkan.py` runs it on Mesa's lavapipe, which needs no GPU. What is compared is the built-in model, with the CPU
of the same machine, through the public API. A GPU adds in another order and keeps less in between, so numbers differ;
the bounds are two to three times what lavapipe shows.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
from numpy.typing import NDArray
from PIL import Image

from local_llava import Llava, devices, ggml
from local_llava.convert import convert
from local_llava.hub import builtin_checkpoint
from local_llava.types import ModelFiles, Reply
from local_llava.vision import VisionTower

N_LAYERS = 5
"""Of tiny-llava, the output matrix included."""
LAYERS = {"all": -1, "half": 3, "output only": 1, "none": 0}

CASES = [(quant, layers) for quant in ("F16", "Q4_K_M") for layers in LAYERS] + [("F32", "all"), ("Q8_0", "all")]
"""Types of the language model, and how much of it is on the GPU."""

IN_FLOAT32 = "GGML_VK_DISABLE_F16" in os.environ
"""Whether llama.cpp's Vulkan backend is told to compute as the CPU does. Else it sums products of float16 numbers in
float16, where the GPU can, and that is most of the difference."""

MAX_FEATURES = {"F32": 1e-3, "F16": 1e-3, "Q8_0": 2e-2}
"""Relative L2 distance of image embeddings, by type of the mmproj. The CPU rounds what it multiplies with Q8_0."""
MAX_LOGITS = (
    {"F32": 1e-2, "F16": 1e-2, "Q8_0": 0.2, "Q4_K_M": 0.2}
    if IN_FLOAT32
    else {"F32": 2e-2, "F16": 0.1, "Q8_0": 0.3, "Q4_K_M": 0.3}
)
"""Largest difference of a logit, by type of the language model. Their standard deviation is 3.8."""
MAX_SAME = 5e-3
"""The same where no GPU is used: the last bits depend on how a prompt was cut into batches, which time decides."""


@dataclass(frozen=True)
class Question:
    picture: Image.Image
    text: str
    answer: str


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not devices.gpus():
        pytest.exit("no GPU: llama-cpp-python has no backend for one, or it finds none; see scripts/vulkan.py", 1)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    """By type of the language model; the mmproj is F32."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        quant: convert(builtin_checkpoint(), folder / quant, quant=quant, mmproj_quant="F32") for quant in MAX_LOGITS
    }


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """About pictures that no training saw; three each."""
    asked = []
    for scene, rng in itertools.islice(scenes.sample_scenes(11, held_out=True), 12):
        picture = scenes.draw(scene)
        asked += [Question(picture, q.question, q.answer) for q in scenes.sample_questions(scene, rng, 3)]
    return asked


def load(files: ModelFiles, layers: str, **options: Any) -> Llava:
    return Llava.load(files.model, files.mmproj, n_gpu_layers=LAYERS[layers], **options)


@pytest.fixture(scope="session")
def on_cpu(pairs: dict[str, ModelFiles], questions: list[Question]) -> dict[str, tuple[list[str], NDArray[np.float32]]]:
    """By type: the answers, and logits after some of the questions."""
    return {quant: results(files, "none", questions) for quant, files in pairs.items()}


def results(
    files: ModelFiles, layers: str, questions: list[Question], **options: Any
) -> tuple[list[str], NDArray[np.float32]]:
    with load(files, layers, **options) as llava:
        texts = [llava.ask(question.text, question.picture).text for question in questions]
        logits = [llava.logits(question.text, question.picture) for question in questions[::6]]
    return texts, np.stack(logits)


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("quant", MAX_FEATURES)
def test_the_tower(quant: str, flash_attention: bool, questions: list[Question], tmp_path: Path) -> None:
    files = convert(builtin_checkpoint(), tmp_path, quant="F16", mmproj_quant=quant)
    pictures = [question.picture for question in questions[::6]]
    expected = features(files, False, pictures)
    given = features(files, True, pictures, flash_attention=flash_attention)
    distance = float(np.linalg.norm(given - expected) / np.linalg.norm(expected))
    print(f"features, {quant}, flash attention {flash_attention}: {distance:.1e}")
    assert 0 < distance <= MAX_FEATURES[quant], "0 would mean that the GPU was not used"


def features(files: ModelFiles, use_gpu: bool, pictures: list[Image.Image], **how: Any) -> NDArray[np.float32]:
    from local_llava.images import preprocess_tiles

    with VisionTower.load(files.mmproj, use_gpu=use_gpu, **how) as tower:
        pixels = np.concatenate([preprocess_tiles(picture, tower.preprocessing) for picture in pictures])
        return tower.encode(pixels)


@pytest.mark.parametrize(("quant", "layers"), CASES)
def test_logits_and_answers(
    quant: str,
    layers: str,
    pairs: dict[str, ModelFiles],
    on_cpu: dict[str, tuple[list[str], NDArray[np.float32]]],
    questions: list[Question],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "local_llava"):
        texts, logits = results(pairs[quant], layers, questions)
    n = LAYERS[layers] if LAYERS[layers] >= 0 else N_LAYERS
    assert f"offloaded {n}/{N_LAYERS} layers to GPU" in caplog.text
    assert (f"using device {devices.gpus()[0].name}" in caplog.text) == (n > 0), "none is none"
    expected, expected_logits = on_cpu[quant]
    difference = float(np.abs(logits - expected_logits).max())
    same = sum(a == b for a, b in zip(texts, expected, strict=True))
    right = sum(text == question.answer for text, question in zip(texts, questions, strict=True))
    print(f"{quant}, {layers}: logits {difference:.1e}, {same} of {len(texts)} answers the same, {right} right")
    assert difference <= (MAX_LOGITS[quant] if n else MAX_SAME)
    assert same >= len(texts) - 1, "where two tokens are all but equally likely, either may come"


@pytest.mark.parametrize("kv_type", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("flash_attention", [False, True])
def test_kv_types(kv_type: str, flash_attention: bool, pairs: dict[str, ModelFiles], questions: list[Question]) -> None:
    if kv_type == "Q8_0" and not flash_attention:
        pytest.skip("llama.cpp has none")
    how = {"kv_type": kv_type, "flash_attention": flash_attention}
    expected, expected_logits = results(pairs["F16"], "none", questions[:6], **how)
    for layers in ("all", "half"):
        texts, logits = results(pairs["F16"], layers, questions[:6], **how)
        difference = float(np.abs(logits - expected_logits).max())
        print(f"KV cache {kv_type}, flash attention {flash_attention}, {layers}: logits {difference:.1e}")
        assert difference <= MAX_LOGITS["Q8_0" if kv_type == "Q8_0" else "F16"]
        assert texts == expected


@pytest.mark.parametrize("layers", LAYERS)
def test_a_second_question_about_a_picture(
    layers: str, pairs: dict[str, ModelFiles], questions: list[Question]
) -> None:
    """Its prompt begins with what is known: copied, not computed, and answered as if it were the first."""
    alone = {}
    for question in questions[:6]:
        with load(pairs["F16"], layers) as llava:
            alone[question.text, id(question.picture)] = llava.ask(question.text, question.picture)
    with load(pairs["F16"], layers) as llava:
        for i, question in enumerate(questions[:6]):
            reply = llava.ask(question.text, question.picture)
            assert reply.text == alone[question.text, id(question.picture)].text
            if i % 3:
                assert reply.timings.images_encoded == 0
                assert reply.timings.reused_tokens >= reply.timings.image_tokens > 0


@pytest.mark.parametrize("layers", ["all", "half"])
def test_many_answers_at_the_same_time(layers: str, pairs: dict[str, ModelFiles], questions: list[Question]) -> None:
    with load(pairs["F16"], layers, parallel=8) as llava:

        def ask(question: Question) -> str:
            return llava.ask(question.text, question.picture).text

        one_by_one = [ask(question) for question in questions[:24]]
    with load(pairs["F16"], layers, parallel=8) as llava, ThreadPoolExecutor(8) as pool:

        def ask_too(question: Question) -> str:
            return llava.ask(question.text, question.picture).text

        together = list(pool.map(ask_too, questions[:24]))
    same = sum(a == b for a, b in zip(one_by_one, together, strict=True))
    print(f"{layers}: {same} of {len(together)} answers the same in batches")
    assert same >= len(together) - 1


ASK = """
import json, sys
from dataclasses import asdict
from local_llava import Llava
model, mmproj, picture, question, layers = sys.argv[1:]
with Llava.load(model, mmproj, n_gpu_layers=int(layers), image_cache="kv") as llava:
    reply = llava.ask(question, picture)
print(json.dumps([reply.text, asdict(reply.timings)]))
"""


@pytest.fixture
def ask_in_a_process(tmp_path: Path, pairs: dict[str, ModelFiles], questions: list[Question]) -> Iterator[Any]:
    picture = tmp_path / "picture.png"
    questions[0].picture.save(picture)
    env = {**os.environ, "LOCAL_LLAVA_CACHE": str(tmp_path / "cache")}

    def ask(question: Question, layers: str) -> tuple[str, dict[str, Any]]:
        files = pairs["F16"]
        command = [sys.executable, "-c", ASK, str(files.model), str(files.mmproj), str(picture), question.text]
        done = subprocess.run([*command, str(LAYERS[layers])], env=env, check=True, capture_output=True, text=True)
        text, timings = json.loads(done.stdout.splitlines()[-1])
        return text, timings

    yield ask


@pytest.mark.parametrize("layers", LAYERS)
def test_a_kept_kv_cache_in_another_process(
    layers: str, ask_in_a_process: Any, pairs: dict[str, ModelFiles], questions: list[Question]
) -> None:
    one, two = questions[:2]
    with load(pairs["F16"], layers) as llava:
        expected: Reply = llava.ask(two.text, two.picture)
    _, first = ask_in_a_process(one, layers)
    assert first["images_encoded"] == 1 and first["restored_tokens"] == 0
    text, timings = ask_in_a_process(two, layers)
    assert timings["restored_tokens"] >= timings["image_tokens"] > 0 and timings["images_encoded"] == 0, timings
    assert text == expected.text


def test_a_kept_kv_cache_is_of_one_way_of_loading(ask_in_a_process: Any, questions: list[Question]) -> None:
    """What a GPU computed is rounded otherwise: the CPU does not go on with it, or answers would depend on it."""
    ask_in_a_process(questions[0], "all")
    _, timings = ask_in_a_process(questions[1], "none")
    assert timings["restored_tokens"] == 0


@pytest.mark.parametrize("broken", ["the tower's memory", "the language model"])
def test_a_driver_that_fails_leaves_the_cpu(
    broken: str,
    pairs: dict[str, ModelFiles],
    questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The functions that a driver fails in return what they return then; there is no way to break a sound driver."""
    import llama_cpp.llama_cpp as c

    g = ggml.functions()
    gpu = devices.gpus()[0].handle
    allocate, load_file = g.backend_alloc_ctx_tensors, c.llama_model_load_from_file
    handles: list[int] = []
    start = g.backend_dev_init
    if broken == "the language model":
        fails = lambda path, params: None if params.n_gpu_layers else load_file(path, params)  # noqa: E731
        monkeypatch.setattr(c, "llama_model_load_from_file", fails)
    else:

        def started(device: int, params: Any) -> Any:
            handle = start(device, params)
            handles.extend([handle] if device == gpu else [])
            return handle

        monkeypatch.setattr(g, "backend_dev_init", started)

        def allocated(context: int, backend: int) -> Any:
            # Once: the CPU's backend may get the address that the GPU's had.
            return None if handles and handles.pop() == backend else allocate(context, backend)

        monkeypatch.setattr(g, "backend_alloc_ctx_tensors", allocated)
    question = questions[0]
    with Llava.load(pairs["F16"].model, pairs["F16"].mmproj) as llava:
        assert llava.ask(question.text, question.picture).text == question.answer
    assert "the GPU cannot be used" in caplog.text and "the CPU computes everything" in caplog.text
