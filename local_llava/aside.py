"""Long prompts, read aside: one at a time, in a KV cache of its own.

On CPUs, attention takes longer for every cell that is in use, whoever's it is: it passes over the mask that hides it. A
prompt of 600 tokens of a model with 1B parameters took 4 % longer beside one such prompt that was kept, 13 % beside
seven (docs/engine.md). So where much is kept, a long prompt is read in an empty cache, and its keys and values are
moved over: 20 MB of that model, in a hundredth of a second.

Knows both KV caches and the prompt that is read. When it goes on is `scheduler`'s.
"""

from __future__ import annotations

import logging

from local_llava.errors import EngineError
from local_llava.llm import LLM, Context
from local_llava.run import Run
from local_llava.sequences import Sequence, Sequences

log = logging.getLogger("local_llava")

MIN_ROWS = 128
"""Tokens that a prompt must have left to be read aside: with fewer there is little to save, and they may share a batch
with answers."""

MIN_OTHERS = 256
"""Cells of others from which on it is."""


class Aside:
    """The place aside.

    Attributes:
        run: Whose prompt is read there; its `sequence` is the one there until it is moved over.
    """

    def __init__(self, llm: LLM, sequences: Sequences, n_cells: int) -> None:
        """
        Args:
            llm: The model.
            sequences: Of its own KV cache, where answers are given.
            n_cells: Tokens that the cache aside holds; 0 for none. It is made when it is first needed.
        """
        self._llm, self._sequences, self._n_cells = llm, sequences, n_cells
        self._place: tuple[Context, Sequences] | None = None
        self._home: Sequence | None = None
        self.run: Run | None = None

    @property
    def n_left(self) -> int:
        """Tokens that are still to be read here."""
        return 0 if self.run is None else self.run.total - self.run.sequence.n_past

    def place_of(self, run: Run) -> tuple[Context, Sequences]:
        """Where a request's sequence is."""
        if run is self.run and self._place is not None:
            return self._place
        return self._llm, self._sequences

    def suits(self, run: Run) -> bool:
        """Whether a prompt is better read here, once nobody else's is."""
        n_past = run.sequence.n_past
        n_others = self._llm.n_cells - self._sequences.n_unused - n_past
        enough = run.total - n_past >= MIN_ROWS and n_others >= MIN_OTHERS
        # Logits of many rows are only given at home.
        return enough and run.total <= self._n_cells and not run.offset and not run.request.given

    def begin(self, run: Run) -> bool:
        """Take a prompt, and what there is of it already. Returns whether it can be read here."""
        home = run.sequence
        try:
            if self._place is None:
                context = self._llm.another_context(self._n_cells)
                self._place = context, Sequences(context)
            state = self._llm.save(home.id) if home.units else None
        except (EngineError, MemoryError) as e:
            log.info("prompts are read beside all that is kept: %r", e)
            self._n_cells = 0
            return False
        sequences = self._place[1]
        sequence = sequences.begin(run.units, 0)
        if sequence is None:
            return False
        if state is not None and not sequences.restore(sequence, home.units, state):
            sequences.discard(sequence)
            return False
        self.run, self._home, run.sequence = run, home, sequence
        return True

    def finish(self) -> None:
        """Move the prompt over, which is read.

        Raises:
            EngineError: llama.cpp failed.
        """
        assert self.run is not None and self._place is not None and self._home is not None
        home, sequence = self._home, self.run.sequence
        new = sequence.units[len(home.units) :]
        try:
            self._place[0].forget_first(sequence.id, home.n_past)
            state = self._place[0].save(sequence.id)
        finally:
            self.leave()
        if not self._sequences.move_in(home, new, state):
            raise EngineError("llama.cpp cannot move a prompt between KV caches")

    def leave(self) -> None:
        """Forget what is read here of a prompt; its sequence is the one that it had before."""
        assert self.run is not None and self._place is not None and self._home is not None
        self._place[1].discard(self.run.sequence)
        self.run.sequence = self._home
        self.run = self._home = None
