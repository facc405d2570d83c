"""How much goes into a batch, by what batches took so far.

Knows rows and seconds: the next tokens of running answers are a row each, prompts bring many. Knows no answers.

On CPUs a row costs much the same from the fifth on, whatever else is in the batch, so that there is little to be had
from more of them together, and attention may make it a loss: with few rows, each passes over its own cells, with 64 or
more a whole tile of them passes over the cells that any of them sees. So answers go in groups where that is measured to
be faster, and beside 64 rows of a prompt only one that is alone. On a GPU, all go together.
"""

from __future__ import annotations

from collections.abc import Sequence

from local_llava.llm.rows import ATTENTION_TILE, efficient_size

MIN_MEASURED = 16
"""Rows of a batch from which on it says how long a row of a prompt takes; smaller ones are ruled by other costs."""

_GROUP = 4
"""Answers in a batch, where groups are tried: so many rows the kernels of quantized weights take at once."""

_BELOW_TILE = 48
"""Rows of a batch in which attention looks at each row's own cells only. As of 56, it is filled up to a whole tile."""

_TRIED_AGAIN = 64
"""Batches of answers after which the other way is tried again: another program may have slowed the machine."""


class Pace:
    """What batches take, learned as they are evaluated."""

    def __init__(self, n_batch: int, on_cpu: bool) -> None:
        """
        Args:
            n_batch: Rows of a batch at most.
            on_cpu: Whether all of the model is there.
        """
        self._n_batch, self._on_cpu = n_batch, on_cpu
        self._prompt_row_s = 0.0
        self._answers_row_s: dict[int, float] = {}
        self._n_answer_batches = 0

    def note(self, n_rows: int, seconds: float) -> None:
        """Learn from a batch how long a row of a prompt takes."""
        row_s = seconds / n_rows
        if n_rows >= MIN_MEASURED:
            self._prompt_row_s = 0.7 * self._prompt_row_s + 0.3 * row_s if self._prompt_row_s else row_s
        else:  # a small batch takes longer for each row; after a pause of the whole computer, this finds back
            self._prompt_row_s = min(self._prompt_row_s, row_s)

    def note_answers(self, n: int, seconds: float) -> None:
        """Learn from a batch that had the next tokens of n answers and nothing else."""
        self._n_answer_batches += 1
        row_s, known = seconds / n, self._answers_row_s.get(n)
        self._answers_row_s[n] = row_s if known is None else 0.7 * known + 0.3 * min(row_s, 2 * known)

    def together(self, n: int) -> int:
        """How many of n running answers get their next tokens in one batch."""
        if not self._on_cpu or n <= _GROUP:
            return n
        group, whole = (self._answers_row_s.get(size, 0.0) for size in (_GROUP, n))
        grouped = group <= whole
        if self._n_answer_batches % _TRIED_AGAIN == _TRIED_AGAIN - 1:
            grouped = not grouped
        return _GROUP if grouped else n

    def room(self, n_together: int, n_answering: int, seconds: float) -> int:
        """Rows for prompts in the next batch.

        Args:
            n_together: Answers that have a row in it.
            n_answering: Answers that wait for it.
            seconds: That they may still wait.
        """
        room = self._n_batch - n_together
        if n_answering:
            # The first rows show how long a row takes.
            row_s = self._prompt_row_s
            room = min(room, max(1, int(seconds / row_s) if row_s else MIN_MEASURED))
        if room >= ATTENTION_TILE:
            return min(room, efficient_size(room))
        efficient = min(efficient_size(n_together + room), self._n_batch) - n_together
        return efficient if efficient > 0 else room

    def side_by_side(self, needs: Sequence[int], room: int, n_together: int) -> int:
        """Rows for several prompts, about different pictures, in a batch in which they have room.

        Args:
            needs: Rows that each has left.
            room: Rows that there may be for all of them.
            n_together: Answers that have a row in the batch.

        Returns:
            The room, or less where short prompts would come into one tile of attention.
        """
        if not self._on_cpu or len(needs) < 2 or max(needs) >= ATTENTION_TILE or n_together >= _BELOW_TILE:
            return room
        return min(room, _BELOW_TILE - n_together)

    def share(self, n_together: int, n_prompts: int) -> bool:
        """Whether so many answers' rows and so many of prompts are better off in one batch than in two."""
        return not self._on_cpu or n_together <= 1 or n_together + n_prompts < ATTENTION_TILE


def shares(needs: Sequence[int], room: int) -> list[int]:
    """Rows for each of several prompts.

    Args:
        needs: Rows that each has left, the oldest first.
        room: Rows for all of them.

    Returns:
        Half of them for the oldest, then for those that need no more than an equal share, then for the others in order.
    """
    given = [0] * len(needs)
    if not needs or room < 1:
        return given
    fair = max(1, room // len(needs))

    def give(i: int, most: int) -> None:
        nonlocal room
        n = min(needs[i] - given[i], most, room)
        given[i] += n
        room -= n

    give(0, max(1, room // 2))
    for i, need in enumerate(needs):
        if need - given[i] <= fair:
            give(i, fair)
    for i in range(len(needs)):
        give(i, room)
    return given
