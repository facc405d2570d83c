"""Text to tokens of a SentencePiece-type vocabulary (Llama 2, Vicuna, Mistral, Phi 3), as the tokenizers library does.

Knows byte pair encoding on characters, with spaces written as "▁" and unknown characters as byte tokens. Does not know
where text and special tokens come from (`prompt`), nor how tokens become text (`detokenizer`).

llama.cpp's own tokenizer for such vocabularies is not used: it knows two of the ways in which checkpoints put a space
before text, takes the order of merges from scores, where all merges to one token are alike, and makes control and byte
tokens of typed text where a vocabulary lets it.

The algorithm and the order of its steps are those of https://github.com/huggingface/tokenizers (models/bpe/word.rs,
tokenizer/added_vocabulary.rs, pre_tokenizers/metaspace.rs).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from local_llava.gguf_file import GGUFFile
from local_llava.llm_vocab import BYTE_TOKENS, NORMAL, USER_DEFINED, Vocab, is_mark

SPACE = "▁"
"""U+2581, as which vocabularies write a space."""

_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""Unicode's White_Space, which tokens with `lstrip` or `rstrip` swallow. Python's own strip() takes a few more."""

_Rank = Callable[[str, str], "float | None"]
"""How early two symbols merge, the lowest first; None if they do not."""


@dataclass(frozen=True)
class TextRun:
    """The text of a prompt between two special tokens or pictures."""

    pieces: tuple[str, ...]
    """The text, in pieces that no special token's text crosses or is part of."""
    first: bool = False
    """Whether nothing comes before it that the template wrote."""
    after: int | None = None
    """The special token before it."""
    before: int | None = None
    """The special token after it."""


class SentencePiece:
    """The tokenizer of a vocabulary."""

    def __init__(self, vocab: Vocab, tokens: Sequence[str], types: Sequence[int], rank: _Rank) -> None:
        """Use `from_gguf`."""
        self._rules, self._rank = vocab, rank
        self._ids = _symbols(tokens, types)
        by_text = {text: i for i, text in enumerate(tokens) if text in BYTE_TOKENS}
        self._bytes = [by_text[f"<0x{byte:02X}>"] for byte in range(256)]
        users = {text: i for i, text in enumerate(tokens) if types[i] == USER_DEFINED and not is_mark(text)}
        self._normalizes = vocab.space_prefix in ("prepend", "replace")
        self._raw = _Matcher({text: i for text, i in users.items() if i not in vocab.normalized})
        self._normalized = _Matcher({self._normalize(text): i for text, i in users.items() if i in vocab.normalized})

    @classmethod
    def from_gguf(cls, gguf: GGUFFile, vocab: Vocab) -> SentencePiece:
        """The tokenizer of a language model's GGUF that `check_vocab` accepts, whose tokenizer.ggml.model is "llama".

        Merges are ranked by `tokenizer.ggml.merges` where the file has them, as ours do; else every pair that makes a
        token merges, by the token's score, as in the sentencepiece library.
        """
        tokens, types = gguf.metadata["tokenizer.ggml.tokens"], gguf.metadata["tokenizer.ggml.token_type"]
        merges = gguf.metadata.get("tokenizer.ggml.merges")
        symbols = _symbols(tokens, types)
        if merges is not None:
            rank = _by_merges(symbols, merges)
        else:
            rank = _by_scores(symbols, gguf.metadata["tokenizer.ggml.scores"])
        return cls(vocab, tokens, types, rank)

    def encode(self, run: TextRun) -> list[int]:
        """Token ids of a text, in which nothing becomes a control token or, but for bytes, a byte token."""
        text = "".join(run.pieces)
        if run.after in self._rules.rstrip:
            text = text.lstrip(_WHITESPACE)
        if run.before in self._rules.lstrip:
            text = text.rstrip(_WHITESPACE)
        ids: list[int] = []
        for start, part in self._raw.split(text):
            ids += [part] if isinstance(part, int) else self._encode(part, run.first and start == 0)
        return ids

    def _encode(self, text: str, first: bool) -> list[int]:
        """Tokens of text without those that are matched as they are; `first` where the prompt begins with it."""
        ids: list[int] = []
        for start, part in self._normalized.split(self._normalize(text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            for symbol in merge(self._with_prefix(part, first and start == 0), self._rank):
                known = self._ids.get(symbol)
                ids += [self._bytes[byte] for byte in symbol.encode()] if known is None else [known]
        return ids

    def _normalize(self, text: str) -> str:
        """What a normalizer does, where there is one."""
        if self._rules.space_prefix == "prepend":
            text = SPACE + text
        return text.replace(" ", SPACE) if self._normalizes else text

    def _with_prefix(self, text: str, first: bool) -> str:
        """What Metaspace does, where there is no normalizer."""
        text = text.replace(" ", SPACE)
        wanted = self._rules.space_prefix == "always" or (self._rules.space_prefix == "first" and first)
        return SPACE + text if wanted and not text.startswith(SPACE) else text


def merge(text: str, rank: _Rank) -> list[str]:
    """Byte pair encoding: merge the pair of the lowest rank, the leftmost of equals, until no pair is left to merge.

    Args:
        text: At least one character.
        rank: Of two neighbours, or None where they do not merge.

    Returns:
        The symbols that are left, in order.
    """
    symbols = list(text)
    n = len(symbols)
    following, preceding = list(range(1, n + 1)), list(range(-1, n - 1))
    queue = [(r, i, text[i : i + 2]) for i in range(n - 1) if (r := rank(text[i], text[i + 1])) is not None]
    heapq.heapify(queue)
    while queue:
        _, i, whole = heapq.heappop(queue)
        j = following[i]
        # Stale where one of the two has merged since, unless the new pair makes the same symbol.
        if j == n or symbols[i] + symbols[j] != whole or not symbols[i] or rank(symbols[i], symbols[j]) is None:
            continue
        symbols[i], symbols[j] = whole, ""
        following[i] = following[j]
        if following[i] < n:
            preceding[following[i]] = i
        for left in (preceding[i], i):
            right = following[left] if left >= 0 else n
            if right < n and (r := rank(symbols[left], symbols[right])) is not None:
                heapq.heappush(queue, (r, left, symbols[left] + symbols[right]))
    return [symbol for symbol in symbols if symbol]


class _Matcher:
    """Finds tokens in text: the leftmost one, and of several there the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        texts = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def split(self, text: str) -> Iterator[tuple[int, str | int]]:
        """The tokens found and the text between them, each with where it starts."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > end:
                yield end, text[end : match.start()]
            yield match.start(), self._ids[match[0]]
            end = match.end()
        if end < len(text):
            yield end, text[end:]


def _symbols(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """What merging may make: no control, byte, unknown or unused token, nor one that only a template may write."""
    return {
        text: i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == NORMAL or (kind == USER_DEFINED and not is_mark(text))
    }


def _by_merges(symbols: Mapping[str, int], merges: Sequence[str]) -> _Rank:
    pairs = enumerate(merge.partition(" ") for merge in merges)
    ranks = {(left, right): i for i, (left, _, right) in pairs if left + right in symbols}
    return lambda left, right: ranks.get((left, right))


def _by_scores(symbols: Mapping[str, int], scores: Sequence[float]) -> _Rank:
    def rank(left: str, right: str) -> float | None:
        token = symbols.get(left + right)
        return None if token is None else -scores[token]

    return rank
