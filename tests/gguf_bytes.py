"""Writes small GGUF files byte by byte, wrong ones included, and a tiny language model to change."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from local_llava.llm_vocab import byte_alphabet

CODES = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "str": (8, ""),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}

Entry = tuple[str, str, Any]
"""Key, type as `GGUFFile.types` gives it, value."""


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: str, value: Any) -> bytes:
    name = kind.removeprefix("arr[").removesuffix("]")
    number, code = CODES[name]
    items = value if kind.startswith("arr") else [value]
    body = b"".join(text(v) if name == "str" else struct.pack("<" + code, v) for v in items)
    head = struct.pack("<IIQ", 9, number, len(items)) if kind.startswith("arr") else struct.pack("<I", number)
    return text(key) + head + body


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file is to state it, right or wrong."""

    name: str
    ne: Sequence[int]
    data: bytes = b""
    type: int = 0
    offset: int | None = None


def header(version: int = 3, n_tensors: int = 0, n_entries: int = 0, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_entries)


def gguf(entries: Iterable[Entry | bytes] = (), tensors: Iterable[Tensor] = (), alignment: int = 32) -> bytes:
    """A whole file; an entry given as bytes is written as it is."""
    entries, tensors = list(entries), list(tensors)
    out = header(n_tensors=len(tensors), n_entries=len(entries))
    out += b"".join(e if isinstance(e, bytes) else entry(*e) for e in entries)
    data = b""
    for t in tensors:
        offset = len(data) if t.offset is None else t.offset
        out += text(t.name) + struct.pack(f"<I{len(t.ne)}QIQ", len(t.ne), *t.ne, t.type, offset)
        data += t.data + bytes(-len(t.data) % alignment)
    if tensors:
        out += bytes(-len(out) % alignment)
    return out + data


@dataclass
class TinyLLM:
    """A language model of 2 layers with random weights, that llama.cpp loads and runs; change it, then take `bytes`."""

    n_embd: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 96
    weight_type: int = 0
    tied: bool = False
    entries: dict[str, tuple[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokens = [*byte_alphabet(), "he", "ll", "hell", *specials, "[PAD0]"]
        n = len(tokens)
        self.entries = {
            "general.architecture": ("str", "llama"),
            "general.name": ("str", "tiny"),
            "llama.context_length": ("u32", 256),
            "llama.embedding_length": ("u32", self.n_embd),
            "llama.block_count": ("u32", self.n_layer),
            "llama.feed_forward_length": ("u32", self.n_ff),
            "llama.attention.head_count": ("u32", self.n_head),
            "llama.attention.head_count_kv": ("u32", self.n_head_kv),
            "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
            "llama.rope.dimension_count": ("u32", self.n_embd // self.n_head),
            "llama.rope.freq_base": ("f32", 500000.0),
            "tokenizer.ggml.model": ("str", "gpt2"),
            "tokenizer.ggml.pre": ("str", "llama-bpe"),
            "tokenizer.ggml.tokens": ("arr[str]", tokens),
            "tokenizer.ggml.token_type": ("arr[i32]", [1] * 259 + [3] * 5 + [5]),
            "tokenizer.ggml.merges": ("arr[str]", ["h e", "l l", "he ll"]),
            "tokenizer.ggml.bos_token_id": ("u32", 259),
            "tokenizer.ggml.eos_token_id": ("u32", 260),
            "tokenizer.ggml.eot_token_id": ("u32", 263),
            "tokenizer.ggml.add_bos_token": ("bool", True),
        }
        e, kv = self.n_embd, self.n_head_kv * (self.n_embd // self.n_head)
        self.add("token_embd.weight", n, e)
        for i in range(self.n_layer):
            shapes = {"attn_q": (e, e), "attn_k": (kv, e), "attn_v": (kv, e), "attn_output": (e, e)}
            shapes |= {"ffn_gate": (self.n_ff, e), "ffn_up": (self.n_ff, e), "ffn_down": (e, self.n_ff)}
            for name, shape in shapes.items():
                self.add(f"blk.{i}.{name}.weight", *shape)
            self.add(f"blk.{i}.attn_norm.weight", e)
            self.add(f"blk.{i}.ffn_norm.weight", e)
        self.add("output_norm.weight", e)
        if not self.tied:
            self.add("output.weight", n, e)

    def add(self, name: str, *shape: int, type: int | None = None) -> None:
        """Put a tensor of random values, in numpy's order; `type` 0 is F32, 1 F16."""
        kind = type if type is not None else self.weight_type if len(shape) > 1 else 0
        values = np.random.default_rng(len(self.tensors)).normal(0, 0.05, shape).astype("<f4" if kind == 0 else "<f2")
        self.tensors[name] = Tensor(name, shape[::-1], values.tobytes(), kind)

    @property
    def bytes(self) -> bytes:
        return gguf([(key, *value) for key, value in self.entries.items()], self.tensors.values())


def tiny_sentencepiece() -> TinyLLM:
    """A model with a SentencePiece vocabulary."""
    model = TinyLLM()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581he", "he", "e", "h", "l", "o"]
    model.entries |= {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.pre": ("str", "default"),
        "tokenizer.ggml.tokens": ("arr[str]", tokens),
        "tokenizer.ggml.scores": ("arr[f32]", [0.0] * 259 + [-1.0] * 6),
        "tokenizer.ggml.token_type": ("arr[i32]", [2, 3, 3] + [6] * 256 + [1] * 6),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
    }
    for key in ("tokenizer.ggml.merges", "tokenizer.ggml.eot_token_id"):
        del model.entries[key]
    return model
