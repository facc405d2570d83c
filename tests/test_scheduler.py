"""Many questions at once: who comes when, how long others wait, leaving early, closing. By batches, not the clock."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tiny_world import (
    QUESTION,
    Asking,
    Batches,
    at_once,
    between_steps,
    forget_everything,
    fresh_seed,
    is_idle,
    line,
    picture,
    questions,
    wait_until,
)

from local_llava import BusyError, EngineError, Llava, UsageError
from local_llava.embeddings import Encoder, Encoding
from local_llava.llm import LLM
from local_llava.llm.rows import Rows
from local_llava.request import Picture
from local_llava.types import ModelFiles

LONG = "word " * 60
"""300 to 400 tokens."""


@pytest.fixture(scope="module")
def module_llava(tiny: ModelFiles) -> Iterator[Llava]:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_batch=32) as llava:
        yield llava


@pytest.fixture
def llava(module_llava: Llava) -> Iterator[Llava]:
    forget_everything(module_llava)
    yield module_llava
    wait_until(lambda: is_idle(module_llava))


@pytest.fixture
def batches(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(llava, monkeypatch)


def never_end(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers have as many tokens as they may have, whatever the model means."""
    monkeypatch.setattr(llava._llm, "ends_turn", lambda token: False)


class Hold:
    """Holds the engine in the first batch that a condition is true of, until `release`."""

    def __init__(self, batches: Batches, n: int = 1) -> None:
        self._n, self._seen = n, 0
        self.reached, self._gate = threading.Event(), threading.Event()
        batches.before = self._before

    def _before(self, rows: Rows) -> None:
        self._seen += 1
        if self._seen == self._n:
            self.reached.set()
            assert self._gate.wait(60)

    def release(self) -> None:
        self._gate.set()


# --- order ---


def test_first_come_first_served(tiny: ModelFiles) -> None:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, parallel=2) as llava:
        assert llava.parallel == 2
        begun: list[str] = []
        begin = llava._scheduler._sequences.begin

        def watched(units: Any, n_new: int) -> Any:
            running = len(llava._scheduler._running)
            assert running < 2
            sequence = begin(units, n_new)
            if sequence is not None:
                begun.append(next(str(u) for u in units if not isinstance(u, int)))
            return sequence

        llava._scheduler._sequences.begin = watched  # type: ignore[method-assign]
        pictures = [picture(60 + i) for i in range(6)]
        names = [str(p.shown) for p in llava._pictures(pictures, llava.options)]
        with line(llava) as waiting:
            asked = [waiting.ask(QUESTION, p, max_tokens=6) for p in pictures]
        replies = [a.reply for a in asked]
        assert begun == names
        ends = [a.done_at for a in asked]
        assert max(ends[:2]) < min(ends[4:])
        assert [llava.ask(QUESTION, p, max_tokens=6).tokens for p in pictures] == [r.tokens for r in replies]


