"""The text of an answer, from the bytes of its tokens as they come.

Knows UTF-8 and stop texts. Does not know tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class AnswerText:
    """Joins pieces of bytes to text, and holds back what may turn out not to belong to it.

    A character may be spread over several tokens, and so may a stop text; bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """
        Args:
            stop: Texts that end the answer where they first occur.
        """
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """Whether a stop text came; nothing comes after it."""

    def push(self, piece: bytes) -> str:
        """The text that is certain after these bytes, from where the last call's ended."""
        return self._take(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest."""
        rest = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [i for stop in self._stop if (i := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
