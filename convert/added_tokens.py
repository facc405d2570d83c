"""The tokens that a tokenizer finds in text before anything else, and whether the runtime finds the same.

Knows the `added_tokens` of tokenizer.json and `added_tokens_decoder` of tokenizer_config.json. Does not know BPE.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from local_llava.convert.config import Config, read_json
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import is_mark

_WORD = re.compile(r"[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s+")
"""A text that the pre-tokenizer leaves in one piece, as far as ASCII goes."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as text, before the text is split into words."""

    id: int
    content: str
    special: bool
    """Skipped in decoded text; left unmatched in what users type."""
    normalized: bool
    """Looked for after all others."""
    lstrip: bool = False
    """Swallows the white space before it."""
    rstrip: bool = False
    """Swallows the white space after it."""


def read_added_tokens(root: Config) -> list[AddedToken]:
    """Read the added tokens of a tokenizer.json.

    Raises:
        CheckpointError: An entry is malformed, or asks for matching of whole words, which is not supported.
    """
    entries = root.values.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{root.name('added_tokens')} must be a list, not {type(entries).__name__}")
    tokens: dict[str, AddedToken] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise CheckpointError(f"{root.name('added_tokens')}[{i}] must be an object, not {entry!a:.40}")
        token = _read(Config(root.path, entry, f"added_tokens[{i}]"), entry.get("id"))
        if token.content in tokens or any(token.id == t.id for t in tokens.values()):
            raise CheckpointError(f"{root.name('added_tokens')}[{i}] repeats the id or the text of another")
        tokens[token.content] = token
    return list(tokens.values())


def with_configuration(added: Sequence[AddedToken], directory: Path) -> list[AddedToken]:
    """Added tokens as a checkpoint's tokenizer_config.json has them, by id.

    As in transformers, which adds the tokens that only that file has, and replaces those of which it says something
    else.

    Raises:
        CheckpointError: An entry is malformed, or asks for matching of whole words, which is not supported.
    """
    tokens = {token.content: token for token in added}
    path = directory / "tokenizer_config.json"
    decoder = Config(path, read_json(path)).sub("added_tokens_decoder") if path.is_file() else Config(path, {})
    for key, entry in decoder.values.items():
        if not isinstance(entry, dict) or not key.isascii() or not key.isdigit():
            raise CheckpointError(f"{decoder.name(key[:20])} must be an object under a token id")
        token = _read(Config(path, entry, f"{decoder.section}.{key[:20]}"), int(key[:20]))
        known = tokens.get(token.content, token)
        tokens[token.content] = replace(token, id=known.id)
    return sorted(tokens.values(), key=lambda t: t.id)


def _read(entry: Config, token_id: Any) -> AddedToken:
    content = entry.values.get("content")
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < 1 << 31:
        raise CheckpointError(f"{entry.name('id')} must be a token id, not {token_id!a:.40}")
    if not isinstance(content, str) or not content or "\0" in content:
        raise CheckpointError(f"{entry.name('content')} must be a text without a zero character, not {content!a:.40}")
    if entry.flag("single_word", False):
        raise CheckpointError(
            f"{entry.name('single_word')} is set for {content!a:.40}; only a token without is supported"
        )
    special = entry.flag("special", False)
    return AddedToken(
        id=token_id,
        content=content,
        special=special,
        normalized=entry.flag("normalized", not special),
        lstrip=entry.flag("lstrip", False),
        rstrip=entry.flag("rstrip", False),
    )


def check_matching(path: Path, added: Sequence[AddedToken], vocab: Mapping[str, int]) -> None:
    """Check that llama.cpp finds the same added tokens in any text as the tokenizers library.

    That takes the leftmost match and, of those, the longest; llama.cpp takes the longest token first, wherever it is.
    They differ only where one token's end is another's beginning. Besides, llama.cpp (with `ignore_merges`) takes a
    word that is a token whole, so a control token that is a word could be typed. It swallows no white space.

    Raises:
        CheckpointError: They would differ.
    """
    for token in added:
        if token.lstrip or token.rstrip:
            flag = "lstrip" if token.lstrip else "rstrip"
            raise CheckpointError(
                f"{path}: added_tokens: {flag} is set for {token.content!a:.40}; llama.cpp matches tokens as they are"
            )
    starts = defaultdict(list)
    for token in added:
        for n in range(1, len(token.content)):
            starts[token.content[:n]].append(token)
    for token in added:
        text = token.content
        for n in range(1, len(text)):
            for other in starts.get(text[n:], ()):
                if len(other.content) > len(text):
                    raise CheckpointError(
                        f"{path}: added_tokens: {text!a:.40} ends as {other.content!a:.40} begins; "
                        "llama.cpp would match such tokens in another order"
                    )
        if token.special and text not in vocab and _WORD.fullmatch(text):
            raise CheckpointError(
                f"{path}: added_tokens: the special token {text!a:.40} is a plain word; "
                "llama.cpp would read it in what users type"
            )
    late = [t.content for t in added if t.normalized]
    for token in added:
        for longer in late if not token.normalized else ():
            if token.content in longer and token.content != longer:
                raise CheckpointError(
                    f"{path}: added_tokens: {token.content!a:.40} is part of {longer!a:.40}, but matched before it; "
                    "llama.cpp matches the longer one first"
                )


def check_stripping(path: Path, added: Sequence[AddedToken]) -> None:
    """Check that only tokens of a chat template swallow white space, around which the runtime makes texts and tokens.

    Raises:
        CheckpointError: One does that is matched in what users type.
    """
    for token in added:
        if (token.lstrip or token.rstrip) and not (token.special or is_mark(token.content)):
            flag = "lstrip" if token.lstrip else "rstrip"
            raise CheckpointError(
                f"{path}: added_tokens: {flag} is set for {token.content!a:.40}; only special tokens may have it"
            )