def test_the_time_until_the_turn_comes_is_told(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llava.load(tiny.model, tiny.mmproj, n_threads=1, parallel=1) as llava:
        never_end(llava, monkeypatch)
        hold = Hold(Batches(llava, monkeypatch), n=3)
        first = Asking(lambda: llava.ask(QUESTION, max_tokens=8))
        assert hold.reached.wait(60)
        others = [Asking(lambda: llava.ask(QUESTION, max_tokens=8)) for _ in range(3)]
        wait_until(lambda: llava._worker._n_open == 4)
        time.sleep(0.1)
        hold.release()
        waits = [a.reply.timings.waited_s for a in others]
        assert first.reply.timings.waited_s < 0.1 <= min(waits) < max(waits)
        assert max(waits) < 60 and first.reply.timings.prefill_s < 0.1


def test_what_has_no_room_waits_and_nobody_overtakes_it(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that needs all of the cache is not starved by small ones."""
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, parallel=4, n_ctx=256) as llava:
        never_end(llava, monkeypatch)
        n_cells = llava._llm.n_cells
        order: list[int] = []
        begin = llava._scheduler._sequences.begin

        def watched(units: Any, n_new: int) -> Any:
            sequence = begin(units, n_new)
            if sequence is not None:
                order.append(len(units) + n_new)
            return sequence

        llava._scheduler._sequences.begin = watched  # type: ignore[method-assign]
        n_small = n_cells // 256
        with line(llava) as waiting:
            # They need n_ctx each, so that one more than fit has to wait; those behind it need little.
            large = [waiting.ask(f"{i}?", max_tokens=230) for i in range(n_small + 1)]
            small = [waiting.ask(f"{i} again?", max_tokens=2) for i in range(4)]
        assert all(a.reply for a in [*large, *small])
        assert order == sorted(order, reverse=True), "as they came"
        assert is_idle(llava)


def test_too_many_are_refused(tiny: ModelFiles) -> None:
    with Llava.load(tiny.model, tiny.mmproj, n_threads=1, parallel=1, max_waiting=2) as llava:
        with line(llava) as waiting:
            asked = [waiting.ask(QUESTION, max_tokens=2) for _ in range(4)]
            error = asked[3].error
            assert isinstance(error, BusyError) and "max_waiting" in str(error)
            with pytest.raises(BusyError, match="busy"):
                llava.stream(QUESTION)  # at once, and not only when the first piece is asked for

            async def main() -> None:
                with pytest.raises(BusyError):
                    await llava.aask(QUESTION)

            asyncio.run(main())
        assert [len(a.reply.tokens) for a in asked[:3]] == [2, 2, 2]
        assert llava.ask(QUESTION, max_tokens=2).tokens == asked[0].reply.tokens


def test_event_loops_ask_many_at_once(llava: Llava) -> None:
    asked = questions(fresh_seed(), 4, 3)
    expected = [llava.ask(a.question, a.picture).tokens for a in asked]
    forget_everything(llava)

    async def main() -> list[Any]:
        return await asyncio.gather(*(llava.aask(a.question, a.picture) for a in asked))

    assert [r.tokens for r in asyncio.run(main())] == expected


def test_sixteen_threads(llava: Llava) -> None:
    seed = fresh_seed()
    asked = questions(seed, 8, 6)
    expected = [llava.ask(a.question, a.picture).tokens for a in asked]
    forget_everything(llava)

    def some(i: int) -> list[tuple[int, ...]]:
        return [llava.ask(a.question, a.picture).tokens for a in asked[i * 3 : i * 3 + 3]]

    results = at_once([lambda i=i: some(i) for i in range(16)])  # type: ignore[misc]
    assert [tokens for part in results for tokens in part] == expected, seed


def test_two_models_at_once(tiny: ModelFiles, llava: Llava) -> None:
    asked = questions(fresh_seed(), 6, 2)
    expected = [llava.ask(a.question, a.picture).tokens for a in asked]
    forget_everything(llava)
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1) as other:

        def all_of(which: Llava) -> list[tuple[int, ...]]:
            return [which.ask(a.question, a.picture).tokens for a in asked]

        assert at_once([lambda: all_of(llava), lambda: all_of(other)] * 2) == [expected] * 4
    assert llava.ask(asked[0].question, asked[0].picture).tokens == expected[0], "the other one's end is not ours"


# --- who waits for whom ---


@pytest.fixture
def answering(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> Iterator[Iterator[Any]]:
    """A stream whose prompt is read."""
    with monkeypatch.context() as patch:
        never_end(llava, patch)
        stream = llava.stream(QUESTION, max_tokens=900)
        next(stream)
        yield stream
        stream.close()


def is_answering(llava: Llava) -> bool:
    return any(not run.reading for run in llava._scheduler._running)


@pytest.mark.parametrize("max_stall", [0.0, 3600.0])
def test_prompts_do_not_stall_answers(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch, max_stall: float) -> None:
    """The next token of a running answer is in every batch; how much there may be besides is `max_stall`'s."""
    options = {"kv_type": "F32", "n_threads": 1, "n_batch": 64, "max_stall": max_stall}
    with Llava.load(tiny.model, tiny.mmproj, **options) as llava:
        never_end(llava, monkeypatch)
        llava.ask(LONG, max_tokens=1)  # how long a row takes
        batches = Batches(llava, monkeypatch)
        stream = llava.stream(QUESTION, max_tokens=900)
        next(stream)
        beside: list[int] = []
        pieces: list[float | None] = []
        advance = Encoding.advance

        def count(rows: Rows) -> None:
            running = [r for r in llava._scheduler._running if not r.reading]
            assert all(r.sequence.id in rows.sequences for r in running), "it stands still"
            if running:
                beside.append(len(rows) - len(running))

        def piece(self: Encoding, seconds: float | None) -> None:
            if is_answering(llava):
                pieces.append(seconds)
            advance(self, seconds)

        batches.before = count
        monkeypatch.setattr(Encoding, "advance", piece)
        other = Asking(lambda: llava.ask("Another one: " + LONG, picture(3), max_tokens=1))
        wait_until(lambda: any(r.reading for r in llava._scheduler._running) or other.done_at > 0)
        while not other.done_at:
            assert next(stream)
        assert other.reply.timings.images_encoded == 1
        assert pieces and set(pieces) == {max_stall}
        reading = [n for n in beside if n]
        if max_stall:
            assert max(reading) > 50
        else:
            assert set(reading) == {1} and len(reading) > 100
        stream.close()


def test_the_more_prompts_wait_the_longer_an_answer_stands_still(
    llava: Llava, answering: Iterator[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`max_stall` is for each of them."""
    pieces: list[tuple[float, int]] = []
    advance = Encoding.advance

    def piece(self: Encoding, seconds: float) -> None:
        assert is_answering(llava)
        pieces.append((seconds, sum(run.reading for run in llava._scheduler._running)))
        advance(self, seconds)

    monkeypatch.setattr(Encoding, "advance", piece)
    with line(llava) as waiting:
        others = [waiting.ask(QUESTION, picture(i), max_tokens=1) for i in range(3)]
    assert [other.reply.timings.images_encoded for other in others] == [1, 1, 1]
    assert [seconds for seconds, _ in pieces] == [n * llava.options.max_stall for _, n in pieces]
    assert {n for _, n in pieces} >= {2, 3}


def test_short_questions_about_several_pictures_go_in_small_batches(
    tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows would bring them into one tile of attention, which passes over all pictures; a long prompt has tiles."""
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, n_batch=256, parallel=8) as llava:
        for i in range(8):
            llava.ask(QUESTION, picture(i), max_tokens=1)
        batches = Batches(llava, monkeypatch)

        def largest(pictures: list[int], before: str) -> int:
            batches.rows.clear()
            with line(llava) as waiting:
                asked = [
                    waiting.ask(f"{i} {QUESTION}", picture(p), max_tokens=1)
                    for i, p in zip(before, pictures, strict=True)
                ]
            assert sum(a.reply.timings.prefilled_tokens for a in asked) == batches.n_rows > 64
            return max(batch.total() for batch in batches.rows)

        assert largest(list(range(8)), "ABCDEFGH") == 48
        assert largest([0] * 8, "IJKLMNOP") > 64
        batches.rows.clear()
        llava.ask(LONG, max_tokens=1)
        assert max(batch.total() for batch in batches.rows) == 256


def test_a_short_question_does_not_wait_for_a_long_one(llava: Llava, batches: Batches) -> None:
    with line(llava) as waiting:
        long = waiting.ask("A: " + LONG, max_tokens=1)
        short = waiting.ask("B", max_tokens=1)
    n_long, n_short = long.reply.timings.prompt_tokens, short.reply.timings.prompt_tokens
    assert n_long > 300 > 20 > n_short
    long_id, short_id = (
        (int(batches.rows[0].most_common()[i][0]) for i in (0, 1)) if len(batches.rows[0]) > 1 else (0, 0)
    )
    assert long_id != short_id, "both begin in the first batch"
    last_short = max(i for i, batch in enumerate(batches.rows) if batch[short_id])
    last_long = max(i for i, batch in enumerate(batches.rows) if batch[long_id])
    assert last_short <= 2 and last_long >= n_long // 32
    assert all(batch[long_id] >= 16 for batch in batches.rows[:last_short]), "which is not starved either"


def test_a_question_without_pictures_does_not_wait_for_the_tower(
    llava: Llava, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = picture(9)
    llava.ask(QUESTION, known)
    encoding = threading.Event()
    answered = threading.Event()

    def endless(self: Encoding, seconds: float | None) -> None:
        """The tower takes its time until both others are answered."""
        encoding.set()
        if answered.is_set():
            advance(self, seconds)

    advance = Encoding.advance
    monkeypatch.setattr(Encoding, "advance", endless)
    slow = Asking(lambda: llava.ask(QUESTION, picture(3)))
    assert encoding.wait(60)
    try:
        text = Asking(lambda: llava.ask("Why?", max_tokens=2))
        seen = Asking(lambda: llava.ask("Is there a star?", known))
        assert text.reply.tokens and seen.reply.timings.images_encoded == 0
        assert not slow.done_at
    finally:
        answered.set()
    assert slow.reply.timings.images_encoded == 1


def test_embeddings_alone_do_not_stall_answers(
    llava: Llava, answering: Iterator[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[float | None] = []
    advance = Encoding.advance

    def piece(self: Encoding, seconds: float | None) -> None:
        pieces.append(seconds)
        advance(self, seconds)

    monkeypatch.setattr(Encoding, "advance", piece)
    embeddings = llava.embed_images([picture(i) for i in range(70, 80)])
    assert np.shape(embeddings)[0] == 10
    assert pieces and set(pieces) == {llava.options.max_stall}


@pytest.fixture
def encoded(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """The pictures that go through the tower together, in order."""
    found: list[list[bytes]] = []
    begin = Encoding.__init__

    def watched(self: Encoding, encoder: Encoder, known: Any, new: Sequence[Picture]) -> None:
        if new:
            found.append([p.digest for p in new])
        begin(self, encoder, known, new)

    monkeypatch.setattr(Encoding, "__init__", watched)
    return found


def test_nobody_computes_what_another_one_is_computing(
    llava: Llava, encoded: list[list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = picture(81), picture(82)
    with line(llava):
        first = [threading.Thread(target=llava.embed_images, args=([one, other],)) for _ in range(4)]
        for thread in first:
            thread.start()
        wait_until(lambda: llava._worker._orders.qsize() == 4)
    for thread in first:
        thread.join(60)
    assert len(encoded) == 1 and len(encoded[0]) == 2
    # Also where it begins while an answer's picture is on its way.
    advance, begun, go = Encoding.advance, threading.Event(), threading.Event()

    def slow(self: Encoding, seconds: float | None) -> None:
        if go.is_set():
            advance(self, seconds)
        begun.set()
        time.sleep(0.001)

    monkeypatch.setattr(Encoding, "advance", slow)
    asking = Asking(lambda: llava.ask(QUESTION, picture(83), max_tokens=2))
    begun.wait(60)
    late = threading.Thread(target=llava.embed_images, args=(picture(83),))
    late.start()
    wait_until(lambda: bool(llava._scheduler._only_encoding))
    go.set()
    late.join(60)
    assert asking.reply.timings.images_encoded == 1 and len(encoded) == 2


def test_answers_and_embeddings_alone_take_turns(llava: Llava, encoded: list[list[bytes]]) -> None:
    """However many are asked for, an answer's picture waits for one of them only."""
    with line(llava) as waiting:
        threads = [threading.Thread(target=llava.embed_images, args=(picture(90 + i),)) for i in range(5)]
        for thread in threads:
            thread.start()
        wait_until(lambda: llava._worker._orders.qsize() == 5)
        asking = waiting.ask(QUESTION, picture(95), max_tokens=2)
    assert asking.reply.timings.images_encoded == 1
    for thread in threads:
        thread.join(60)
    assert encoded.index([llava._pictures([picture(95)], llava.options)[0].digest]) <= 1 and len(encoded) == 6


def test_one_slow_batch_does_not_slow_prompts_for_ever(
    llava: Llava, answering: Iterator[Any], batches: Batches
) -> None:
    """A computer that slept: the row that seemed to take minutes must not be believed for long."""
    between_steps(llava, lambda scheduler: setattr(scheduler._pace, "_prompt_row_s", 1000.0))
    reply = llava.ask("Again: " + LONG, max_tokens=1)
    beside = [batch.total() - 1 for batch in batches.rows if len(batch) > 1]
    assert sum(beside) >= reply.timings.prefilled_tokens and len(beside) < 60
    assert next(answering), "which was not over before"


# --- one batch for all ---


@pytest.fixture(scope="module")
def llm(tiny: ModelFiles) -> Iterator[LLM]:
    llm = LLM.load(tiny.model, n_cells=256, n_seq_max=4, n_outputs=16, kv_type="F32", n_threads=1)
    yield llm
    llm.close()


def test_tokens_and_embeddings_share_a_batch(llm: LLM) -> None:
    """An answer's tokens, sent as embeddings beside a picture's, give what they give alone."""
    seen = np.random.default_rng(3).normal(0, 0.05, (30, llm.config.n_embd)).astype(np.float32)
    start, token = [475, *range(40, 60)], [61]

    def begin() -> None:
        for sequence in range(4):
            llm.keep(sequence, 0)
        rows = Rows()
        rows.add(0, 0, start, "")
        llm.decode(rows)

    def logits(*parts: tuple[int, int, Any]) -> list[np.ndarray[Any, Any]]:
        rows = Rows()
        outputs = [rows.add(*part, "last") + len(part[2]) - 1 for part in parts]
        llm.decode(rows)
        return [llm.logits(row).copy() for row in outputs]

    begin()
    separate = [*logits((0, len(start), token)), *logits((1, 0, seen))]
    begin()
    together = logits((0, len(start), token), (1, 0, seen))
    for one, other in zip(separate, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    begin()
    tokens_alone = logits((0, len(start), token), (2, 0, start))
    np.testing.assert_allclose(tokens_alone[0], separate[0], atol=2e-5)


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_K_M"])
def test_token_embeddings_are_those_of_llama_cpp(quant: str, tmp_path: Any) -> None:
    from llava_checkpoints import TINY

    from local_llava.convert import convert

    files = convert(TINY, tmp_path, quant=quant)
    llm = LLM.load(files.model, n_cells=256, kv_type="F32", n_threads=1)
    try:
        tokens = [475, *range(0, 200, 3)]
        results = []
        for inputs in (tokens, llm.token_embeddings(tokens)):
            llm.keep(0, 0)
            rows = Rows()
            row = rows.add(0, 0, inputs, "last") + len(tokens) - 1
            llm.decode(rows)
            results.append(llm.logits(row).copy())
        assert np.array_equal(*results), "bit for bit"
        with pytest.raises(EngineError, match="out of the vocabulary"):
            llm.token_embeddings([1_000_000])
    finally:
        llm.close()


# --- leaving early ---


def test_closing_a_stream_frees_its_sequence_within_a_step(
    llava: Llava, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_end(llava, monkeypatch)
    stream = llava.stream(QUESTION, picture(3), max_tokens=900)
    next(stream)
    hold = Hold(batches)
    assert hold.reached.wait(60)
    n_batches = len(batches.rows)
    stream.close()
    hold.release()
    wait_until(lambda: is_idle(llava))
    assert len(batches.rows) <= n_batches + 1, "the one that was held"
    again = llava.ask("Is there a star?", picture(3))
    assert again.timings.images_encoded == 0 and again.timings.reused_tokens > 36, "what was read stays"


class LeftError(Exception):
    pass


def test_a_prompt_that_is_being_read_is_cut(llava: Llava, batches: Batches, caplog: pytest.LogCaptureFixture) -> None:
    """Between two parts, or in the midst of one; and nothing is said of it, least of all that something failed."""
    hold = Hold(batches, n=3)

    def leave(done: int, total: int) -> None:
        if done >= 64:
            assert hold.reached.wait(60)
            raise LeftError
        assert total > 300

    asked = Asking(lambda: llava.ask("C: " + LONG, on_prefill=leave))
    assert isinstance(asked.error, LeftError)
    hold.release()
    wait_until(lambda: is_idle(llava))
    assert len(batches.rows) == 3 and batches.n_rows <= 96
    again = llava.ask("C: " + LONG, max_tokens=1)
    assert again.timings.reused_tokens >= 64, "what was read stays"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_leaving_while_the_tower_computes(llava: Llava, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, gate = threading.Event(), threading.Event()
    n_pieces = 0

    def held(self: Encoding, seconds: float | None) -> None:
        nonlocal n_pieces
        n_pieces += 1
        reached.set()
        gate.wait(60)  # and there is always more to compute

    advance = Encoding.advance
    monkeypatch.setattr(Encoding, "advance", held)

    async def main() -> None:
        task = asyncio.create_task(llava.aask(QUESTION, picture(3)))
        await asyncio.to_thread(reached.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    gate.set()
    wait_until(lambda: is_idle(llava))
    assert n_pieces <= 2 and not batches.rows
    monkeypatch.setattr(Encoding, "advance", advance)
    assert llava.ask(QUESTION, picture(3)).timings.images_encoded == 1


def test_leaving_while_waiting(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llava.load(tiny.model, tiny.mmproj, kv_type="F32", n_threads=1, parallel=1) as llava:
        never_end(llava, monkeypatch)
        stream = llava.stream(QUESTION, max_tokens=900)
        next(stream)
        begun: list[int] = []
        begin = llava._scheduler._sequences.begin
        monkeypatch.setattr(
            llava._scheduler._sequences, "begin", lambda units, n: (begun.append(len(units)), begin(units, n))[1]
        )

        async def main() -> None:
            tasks = [asyncio.create_task(llava.aask(f"{i}?", max_tokens=2)) for i in range(3)]
            while between_steps(llava, lambda s: len(s._waiting)) < 3:
                await asyncio.sleep(0.001)
            tasks[0].cancel()
            tasks[1].cancel()
            await asyncio.wait(tasks[:2])
            assert all(task.cancelled() for task in tasks[:2])
            stream.close()
            assert len((await tasks[2]).tokens) == 2

        asyncio.run(main())
        assert len(begun) == 1, "the two that were left never began"
        assert is_idle(llava)


def test_others_go_on_when_one_leaves(llava: Llava) -> None:
    asked = questions(fresh_seed(), 6, 1)
    expected = [llava.ask(a.question, a.picture).tokens for a in asked]
    forget_everything(llava)
    with line(llava) as waiting:
        left = [llava.astream(QUESTION, asked[i].picture) for i in range(2)]
        going = [waiting.ask(a.question, a.picture) for a in asked]

    async def leave() -> None:
        for stream in left:
            async for _ in stream:
                break
            await stream.aclose()

    asyncio.run(leave())
    assert [a.reply.tokens for a in going] == expected


def test_many_leave_at_any_time(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """By chance: at once, while they wait, while pictures are encoded or prompts are read, and in mid-answer."""
    never_end(llava, monkeypatch)
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    asked = questions(seed, 12, 2)

    async def main() -> None:
        tasks = [asyncio.create_task(llava.aask(a.question, a.picture, max_tokens=30)) for a in asked * 2]
        for i in rng.permutation(len(tasks)):
            if rng.random() < 0.7:
                await asyncio.sleep(rng.random() * 0.01)
                tasks[i].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) or r.tokens for r in results), seed

    asyncio.run(main())
    wait_until(lambda: is_idle(llava))
    forget_everything(llava)
    assert between_steps(llava, lambda s: s._sequences.n_free) == llava._llm.n_cells


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT to one process")
def test_ctrl_c(tiny: ModelFiles) -> None:
    """While the prompt is read, and in mid-answer; the next question is answered."""
    script = """
        import os, signal, sys, threading
        from local_llava import Llava
        with Llava.load(sys.argv[1], sys.argv[2], n_threads=1, n_batch=16) as llava:
            interrupt = lambda *_: os.kill(os.getpid(), signal.SIGINT)
            try:
                llava.ask("word " * 80, on_prefill=lambda done, total: done < 40 or interrupt())
                print("not interrupted")
            except KeyboardInterrupt:
                print("interrupted")
            decode, n = llava._llm.decode, 0
            def late(*args):
                global n
                n += 1
                if n == 20:
                    interrupt()
                decode(*args)
            llava._llm.decode = late
            llava._llm.ends_turn = lambda token: False
            try:
                llava.ask("Why?", max_tokens=900)
                print("not interrupted")
            except KeyboardInterrupt:
                print("interrupted")
            print(llava.ask("Why?", max_tokens=3).timings.completion_tokens)
            print(llava._worker.call(lambda: len(llava._scheduler._running)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tiny.model), str(tiny.mmproj)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["interrupted", "interrupted", "3", "0"], done.stderr


# --- closing ---


def test_closing_ends_every_answer(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    for delay in (0.0, 0.002, 0.02, 0.1):
        llava = Llava.load(tiny.model, tiny.mmproj, n_threads=1, parallel=2)
        never_end(llava, monkeypatch)
        errors: list[BaseException] = []

        def ask(i: int, llava: Llava = llava, errors: list[BaseException] = errors) -> None:
            try:
                for _ in llava.stream(QUESTION, picture(i), max_tokens=900):
                    pass
                errors.append(AssertionError("it ended as if it were complete"))
            except (EngineError, UsageError) as closed:
                errors.append(closed)

        async def aask(llava: Llava = llava) -> None:
            with pytest.raises((EngineError, UsageError), match="closed"):
                await llava.aask(QUESTION, max_tokens=900)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        threads.append(threading.Thread(target=lambda: asyncio.run(aask())))
        for thread in threads:
            thread.start()
        if delay:
            wait_until(lambda llava=llava: bool(llava._scheduler._running))  # type: ignore[misc]
        time.sleep(delay)
        llava.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "it hangs"
        assert len(errors) == 6 and all("closed" in str(e) for e in errors), errors
        with pytest.raises(UsageError, match="the model is closed"):
            llava.ask(QUESTION)
        with pytest.raises(UsageError, match="the model is closed"):
            llava.embed_images(picture(1))
        llava.close()


def test_closing_in_the_midst_of_a_step(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which then looks for what was cancelled: an answer that is broken off must not look complete."""
    llava = Llava.load(tiny.model, tiny.mmproj, n_threads=1)
    never_end(llava, monkeypatch)
    stream = llava.stream(QUESTION, max_tokens=900)
    next(stream)
    drop = llava._scheduler._drop_cancelled

    def late() -> None:
        threading.Thread(target=llava.close).start()
        wait_until(lambda: llava._worker._closed)
        drop()

    monkeypatch.setattr(llava._scheduler, "_drop_cancelled", late)
    with pytest.raises(EngineError, match="closed"):
        list(stream)
    llava.close()


def test_a_block_closes(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), Llava.load(tiny.model, tiny.mmproj, n_threads=1) as llava:
        never_end(llava, monkeypatch)
        stream = llava.stream(QUESTION, max_tokens=900)
        next(stream)
        raise ZeroDivisionError
    assert not llava._worker._thread.is_alive()
    with pytest.raises(EngineError, match="closed"):
        list(stream)


def test_a_model_that_nobody_has_any_more_is_closed(tiny: ModelFiles) -> None:
    llava = Llava.load(tiny.model, tiny.mmproj, n_threads=1)
    thread = llava._worker._thread
    llava._llm.ends_turn = lambda token: False  # type: ignore[method-assign]
    stream = llava.stream(QUESTION, max_tokens=900)
    next(stream)
    del llava
    assert next(stream).tokens, "who reads it has it"
    stream.close()
    del stream
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", ["", "stream.close()", "del llava", "import gc; del llava, stream; gc.collect()"])
def test_a_program_that_forgets_to_close_ends(tiny: ModelFiles, end: str) -> None:
    script = (
        "import sys; from local_llava import Llava\n"
        "llava = Llava.load(sys.argv[1], sys.argv[2], n_threads=1)\n"
        "llava._llm.ends_turn = lambda token: False\n"
        "stream = llava.stream('Why?', max_tokens=900)\n"
        f"next(stream)\n{end}\nprint('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny.model), str(tiny.mmproj)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
