"""Checks the vocabulary of a language model's GGUF before llama.cpp reads it.

Knows what `llama_vocab::impl::load` and the tokenizers behind it assume (src/llama-vocab.cpp of llama.cpp in
llama-cpp-python 0.3.36): it aborts on repeated tokens, and on text for which a SentencePiece vocabulary has no byte; it
goes on with wrong ids, a guessed pre-tokenizer or dropped text in other cases. Knows our own keys as well, which say
what GGUF has no key for. Does not know the model's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from local_llava.default_chats import default_chat
from local_llava.errors import ModelFileError
from local_llava.gguf_file import GGUFFile

LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
"""Names that llama.cpp has for Llama-3's pre-tokenizer."""

END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn of a chat, by text: Llama 3, ChatML, Phi 3, Gemma."""

_LLAMA3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

_TYPES = {
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

_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocab:
    """What the rest of local-llava needs to know of a vocabulary that passed."""

    n_vocab: int
    model: str
    """"gpt2" (byte-level BPE) or "llama" (SentencePiece)."""
    bos: int
    eos: int
    eot: int | None
    """End of a chat's turn, where the vocabulary has one."""
    add_bos: bool
    chat_template: str | None
    """The file's, or the one that models of its kind were trained with."""
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
    overrides: Mapping[str, str | int] = field(default_factory=dict)
    """Metadata to give llama.cpp in place of what the file lacks (`kv_overrides`)."""


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
    for key, kind in _TYPES.items():
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
    overrides: dict[str, str | int] = checks.pre_tokenizer(tokens) if model == "gpt2" else {}
    ids = checks.special_ids(len(tokens))
    bos, eos = ids["tokenizer.ggml.bos_token_id"], ids["tokenizer.ggml.eos_token_id"]
    eot = ids.get("tokenizer.ggml.eot_token_id")
    if eot is None:
        # Files of before mid-2024 name no end of turn; without it the model never stops talking.
        eot = next((tokens[text] for text in END_OF_TURN if text in tokens), None)
        if eot is not None:
            overrides["tokenizer.ggml.eot_token_id"] = eot
    return Vocab(
        n_vocab=len(tokens),
        model=model,
        bos=bos,
        eos=eos,
        eot=eot,
        add_bos=gguf.metadata.get("tokenizer.ggml.add_bos_token", True),
        chat_template=gguf.metadata.get("tokenizer.chat_template", default_chat(model, tokens)),
        space_prefix=checks.space_prefix(),
        strip_space=gguf.metadata.get(STRIP_SPACE_KEY, adds_space(checks.space_prefix())),
        lstrip=checks.token_set(LSTRIP_KEY, len(tokens)),
        rstrip=checks.token_set(RSTRIP_KEY, len(tokens)) or checks.rstrip_of_phi3(tokens),
        normalized=checks.token_set(NORMALIZED_KEY, len(tokens)),
        overrides=overrides,
    )


def adds_space(space_prefix: str) -> bool:
    """Whether one of `SPACE_PREFIXES` puts a space anywhere."""
    return space_prefix not in ("replace", "never")


def is_mark(text: str) -> bool:
    """Whether a user-defined token looks like one that only a chat template may write; some are runs of spaces."""
    return text[:1] + text[-1:] in ("<>", "[]") and len(text) > 2


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
        if self.is_named_phi3():
            missing = [text for text in _PHI3_TOKENS if text not in tokens]
            if missing:
                raise self.error(
                    "general.name", f"is {name[:40]!a}, but the vocabulary has no {missing[0]}, as Phi 3's has"
                )

    def is_named_phi3(self) -> bool:
        return any(part in self.metadata.get("general.name", "").lower() for part in ("phi-3", "phi3"))

    def rstrip_of_phi3(self, tokens: Mapping[str, int]) -> frozenset[int]:
        """Tokens that swallow the white space after them in a Phi 3, by llama.cpp's rule: GGUF has no key for it."""
        if not self.is_named_phi3():
            return frozenset()
        kinds = self.metadata["tokenizer.ggml.token_type"]
        plain = {tokens[text] for text in _PHI3_TOKENS if text != "</s>"}
        marks = {i for text, i in tokens.items() if kinds[i] == CONTROL or (kinds[i] == USER_DEFINED and is_mark(text))}
        return frozenset(marks - plain)

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

    def pre_tokenizer(self, tokens: Mapping[str, int]) -> dict[str, str | int]:
        key = "tokenizer.ggml.pre"
        pre = self.metadata.get(key, "default")
        if pre in LLAMA3_PRE:
            return {}
        if pre == "default" and all(mark in tokens for mark in _LLAMA3_MARKS):
            # Files of before May 2024 do not name it, and llama.cpp then splits text like none of its models does.
            return {key: LLAMA3_PRE[0]}
        raise self.error(key, f"is {pre[:40]!a}; supported is llama-bpe (Llama 3)")

    def special_ids(self, n: int) -> dict[str, int]:
        """Special token ids by key. BOS and EOS must be there: in place of one llama.cpp takes 11, Llama 3's comma."""
        ids = {}
        for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask"):
            key = f"tokenizer.ggml.{name}_token_id"
            self.typed(key, "u32", required=name in ("bos", "eos"))
            if key in self.metadata:
                if self.metadata[key] >= n:
                    raise self.error(key, f"is {self.metadata[key]}, but the vocabulary has {n} tokens")
                ids[key] = self.metadata[key]
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
