"""Logits along answers that are given: those of transformers, and of one token after the other; in company; reused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_checkpoints import TINY, random_model, save
from numpy.typing import NDArray
from PIL import Image
from test_parity import reference_inputs, write_processor_files
from tiny_world import QUESTION, Batches, at_once, forget_everything, fresh_seed, is_idle, picture, questions
from transformers import LlavaForConditionalGeneration

from local_llava import EngineError, Llava, PromptError, UsageError, aside
from local_llava.convert import convert
from local_llava.speculation import MAX_GUESSED
from local_llava.types import ModelFiles


@pytest.fixture(scope="module")
def llava(tiny: ModelFiles) -> Iterator[Llava]:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, parallel=4, n_ctx=512) as llava:
        yield llava


def words(seed: int, n: int) -> tuple[int, ...]:
    """Tokens that no model would say."""
    return tuple(np.random.default_rng(seed).integers(0, 600, n).tolist())


def stepwise(llava: Llava, prompt: Sequence[int | None], answer: Sequence[int], image: Any) -> NDArray[np.float32]:
    """As if each token were the last one."""
    parts = [llava.answer_logits([*prompt, *answer[:i]], (), image) for i in range(len(answer) + 1)]
    return np.concatenate(parts)


@pytest.mark.parametrize("which", ["tiny", "random"])
def test_they_are_those_of_transformers(which: str, tmp_path: Path) -> None:
    if which == "tiny":
        checkpoint, model = TINY, LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    else:
        model = random_model(seed=5)
        checkpoint = save(model, tmp_path / "checkpoint")
        write_processor_files(checkpoint)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    scene, answer = picture(fresh_seed()), words(1, 50)
    inputs = reference_inputs(checkpoint, QUESTION, scene)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(input_ids=ids, **rest).logits[0, inputs["input_ids"].shape[1] - 1 :].numpy()
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        logits = llava.answer_logits(llava.prompt_tokens(QUESTION, scene), answer, scene)
    assert logits.shape == (51, 640) and logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 1e-3


@pytest.mark.parametrize(("quant", "kv_type", "bound"), [("F32", "F32", 1e-4), ("Q4_K_M", "F16", 0.3)])
def test_they_are_those_of_one_token_after_the_other(quant: str, kv_type: str, bound: float, tmp_path: Path) -> None:
    """In parts of the logits' spread; see `test_same_answers` for the bound where activations are rounded."""
    files = convert(TINY, tmp_path, quant=quant, mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type=kv_type, n_threads=1) as llava:
        for asked in questions(fresh_seed(), 2, 2):
            prompt = llava.prompt_tokens(asked.question, asked.picture)
            for answer in (llava.ask(asked.question, asked.picture).tokens, words(2, 40)):
                logits = llava.answer_logits(prompt, answer, asked.picture)
                expected = stepwise(llava, prompt, answer, asked.picture)
                assert np.abs(logits - expected).max() <= bound * np.std(expected)
            assert np.abs(llava.logits(asked.question, asked.picture) - logits[0]).max() <= bound * np.std(logits)


