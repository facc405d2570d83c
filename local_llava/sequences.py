"""What the KV cache holds, sequence by sequence: the longest prefix that is there already, and room for what is not.

Mirrors llama.cpp's unified KV cache: a cell holds one token of one or more sequences, and is free when no sequence has
it any more. Knows no requests and no pictures but by what they are called (`request.Unit`).

A sequence belongs to an answer that is being given, or is retired: then it stays until its cells or its number are
needed, the least recently used one going first, so that a later prompt can begin with what it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as ListOf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from local_llava.request import Unit, n_tokens


class Cache(Protocol):
    """The part of `llm.Context` that is mirrored."""

    n_cells: int
    n_seq_max: int

    def keep(self, sequence: int, n: int) -> bool: ...

    def copy(self, source: int, target: int, n: int) -> None: ...

    def restore(self, sequence: int, state: NDArray[np.uint8], n: int) -> bool: ...

    def move_in(self, sequence: int, state: NDArray[np.uint8], n: int) -> bool: ...


class Sequence:
    """A sequence in the KV cache.

    Attributes:
        id: Its number.
        units: What it holds, whole pieces only.
        cells: The cells of its tokens, those of a picture that is read in part included.
        reserved: Cells that it may still come to need.
        live: Whether an answer is being given with it.
    """

    def __init__(self, id: int) -> None:
        self.id = id
        self.units: list[Unit] = []
        self.cells: list[int] = []
        self.reserved = 0
        self.live = True
        self.last_used = 0

    @property
    def n_past(self) -> int:
        """Tokens that it holds."""
        return len(self.cells)

    def common(self, units: ListOf[Unit]) -> int:
        """Pieces that it and a prompt begin with. The prompt's last one is not counted: its logits are needed."""
        n = 0
        for own, other in zip(self.units, units[:-1], strict=False):
            if own != other:
                break
            n += 1
        return n


