"""Checks the vocabulary of a language model's GGUF before llama.cpp reads it.

Knows what `llama_vocab::impl::load` and the tokenizers behind it assume (src/llama-vocab.cpp of llama.cpp in
llama-cpp-python 0.3.36): it aborts on repeated tokens, and on text for which a SentencePiece vocabulary has no byte; it
goes on with wrong ids, a guessed pre-tokenizer or dropped text in other cases. Knows our own keys as well, which say
what GGUF has no key for. Does not know the model's tensors, nor what published files get wrong: `corrections` puts that
right before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile

LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
"""Names that llama.cpp has for Llama-3's pre-tokenizer."""

QWEN2_PRE = "qwen2"
"""Its tokenizer also normalizes text to NFC, which llama.cpp leaves to others."""

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn of a chat, by text: Llama 3, ChatML, Phi 3, Gemma."""

_SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask")

OPTIONAL_TYPES = {
    "general.name": "str",
    "tokenizer.ggml.pre": "str",
    "tokenizer.chat_template": "str",
    "tokenizer.ggml.token_type_count": "u32",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.ggml.add_sep_token": "bool",
    "tokenizer.ggml.add_space_prefix": "bool",
    "tokenizer.ggml.remove_extra_whitespaces": "bool",
    "tokenizer.ggml.suppress_tokens": "arr[i32]",
    **{f"tokenizer.ggml.{name}_token_id": "u32" for name in _SPECIAL_IDS},
}
"""Optional entries: llama.cpp refuses to load a file in which one has another type."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Of llama.cpp's `llama_token_type`."""

SPACE_PREFIXES = ("prepend", "replace", "always", "first", "never")
"""Where a SentencePiece tokenizer puts a space before text, in the tokenizers library's words. By the normalizer
Prepend before each text between added tokens, or by Replace alone before none; or by the pre-tokenizer Metaspace, which
adds none where there is one, before each such text, before the one that begins the prompt, or before none."""

SPACE_PREFIX_KEY = "local_llava.tokenizer.space_prefix"
STRIP_SPACE_KEY = "local_llava.tokenizer.strip_space"
LSTRIP_KEY = "local_llava.tokenizer.lstrip_tokens"
RSTRIP_KEY = "local_llava.tokenizer.rstrip_tokens"
NORMALIZED_KEY = "local_llava.tokenizer.normalized_tokens"
"""Of a SentencePiece vocabulary: one of `SPACE_PREFIXES`; whether an answer loses the space that it begins with; ids of
tokens that swallow white space before or after them, and of those that are looked for in text with its prefix.
Files of other tools lack them."""

PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")
"""Those that llama.cpp takes for granted in a model that is named Phi 3."""


@dataclass(frozen=True)
class Vocab:
    """What the rest of local-llava needs to know of a vocabulary that passed."""

    n_vocab: int
    model: str
    """"gpt2" (byte-level BPE) or "llama" (SentencePiece)."""
    bos: int
    """-1 where there is none: then no text begins with one."""
    eos: int
    eot: int | None
    """End of a chat's turn, where that is not `eos`."""
    add_bos: bool
    chat_template: str | None
    pre: str = LLAMA3_PRE[0]
    """Name of the pre-tokenizer: one of `LLAMA3_PRE` or `QWEN2_PRE`; of no account in SentencePiece."""
    space_prefix: str = "never"
    """Of SentencePiece: one of `SPACE_PREFIXES`."""
    strip_space: bool = False
    """Whether an answer loses the space that it begins with."""
    lstrip: frozenset[int] = frozenset()
    """Tokens that swallow the white space before them."""
    rstrip: frozenset[int] = frozenset()
    """Tokens that swallow the white space after them."""
    normalized: frozenset[int] = frozenset()
    """User-defined tokens that are looked for in text with its prefix, after all others."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Metadata to give llama.cpp in place of what the file says (`kv_overrides`)."""


