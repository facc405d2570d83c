"""Tokens to text, one by one as they come.

Knows how the two kinds of vocabulary write text; both leave out control tokens. Does not know stop texts.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from local_llava.llm_vocab import BYTE, NORMAL, USER_DEFINED
from local_llava.sentencepiece import SPACE


class Detokenizer(Protocol):
    """What an answer's tokens say."""

    def push(self, token: int) -> str:
        """The text that is certain after this token, from where the last call's ended."""
        ...

    def finish(self) -> str:
        """The rest."""
        ...


class ByteLevelDetokenizer:
    """Of byte-level BPE: tokens are bytes, a character may be spread over several; what is no UTF-8 becomes U+FFFD."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        """
        Args:
            piece: The bytes of a token, none of a control token.
        """
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._piece(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class SentencePieceDetokenizer:
    """Of SentencePiece: tokens are text, but for byte tokens, whose runs are UTF-8.

    As the tokenizers library's decoders Replace, ByteFallback, Fuse and Strip, with one difference: of a run of byte
    tokens that turns out to be no UTF-8, that library replaces every byte by U+FFFD, and here the characters that came
    before the mistake stay, since they may have been shown. Newlines are byte tokens, and would have to wait.
    """

    def __init__(self, tokens: Sequence[str], types: Sequence[int], strip_space: bool) -> None:
        """
        Args:
            tokens: The vocabulary, by id.
            types: llama.cpp's type of each token.
            strip_space: Whether a text loses the space that it begins with.
        """
        self._tokens, self._types = tokens, types
        self._at_start = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._broken = False
        """Whether the run of byte tokens is no UTF-8."""

    def push(self, token: int) -> str:
        kind, text = self._types[token], self._tokens[token]
        if kind == BYTE:
            return self._stripped(self._byte(int(text[3:5], 16)))
        if kind not in (NORMAL, USER_DEFINED):
            return ""
        return self._stripped(self._end_run() + text.replace(SPACE, " "))

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _byte(self, byte: int) -> str:
        if self._broken:
            return "\ufffd"
        n_pending = self._n_pending()
        try:
            return self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._decoder.reset()
            self._broken = True
            return "\ufffd" * (n_pending + 1)

    def _end_run(self) -> str:
        """What is left of a run of byte tokens."""
        n_pending = self._n_pending()
        self._decoder.reset()
        self._broken = False
        return "\ufffd" * n_pending

    def _n_pending(self) -> int:
        """Bytes of a character that is not complete."""
        return len(self._decoder.getstate()[0])

    def _stripped(self, text: str) -> str:
        if not text or not self._at_start:
            return text
        self._at_start = False
        return text.removeprefix(" ")
