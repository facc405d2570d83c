"""What is not computed again: counted in pictures encoded and tokens evaluated, not in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_world import QUESTION, Batches, at_once, between_steps, forget_everything, is_idle, line, picture

from local_llava import Llava, Message, Reply
from local_llava.conversation import as_messages
from local_llava.convert import convert
from local_llava.request import Unit, as_units, n_tokens
from local_llava.scheduler import N_RETIRED
from local_llava.types import ModelFiles

EIGHT = [
    QUESTION,
    "Describe the picture.",
    "How many shapes are there?",
    "Is there a star?",
    "Is there a circle?",
    "What is on the left?",
    "Name the colours from left to right.",
    "List the shapes as JSON.",
]


@pytest.fixture(scope="module")
def module_llava(tiny: ModelFiles) -> Iterator[Llava]:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1) as llava:
        yield llava


@pytest.fixture
def llava(module_llava: Llava) -> Iterator[Llava]:
    forget_everything(module_llava)
    yield module_llava
    assert is_idle(module_llava)


def units(llava: Llava, messages: object, images: object = (), system: str | None = None) -> list[Unit]:
    """A prompt, piece by piece."""
    turns = as_messages(messages, images, system)  # type: ignore[arg-type]
    pictures = llava._pictures([image for turn in turns for image in turn.images], llava.options)
    return as_units(llava._build(turns), pictures)


def common(one: list[Unit], other: list[Unit]) -> int:
    """Tokens that two prompts begin with."""
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return n_tokens(one[:n])


def n_evaluated(replies: list[Reply]) -> int:
    return sum(r.timings.prefilled_tokens + r.timings.completion_tokens - 1 for r in replies)


class EmbeddingRows:
    """Counts what is evaluated of pictures."""

    def __init__(self, batches: Batches) -> None:
        self.n = 0
        batches.before = self._count

    def _count(self, rows: object) -> None:
        self.n += sum(len(part) for part in rows.inputs if isinstance(part, np.ndarray))  # type: ignore[attr-defined]


def test_the_counters_tell_what_was_evaluated(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(llava, monkeypatch)
    scene = picture(3)
    replies = [llava.ask(q, scene) for q in EIGHT]
    assert n_evaluated(replies) == batches.n_rows
    assert [r.timings.images_encoded for r in replies] == [1] + [0] * 7


def test_a_follow_up_question(llava: Llava) -> None:
    scene = picture(3)
    first = llava.ask(QUESTION, scene)
    assert (first.timings.images_encoded, first.timings.reused_tokens) == (1, 0)
    turns = [
        Message("user", QUESTION, (scene,)),
        Message("assistant", first.text),
        Message("user", "Is there a circle?"),
    ]
    second = llava.chat(turns)
    assert second.timings.images_encoded == 0
    assert second.timings.reused_tokens == first.timings.prompt_tokens + len(first.tokens)
    turns += [Message("assistant", second.text), Message("user", "And a star?")]
    third = llava.chat(turns)
    assert third.timings.images_encoded == 0
    assert third.timings.reused_tokens == second.timings.prompt_tokens + len(second.tokens)
    # Another way to go on from the first answer begins with what is there of it, too.
    other = [*turns[:2], Message("user", "How many shapes are there?")]
    again = llava.chat(other)
    assert again.timings.reused_tokens == common(units(llava, other), units(llava, turns))
    assert again.timings.reused_tokens >= first.timings.prompt_tokens + len(first.tokens)
    forget_everything(llava)
    alone = llava.chat(turns)
    assert (alone.timings.reused_tokens, alone.timings.images_encoded) == (0, 1)
    assert alone.tokens == third.tokens


def test_another_question_about_the_picture(llava: Llava) -> None:
    scene = picture(3)
    llava.ask(EIGHT[0], scene)
    second = llava.ask(EIGHT[1], scene)
    expected = common(units(llava, EIGHT[0], scene), units(llava, EIGHT[1], scene))
    assert second.timings.reused_tokens == expected >= second.timings.image_tokens
    assert second.timings.images_encoded == 0


def test_the_same_question_twice(llava: Llava) -> None:
    scene = picture(3)
    first, second = (llava.ask(QUESTION, scene) for _ in range(2))
    assert second.timings.prefilled_tokens == 1, "whose logits are needed"
    assert second.timings.images_encoded == 0 and second.tokens == first.tokens


def test_the_same_system_prompt_with_another_picture(llava: Llava) -> None:
    system = "You look at pictures and answer in one short sentence."
    a, b = picture(3), picture(8)
    first = llava.ask(QUESTION, a, system=system)
    second = llava.ask(QUESTION, b, system=system)
    before = llava.prompt_tokens(QUESTION, b, system=system).index(None)
    assert second.timings.reused_tokens == before > 10
    assert first.timings.images_encoded == second.timings.images_encoded == 1
    assert first.text != second.text
    other = llava.ask(QUESTION, b, system="Another one.")
    assert other.timings.reused_tokens < before and other.timings.images_encoded == 0


def test_text_without_a_picture(llava: Llava) -> None:
    first = llava.ask("Is there a star in the sky?")
    second = llava.ask("Is there a star in the picture?")
    expected = common(*(units(llava, f"Is there a star in the {word}?") for word in ("sky", "picture")))
    assert second.timings.reused_tokens == expected > 10
    assert first.timings.image_tokens == second.timings.images_encoded == 0


def test_eight_questions_about_a_new_picture_at_once(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = picture(3)
    alone = [llava.ask(q, scene) for q in EIGHT]
    forget_everything(llava)
    batches = Batches(llava, monkeypatch)
    of_pictures = EmbeddingRows(batches)
    with line(llava) as waiting:
        asked = [waiting.ask(q, scene) for q in EIGHT]
    replies = [a.reply for a in asked]
    assert [r.tokens for r in replies] == [r.tokens for r in alone]
    assert sum(r.timings.images_encoded for r in replies) == 1
    n_image = replies[0].timings.image_tokens
    assert of_pictures.n == n_image, "read once, for all of them"
    assert replies[0].timings.reused_tokens == 0
    for question, reply in zip(EIGHT[1:], replies[1:], strict=True):
        least = common(units(llava, EIGHT[0], scene), units(llava, question, scene))
        assert reply.timings.reused_tokens >= least >= n_image
    assert n_evaluated(replies) == batches.n_rows
    assert max(len(batch) for batch in batches.rows) == 8, "and answered together"


def test_eight_pictures_and_eight_questions_at_once(llava: Llava) -> None:
    pictures = [picture(i) for i in range(40, 48)]
    replies = at_once([lambda p=p: llava.ask(QUESTION, p) for p in pictures])  # type: ignore[misc]
    assert [r.timings.images_encoded for r in replies] == [1] * 8
    forget_everything(llava)
    assert [llava.ask(QUESTION, p).tokens for p in pictures] == [r.tokens for r in replies]


def test_an_answer_that_is_being_given_is_a_source(llava: Llava) -> None:
    scene = picture(3)
    stream = llava.stream(QUESTION, scene)
    next(stream)
    other = llava.ask("Is there a star?", scene)
    assert other.timings.images_encoded == 0
    assert other.timings.reused_tokens > other.timings.image_tokens
    rest = list(stream)
    assert rest[-1].reply is not None and rest[-1].reply.text == llava.ask(QUESTION, scene).text


def test_a_picture_that_is_known_but_no_longer_in_the_cache(llava: Llava) -> None:
    scene = picture(3)
    first = llava.ask(QUESTION, scene)
    # As many other prompts as are kept, and one more; with system prompts that share nothing.
    for i in range(N_RETIRED + llava.parallel + 1):
        llava.ask(QUESTION, system=f"{i} is a number.", max_tokens=1)
    again = llava.ask(QUESTION, scene)
    n_before = llava.prompt_tokens(QUESTION, 1).index(None)
    assert again.timings.images_encoded == 0 and again.timings.reused_tokens <= n_before
    assert again.tokens == first.tokens


def test_embeddings_that_were_asked_for_are_known(llava: Llava) -> None:
    scene = picture(3)
    embeddings = llava.embed_images(scene)
    reply = llava.ask(QUESTION, scene)
    assert reply.timings.images_encoded == 0 and reply.timings.reused_tokens == 0
    assert np.array_equal(llava.embed_images([scene, scene]), np.concatenate([embeddings, embeddings]))


def test_two_pictures_in_one_question(llava: Llava) -> None:
    a, b, c = picture(3), picture(8), picture(9)
    first = llava.ask(QUESTION, [a, b])
    assert first.timings.images_encoded == 2 and first.timings.reused_tokens == 0
    second = llava.ask(QUESTION, [a, c])
    assert second.timings.images_encoded == 1
    assert second.timings.reused_tokens == common(units(llava, QUESTION, [a, b]), units(llava, QUESTION, [a, c]))
    n_image = first.timings.image_tokens // 2
    assert n_image <= second.timings.reused_tokens < 2 * n_image
    turned = llava.ask(QUESTION, [b, a])
    assert turned.timings.images_encoded == 0
    assert turned.timings.reused_tokens == common(units(llava, QUESTION, [a, b]), units(llava, QUESTION, [b, a]))
    twice = llava.ask(QUESTION, [picture(10), picture(10)])
    assert twice.timings.images_encoded == 1, "once, though shown twice"
    forget_everything(llava)
    for reply, shown in ((turned, [b, a]), (second, [a, c]), (twice, [picture(10), picture(10)])):
        assert llava.ask(QUESTION, shown).tokens == reply.tokens


def test_a_picture_that_is_shown_again(llava: Llava) -> None:
    """What is known of its first place does not fill its second."""
    scene = picture(3)
    first = llava.ask(QUESTION, scene)
    turns = [Message("user", QUESTION, (scene,)), Message("assistant", first.text), Message("user", "Now?", (scene,))]
    again = llava.chat(turns)
    assert again.timings.images_encoded == 0
    assert again.timings.reused_tokens == common([*units(llava, QUESTION, scene), *first.tokens], units(llava, turns))
    between_steps(llava, lambda scheduler: scheduler._encoder._known.clear())
    longer = [*turns, Message("assistant", again.text), Message("user", "And now?", (scene, scene))]
    third = llava.chat(longer)
    assert third.timings.images_encoded == 1, "its embeddings are not in the KV cache"
    forget_everything(llava)
    assert [llava.chat(c).tokens for c in (turns, longer)] == [again.tokens, third.tokens]


def test_a_picture_that_is_seen_otherwise_is_another_one(llava: Llava) -> None:
    scene = picture(3)
    wide = Image.new("RGB", (scene.width * 3, scene.height), "white")
    wide.paste(scene, (0, 0))
    first = llava.ask(QUESTION, wide, preprocess="crop")
    other = llava.ask(QUESTION, wide, preprocess="pad")
    assert first.timings.images_encoded == other.timings.images_encoded == 1
    assert other.timings.reused_tokens < other.timings.image_tokens
    copy = wide.copy()
    assert llava.ask(QUESTION, copy, preprocess="pad").timings.images_encoded == 0, "known by its pixels"


def test_logits_reuse_what_is_there(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = picture(3)
    batches = Batches(llava, monkeypatch)
    cold = llava.logits(QUESTION, scene)
    n_cold = batches.n_rows
    assert n_cold == len(llava.prompt_tokens(QUESTION, 1))
    warm = llava.logits(QUESTION, scene)
    assert batches.n_rows == n_cold + 1
    np.testing.assert_allclose(warm, cold, atol=1e-4)


@pytest.mark.parametrize("n_batch", [16, 37])
def test_pictures_that_do_not_fit_a_batch(tiny: ModelFiles, llava: Llava, n_batch: int) -> None:
    scene, other = picture(3), picture(8)
    expected = [llava.ask(q, p).tokens for p in (scene, other) for q in EIGHT]
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_batch=n_batch) as small:
        assert small._llm.n_batch == n_batch
        replies = at_once([lambda p=p, q=q: small.ask(q, p) for p in (scene, other) for q in EIGHT])  # type: ignore[misc]
        assert [r.tokens for r in replies] == expected
        assert sum(r.timings.images_encoded for r in replies) == 2


def test_few_cells_are_enough_for_many_questions(tiny: ModelFiles, llava: Llava) -> None:
    """Where all that is kept fits no longer, answers stay the same, and what is used is kept longest."""
    pictures = [picture(i) for i in range(50, 60)]
    expected = [llava.ask(QUESTION, p).tokens for p in pictures]
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_ctx=128, parallel=1) as small:
        assert small._llm.n_cells < 10 * 60
        for _ in range(2):
            assert [small.ask(QUESTION, p).tokens for p in pictures] == expected
        last = small.ask(EIGHT[3], pictures[-1])
        assert last.timings.reused_tokens > last.timings.image_tokens
        assert is_idle(small)
        kept = between_steps(small, lambda s: [list(x.units) for x in s._sequences.retired])
        assert len(kept) > 1


# --- LLaVA-NeXT, whose pictures take as many tokens as their sizes ask for ---


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llava]:
    from next_checkpoints import random_next_model, save_next

    directory: Path = tmp_path_factory.mktemp("next")
    checkpoint = save_next(random_next_model(((28, 56), (56, 28), (56, 56))), directory / "checkpoint")
    files = convert(checkpoint, directory / "out", quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=1, max_tokens=6) as llava:
        yield llava


def test_eight_questions_about_tiles_at_once(tiles: Llava) -> None:
    scene = picture(3).resize((150, 80))
    # These pictures are so small that only with more before them is it worth waiting for who reads them.
    system = "Look at the whole of the picture, tile by tile, before you answer."
    with line(tiles) as waiting:
        asked = [waiting.ask(q, scene, system=system) for q in EIGHT]
    replies = [asking.reply for asking in asked]
    assert sum(r.timings.images_encoded for r in replies) == 1
    n_image = replies[0].timings.image_tokens
    assert n_image > 4 and sum(r.timings.reused_tokens >= n_image + 20 for r in replies) == 7
    forget_everything(tiles)
    assert [tiles.ask(q, scene, system=system).tokens for q in EIGHT] == [r.tokens for r in replies]


def test_another_size_is_another_picture(tiles: Llava) -> None:
    scene = picture(3)
    tiles.ask(QUESTION, scene)
    other = tiles.ask(QUESTION, scene.resize((90, 40)))
    n_before = tiles.prompt_tokens(QUESTION, scene).index(None)
    assert other.timings.images_encoded == 1 and other.timings.reused_tokens == n_before
    again = tiles.ask("Another question?", scene)
    assert again.timings.images_encoded == 0 and again.timings.reused_tokens > again.timings.image_tokens
