"""What goes wrong in the engine reaches the question that caused it, and no other one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_world import (
    QUESTION,
    Asked,
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

from local_llava import EngineError, Llava, LocalLlavaError
from local_llava.answer import Answer
from local_llava.embeddings import Encoding
from local_llava.llm.rows import Rows
from local_llava.run import Run
from local_llava.schema.constraint import Constraint
from local_llava.types import ModelFiles


@pytest.fixture(scope="module")
def module_llava(tiny: ModelFiles) -> Iterator[Llava]:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_batch=64, max_stall=60.0) as llava:
        yield llava


@pytest.fixture
def llava(module_llava: Llava) -> Iterator[Llava]:
    forget_everything(module_llava)
    yield module_llava
    wait_until(lambda: is_idle(module_llava))


@pytest.fixture
def batches(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(llava, monkeypatch)


@pytest.fixture
def asked() -> list[Asked]:
    return questions(fresh_seed(), 6, 1)


def run_of(llava: Llava, question: str) -> Any:
    """The run that answers a question; None where there is none (yet)."""
    return next((r for r in llava._scheduler._running if r.request.options.system == question), None)


def ask_with_culprit(llava: Llava, asked: list[Asked], **options: Any) -> tuple[Asking, list[Asking]]:
    """Six questions at once, among them, as the third, one of which a fault knows by its system prompt."""
    with line(llava) as waiting:
        others = [waiting.ask(a.question, a.picture) for a in asked[:2]]
        culprit = waiting.ask(QUESTION, asked[2].picture, system="culprit", **options)
        others += [waiting.ask(a.question, a.picture) for a in asked[3:]]
    return culprit, others


def check_others(llava: Llava, asked: list[Asked], expected: list[Any], others: list[Asking]) -> None:
    assert [a.reply.tokens for a in others] == expected
    reply = llava.ask(QUESTION, asked[2].picture)
    assert reply.tokens, "the next one works"


@pytest.fixture
def expected(llava: Llava, asked: list[Asked]) -> list[tuple[int, ...]]:
    tokens = [llava.ask(a.question, a.picture).tokens for a in asked]
    forget_everything(llava)
    return [*tokens[:2], *tokens[3:]]


@pytest.mark.parametrize("error", [EngineError("cannot"), MemoryError(), ValueError("never thought of")])
@pytest.mark.parametrize("when", ["reading", "answering"])
def test_a_batch_that_fails_because_of_one(
    llava: Llava, batches: Batches, asked: list[Asked], expected: list[Any], error: Exception, when: str
) -> None:
    sizes: list[int] = []

    def fail(rows: Rows) -> None:
        run = run_of(llava, "culprit")
        if run is not None and run.sequence.id in rows.sequences and run.reading == (when == "reading"):
            sizes.append(len(set(rows.sequences)))
            raise error

    batches.before = fail
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.error is error
    assert sizes[-1] == 1 and len(sizes) == 1 + (sizes[0] > 1), "with others if there were some, and then alone"
    check_others(llava, asked, expected, others)


def test_a_batch_that_fails_once_is_no_error(
    llava: Llava, batches: Batches, asked: list[Asked], expected: list[Any]
) -> None:
    n_batches = 0

    def fail(rows: Rows) -> None:
        nonlocal n_batches
        n_batches += 1
        if n_batches % 5 == 2 and len(set(rows.sequences)) > 1:
            raise EngineError("no memory for a moment")

    batches.before = fail
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.reply.tokens
    check_others(llava, asked, expected, others)


def test_a_batch_that_fails_for_everyone(llava: Llava, batches: Batches, asked: list[Asked]) -> None:
    def fail(rows: Rows) -> None:
        raise EngineError("llama.cpp cannot evaluate")

    batches.before = fail
    culprit, others = ask_with_culprit(llava, asked)
    assert all(isinstance(a.error, EngineError) for a in (culprit, *others))
    batches.before = lambda rows: None
    assert llava.ask(QUESTION, asked[0].picture).tokens


@pytest.mark.parametrize("with_pictures", [False, True])
def test_what_llama_cpp_refuses(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch, with_pictures: bool
) -> None:
    """A token that is none: `llama_decode` says so in a batch of tokens, and the table of embeddings in another one."""
    tokenize = llava._llm.tokenize
    monkeypatch.setattr(
        llava._llm, "tokenize", lambda run: [99_999] if "culprit" in "".join(run.pieces) else tokenize(run)
    )
    if with_pictures:
        culprit, others = ask_with_culprit(llava, asked)
        assert isinstance(culprit.error, EngineError)
        check_others(llava, asked, expected, others)
    else:
        text = ["Why?", "How?", "Where?"]
        alone = [llava.ask(t, max_tokens=5).tokens for t in text]
        with line(llava) as waiting:
            culprit = waiting.ask("culprit")
            others = [waiting.ask(t, max_tokens=5) for t in text]
        assert "status -1" in str(culprit.error) and "invalid token" in str(culprit.error)
        assert [a.reply.tokens for a in others] == alone


def test_llama_cpp_is_as_before_after_a_refusal(llava: Llava) -> None:
    """What it kept of the batch that failed is forgotten: all sequences and all cells are as they should be."""
    rows = Rows()
    first = llava.ask(QUESTION, picture(3))

    def provoke(scheduler: Any) -> str:
        rows.add(0, 400, [5, 99_999], "last")
        with pytest.raises(EngineError) as error:
            llava._llm.decode(rows)
        return str(error.value)

    assert "2 tokens" in between_steps(llava, provoke)
    again = llava.ask(QUESTION, picture(3))
    assert again.tokens == first.tokens and again.timings.prefilled_tokens == 1


def raising(error: Exception, when: Callable[..., bool], function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise error
        return function(*args, **kwargs)

    return wrapped


def test_sampling_that_fails(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ZeroDivisionError("while sampling")
    third = raising(
        error, lambda self, context, row: self._options.system == "culprit" and self.n_sampled == 2, Answer.take
    )
    monkeypatch.setattr(Answer, "take", third)
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.error is error
    check_others(llava, asked, expected, others)


def test_a_constraint_that_fails(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = EngineError("the answer cannot be held to the schema any more")
    monkeypatch.setattr(Constraint, "accept", raising(error, lambda *_: True, Constraint.accept))
    culprit, others = ask_with_culprit(llava, asked, json_schema={"type": "integer"})
    assert culprit.error is error
    check_others(llava, asked, expected, others)


@pytest.mark.parametrize("error", [EngineError("no memory on the GPU"), MemoryError()])
def test_a_picture_that_cannot_be_encoded(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bad = llava._pictures([asked[2].picture], llava.options)[0].digest
    monkeypatch.setattr(
        Encoding,
        "advance",
        raising(error, lambda self, _: any(p.digest == bad for p in self._new), Encoding.advance),
    )
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.error is error
    with pytest.raises(type(error)):
        llava.embed_images(asked[2].picture)
    assert [a.reply.tokens for a in others] == expected
    monkeypatch.undo()
    assert llava.ask(QUESTION, asked[2].picture).timings.images_encoded == 1


def test_a_tower_that_cannot_begin(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, bad = llava._tower.begin, llava._pictures([asked[2].picture], llava.options)[0].pixels
    error = EngineError("no memory for a graph")
    monkeypatch.setattr(llava._tower, "begin", raising(error, lambda pixels: (pixels == bad).all(), begin))
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.error is error
    assert [a.reply.tokens for a in others] == expected


@pytest.mark.parametrize("what", ["plan_prompt", "plan_tokens"])
def test_what_cannot_be_put_into_a_batch(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also where a part of it is in the batch already."""
    error, plan = KeyError("embeddings"), getattr(Run, what)

    def fail(run: Run, *args: Any) -> None:
        plan(run, *args)
        if run.request.options.system == "culprit":
            raise error

    monkeypatch.setattr(Run, what, fail)
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.error is error
    check_others(llava, asked, expected, others)


