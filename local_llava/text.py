"""The text of an answer as it comes, up to a stop text.

Does not know tokens: they are made text by `detokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence


class AnswerText:
    """Joins pieces of text, and holds back what may turn out to be the beginning of a stop text."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """
        Args:
            stop: Texts that end the answer where they first occur.
        """
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop text came; nothing comes after it."""

    def push(self, piece: str) -> str:
        """The text that is certain after this piece, from where the last call's ended."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [i for stop in self._stop if (i := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """The rest."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