def test_in_company(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at a time, beside answers that are being given; never more rows with logits than there is room for."""
    scenes = [picture(seed) for seed in (3, 8, 3)]
    prompt = llava.prompt_tokens(QUESTION, scenes[0])
    answers = [words(i, 30 + 7 * i) for i in range(3)]
    alone = [llava.answer_logits(prompt, a, s) for a, s in zip(answers, scenes, strict=True)]
    said = [llava.ask(QUESTION, s).tokens for s in scenes]
    forget_everything(llava)
    batches = Batches(llava, monkeypatch)
    most = []
    batches.before = lambda rows: most.append(sum(rows.outputs))
    calls: list[Any] = [
        lambda a=a, s=s: llava.answer_logits(prompt, a, s)  # type: ignore[misc]
        for a, s in zip(answers, scenes, strict=True)
    ]
    calls += [lambda s=s: llava.ask(QUESTION, s).tokens for s in scenes]  # type: ignore[misc]
    results = at_once(calls)
    for ours, expected in zip(results, alone, strict=False):
        assert np.abs(ours - expected).max() <= 1e-4 * np.std(expected)
    assert results[3:] == said
    assert max(len(batch) for batch in batches.rows) > 1 and max(most) <= llava.parallel + MAX_GUESSED
    assert is_idle(llava)


def test_many_tokens_at_a_time_and_nothing_twice_but_the_answer(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, answer = picture(3), words(4, 60)
    prompt = llava.prompt_tokens(QUESTION, scene)
    forget_everything(llava)
    batches = Batches(llava, monkeypatch)
    first = llava.answer_logits(prompt, answer, scene)
    assert batches.n_rows == len(prompt) + len(answer) and len(batches.rows) <= 1 + len(answer) // MAX_GUESSED
    batches.rows.clear()
    again = llava.answer_logits(prompt, answer, scene)
    assert batches.n_rows == 1 + len(answer), "the prompt is there but for its last token, whose logits are wanted"
    assert np.abs(again - first).max() <= 1e-4 * np.std(first)
    batches.rows.clear()
    other = llava.answer_logits([*prompt[:-1], 5], (), scene)
    assert other.shape == (1, 640) and batches.n_rows == 1


def test_a_batch_that_fails_is_tried_again(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, so that only the culprit would fail."""
    scene, answers = picture(8), (words(5, 50), words(6, 60))
    prompt = llava.prompt_tokens(QUESTION, scene)
    expected = [llava.answer_logits(prompt, answer, scene) for answer in answers]
    forget_everything(llava)
    batches = Batches(llava, monkeypatch)
    n_together = 0

    def fail(rows: Any) -> None:
        nonlocal n_together
        n_together += len(set(rows.sequences)) > 1
        if n_together == 1:
            n_together += 1
            raise EngineError("once")

    batches.before = fail
    results = at_once([lambda a=a: llava.answer_logits(prompt, a, scene) for a in answers])  # type: ignore[misc]
    assert n_together > 1
    for logits, wanted in zip(results, expected, strict=True):
        assert np.abs(logits - wanted).max() <= 1e-4 * np.std(wanted)


def test_long_prompts_stay_at_home(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KV cache aside has room for the logits of one row only; more of them would end the process."""
    scene, answer = picture(8), words(7, 50)
    prompt = llava.prompt_tokens(QUESTION, scene)
    expected = llava.answer_logits(prompt, answer, scene)
    monkeypatch.setattr(aside, "MIN_ROWS", 32)
    monkeypatch.setattr(aside, "MIN_OTHERS", 1)
    places = []
    for tokens in (answer, ()):
        forget_everything(llava)
        llava.ask(QUESTION, picture(3))
        logits = llava.answer_logits(prompt, tokens, scene)
        assert np.abs(logits - expected[: len(logits)]).max() <= 1e-4 * np.std(expected)
        places.append(llava._scheduler._aside._place is not None)
    assert places == [False, True]


def test_what_cannot_be(llava: Llava) -> None:
    scene = picture(3)
    prompt = llava.prompt_tokens(QUESTION, scene)
    first = prompt.index(None)
    apart = [*prompt[:first], None, 5, *prompt[first + 1 :]]
    for args, error, message in (
        ((prompt, (), ()), UsageError, "the prompt has 36 places for tokens of pictures, and the pictures take 0"),
        ((prompt, (), [scene, scene]), UsageError, "36 places for tokens of pictures, and the pictures take 72"),
        ((apart, (), scene), UsageError, "a picture takes 36 tokens, for which the prompt has no place side by side"),
        ((prompt, (640,), scene), UsageError, "a token must be 0 to 639, not 640"),
        ((prompt, (-1,), scene), UsageError, "a token must be 0 to 639, not -1"),
        ((prompt, (None,), scene), UsageError, "the prompt has 1 places"),
        ((prompt, words(0, 500), scene), PromptError, r"have 5\d\d tokens; the context holds 1 to 512"),
        (((), (), ()), PromptError, "have 0 tokens"),
    ):
        with pytest.raises(error, match=message):
            llava.answer_logits(*args)  # type: ignore[arg-type]
    assert is_idle(llava)


def test_to_the_end_of_the_context(tiny: ModelFiles) -> None:
    with Llava.load(tiny.model, tiny.mmproj, n_ctx=64, n_threads=1, parallel=1) as llava:
        prompt = llava.prompt_tokens("Hm?")
        assert llava.answer_logits(prompt, words(0, 64 - len(prompt))).shape == (65 - len(prompt), 640)


# --- embeddings that are known ---


def test_known_embeddings_save_the_tower(llava: Llava) -> None:
    one, other = picture(3), picture(8)
    said = [llava.ask(QUESTION, image).text for image in (one, other)]
    embeddings = list(llava.embed_images([one, other]))
    forget_everything(llava)
    llava.use_embeddings([one, other], embeddings)
    replies = [llava.ask(QUESTION, image) for image in (one, other)]
    assert [reply.text for reply in replies] == said != said[::-1]
    assert [reply.timings.images_encoded for reply in replies] == [0, 0]
    forget_everything(llava)
    llava.use_embeddings(one, [embeddings[1]])
    assert llava.ask(QUESTION, one).text == said[1], "it is seen as the other one"
    forget_everything(llava)
    assert llava.ask(QUESTION, one).text == said[0]


def test_what_was_computed_before_is_not_taken_for_known_embeddings(
    tiny: ModelFiles, llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the KV cache nor on disk, and nor the other way round."""
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(tmp_path / "pictures"))
    one, other = picture(3), picture(8)
    said = [llava.ask(QUESTION, image).tokens for image in (one, other)]
    for image_before in ([], [one]):
        with Llava.load(tiny.model, tiny.mmproj, n_threads=1, kv_type="F32", image_cache="kv") as keeping:
            for image in image_before:
                assert keeping.ask(QUESTION, image).tokens == said[0]
            keeping.use_embeddings(one, list(keeping.embed_images(other)))
            for _ in range(2):
                reply = keeping.ask(QUESTION, one)
                assert reply.tokens == said[1] and reply.timings.images_encoded == 0
            assert np.array_equal(keeping.embed_images(one), keeping.embed_images(other))
        with Llava.load(tiny.model, tiny.mmproj, n_threads=1, kv_type="F32", image_cache="kv") as keeping:
            assert keeping.ask(QUESTION, one).tokens == said[0]


def test_the_towers_own_embeddings_change_nothing(llava: Llava) -> None:
    forget_everything(llava)
    one, other = picture(3), picture(8)
    first = llava.ask(QUESTION, one)
    own = list(llava.embed_images(one))
    llava.use_embeddings(one, list(llava.embed_images(other)))
    llava.use_embeddings(one, own)
    again = llava.ask(QUESTION, one)
    assert again.tokens == first.tokens and again.timings.prefilled_tokens == 1


def test_known_embeddings_are_copied(llava: Llava) -> None:
    values = np.array(llava.embed_images(picture(3))[0])
    expected = values.copy()
    llava.use_embeddings(picture(3), [values])
    values[:] = 0
    assert np.array_equal(llava.embed_images(picture(3))[0], expected)


def test_embeddings_of_another_shape(llava: Llava) -> None:
    scene = picture(3)
    for wrong in ([], [np.zeros((36, 64), np.float32)], [np.zeros((35, 256), np.float32)], [np.zeros(3, np.float32)]):
        with pytest.raises(UsageError, match=r"embeddings must be of shapes \[\(36, 256\)\], not"):
            llava.use_embeddings(scene, wrong)
    with pytest.raises(UsageError, match=r"embeddings must be of shapes \[\], not"):
        llava.use_embeddings((), [np.zeros((36, 256), np.float32)])
    with pytest.raises(UsageError, match="finite"):
        llava.use_embeddings(scene, [np.full((36, 256), np.nan, np.float32)])
    assert isinstance(scene, Image.Image)
