"""Answers do not depend on what else is computed, or was computed before: alone, in company, reused, restored."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llava_checkpoints import TINY, random_model, save
from numpy.typing import NDArray
from tiny_world import Asked, at_once, forget_everything, fresh_seed, questions

from local_llava import Llava, Reply, aside
from local_llava.convert import convert
from local_llava.pace import Pace
from local_llava.types import ModelFiles

N_PICTURES, EACH = 125, 4
"""500 questions."""

Answers = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def seed() -> int:
    return fresh_seed()


@pytest.fixture(scope="module")
def asked(seed: int) -> list[Asked]:
    return questions(seed, N_PICTURES, EACH)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def load(tiny: ModelFiles, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Llava]:
    """In F32 throughout."""
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(directory))
    return lambda **options: Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_ctx=256, **options)


@pytest.fixture(scope="module")
def alone(tiny: ModelFiles, asked: list[Asked]) -> Answers:
    """Each as if it were the first one that a process is asked."""
    answers = []
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_ctx=256, parallel=1) as llava:
        for a in asked:
            reply = llava.ask(a.question, a.picture, max_tokens=64)
            assert (reply.timings.reused_tokens, reply.timings.images_encoded) == (0, 1)
            answers.append(reply.tokens)
            forget_everything(llava)
    return answers


def shuffled(asked: Sequence[Asked], seed: int) -> list[int]:
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    return order


def check(replies: dict[int, Reply], alone: Answers, seed: int) -> None:
    other = [i for i, reply in replies.items() if reply.tokens != alone[i]]
    assert len(replies) == len(alone) and not other, f"{len(other)} of {len(alone)} differ, seed {seed}"


def test_the_same_answers(
    load: Callable[..., Llava], asked: list[Asked], alone: Answers, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight at a time in any order, while pictures and prompts are kept; then in other processes with either of them.

    Always with the KV cache of what came before, so that most questions begin with a picture that is there already.
    """
    order = shuffled(asked, seed)
    places: list[Any] = []
    monkeypatch.setattr(Pace, "together", lambda self, n: n)  # all eight in a batch
    monkeypatch.setattr(aside, "MIN_ROWS", 32)  # where there is a cache aside, pictures are read in it
    monkeypatch.setattr(aside, "MIN_OTHERS", 1)
    for mode, encoded, restored in (("kv", N_PICTURES, None), ("kv", 0, N_PICTURES), ("embeddings", 0, 0)):
        sizes: list[int] = []
        with load(image_cache=mode, parallel=8 if restored is None else 1) as llava:
            decode = llava._llm.decode

            def watched(rows: Any, *rest: Any, decode: Any = decode, sizes: list[int] = sizes) -> None:
                sizes.append(len(set(rows.sequences)))
                decode(rows, *rest)

            monkeypatch.setattr(llava._llm, "decode", watched)
            with ThreadPoolExecutor(2 * llava.parallel) as pool:
                answer = pool.map(
                    lambda i, llava=llava: llava.ask(asked[i].question, asked[i].picture, max_tokens=64),  # type: ignore[misc]
                    order,
                )
                check(dict(zip(order, replies := list(answer), strict=True)), alone, seed)
            places.append(llava._scheduler._aside._place)
        assert max(sizes) == 8 and np.mean(sizes) > 4 if restored is None else max(sizes) == 1
        timings = [reply.timings for reply in replies]
        assert sum(t.images_encoded for t in timings) == encoded
        # More of them come back from disk, where they had to make room in the KV cache.
        n_restored = sum(t.restored_tokens >= 36 for t in timings)
        assert restored is None or (n_restored >= restored and bool(n_restored) == bool(restored))
        assert sum(t.reused_tokens for t in timings) > 5 * len(asked)
    assert places[0] is not None


# --- models that round ---


ROUNDED = {"tiny F16": 0.02, "tiny Q4_K_M": 0.3, "random F16": 0.02, "random Q4_K_M": 0.5}
"""By how much a logit may differ, in parts of the spread (standard deviation) of all of them: about four times what was
measured. Activations are rounded to 8 bits before they meet quantized weights, and what differs in its last bits
before may round otherwise."""


@pytest.fixture(scope="module", params=ROUNDED)
def rounded(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelFiles, float]]:
    name, quant = request.param.split()
    directory: Path = tmp_path_factory.mktemp("rounded")
    checkpoint = TINY
    if name == "random":
        text = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
        checkpoint = save(random_model(text | {"num_attention_heads": 4}, seed=3), directory / "checkpoint")
    yield convert(checkpoint, directory / "out", quant=quant), ROUNDED[request.param]


def test_logits_of_rounded_models_stay_close(
    rounded: tuple[ModelFiles, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, bound = rounded
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(tmp_path))
    seed = fresh_seed()
    asked = questions(seed, 8, 2)
    worst: dict[str, float] = {}

    def compare(how: str, ours: Sequence[NDArray[np.float32]]) -> None:
        differences = [np.abs(a - b).max() / np.std(b) for a, b in zip(ours, alone, strict=True)]
        worst[how] = float(max(differences))

    with Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        alone = []
        for a in asked:
            alone.append(llava.logits(a.question, a.picture))
            forget_everything(llava)
        assert np.isfinite(alone).all()
        forget_everything(llava)
        # Two pictures may look alike to random weights, eight not all do.
        others = [llava.logits(asked[0].question, a.picture) for a in asked[::2]]
        spread = np.ptp(others, axis=0).max() / np.std(alone[0])
        assert spread > bound, ("other pictures make more of a difference", spread, seed)
        forget_everything(llava)
        calls = [lambda a=a: llava.logits(a.question, a.picture) for a in asked]  # type: ignore[misc]
        company = [lambda a=a: llava.ask(a.question, a.picture, max_tokens=20) for a in asked]  # type: ignore[misc]
        compare("in company", at_once([*calls, *company])[: len(calls)])  # type: ignore[arg-type]
        compare("reused", [llava.logits(a.question, a.picture) for a in reversed(asked)][::-1])
    for mode in ("kv", "kv", "embeddings"):
        with Llava.load(files.model, files.mmproj, n_threads=1, image_cache=mode) as llava:
            if not list(tmp_path.glob("*.kv")):
                for a in asked:
                    llava.ask(a.question, a.picture, max_tokens=1)
                forget_everything(llava)
                continue
            compare("restored" if mode == "kv" else "embeddings", [llava.logits(a.question, a.picture) for a in asked])
    assert max(worst.values()) <= bound, (worst, seed)