def check_vocab(gguf: GGUFFile) -> Vocab:
    """Check the `tokenizer.*` metadata of a language model.

    Raises:
        ModelFileError: The vocabulary is missing, damaged or of a kind that is not supported; one line that names the
            file and the metadata key.
    """
    checks = _Checks(gguf)
    model = checks.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise checks.error(
            "tokenizer.ggml.model", f"is {model[:40]!a}; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    for key, kind in OPTIONAL_TYPES.items():
        checks.typed(key, kind)
    tokens = checks.tokens()
    checks.token_types(tokens)
    checks.scores(len(tokens), required=model == "llama")
    checks.merges(required=model == "gpt2")
    if model == "gpt2":
        checks.bytes_of_bpe(tokens)
    else:
        checks.bytes_of_sentencepiece(tokens)
    checks.name(tokens)
    pre = checks.pre_tokenizer(model)
    # llama.cpp's defaults.
    add_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", pre != QWEN2_PRE)
    ids = checks.special_ids(len(tokens), add_bos)
    return Vocab(
        n_vocab=len(tokens),
        model=model,
        bos=ids.get("bos", -1),
        eos=ids["eos"],
        eot=ids.get("eot"),
        add_bos=add_bos,
        chat_template=gguf.metadata.get("tokenizer.chat_template"),
        pre=pre,
        space_prefix=checks.space_prefix(),
        strip_space=gguf.metadata.get(STRIP_SPACE_KEY, adds_space(checks.space_prefix())),
        lstrip=checks.token_set(LSTRIP_KEY, len(tokens)),
        rstrip=checks.token_set(RSTRIP_KEY, len(tokens)),
        normalized=checks.token_set(NORMALIZED_KEY, len(tokens)),
        overrides=gguf.overrides,
    )


def special_tokens(gguf: GGUFFile) -> dict[str, int]:
    """Text -> id of the tokens that text must not turn into.

    llama.cpp matches user-defined ones in any text; of those only the ones that look like marks are meant, since some
    vocabularies define runs of spaces so.
    """
    tokens: list[str] = gguf.metadata["tokenizer.ggml.tokens"]
    types: list[int] = gguf.metadata.get("tokenizer.ggml.token_type", [])
    return {
        text: i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and is_mark(text))
    }


def adds_space(space_prefix: str) -> bool:
    """Whether one of `SPACE_PREFIXES` puts a space anywhere."""
    return space_prefix not in ("replace", "never")


def is_mark(text: str) -> bool:
    """Whether a user-defined token looks like one that only a chat template may write; some are runs of spaces."""
    return text[:1] + text[-1:] in ("<>", "[]") and len(text) > 2


