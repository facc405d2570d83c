"""Long prompts that are read in a KV cache of their own: the same answers, nothing computed twice, nobody stalled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_world import (
    QUESTION,
    Asking,
    Batches,
    between_steps,
    forget_everything,
    fresh_seed,
    is_idle,
    line,
    picture,
    questions,
    wait_until,
)

from local_llava import EngineError, Llava, aside
from local_llava.llm import Context
from local_llava.llm.rows import Rows
from local_llava.types import ModelFiles

SYSTEM = "Be brief, and look at the whole of the picture before you answer."
N_BATCH = 16


@pytest.fixture(scope="module")
def module_llava(tiny: ModelFiles) -> Iterator[Llava]:
    options = {"kv_type": "F32", "n_threads": 1, "n_batch": N_BATCH, "n_gpu_layers": 0, "image_cache": "off"}
    with Llava.load(tiny.model, tiny.mmproj, **options) as llava:
        yield llava


@pytest.fixture
def llava(module_llava: Llava, monkeypatch: pytest.MonkeyPatch) -> Iterator[Llava]:
    """Any picture is read aside as soon as something else is kept."""
    forget_everything(module_llava)
    monkeypatch.setattr(aside, "MIN_ROWS", 36)
    monkeypatch.setattr(aside, "MIN_OTHERS", 1)
    yield module_llava
    wait_until(lambda: is_idle(module_llava))
    assert between_steps(module_llava, look) == (None, 0)


def look(scheduler: Any) -> tuple[Any, int]:
    """Who is read aside, and how many cells are in use there."""
    place = scheduler._aside._place
    return scheduler._aside.run, 0 if place is None else place[1]._cache.n_cells - place[1].n_free


class Watched:
    """Rows that were evaluated aside, batch by batch; `before` is called with each of these batches."""

    def __init__(self, llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.before: Any = lambda rows: None
        decode = Context.decode

        def watched(context: Context, rows: Rows, *rest: Any) -> None:
            if context is not llava._llm:
                self.before(rows)
                self.rows.append(len(rows))
            decode(context, rows, *rest)

        monkeypatch.setattr(Context, "decode", watched)


@pytest.fixture
def watched(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(llava, monkeypatch)


def alone(llava: Llava, *args: Any, **options: Any) -> Any:
    """An answer of a model that knows nothing else, so that nothing is read aside."""
    forget_everything(llava)
    return llava.ask(*args, **options)


def test_the_same_answers(llava: Llava, watched: Watched) -> None:
    seed = fresh_seed()
    asked = questions(seed, 20, 2)
    expected = [alone(llava, a.question, a.picture).tokens for a in asked]
    assert not watched.rows
    forget_everything(llava)
    replies = [llava.ask(a.question, a.picture) for a in asked]
    assert [reply.tokens for reply in replies] == expected, seed
    # The first question about each picture but the very first is read aside, and whole; the second one reuses it.
    n_aside = sum(reply.timings.prefilled_tokens for reply in replies[2::2])
    assert sum(watched.rows) == n_aside
    assert all(reply.timings.reused_tokens > 36 and not reply.timings.images_encoded for reply in replies[1::2])


def test_several_at_once(llava: Llava, watched: Watched) -> None:
    seed = fresh_seed()
    asked = questions(seed, 24, 1)
    expected = [alone(llava, a.question, a.picture).tokens for a in asked]
    forget_everything(llava)
    with line(llava) as waiting:
        answers = [waiting.ask(a.question, a.picture) for a in asked]
    assert [answer.reply.tokens for answer in answers] == expected, seed
    assert len(watched.rows) > 24


def test_logits(llava: Llava, watched: Watched) -> None:
    scene = picture(3)
    expected = llava.logits(QUESTION, scene)
    forget_everything(llava)
    llava.ask(QUESTION, picture(4))
    found = llava.logits(QUESTION, scene)
    prompt = llava.prompt_tokens(QUESTION, 1)
    assert sum(watched.rows) == len(prompt) - prompt.index(None), "all but what both prompts begin with"
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert llava.ask(QUESTION, scene).timings.prefilled_tokens == 1, "and it is kept"


def test_what_a_prompt_begins_with_is_not_read_again(llava: Llava, watched: Watched) -> None:
    expected = alone(llava, QUESTION, picture(3), system=SYSTEM)
    forget_everything(llava)
    llava.ask(QUESTION, picture(4), system=SYSTEM)
    reply = llava.ask(QUESTION, picture(3), system=SYSTEM)
    assert reply.tokens == expected.tokens
    assert reply.timings.reused_tokens > 15 and sum(watched.rows) == reply.timings.prefilled_tokens < 60
    held = between_steps(llava, lambda s: [(s_.n_past, len(set(s_.cells))) for s_ in s._sequences.retired])
    n_used = between_steps(llava, lambda s: llava._llm.n_cells - s._sequences.n_unused)
    assert n_used == sum(n for n, _ in held) - reply.timings.reused_tokens, "both share the cells of the beginning"


def test_sampling_with_penalties_and_logprobs(llava: Llava, watched: Watched) -> None:
    """llama.cpp's own samplers take the first token from the cache aside."""
    options = {"temperature": 0.8, "repeat_penalty": 1.3, "seed": 5, "logprobs": 3}
    expected = alone(llava, QUESTION, picture(3), **options)
    forget_everything(llava)
    llava.ask(QUESTION, picture(4))
    reply = llava.ask(QUESTION, picture(3), **options)
    assert watched.rows and reply.tokens == expected.tokens
    assert reply.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=1e-4)


