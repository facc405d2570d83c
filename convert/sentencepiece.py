"""SentencePiece-type BPE of a tokenizer.json: Llama 2, Vicuna, Mistral, Phi 3.

Knows how such files say what the runtime does (`local_llava.sentencepiece`): a normalizer or a Metaspace that writes
spaces as U+2581 and puts one before a text, merges of characters, and byte tokens for those that are not in the
vocabulary. Anything else is refused by name.

llama.cpp merges by scores. They are made of the merges' order, so that it splits text as they do, but where a file
ranks other merges between two of the same token, has fewer than it could, or text spells a special token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from local_llava.convert.bpe import Vocabulary, check_model, read_ids, read_merges
from local_llava.convert.config import Config
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import BYTE_TOKENS
from local_llava.sentencepiece import SPACE

_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def read_sentencepiece(root: Config) -> Vocabulary:
    """Read the vocabulary of a tokenizer.json whose model has byte_fallback.

    Raises:
        CheckpointError: It is malformed, or does something that the runtime does not.
    """
    model = root.sub("model")
    check_model(model)
    if model.flag("ignore_merges", False):
        raise CheckpointError(
            f"{model.name('ignore_merges')} is set; with byte_fallback only a model without it is supported"
        )
    space_prefix, strip_space = _space_prefix(root), _strips_space(root)
    ids = read_ids(model)
    _check_texts(model, ids)
    unk = model.values.get("unk_token")
    types = dict.fromkeys(BYTE_TOKENS, TokenType.BYTE)
    if isinstance(unk, str) and unk in ids:
        types[unk] = TokenType.UNKNOWN
    merges = read_merges(model, ids)
    if not merges:
        raise CheckpointError(f"{model.name('merges')} is empty; with byte_fallback a model that merges is supported")
    return Vocabulary(
        model="llama",
        pre="default",
        ids=ids,
        merges=tuple(merges),
        types=types,
        scores=_scores({text: i for text, i in ids.items() if text not in types}, merges),
        unk=ids.get(unk) if isinstance(unk, str) else None,
        space_prefix=space_prefix,
        strip_space=strip_space,
    )


def _scores(ids: Mapping[str, int], merges: list[str]) -> dict[str, float]:
    """The score of each token: minus the place of the first merge that makes it; less than any where none does."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault(merge.replace(" ", ""), float(-rank))
    return {text: scores.get(text, float(-len(merges) - i)) for text, i in ids.items()}


def _space_prefix(root: Config) -> str:
    """Where a space is put before text: one of `llm_vocab.SPACE_PREFIXES`."""
    normalizers = _steps(root, "normalizer", "normalizers")
    pre_tokenizers = _steps(root, "pre_tokenizer", "pretokenizers")
    if not pre_tokenizers and normalizers in ([_PREPEND, _REPLACE], [_REPLACE, _PREPEND]):
        return "prepend"
    if not pre_tokenizers and normalizers == [_REPLACE]:
        return "replace"
    if not normalizers and [p.get("type") for p in pre_tokenizers] == ["Metaspace"]:
        metaspace = pre_tokenizers[0]
        scheme = metaspace.get("prepend_scheme", "always")
        if metaspace.get("add_prefix_space") is False:  # files of before tokenizers 0.15
            scheme = "never"
        if (
            scheme in ("always", "first", "never")
            and metaspace.get("replacement") == SPACE
            and metaspace.get("split") is False
        ):
            return str(scheme)
    found = [p.get("type") for p in (*normalizers, *pre_tokenizers)]
    raise CheckpointError(
        f"{root.name('normalizer')} and pre_tokenizer do {found!a:.80}; with byte_fallback supported are the "
        "normalizers Prepend and Replace, or Metaspace without split, with U+2581 for a space"
    )


def _strips_space(root: Config) -> bool:
    decoders = _steps(root, "decoder", "decoders")
    if decoders not in (_DECODERS, [*_DECODERS, _STRIP]):
        found = [p.get("type") for p in decoders]
        raise CheckpointError(
            f"{root.name('decoder')} does {found!a:.80}; with byte_fallback supported are Replace, ByteFallback, Fuse "
            "and, for one space at the start, Strip"
        )
    return _STRIP in decoders


def _steps(root: Config, key: str, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, whether it is one, a sequence, or none."""
    whole = root.sub(key).values
    steps = whole.get(inner) if whole.get("type") == "Sequence" else [whole] if whole else []
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{root.name(key)}.{inner} must be a list of objects")
    return steps


def _check_texts(model: Config, ids: Mapping[str, int]) -> None:
    for text in ids:
        if not text or "\0" in text or " " in text:
            raise CheckpointError(
                f"{model.name('vocab')}[{text!a:.40}] must be a text without a space or a zero character"
            )
    missing = sorted(BYTE_TOKENS - ids.keys())
    if missing:
        # Text with such bytes would become unknown tokens.
        raise CheckpointError(
            f"{model.name('vocab')} lacks {len(missing)} of the 256 byte tokens, such as {missing[0]}"
        )
