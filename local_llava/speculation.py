"""Guesses of an answer's next tokens, from what was read and written before (prompt lookup).

Knows tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

from local_llava.answer import Answer
from local_llava.request import Request, Unit

MAX_GUESSED = 16
"""Tokens that are guessed at a time, at most."""


class Guesser:
    """Guesses, and learns whether guessing pays."""

    def measure(self, n_rows: int, seconds: float) -> None:
        """Note how long a batch took."""

    def guess(self, prompt: Sequence[Unit], answer: Answer, request: Request, most: int) -> list[int]:
        """Tokens that may come after the answer's last one, at most so many."""
        return []

    def learn(self, n_guessed: int, n_right: int) -> None:
        """Note how many guesses were right."""
