"""A test of this computer: the built-in model answers questions whose right answers are known, on every device.

Knows what must come out, and how far a GPU may be from the CPU. Everything is asked through `Llava`, as users do.

The pictures were drawn for no training, and are the same each time. On a GPU, numbers are rounded otherwise than on a
CPU, so the two are compared with a tolerance, and the answers, which are the likeliest tokens, word by word.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from local_llava import devices, hub
from local_llava.convert import convert
from local_llava.engine import Llava
from local_llava.types import ModelFiles

SEED, N_SCENES, N_QUESTIONS = 5, 6, 3
"""Of the pictures, and how many there are with how many questions each."""

MIN_RIGHT = 0.85
"""Share of right answers; the model gives 93 % in F16, of any questions."""
MAX_FEATURES = 5e-3
"""Relative L2 distance of the image embeddings that a GPU computes from the CPU's."""
MAX_LOGITS = 0.15
"""Largest difference of a logit, of logits whose standard deviation is 3.8. Where GPUs sum in float16, as Vulkan's
backend lets them, it is 0.04; what is wrong differs by more than 1."""
MIN_SAME = 0.95
"""Share of answers that are the same, word by word: where two tokens are all but equally likely, either may come."""

Layers: TypeAlias = Literal["all", "some", "none"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    measured: str
    """What was seen, and what is accepted."""


@dataclass(frozen=True)
class _Answers:
    """What the model gave."""

    features: NDArray[np.float32]
    """[n_images, n_tokens, n_embd]"""
    logits: NDArray[np.float32]
    """[n_images, n_vocab]: after each picture's first question."""
    texts: list[str]


@dataclass(frozen=True)
class _Question:
    picture: Image
    text: str
    answer: str


def run(progress: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """Test the CPU, and the GPUs with it, one check after the other. It takes some 20 seconds without a GPU.

    Args:
        progress: Called with what is done next.
    """
    questions = _questions()
    with tempfile.TemporaryDirectory(prefix="local-llava-selftest-") as folder:
        files = convert(hub.builtin_checkpoint(), Path(folder), quant="F16")
        progress("the CPU")
        expected = _answers(files, questions, "none")
        right = sum(given == asked.answer for given, asked in zip(expected.texts, questions, strict=True))
        yield Check(
            "answers of the CPU",
            right >= MIN_RIGHT * len(questions),
            f"{right} of {len(questions)} are right; at least {MIN_RIGHT:.0%} must be",
        )
        yield from _reuse(files, questions, "none")
        if not devices.gpus():
            return
        for layers in ("all", "some", "none"):
            progress(f"the GPU, with {layers} of the layers")
            yield from _compare(expected, _answers(files, questions, layers), layers)
        yield from _reuse(files, questions, "all")


def _questions() -> list[_Question]:
    from local_llava.tiny_llava import scenes

    questions = []
    for scene, rng in itertools.islice(scenes.sample_scenes(SEED, held_out=True), N_SCENES):
        picture = scenes.draw(scene)
        questions += [
            _Question(picture, q.question, q.answer) for q in scenes.sample_questions(scene, rng, N_QUESTIONS)
        ]
    return questions


def _load(files: ModelFiles, layers: Layers, **options: Any) -> Llava:
    from local_llava.corrections import open_model

    n_layer = open_model(files.model).metadata["llama.block_count"]
    n_gpu_layers = {"all": -1, "some": n_layer // 2 + 1, "none": 0}[layers]
    return Llava.load(files.model, files.mmproj, n_gpu_layers=n_gpu_layers, image_cache="off", **options)


def _answers(files: ModelFiles, questions: list[_Question], layers: Layers) -> _Answers:
    first = questions[::N_QUESTIONS]
    with _load(files, layers) as llava:
        features = np.stack([llava.embed_images(question.picture)[0] for question in first])
        logits = np.stack([llava.logits(question.text, question.picture) for question in first])
        texts = [llava.ask(question.text, question.picture, max_tokens=64).text for question in questions]
    return _Answers(features, logits, texts)


def _compare(expected: _Answers, given: _Answers, layers: Layers) -> Iterator[Check]:
    """Of a GPU with the CPU. With no layers the tower is on the CPU, too, so nothing may differ."""
    where = f"GPU, {layers} of the layers"
    distance = float(np.linalg.norm(given.features - expected.features) / np.linalg.norm(expected.features))
    yield Check(
        f"image embeddings ({where})", distance <= MAX_FEATURES, f"{distance:.1e} from the CPU's, up to {MAX_FEATURES}"
    )
    difference = float(np.abs(given.logits - expected.logits).max())
    yield Check(f"logits ({where})", difference <= MAX_LOGITS, f"{difference:.1e} from the CPU's, up to {MAX_LOGITS}")
    same = sum(a == b for a, b in zip(given.texts, expected.texts, strict=True))
    yield Check(
        f"answers ({where})",
        same >= MIN_SAME * len(expected.texts),
        f"{same} of {len(expected.texts)} are the CPU's; at least {MIN_SAME:.0%} must be",
    )


def _reuse(files: ModelFiles, questions: list[_Question], layers: Layers) -> Iterator[Check]:
    """A second question about a picture takes what is known of it, and is answered as if it were the first."""
    one, two = questions[:2]
    where = "GPU" if layers != "none" else "CPU"
    with _load(files, layers) as llava:
        alone = llava.ask(two.text, two.picture, max_tokens=64)
    with _load(files, layers) as llava:
        llava.ask(one.text, one.picture, max_tokens=64)
        started = time.perf_counter()
        second = llava.ask(two.text, two.picture, max_tokens=64)
        seconds = time.perf_counter() - started
    timings = second.timings
    yield Check(
        f"a second question about a picture ({where})",
        second.text == alone.text and timings.images_encoded == 0 and timings.reused_tokens >= timings.image_tokens,
        f"{timings.reused_tokens} of {timings.prompt_tokens} tokens reused, {seconds:.2f} s, "
        + ("the same answer" if second.text == alone.text else "another answer"),
    )