def test_questions_about_one_new_picture(llava: Llava, watched: Watched) -> None:
    """The others wait for it, and begin with what is moved over."""
    llava.ask(QUESTION, picture(4))
    scene = picture(3)
    with line(llava) as waiting:
        answers = [waiting.ask(q, scene) for q in (QUESTION, "Is there a star?", "How many shapes are there?")]
    timings = [answer.reply.timings for answer in answers]
    assert [t.images_encoded for t in timings] == [1, 0, 0]
    assert sum(watched.rows) == timings[0].prefilled_tokens
    assert all(t.reused_tokens > 36 for t in timings[1:])


def test_a_short_question_does_not_wait(llava: Llava, watched: Watched) -> None:
    """One that is much shorter than what is left of the prompt aside is read beside it, in turns."""
    llava.ask(QUESTION, picture(4))
    with line(llava) as waiting:
        long = waiting.ask("word " * 35, picture(3), max_tokens=1)
        short = waiting.ask(QUESTION, picture(5), max_tokens=1)
    assert long.reply.timings.prompt_tokens > 3 * short.reply.timings.prompt_tokens
    assert sum(watched.rows) == long.reply.timings.prefilled_tokens, "the short one was not read aside"
    assert short.done_at < long.done_at


def test_answers_go_on_meanwhile(llava: Llava, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run have a turn between two batches aside."""
    monkeypatch.setattr(llava._llm, "ends_turn", lambda token: False)
    batches = Batches(llava, monkeypatch)
    between: list[int] = []
    watched.before = lambda rows: between.append(len(batches.rows))
    with line(llava) as waiting:
        running = [waiting.ask(f"{i}?", max_tokens=200) for i in range(2)]
    wait_until(lambda: sum(not run.reading for run in llava._scheduler._running) == 2)
    reply = llava.ask(QUESTION, picture(3), max_tokens=1)
    assert reply.timings.images_encoded == 1 and len(between) > 1
    assert all(b > a for a, b in itertools.pairwise(between))
    assert all(answer.reply.timings.completion_tokens == 200 for answer in running)


def test_leaving_while_it_is_read(llava: Llava, watched: Watched) -> None:
    llava.ask(QUESTION, picture(4))
    scene = picture(3)

    def leave(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llava.ask(QUESTION, scene, on_prefill=leave)
    assert watched.rows
    wait_until(lambda: is_idle(llava))
    assert between_steps(llava, look) == (None, 0)
    assert llava.ask(QUESTION, scene).tokens == alone(llava, QUESTION, scene).tokens


def test_a_batch_that_fails(llava: Llava, watched: Watched) -> None:
    """Only that answer fails, and the place is free for the next one."""
    llava.ask(QUESTION, picture(4))
    error = EngineError("on purpose")

    def fail(rows: Rows) -> None:
        if len(watched.rows) == 1:
            watched.before = lambda rows: None
            raise error

    watched.before = fail
    with line(llava) as waiting:
        culprit, other = waiting.ask(QUESTION, picture(3)), waiting.ask(QUESTION, picture(5))
    assert culprit.error is error
    assert other.reply.tokens == alone(llava, QUESTION, picture(5)).tokens


@pytest.mark.parametrize("what", ["save", "move_in"])
def test_what_cannot_be_moved(llava: Llava, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llava.ask(QUESTION, picture(4))
    llava.ask(QUESTION, picture(5))
    scene = picture(3)
    with monkeypatch.context() as patch:
        if what == "save":
            save = Context.save

            def failing(context: Context, sequence: int) -> Any:
                if context is not llava._llm:
                    raise EngineError("llama.cpp cannot save a sequence")
                return save(context, sequence)

            patch.setattr(Context, "save", failing)
        else:
            # As if it were of another version: llama.cpp refuses bytes that are too few.
            restore = Context.restore
            patch.setattr(
                Context,
                "restore",
                lambda context, sequence, state, n: restore(
                    context, sequence, state[:-100].copy() if context is llava._llm else state, n
                ),
            )
        with pytest.raises(EngineError, match=r"cannot (save|move)"):
            llava.ask(QUESTION, scene)
    assert llava.ask(QUESTION, scene).tokens == alone(llava, QUESTION, scene).tokens


def test_a_cache_that_cannot_be_made(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all is read beside what is kept, as without one."""
    monkeypatch.setattr(aside, "MIN_ROWS", 36)
    monkeypatch.setattr(aside, "MIN_OTHERS", 1)
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_gpu_layers=0, image_cache="off") as llava:
        expected = alone(llava, QUESTION, picture(3)).tokens
        forget_everything(llava)
        tried: list[int] = []

        def fail(n_cells: int) -> Context:
            tried.append(n_cells)
            raise EngineError("no context")

        monkeypatch.setattr(llava._llm, "another_context", fail)
        llava.ask(QUESTION, picture(4))
        assert llava.ask(QUESTION, picture(3)).tokens == expected
        llava.ask(QUESTION, picture(5))
        assert tried == [256], "once is enough"


def test_nothing_is_read_aside_where_little_is_kept(tiny: ModelFiles) -> None:
    with Llava.load(tiny.model, tiny.mmproj, n_threads=1, n_gpu_layers=0, image_cache="off") as llava:
        for i in range(3):
            llava.ask(QUESTION, picture(i))
        assert between_steps(llava, lambda s: s._aside._place) is None, "not even made"


def test_closing_while_it_is_read(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "MIN_ROWS", 36)
    monkeypatch.setattr(aside, "MIN_OTHERS", 1)
    options = {"n_threads": 1, "n_gpu_layers": 0, "n_batch": N_BATCH, "image_cache": "off"}
    with Llava.load(tiny.model, tiny.mmproj, **options) as llava:
        llava.ask(QUESTION, picture(4))
        watched = Watched(llava, monkeypatch)
        closing: list[Asking] = []

        def close(rows: Rows) -> None:
            watched.before = lambda rows: None
            closing.append(Asking(llava.close))  # type: ignore[arg-type]
            wait_until(lambda: llava._worker._closed)

        watched.before = close
        with pytest.raises(EngineError, match="closed"):
            llava.ask(QUESTION, picture(3))
    assert watched.rows and closing
