"""Many answers at once on one KV cache: which sequence goes how far in the next step.

Knows the language model, the encoder and the order of things; runs in the thread that owns both models (`worker`).
What the KV cache holds is `sequences`'s, sampling `answer`'s. Knows no picture files and no chat format.

A step is one batch. Running answers have their next tokens in it, and prompts that are still read fill the rest, so
that both share one pass over the weights, or take turns where that is faster (`pace`), or where a long prompt is read
in a KV cache of its own (`aside`). While answers run, the prompts' part is only so large that they need not wait longer
than `max_stall` for each of them: the more prompts wait, the larger are the parts, which are read faster. Pictures go
through the tower before, in pieces that are bounded likewise. The oldest prompt has the first claim on half of the
room; then come those that need little: a short question does not wait for a long one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as ListOf
from typing import Any

import numpy as np

from local_llava.aside import Aside
from local_llava.embeddings import Encoder, Encoding
from local_llava.errors import EngineError
from local_llava.llm import LLM, Context, InterruptedDecodeError, Rows
from local_llava.pace import MIN_MEASURED, Pace, shares
from local_llava.picture_store import PictureStore
from local_llava.request import Picture, Progress, Request, Unit, n_tokens
from local_llava.run import Run
from local_llava.sequences import Sequences
from local_llava.speculation import Guesser
from local_llava.worker import Ticket

log = logging.getLogger("local_llava")

N_RETIRED = 15
"""Sequences that are kept for later prompts, at most, beside those of answers that are being given."""

ALONE_S = 1.0
"""Seconds that a step may go on with pictures while no answer runs: until then a new question is not seen. A batch of a
prompt's tokens has all the rows that it may have then, since fewer are evaluated more slowly: by a fifth with 32 of
them, by a hundredth with 256."""

_WORTH_WAITING = 32
"""Tokens that a prompt must save by waiting for another one, which reads the same beginning, to be read first."""


class Scheduler:
    """Answers requests, as many at a time as may be, in the order they came."""

    def __init__(
        self,
        llm: LLM,
        encoder: Encoder,
        store: PictureStore,
        *,
        n_ctx: int,
        parallel: int,
        max_stall: float,
        load_s: float,
        n_cells_aside: int = 0,
    ) -> None:
        """
        Args:
            llm: Loaded for `parallel + N_RETIRED + 1` sequences.
            encoder: Of the pictures.
            store: What is kept of them on disk.
            n_ctx: Tokens that one conversation may have.
            parallel: Answers that are given at the same time.
            max_stall: Seconds that one may stand still for each prompt of others.
            load_s: Seconds that loading took, for `Timings`.
            n_cells_aside: Tokens of a prompt that may be read aside, at most.
        """
        self._llm, self._encoder, self._store = llm, encoder, store
        self._n_ctx, self._parallel, self._max_stall, self._load_s = n_ctx, parallel, max_stall, load_s
        self._sequences = Sequences(llm)
        self._aside = Aside(llm, self._sequences, n_cells_aside)
        self._was_aside = False
        self._waiting: deque[Run] = deque()
        self._running: list[Run] = []
        self._suspects: list[Run] = []
        self._only_encoding: deque[tuple[Iterable[Picture], Ticket[Any]]] = deque()
        self._encoding: Encoding | None = None  # of the first of them, once it is begun
        self._answers_turn = False
        self._pace = Pace(llm.n_batch, llm.on_cpu)
        self._n_planned = self._prompts_planned_at = 0
        self._guesser = Guesser()

    def add(self, request: Request, ticket: Ticket[Any]) -> None:
        """Take a request; Progress and Chunks, or logits float32 [n, n_vocab], come on its ticket."""
        self._waiting.append(Run(request, ticket, self._n_ctx, self._load_s))

    def encode(self, pictures: Iterable[Picture], ticket: Ticket[Any]) -> None:
        """Take pictures; their embeddings come on the ticket."""
        self._only_encoding.append((pictures, ticket))

    def step(self) -> bool:
        """Go on by one batch. Returns whether there is more to do."""
        self._drop_cancelled()
        self._admit()
        started = time.perf_counter()
        self._encode()
        self._evaluate(time.perf_counter() - started)
        return bool(self._running or self._waiting or self._only_encoding)

    def fail(self, error: BaseException) -> None:
        """End everything with an error."""
        self._encoding = None
        while self._only_encoding:
            self._only_encoding.popleft()[1].end(error)
        for run in [*self._running, *self._waiting]:
            self._stop(run, error)

    def _drop_cancelled(self) -> None:
        for run in [r for r in (*self._running, *self._waiting) if r.ticket.cancelled]:
            run.ticket.drop()
            self._stop(run, None)

    def _admit(self) -> None:
        """Let requests begin while there is room for all that they may come to need: none is stopped half-way."""
        while self._waiting and len(self._running) < self._parallel:
            run = self._waiting[0]
            # Of an answer that is given nothing is reused: its logits are wanted.
            sequence = self._sequences.begin(run.request.units, run.n_after)
            if sequence is None:
                return
            self._waiting.popleft()
            self._running.append(run)
            run.begin(sequence)
            with self._failing(run):
                self._restore(run)
                run.answer_with(self._llm)

    def _restore(self, run: Run) -> None:
        """Begin with what is kept on disk, if that is more than what the KV cache has."""
        found = self._store.prefix(run.request.units, len(run.sequence.units))
        if found is not None:
            n, state = found
            if self._sequences.restore(run.sequence, run.units[:n], state):
                run.restored = run.sequence.n_past
            else:
                self._sequences.rejoin(run.sequence, run.request.units)

    def _encode(self) -> None:
        """Go on with the pictures of the oldest request that needs some. Those that need none are let through."""
        busy = self._encode_only()
        for run in list(self._running):
            if run.embeddings is not None or self._waits(run):
                continue
            started = time.perf_counter()
            with self._failing(run):
                if run.encoding is None:
                    # Not those that are not held: a picture that is held may be shown again further on.
                    ahead = set(run.units[len(run.sequence.units) :])
                    needed = [p for p in run.request.pictures if p.shown in ahead]
                    if busy and not self._encoder.knows(needed):
                        continue
                    run.encoding = self._encoder.begin(needed)
                if run.encoding.n_new:
                    if busy:
                        continue
                    busy = True
                    run.encoding.advance(self._pause())
                run.encoded(time.perf_counter() - started)

    def _encode_only(self) -> bool:
        """Go on with pictures of which only the embeddings are wanted. Returns whether there were some."""
        while self._only_encoding and self._only_encoding[0][1].cancelled:
            self._encoding = None
            self._only_encoding.popleft()[1].drop()
        if not self._only_encoding or (self._encoding is None and self._is_answers_turn()):
            return False
        pictures, ticket = self._only_encoding[0]
        try:
            if self._encoding is None:
                self._encoding = self._encoder.begin(pictures)
            self._encoding.advance(self._pause())
            if not self._encoding.done:
                return True
            ticket.deliver(self._encoding.embeddings)
            ticket.end()
        except Exception as e:
            ticket.end(e)
        self._encoding, self._answers_turn = None, True
        self._only_encoding.popleft()
        return True

    def _is_answers_turn(self) -> bool:
        """Whether pictures of which only the embeddings are wanted are not begun now, but those of an answer are, or
        have been: what both show is computed once."""
        turn, self._answers_turn = self._answers_turn, False
        if any(run.encoding is not None for run in self._running):
            return True
        return turn and any(run.embeddings is None and not self._waits(run) for run in self._running)

    def _waits(self, run: Run) -> bool:
        """Whether a prompt waits for an earlier one that reads the same beginning; takes over what is there of it."""
        if run is self._aside.run:
            return False
        for other in self._running[: self._running.index(run)]:
            n = _common(other.units, run.request.units[:-1])
            if n_tokens(run.units[len(run.sequence.units) : n]) < _WORTH_WAITING:
                continue
            if len(other.sequence.units) < n or other is self._aside.run:
                return True
            if run.offset == 0 and self._sequences.rejoin(run.sequence, run.request.units):
                run.forget_encoding()
        return False

    def _pause(self) -> float:
        """Seconds that a step may take besides the next tokens of the running answers."""
        n_reading = sum(run.reading for run in self._running)
        return self._max_stall * max(1, n_reading) if n_reading < len(self._running) else ALONE_S

    def _evaluate(self, spent: float) -> None:
        """Make a batch, evaluate it, and take the next tokens.

        Args:
            spent: Seconds that this step has taken already.
        """
        rows = Rows()
        planned: list[Run] = []
        if self._suspects:
            run = self._suspects[0]
            if run.reading:
                run.plan_prompt(rows, self._llm.n_batch)
            else:
                run.plan_tokens(rows)
            planned.append(run)
        else:
            try:
                self._plan(rows, planned, spent)
            except Exception as e:
                if not planned:
                    raise
                # Part of this one's rows may be in the batch, so that is given up.
                self._stop(planned.pop(), e)
                self._restart(planned)
                return
        if not planned:
            return
        context, sequences = self._aside.place_of(planned[0])
        started = time.perf_counter()
        try:
            stop = _all_cancelled(planned) if len(rows) >= MIN_MEASURED else None
            context.decode(rows, stop, sequences.n_unused - len(rows))
        except InterruptedDecodeError:
            self._restart(planned)
            return
        except Exception as e:
            self._recover(planned, e)
            return
        seconds = time.perf_counter() - started
        self._pace.note(len(rows), seconds)
        if not any(run.reading for run in planned):
            self._guesser.measure(len(rows), seconds)
            if len(rows) == len(planned):
                self._pace.note_answers(len(rows), seconds)
        self._suspects = [run for run in self._suspects if run not in planned]
        for run in planned:
            with self._failing(run):
                self._advance(run, context, sequences)

    def _plan(self, rows: Rows, planned: list[Run], spent: float) -> None:
        """Choose what goes into a batch: the answers that waited longest, and prompts once all had a turn."""
        answering = sorted((run for run in self._running if not run.reading), key=lambda run: run.planned_at)
        reading = [r for r in self._running if r.reading and not self._waits(r) and r.embeddings is not None]
        self._n_planned += 1
        n_together = self._pace.together(len(answering))
        group, others = answering[:n_together], answering[n_together:]
        room = 0
        if reading and self._had_turn(others):
            reading, apart = self._together(reading)
            room = self._pace.room(0 if apart else len(group), len(answering), self._pause() - spent)
            if apart or not self._pace.share(len(group), room):
                if self._had_turn(group):
                    group = []
                else:
                    room = 0
        needs = [run.total - run.sequence.n_past for run in reading]
        if len({tuple(picture.digest for picture in run.request.pictures) for run in reading}) > 1:
            room = self._pace.side_by_side(needs, room, len(group))
        for run, n in zip(reading, shares(needs, room), strict=True):
            if n:
                planned.append(run)
                run.plan_prompt(rows, n)
                self._prompts_planned_at, self._was_aside = self._n_planned, run is self._aside.run
        for run in group:
            planned.append(run)
            if len(self._running) == 1:
                most = min(self._sequences.n_free + run.sequence.reserved, self._llm.n_batch) - 1
                run.guess(self._guesser, most)
            run.plan_tokens(rows)
            run.planned_at = self._n_planned

    def _together(self, reading: list[Run]) -> tuple[list[Run], bool]:
        """Which of the prompts may share the next batch, and whether they are read aside."""
        aside = self._aside
        suited = [run for run in reading if run is not aside.run and aside.suits(run)]
        if aside.run is None and suited and not aside.begin(suited.pop(0)):
            return reading, False
        # A prompt that is much shorter than what is left of the one aside does not wait for it.
        waiting = [run for run in suited if 2 * (run.total - run.sequence.n_past) >= aside.n_left]
        beside = [run for run in reading if run is not aside.run and run not in waiting]
        if aside.run is not None and aside.run in reading and not (beside and self._was_aside):
            return [aside.run], True
        return beside, False

    def _had_turn(self, answering: list[Run]) -> bool:
        """Whether answers went on since the last batch with prompts."""
        return all(run.planned_at > self._prompts_planned_at for run in answering)

    def _recover(self, planned: list[Run], error: Exception) -> None:
        """After a batch that failed: what was in it is tried again one by one, so that only the culprit fails."""
        log.debug("a batch of %d answers failed: %s", len(planned), error)
        self._restart(planned)
        left = [run for run in planned if run in self._running]
        if len(planned) == 1 and left:
            self._stop(left[0], error)
        else:
            self._suspects = left

    def _restart(self, planned: list[Run]) -> None:
        """After a batch that was not evaluated."""
        for run in planned:
            run.restart_piece()
            with self._failing(run):
                self._cut(run)

    def _cut(self, run: Run) -> None:
        """Forget what is no whole piece, or no part of the answer."""
        n = len(run.sequence.units)
        self._aside.place_of(run)[1].cut(run.sequence, n)
        if len(run.sequence.units) < n:
            raise EngineError("llama.cpp can only forget all of a sequence, so the answer cannot go on")

    def _advance(self, run: Run, context: Context, sequences: Sequences) -> None:
        """Note what was evaluated, and take the next tokens.

        Args:
            run: Of the batch.
            context: What it was evaluated in.
            sequences: Those of that context.
        """
        sequences.add(run.sequence, run.n_planned)
        if run.reading:
            run.note_read()
            run.ticket.deliver(Progress(run.sequence.n_past, run.total))
            if run.request.given is not None and run.output_rows:
                run.ticket.deliver(np.stack([context.logits(row) for row in run.output_rows]))
            if run.reading:
                return
            if run is self._aside.run:
                self._aside.finish()
            if run.request.given is not None:
                self._stop(run, None)
                return
        if run.take_tokens(context):
            self._cut(run)
        if run.answer.finished:
            run.finish()
            run.ticket.end()
            self._keep(run)
            self._stop(run, None)

    def _keep(self, run: Run) -> None:
        """Keep what was read of pictures for other processes."""

        def save(n_units: int) -> Any:
            part = self._sequences.scratch(run.sequence, n_units)
            if part is None:
                return None
            try:
                return self._llm.save(part.id)
            finally:
                self._sequences.discard(part)

        try:
            self._store.keep_prefix(run.units, save)
        except (EngineError, MemoryError) as e:
            log.debug("a picture's KV cache is not kept: %s", e)

    def _stop(self, run: Run, error: BaseException | None) -> None:
        """Let go of a request. What its sequence holds stays for others, unless something went wrong."""
        if run in self._waiting:
            self._waiting.remove(run)
        if run is self._aside.run:
            self._aside.leave()
        if run in self._running:
            self._running.remove(run)
            if error is None:
                self._sequences.retire(run.sequence)
            else:
                self._sequences.discard(run.sequence)
        self._suspects = [other for other in self._suspects if other is not run]
        run.close()
        run.ticket.end(error)

    @contextlib.contextmanager
    def _failing(self, run: Run) -> Iterator[None]:
        """What goes wrong here is the request's own affair."""
        try:
            yield
        except Exception as e:
            self._stop(run, e)


def _all_cancelled(runs: list[Run]) -> Callable[[], bool]:
    return lambda: all(run.ticket.cancelled for run in runs)


def _common(a: ListOf[Unit], b: ListOf[Unit]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