class Sequences:
    """All sequences of a KV cache."""

    def __init__(self, cache: Cache) -> None:
        # The engine calls `add` for what it evaluates, and this class calls llama.cpp for the rest.
        self._cache = cache
        self._all: list[Sequence] = []
        self._free_ids = list(reversed(range(cache.n_seq_max)))
        self._free_cells = list(reversed(range(cache.n_cells)))
        self._users = np.zeros(cache.n_cells, np.int32)
        self._clock = itertools.count(1)

    @property
    def n_free(self) -> int:
        """Cells that no sequence has, and none may come to need."""
        return len(self._free_cells) - sum(sequence.reserved for sequence in self._all)

    @property
    def n_unused(self) -> int:
        """Cells that no sequence has, those included that some may come to need."""
        return len(self._free_cells)

    @property
    def retired(self) -> list[Sequence]:
        """Those that no answer is being given with, least recently used first."""
        return sorted((s for s in self._all if not s.live), key=lambda s: s.last_used)

    def longest(self, units: ListOf[Unit]) -> tuple[Sequence | None, int]:
        """The sequence that begins with most of a prompt, and how many pieces of it. The newest, where several do."""
        best, most = None, 0
        for sequence in sorted(self._all, key=lambda s: s.last_used, reverse=True):
            if (n := sequence.common(units)) > most:
                best, most = sequence, n
        return best, most

    def begin(self, units: ListOf[Unit], n_new: int) -> Sequence | None:
        """A sequence for a prompt, that holds what was there of it already.

        Args:
            units: The prompt.
            n_new: Tokens that may come after it.

        Returns:
            None if there is no room now. With no live sequence, there is room for n_cells tokens.
        """
        need = n_tokens(units) + n_new
        source, n_units = self.longest(units)
        while source is not None:
            # Where nothing but the prompt's beginning is in it, it is continued; so it is where there is no room
            # beside it.
            whole = not source.live and n_units == len(source.units)
            if not whole and self._make_room(need - n_tokens(source.units[:n_units]), ids=1, spare=source):
                return self._branch(source, n_units, need)
            if source.live:
                return None
            if self._take_over(source, n_units, need):
                return source
            if whole:
                return None
            self._drop(source)
            source, n_units = self.longest(units)
        if not self._make_room(need, ids=1):
            return None
        return self._new(need)

    def rejoin(self, sequence: Sequence, units: ListOf[Unit]) -> bool:
        """Let a sequence that holds less of its prompt than another one begin like that one. Returns whether it did."""
        source, n_units = self.longest(units)
        if source is None or n_units <= len(sequence.units):
            return False
        need = sequence.reserved + sequence.n_past
        self.cut(sequence, 0)
        self._share(source, n_units, sequence)
        sequence.reserved = need - sequence.n_past
        return True

    def restore(self, sequence: Sequence, units: ListOf[Unit], state: NDArray[np.uint8]) -> bool:
        """Fill a sequence with a saved state of these pieces; what it held is forgotten. Returns whether it worked."""
        self.cut(sequence, 0)
        n = n_tokens(units)
        # What it shared before, it may have no room for of its own.
        if self.n_free < 0 or not self._cache.restore(sequence.id, state, n):
            return False
        self.add(sequence, n)
        sequence.units = list(units)
        return True

    def move_in(self, sequence: Sequence, units: ListOf[Unit], state: NDArray[np.uint8]) -> bool:
        """Append pieces that another KV cache has evaluated. Returns whether it worked; else nothing is appended.

        Args:
            sequence: Has room reserved for them.
            units: The pieces.
            state: Of them, as `llm.Context.move_in` takes it.
        """
        n = n_tokens(units)
        if not self._cache.move_in(sequence.id, state, sequence.n_past + n):
            return False
        self.add(sequence, n)
        sequence.units += units
        return True

    def add(self, sequence: Sequence, n: int) -> None:
        """Note that n more tokens are evaluated. Whole pieces are appended to `units` by the caller."""
        self._take_cells(sequence, n)
        sequence.reserved = max(0, sequence.reserved - n)

    def cut(self, sequence: Sequence, n_units: int) -> None:
        """Forget what comes after so many pieces, also what was evaluated of the next one. Cells stay reserved.

        Where llama.cpp can only forget all of it, the sequence is empty then.
        """
        n_before = sequence.n_past
        if not self._cache.keep(sequence.id, n_tokens(sequence.units[:n_units])):
            n_units = 0
        del sequence.units[n_units:]
        self._release(sequence, n_tokens(sequence.units))
        sequence.reserved += n_before - sequence.n_past

    def retire(self, sequence: Sequence) -> None:
        """Keep what a sequence holds for later prompts, while there is room."""
        self.cut(sequence, len(sequence.units))
        own = sequence.units
        # What is the beginning of another one serves no prompt that the other would not serve.
        others = self.retired
        if not own or any(other.units[: len(own)] == own for other in others if len(other.units) > len(own)):
            self._drop(sequence)
            return
        for other in others:
            if other.units == own[: len(other.units)]:
                self._drop(other)
        sequence.live, sequence.reserved, sequence.last_used = False, 0, next(self._clock)

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._drop(sequence)

    def scratch(self, sequence: Sequence, n_units: int) -> Sequence | None:
        """A sequence that shares the first pieces of another one, to be discarded again; None if no number is free."""
        if not self._free_ids and not self._drop_oldest(spare=sequence):
            return None
        return self._branch(sequence, n_units, 0)

    def _take_over(self, source: Sequence, n_units: int, need: int) -> bool:
        """Go on with a retired sequence, cut to its first pieces. Returns whether there was room."""
        n_shared = n_tokens(source.units[:n_units])
        frees = int((self._users[source.cells[n_shared:]] == 1).sum())
        if not self._make_room(need - n_shared, ids=0, spare=source, frees=frees):
            return False
        source.live, source.last_used = True, next(self._clock)
        self.cut(source, n_units)
        source.reserved = need - source.n_past
        return True

    def _branch(self, source: Sequence, n_units: int, need: int) -> Sequence:
        sequence = self._new(need)
        source.last_used = next(self._clock)
        self._share(source, n_units, sequence)
        sequence.reserved = max(0, need - sequence.n_past)
        return sequence

    def _new(self, need: int) -> Sequence:
        sequence = Sequence(self._free_ids.pop())
        sequence.reserved, sequence.last_used = need, next(self._clock)
        self._all.append(sequence)
        return sequence

    def _share(self, source: Sequence, n_units: int, target: Sequence) -> None:
        n = n_tokens(source.units[:n_units])
        self._cache.copy(source.id, target.id, n)
        target.units, target.cells = source.units[:n_units], source.cells[:n]
        self._users[target.cells] += 1

    def _make_room(self, n: int, ids: int, spare: Sequence | None = None, frees: int = 0) -> bool:
        """Drop retired sequences but `spare` until n cells and so many numbers are free. Drops none if it cannot be."""
        if self.n_free + frees + self._droppable(spare) < n:
            return False
        while self.n_free + frees < n or len(self._free_ids) < ids:
            if not self._drop_oldest(spare):
                return False
        return True

    def _droppable(self, spare: Sequence | None) -> int:
        """Cells that would be free without the retired sequences."""
        retired = [s for s in self._all if not s.live and s is not spare]
        held = np.zeros_like(self._users)
        for sequence in retired:
            held[sequence.cells] += 1
        return int(((held > 0) & (held == self._users)).sum())

    def _drop_oldest(self, spare: Sequence | None) -> bool:
        oldest = next((s for s in self.retired if s is not spare), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    def _drop(self, sequence: Sequence) -> None:
        self._cache.keep(sequence.id, 0)
        self._release(sequence, 0)
        self._all.remove(sequence)
        self._free_ids.append(sequence.id)
        sequence.units, sequence.reserved = [], 0

    def _take_cells(self, sequence: Sequence, n: int) -> None:
        cells = self._free_cells[len(self._free_cells) - n :]
        del self._free_cells[len(self._free_cells) - n :]
        self._users[cells] += 1
        sequence.cells += cells

    def _release(self, sequence: Sequence, n: int) -> None:
        """Give up the cells after the first n."""
        cells = np.array(sequence.cells[n:], np.int64)
        del sequence.cells[n:]
        self._users[cells] -= 1
        self._free_cells += cells[self._users[cells] == 0].tolist()