def is_named_phi3(metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp takes a model for a Phi 3, whose marks swallow the white space after them."""
    name = metadata.get("general.name")
    return isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))


class _Checks:
    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf, self.metadata, self.types = gguf, gguf.metadata, gguf.types

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.gguf.path}: {key} {problem}")

    def typed(self, key: str, kind: str, required: bool = False) -> None:
        if key not in self.types:
            if required:
                raise self.error(key, f"is missing; a language model has it, as {kind}")
        elif self.types[key] != kind:
            raise self.error(key, f"is stored as {self.types[key]}; it must be {kind}")

    def text(self, key: str) -> str:
        self.typed(key, "str", required=True)
        text: str = self.metadata[key]
        return text

    def tokens(self) -> dict[str, int]:
        """Text -> id. ggml hands tokens over as C strings, and llama.cpp aborts where two are equal."""
        key = "tokenizer.ggml.tokens"
        self.typed(key, "arr[str]", required=True)
        tokens: list[str] = self.metadata[key]
        if not 1 <= len(tokens) <= 1 << 22:
            raise self.error(key, f"has {len(tokens)} tokens; 1 to {1 << 22} are accepted")
        ids: dict[str, int] = {}
        for i, text in enumerate(tokens):
            name = text or f"[EMPTY_{i}]"
            if "\0" in name:
                raise self.error(key, f"has a zero byte in token {i}, {name[:40]!a}")
            if ids.setdefault(name, i) != i:
                raise self.error(key, f"has the token {name[:40]!a} twice, at {ids[name]} and {i}")
        return ids

    def token_types(self, tokens: Mapping[str, int]) -> None:
        key = "tokenizer.ggml.token_type"
        self.typed(key, "arr[i32]", required=True)
        kinds: list[int] = self.metadata[key]
        if len(kinds) != len(tokens):
            raise self.error(key, f"has {len(kinds)} items for {len(tokens)} tokens")
        if min(kinds) < 0 or max(kinds) > BYTE:
            raise self.error(key, f"has the value {min(kinds) if min(kinds) < 0 else max(kinds)}; 0 to 6 are known")
        for i, kind in enumerate(kinds):
            text = self.metadata["tokenizer.ggml.tokens"][i] if kind == BYTE else ""
            if kind == BYTE and text not in BYTE_TOKENS:
                raise self.error(key, f"calls token {i}, {text[:40]!a}, a byte; bytes are <0x00> to <0xFF>")

    def merges(self, required: bool) -> None:
        key = "tokenizer.ggml.merges"
        self.typed(key, "arr[str]", required)
        for i, merge in enumerate(self.metadata.get(key, ())):
            left, space, right = merge.partition(" ")
            if not (left and space and right) or "\0" in merge:
                raise self.error(
                    key, f"has the item {merge[:40]!a} at {i}; two tokens with a space between are accepted"
                )

    def scores(self, n: int, required: bool) -> None:
        key = "tokenizer.ggml.scores"
        kind = "arr[i32]" if self.types.get(key) == "arr[i32]" else "arr[f32]"
        self.typed(key, kind, required)
        if key in self.metadata and len(self.metadata[key]) != n:
            raise self.error(key, f"has {len(self.metadata[key])} items for {n} tokens")
        if not all(map(math.isfinite, self.metadata.get(key, ()))):
            raise self.error(key, "has a value that is no number")

    def bytes_of_bpe(self, tokens: Mapping[str, int]) -> None:
        """Text whose bytes are not in the vocabulary would be dropped without a word."""
        missing = [byte for byte, text in enumerate(byte_alphabet()) if text not in tokens]
        if missing:
            raise self.error(
                "tokenizer.ggml.tokens", f"has no token for the byte 0x{missing[0]:02X}, of {len(missing)}"
            )

    def bytes_of_sentencepiece(self, tokens: Mapping[str, int]) -> None:
        """llama.cpp throws through its C interface, and so ends the process, on text with a byte that is missing."""
        missing = sorted(text for text in BYTE_TOKENS if text not in tokens)
        if missing:
            raise self.error("tokenizer.ggml.tokens", f"lacks the byte token {missing[0]}, of {len(missing)}")

    def name(self, tokens: Mapping[str, int]) -> None:
        """llama.cpp gives the special tokens of a model that is *named* Phi 3 other rules, and needs these to do so."""
        name = self.metadata.get("general.name", "")
        if is_named_phi3(self.metadata):
            missing = [text for text in PHI3_TOKENS if text not in tokens]
            if missing:
                raise self.error(
                    "general.name", f"is {name[:40]!a}, but the vocabulary has no {missing[0]}, as Phi 3's has"
                )

    def space_prefix(self) -> str:
        self.typed(SPACE_PREFIX_KEY, "str")
        self.typed(STRIP_SPACE_KEY, "bool")
        if self.metadata["tokenizer.ggml.model"] != "llama":
            return "never"
        added = self.metadata.get("tokenizer.ggml.add_space_prefix", True)
        prefix: str = self.metadata.get(SPACE_PREFIX_KEY, "prepend" if added else "never")
        if prefix not in SPACE_PREFIXES:
            raise self.error(SPACE_PREFIX_KEY, f"is {prefix[:40]!a}; accepted: {', '.join(SPACE_PREFIXES)}")
        return prefix

    def token_set(self, key: str, n: int) -> frozenset[int]:
        self.typed(key, "arr[u32]")
        ids: list[int] = self.metadata.get(key, [])
        if max(ids, default=0) >= n:
            raise self.error(key, f"has the token {max(ids)}, but the vocabulary has {n} tokens")
        return frozenset(ids)

    def pre_tokenizer(self, model: str) -> str:
        key = "tokenizer.ggml.pre"
        pre: str = self.metadata.get(key, "default")
        if model == "gpt2" and pre not in (*LLAMA3_PRE, QWEN2_PRE):
            raise self.error(key, f"is {pre[:40]!a}; supported are llama-bpe (Llama 3) and {QWEN2_PRE}")
        return pre

    def special_ids(self, n: int, add_bos: bool) -> dict[str, int]:
        """Special token ids by name. EOS must be there: in place of one llama.cpp takes 11, Llama 3's comma. So must
        BOS, but where no text begins with one, llama.cpp asks for it nowhere."""
        ids = {}
        for name in _SPECIAL_IDS:
            key = f"tokenizer.ggml.{name}_token_id"
            self.typed(key, "u32", required=name == "eos" or (name == "bos" and add_bos))
            if key in self.metadata:
                if self.metadata[key] >= n:
                    raise self.error(key, f"is {self.metadata[key]}, but the vocabulary has {n} tokens")
                ids[name] = self.metadata[key]
        return ids


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes as, by byte.

    Printable characters of Latin-1 stand for themselves, the others for 256 and up in turn: `bytes_to_unicode` of
    GPT-2's encoder (github.com/openai/gpt-2, src/encoder.py).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
