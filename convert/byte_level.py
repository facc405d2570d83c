"""Byte-level BPE of a tokenizer.json, with the pre-tokenizer of Llama 3 or Qwen2.

Knows which of it llama.cpp does as the tokenizers library does. What it cannot is refused by name, since it would
change what the model reads without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from local_llava.convert.bpe import Vocabulary, check_model, read_ids, read_merges
from local_llava.convert.config import Config
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import LLAMA3_PRE, QWEN2_PRE, byte_alphabet

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELT_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""The same for libraries that lack the inline flag."""

PRE_TOKENIZERS = {
    LLAMA3_REGEX: LLAMA3_PRE[0],
    LLAMA3_REGEX.replace(_CONTRACTIONS, _SPELT_OUT): LLAMA3_PRE[0],
    QWEN2_REGEX: QWEN2_PRE,
    QWEN2_REGEX.replace(_CONTRACTIONS, _SPELT_OUT): QWEN2_PRE,
}
"""Regular expression -> llama.cpp's name of the pre-tokenizer that splits so."""

_NORMALIZERS: Mapping[str, tuple[object, ...]] = {
    LLAMA3_PRE[0]: (None, {"type": "Sequence", "normalizers": []}),
    QWEN2_PRE: ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
}
"""Pre-tokenizer -> what the normalizer must be: the runtime takes text to NFC for Qwen2, and for no other."""

logger = logging.getLogger("local_llava")


def read_byte_level(root: Config) -> Vocabulary:
    """Read the vocabulary of a tokenizer.json.

    Raises:
        CheckpointError: It is malformed, or does something that llama.cpp's tokenizer does not.
    """
    model = root.sub("model")
    check_model(model)
    pre = _pre_tokenizer(root)
    normalizer = root.values.get("normalizer")
    if normalizer not in _NORMALIZERS[pre]:
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        only = "NFC, as Qwen2 has it," if pre == QWEN2_PRE else "a tokenizer without one"
        raise CheckpointError(f"{root.name('normalizer')} is {kind!a:.40}; only {only} is supported")
    ids = read_ids(model)
    _check_alphabet(model, ids)
    merges = read_merges(model, ids)
    _warn_of_unreachable(model, ids, merges, taken_whole=pre != QWEN2_PRE)
    return Vocabulary("gpt2", pre, ids, tuple(merges))


def _pre_tokenizer(root: Config) -> str:
    steps = root.sub("pre_tokenizer").values
    parts = steps.get("pretokenizers") if steps.get("type") == "Sequence" else [steps]
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise CheckpointError(f"{root.name('pre_tokenizer')}.pretokenizers must be a list of objects")
    splits = [p for p in parts if p.get("type") == "Split"]
    regexes = [p["pattern"].get("Regex") for p in splits if isinstance(p.get("pattern"), dict)]
    name = next((PRE_TOKENIZERS[r] for r in regexes if isinstance(r, str) and r in PRE_TOKENIZERS), None)
    if name is None:
        found = f"the regular expression {regexes[0]!a:.60}" if regexes else f"{[p.get('type') for p in parts]!a:.60}"
        raise CheckpointError(
            f"{root.name('pre_tokenizer')} splits by {found}, which is not known; supported is the byte-level "
            "BPE of Llama 3 and Qwen2"
        )
    # Isolated keeps every match as a word; so does removing all that does not match, since the expression matches all.
    whole = len(splits) == 1 and (splits[0].get("behavior"), bool(splits[0].get("invert"))) in (
        ("Isolated", False),
        ("Removed", True),
    )
    rest = [p for p in parts if p.get("type") != "Split"]
    bytewise = len(rest) == 1 and rest[0].get("type") == "ByteLevel" and parts[-1] is rest[0]
    if not whole or not bytewise or rest[0].get("add_prefix_space", True) or rest[0].get("use_regex", True):
        raise CheckpointError(
            f"{root.name('pre_tokenizer')} must be Split (Isolated) by that expression, then ByteLevel without "
            f"a prefix space and its own regular expression; found {[p.get('type') for p in parts]!a:.80}"
        )
    return name


def _check_alphabet(model: Config, ids: Mapping[str, int]) -> None:
    alphabet = set(byte_alphabet())
    for text in ids:
        if not text or not alphabet.issuperset(text):
            raise CheckpointError(f"{model.name('vocab')}[{text!a:.40}] is not written in byte-level BPE's alphabet")
    missing = sorted(alphabet - ids.keys())
    if missing:
        # Text with such bytes would lose them.
        raise CheckpointError(f"{model.name('vocab')} lacks {len(missing)} of the 256 bytes, such as {missing[0]!a}")


def _warn_of_unreachable(model: Config, vocab: Mapping[str, int], merges: Sequence[str], *, taken_whole: bool) -> None:
    """Warn where llama.cpp, which always or never takes a word that is a token whole, differs from what a file says.

    Llama 3 itself does as llama.cpp (its reference tokenizer is tiktoken); its first tokenizer.json did not say so.
    """
    said = model.flag("ignore_merges", False)
    if said == taken_whole:
        return
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    unreachable = [text for text in vocab if len(_bpe(text, rank)) > 1]
    if unreachable:
        logger.warning(
            "%s is %sset: %d tokens, such as %a, cannot be reached by merges; llama.cpp will %s",
            model.name("ignore_merges"),
            "" if said else "not ",
            len(unreachable),
            unreachable[0],
            "use them all the same" if taken_whole else "not use them",
        )


def _bpe(word: str, rank: Mapping[tuple[str, ...], int]) -> list[str]:
    parts = list(word)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
        if (parts[best], parts[best + 1]) not in rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
