"""Byte pair encoding of a tokenizer.json, as far as both kinds of it have the same fields.

Knows vocab and merges. The two kinds are `byte_level` and `sentencepiece`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import TokenType

from local_llava.convert.config import Config
from local_llava.errors import CheckpointError


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary without its added tokens, as GGUF holds it."""

    model: str
    """Kind as GGUF names it: "gpt2", byte-level BPE, or "llama", SentencePiece."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    ids: Mapping[str, int]
    merges: tuple[str, ...]
    """As "left right"."""
    types: Mapping[str, TokenType] = field(default_factory=dict)
    """Of tokens that are no normal ones."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of SentencePiece's normal tokens."""
    unk: int | None = None
    space_prefix: str | None = None
    """Of SentencePiece: one of `llm_vocab.SPACE_PREFIXES`."""
    strip_space: bool = False
    """Whether an answer loses the space that it begins with."""


def check_model(model: Config) -> None:
    """Refuse what changes how words are merged.

    Raises:
        CheckpointError: The model asks for it.
    """
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.values.get(key):
            raise CheckpointError(f"{model.name(key)} is set; only a model without it is supported")


def read_ids(model: Config) -> dict[str, int]:
    """Read `vocab`: text -> id.

    Raises:
        CheckpointError: An id is none, or two tokens have it.
    """
    vocab = model.sub("vocab").values
    seen: dict[int, str] = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise CheckpointError(f"{model.name('vocab')}[{text!a:.40}] must be a token id, not {i!a:.40}")
        if seen.setdefault(i, text) != text:
            raise CheckpointError(f"{model.name('vocab')} has two tokens of id {i}: {seen[i]!a:.40} and {text!a:.40}")
    return dict(vocab)


def read_merges(model: Config, vocab: Mapping[str, int]) -> list[str]:
    """Read `merges` as "left right"; files since tokenizers 0.20 hold pairs.

    Raises:
        CheckpointError: One is malformed, joins what is not in the vocab, or is there twice.
    """
    items = model.values.get("merges")
    if not isinstance(items, list):
        raise CheckpointError(f"{model.name('merges')} must be a list, not {type(items).__name__}")
    merges = []
    for i, item in enumerate(items):
        pair = item.split(" ") if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise CheckpointError(f"{model.name('merges')}[{i}] must be two tokens, not {item!a:.60}")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{model.name('merges')}[{i}] joins {item!a:.60}, of which a part is not in the vocab"
            )
        merges.append(f"{left} {right}")
    if len(set(merges)) < len(merges):
        raise CheckpointError(f"{model.name('merges')} has {len(merges) - len(set(merges))} repeated items")
    return merges
