"""One answer on its way: how far its prompt is read, its pictures, its tokens, and what it took.

Knows what goes into a batch for it and what comes out. Which answers share a batch, and how much of it each gets, is
`scheduler`'s.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from local_llava.answer import Answer
from local_llava.embeddings import Embeddings, Encoding
from local_llava.llm import LLM, Context, Rows
from local_llava.request import Request, Shown, Unit, n_tokens
from local_llava.sequences import Sequence
from local_llava.speculation import MAX_GUESSED, Guesser, Guesses
from local_llava.types import Timings
from local_llava.worker import Ticket


class Run:
    """A request, from when it waits to when its answer is complete.

    Attributes:
        request: What is asked.
        ticket: Where the answer goes.
        units: The prompt, with the answer that is given.
        total: Its tokens.
        limit: Most tokens of the answer.
        n_after: Tokens that may come after the prompt.
        sequence: The one it is given with, from when it is begun.
        reading: Whether the prompt is still being read.
        offset: Tokens that are evaluated of a picture that is not evaluated whole.
        embeddings: Those of the pictures that are still to be read; None until they are there.
        encoding: Those on their way.
        n_encoded: Pictures that had to go through the tower.
        n_planned: Rows that the batch under way has of it.
        planned_at: The last batch that had tokens of its answer.
        row: The batch's row whose logits the next token is taken from.
        output_rows: Those of the batch that have logits, while a prompt is read.
        restored: Tokens that came from disk.
    """

    sequence: Sequence
    answer: Answer

    def __init__(self, request: Request, ticket: Ticket[Any], n_ctx: int, load_s: float) -> None:
        self.request, self.ticket = request, ticket
        self.units: list[Unit] = [*request.units, *(request.given or ())]
        self.total = n_tokens(self.units)
        # The last token of an answer need not be evaluated.
        self.limit = min(request.options.max_tokens, n_ctx - self.total + 1) if request.given is None else 1
        self.n_after = self.limit - 1 + len(request.given or ())
        self.reading = True
        self.offset = self.n_planned = self.planned_at = self.row = self.n_encoded = self.restored = 0
        self.output_rows: list[int] = []
        self.embeddings: Embeddings | None = None
        self.encoding: Encoding | None = None
        self._next: list[int] = []
        self._guessed: list[int] = []
        self._guesses: Guesses | None = None
        self._n_guessed = self._n_right = 0
        self._n_evaluated = 0
        self._load_s, self._image_s, self._waited_s = load_s, request.prepared_s, 0.0
        self._begun = self._read = time.perf_counter()

    def begin(self, sequence: Sequence) -> None:
        """Its turn has come."""
        self.sequence = sequence
        self._begun = time.perf_counter()
        self._waited_s = self._begun - self.request.asked_at

    def answer_with(self, llm: LLM) -> None:
        """Make what the answer is sampled with."""
        self.answer = Answer(llm, self.request.options, self.request.constraint, self.limit)

    def encoded(self, seconds: float) -> None:
        """Note that time went into its pictures."""
        self._image_s += seconds
        self._begun += seconds
        if self.encoding is not None and self.encoding.done:
            self.n_encoded += self.encoding.n_new
            self.embeddings, self.encoding = self.encoding.embeddings, None

    def forget_encoding(self) -> None:
        """What pictures are needed is another question now: the sequence holds more."""
        self.embeddings = self.encoding = None

    def plan_prompt(self, rows: Rows, most: int) -> None:
        """Put the next part of the prompt into a batch, with an answer that is given."""
        position, last = self.sequence.n_past, len(self.request.units) - 1
        i, offset, n = len(self.sequence.units), self.offset, 0
        # From the prompt's last piece on, all have logits: as many as there is room for besides one of each answer.
        stop = min(len(self.units), max(i, last) + max(1, 1 + MAX_GUESSED - sum(rows.outputs)))
        n_before = len(rows)
        while n < most and i < stop:
            unit, wanted = self.units[i], i >= last
            if isinstance(unit, Shown):
                assert self.embeddings is not None
                part: Any = self.embeddings[unit.digest][offset : offset + most - n]
                whole = offset + len(part) == unit.n_tokens
                offset, i = (0, i + 1) if whole else (offset + len(part), i)
                wanted = wanted and whole
            else:
                end = i
                while end < min(stop if wanted else last, i + most - n) and not isinstance(self.units[end], Shown):
                    end += 1
                part, i = self.units[i:end], end
            outputs: Literal["all", "last", ""] = ("last" if isinstance(unit, Shown) else "all") if wanted else ""
            row = rows.add(self.sequence.id, position + n, part, outputs)
            n += len(part)
            self.row = row + len(part) - 1
        self.output_rows = [row for row in range(n_before, len(rows)) if rows.outputs[row]]
        self._planned_units, self._planned_offset, self.n_planned = i, offset, n

    def plan_tokens(self, rows: Rows) -> None:
        """Put the answer's last token, and guesses of the next ones, into a batch."""
        tokens = [*self._next, *self._guessed]
        self.row = rows.add(self.sequence.id, self.sequence.n_past, tokens, "all")
        self.n_planned = len(tokens)

    def guess(self, guesser: Guesser, most: int) -> None:
        """Guess what the next tokens after the last one are."""
        if self._guesses is None and guesser.wanted(self.request):
            self._guesses = guesser.begin(self.units, self.request)
        if self._guesses is not None:
            most = min(most, self.limit - len(self.answer.tokens) - 1)
            self._guessed = self._guesses.next(self.answer.tokens, most)
            self._n_guessed += len(self._guessed)

    def note_read(self) -> None:
        """The part of the prompt is evaluated."""
        self._n_evaluated += self.n_planned
        self.sequence.units += self.units[len(self.sequence.units) : self._planned_units]
        self.offset = self._planned_offset
        self.reading = self._planned_units < len(self.units)
        if not self.reading:
            self.embeddings = {}
            self._read = time.perf_counter()

    def restart_piece(self) -> None:
        """The last batch failed: what it had of a picture is forgotten."""
        self.offset = 0
        self._guessed = []

    def take_tokens(self, context: Context) -> int:
        """Sample after the rows of the batch, as far as what was guessed is right.

        Args:
            context: What the batch was evaluated in.

        Returns:
            Tokens of the batch that were wrong guesses.
        """
        guessed, self._guessed = self._guessed, []
        self.sequence.units += self._next  # none where the rows were the prompt's
        n_right = 0
        while True:
            chunk = self.answer.take(context, self.row + n_right)
            if chunk is not None:
                self.ticket.deliver(chunk)
            if self.answer.finished or n_right == len(guessed) or self.answer.tokens[-1] != guessed[n_right]:
                break
            self.sequence.units.append(guessed[n_right])
            n_right += 1
        self._n_right += n_right
        self._next = self.answer.tokens[-1:]
        return len(guessed) - n_right

    def finish(self) -> None:
        """Deliver the end of the answer, with the whole of it."""
        if self._guesses is not None:
            self._guesses.finish(self.answer.tokens)
        timings = Timings(
            load_s=self._load_s,
            image_s=self._image_s,
            prefill_s=self._read - self._begun,
            decode_s=time.perf_counter() - self._read,
            prompt_tokens=self.total,
            image_tokens=self.request.image_tokens,
            reused_tokens=max(0, self.total - self._n_evaluated),
            images_encoded=self.n_encoded,
            completion_tokens=self.answer.n_sampled,
            restored_tokens=self.restored,
            waited_s=self._waited_s,
            drafted_tokens=self._n_guessed,
            accepted_tokens=self._n_right,
        )
        self.ticket.deliver(self.answer.last(timings, self.request.dropped))

    def close(self) -> None:
        """Free what llama.cpp made for it."""
        if hasattr(self, "answer"):
            self.answer.close()