def test_a_sampler_that_cannot_be_made(
    llava: Llava, asked: list[Asked], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MemoryError()
    sampler = raising(error, lambda options: options.system == "culprit", llava._llm.sampler)
    monkeypatch.setattr(llava._llm, "sampler", sampler)
    culprit, others = ask_with_culprit(llava, asked)
    assert culprit.error is error
    check_others(llava, asked, expected, others)


def test_what_fails_shares_a_beginning_with_others(llava: Llava, batches: Batches, asked: list[Asked]) -> None:
    """Those who wait for a prompt that fails read it themselves."""
    scene = asked[0].picture
    texts = [QUESTION, "Is there a star?", "How many shapes are there?"]
    expected = [llava.ask(t, scene, system="Be brief, and look at the whole picture.").tokens for t in texts]
    forget_everything(llava)
    n_failed = 0

    def fail(rows: Rows) -> None:
        nonlocal n_failed
        first = next((r for r in llava._scheduler._running if r.request.options.max_tokens == 77), None)
        if first is not None and first.sequence.id in rows.sequences:
            n_failed += 1
            raise EngineError("the first one cannot")

    batches.before = fail
    system = "Be brief, and look at the whole picture."
    with line(llava) as waiting:
        culprit = waiting.ask("Describe this image.", scene, system=system, max_tokens=77)
        others = [waiting.ask(t, scene, system=system) for t in texts]
    assert isinstance(culprit.error, EngineError) and n_failed
    assert [a.reply.tokens for a in others] == expected
    assert sum(a.reply.timings.images_encoded for a in others) == 0, "the tower's work for the first one is not lost"


def test_a_step_that_fails_ends_what_is_open_and_the_next_question_works(
    llava: Llava, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the engine itself."""
    with monkeypatch.context() as patch:
        patch.setattr(llava._scheduler, "_admit", raising(ZeroDivisionError("a mistake"), lambda: True, lambda: None))
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            llava.ask(QUESTION)
    assert is_idle(llava) and llava.ask(QUESTION, asked[0].picture).tokens


def test_arguments_that_are_wrong_reach_no_one_else(llava: Llava, asked: list[Asked], tmp_path: Path) -> None:
    first = llava.ask(QUESTION, asked[0].picture)
    stream = llava.stream(QUESTION, asked[0].picture)
    next(stream)
    for wrong in ({"temperature": -1}, {"images": tmp_path / "none.png"}, {"json_schema": {"not": {}}}):
        with pytest.raises(LocalLlavaError):
            llava.ask(QUESTION, **wrong)
    assert list(stream)[-1].reply.tokens == first.tokens  # type: ignore[union-attr]


# --- the image cache ---


@pytest.fixture
def keeping(tiny: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Llava]:
    monkeypatch.setenv("LOCAL_LLAVA_CACHE", str(tmp_path / "kept"))
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, image_cache="kv") as llava:
        yield llava
        assert is_idle(llava)


def test_what_cannot_be_saved_is_no_error(keeping: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = picture(3)
    for error in (EngineError("llama.cpp cannot save"), MemoryError()):
        monkeypatch.setattr(keeping._llm, "save", raising(error, lambda _: True, keeping._llm.save))
        first = keeping.ask(QUESTION, scene)
        assert first.tokens
    again = keeping.ask(QUESTION, scene)
    assert again.tokens == first.tokens and again.timings.prefilled_tokens == 1, "and it stays in memory"


def test_what_llama_cpp_does_not_restore_is_read(keeping: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = picture(3)
    first = keeping.ask(QUESTION, scene)
    forget_everything(keeping)
    restore = keeping._llm.restore
    # The bytes of another version of llama.cpp, say: their checksum is right, but it does not take them.
    monkeypatch.setattr(keeping._llm, "restore", lambda sequence, state, n: restore(sequence, state[:-100].copy(), n))
    again = keeping.ask(QUESTION, scene)
    assert again.tokens == first.tokens
    assert (again.timings.restored_tokens, again.timings.reused_tokens, again.timings.images_encoded) == (0, 0, 0)
    monkeypatch.undo()
    forget_everything(keeping)
    assert keeping.ask(QUESTION, scene).timings.restored_tokens > 36
