"""Checks a language model's GGUF before llama.cpp loads it.

Knows which hyperparameters and tensors llama.cpp's `llama` architecture needs (src/llama-model.cpp and
src/models/llama.cpp of llama-cpp-python 0.3.36), and on which values it aborts the process, loads something else than
was meant, or fails without saying why. The vocabulary is `llm_vocab`'s, the container `gguf_file`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_llava.errors import ModelFileError
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.llm_vocab import Vocab, check_vocab

ARCHITECTURES = ("llama",)

WEIGHT_TYPES = frozenset(
    number for number, traits in TYPES.items() if traits.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)
"""Types that ggml's CPU backend can look up rows in and multiply with. The others are of activations or indices."""
_F32 = frozenset({0})

_MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS; more abort."""

_NUMBERS: dict[str, tuple[str, bool, float, float]] = {
    # key after "llama." -> type, required, lowest, highest
    "context_length": ("u32", True, 1, 1 << 27),
    "embedding_length": ("u32", True, 1, 1 << 17),
    "block_count": ("u32", True, 1, _MAX_LAYERS),
    "feed_forward_length": ("u32", True, 1, 1 << 20),
    "attention.head_count": ("u32", True, 1, 1 << 10),
    "attention.head_count_kv": ("u32", False, 1, 1 << 10),
    "attention.key_length": ("u32", False, 2, 1 << 12),
    "attention.value_length": ("u32", False, 2, 1 << 12),
    "attention.layer_norm_rms_epsilon": ("f32", True, 1e-13, 1),
    "rope.dimension_count": ("u32", False, 2, 1 << 12),
    "rope.freq_base": ("f32", False, 1, 1e12),
    "rope.scaling.factor": ("f32", False, 0, 1e6),
    "rope.scale_linear": ("f32", False, 0, 1e6),
    "rope.scaling.attn_factor": ("f32", False, 1e-6, 1e6),
    "rope.scaling.alpha": ("f32", False, 0, 1e6),
    "rope.scaling.original_context_length": ("u32", False, 1, 1 << 27),
}

_ONLY: dict[str, tuple[str, object, str]] = {
    # Whole key -> type, the one value accepted where the key is there, what any other would mean.
    "general.type": ("str", "model", "it is no model"),
    "split.count": ("u16", 1, "it is one part of a split model; join the parts with llama-gguf-split --merge"),
    "llama.attention.causal": ("bool", True, "it reads text in both directions and cannot generate"),
    "llama.pooling_type": ("u32", 0, "it is an embedding model and cannot generate"),
    "llama.expert_count": ("u32", 0, "mixtures of experts are not supported"),
    "llama.expert_used_count": ("u32", 0, "mixtures of experts are not supported"),
    "llama.expert_group_count": ("u32", 0, "mixtures of experts are not supported"),
    "llama.expert_group_used_count": ("u32", 0, "mixtures of experts are not supported"),
    "llama.nextn_predict_layers": ("u32", 0, "multi-token prediction is not supported"),
}

_OTHER_TYPES = {
    "general.file_type": "u32",
    "llama.vocab_size": "u32",
    "llama.embedding_length_out": "u32",
    "llama.rope.scaling.type": "str",
    "llama.rope.scaling.finetuned": "bool",
}


@dataclass(frozen=True)
class LLMConfig:
    """What the rest of local-llava needs to know of a language model that passed."""

    path: Path
    n_embd: int
    """Width of the embeddings, which the projector's output must have."""
    n_layer: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    """Width of a head."""
    n_ff: int
    n_ctx_train: int
    """Longest context the model was trained for, tokens."""
    tied: bool
    """Whether the output matrix is the embedding's."""
    vocab: Vocab

    @property
    def n_vocab(self) -> int:
        return self.vocab.n_vocab

    @property
    def overrides(self) -> Mapping[str, str | int]:
        """Metadata to load the file with (`kv_overrides` of llama_cpp), where it lacks some."""
        return self.vocab.overrides


def check_llm(gguf: GGUFFile) -> LLMConfig:
    """Check that llama.cpp will load a GGUF as a language model that can be asked.

    Args:
        gguf: The file's header; tensor data is not looked at.

    Returns:
        The model's sizes.

    Raises:
        ModelFileError: One line that names the file, the metadata key or the tensor, and what would be accepted.
    """
    _check_architecture(gguf)
    sizes = _check_numbers(gguf)
    vocab = check_vocab(gguf)
    n_embd, n_head, n_head_kv, n_embd_head = _check_heads(gguf, sizes)
    config = LLMConfig(
        path=gguf.path,
        n_embd=n_embd,
        n_layer=sizes["block_count"],
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=n_embd_head,
        n_ff=sizes["feed_forward_length"],
        n_ctx_train=sizes["context_length"],
        tied="output.weight" not in gguf.tensors,
        vocab=vocab,
    )
    _check_tensors(gguf, config)
    return config


def check_pair(llm: LLMConfig, mmproj: Path, width: int) -> None:
    """Check that a projector's output fits a language model.

    Args:
        llm: The language model.
        mmproj: The other file, for the message.
        width: Length of the image embeddings that it gives.

    Raises:
        ModelFileError: It does not.
    """
    if width != llm.n_embd:
        raise ModelFileError(
            f"{mmproj}: gives image embeddings of width {width}, but {llm.path} takes {llm.n_embd} "
            "(llama.embedding_length): the two files are not of the same model"
        )


def _error(gguf: GGUFFile, what: str, problem: str) -> ModelFileError:
    return ModelFileError(f"{gguf.path}: {what} {problem}")


def _check_type(gguf: GGUFFile, key: str, kind: str, required: bool = False) -> None:
    if key not in gguf.types:
        if required:
            raise _error(gguf, key, f"is missing; a language model has it, as {kind}")
    elif gguf.types[key] != kind:
        raise _error(gguf, key, f"is stored as {gguf.types[key]}; it must be {kind}")


def _check_architecture(gguf: GGUFFile) -> None:
    key = "general.architecture"
    _check_type(gguf, key, "str", required=True)
    architecture = gguf.metadata[key]
    if architecture == "clip":
        raise _error(gguf, key, "is clip: this is the mmproj; give the language model's GGUF as the model")
    if architecture not in ARCHITECTURES:
        raise _error(gguf, key, f"is {architecture[:40]!a}; supported: {', '.join(ARCHITECTURES)}")
    for key, (kind, accepted, meaning) in _ONLY.items():
        _check_type(gguf, key, kind)
        if gguf.metadata.get(key, accepted) != accepted:
            raise _error(gguf, key, f"is {gguf.metadata[key]!a:.80}: {meaning}")
    for key, kind in _OTHER_TYPES.items():
        _check_type(gguf, key, kind)
    scaling = gguf.metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise _error(gguf, "llama.rope.scaling.type", f"is {scaling[:40]!a}; supported: none, linear, yarn")


def _check_numbers(gguf: GGUFFile) -> dict[str, Any]:
    """Values of `_NUMBERS` that the file has, by the key without "llama."."""
    values = {}
    for name, (kind, required, low, high) in _NUMBERS.items():
        key = f"llama.{name}"
        _check_type(gguf, key, kind, required)
        if key not in gguf.metadata:
            continue
        value = gguf.metadata[key]
        if not math.isfinite(value) or not low <= value <= high:
            raise _error(gguf, key, f"is {value:g}; it must be {low:g} to {high:g}")
        values[name] = value
    return values


def _check_heads(gguf: GGUFFile, sizes: dict[str, Any]) -> tuple[int, int, int, int]:
    """Width, heads, KV heads, width of a head."""
    n_embd, n_head = sizes["embedding_length"], sizes["attention.head_count"]
    n_head_kv = sizes.get("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise _error(gguf, "llama.attention.head_count_kv", f"is {n_head_kv}; it must divide head_count, {n_head}")
    if "attention.key_length" not in sizes and n_embd % n_head:
        raise _error(gguf, "llama.attention.head_count", f"is {n_head}; it must divide embedding_length, {n_embd}")
    n_embd_head = sizes.get("attention.key_length", n_embd // n_head)
    for name in ("attention.value_length", "rope.dimension_count"):
        default = n_embd_head if name.startswith("rope") else n_embd // n_head
        if sizes.get(name, default) != n_embd_head:
            raise _error(
                gguf, f"llama.{name}", f"is {sizes.get(name, default)}; a head's width, {n_embd_head}, is needed"
            )
    if n_embd_head % 2:
        raise _error(gguf, "llama.attention.head_count", f"gives heads of width {n_embd_head}; it must be even")
    if gguf.metadata.get("llama.embedding_length_out", n_embd) != n_embd:
        raise _error(gguf, "llama.embedding_length_out", f"must equal embedding_length, {n_embd}")
    return n_embd, n_head, n_head_kv, n_embd_head


def _expected(config: LLMConfig) -> dict[str, tuple[tuple[int, ...], bool, frozenset[int]]]:
    """Every tensor that may be there: shape in numpy's order, whether it must be, types."""
    e, q, kv, ff = (
        config.n_embd,
        config.n_head * config.n_embd_head,
        config.n_head_kv * config.n_embd_head,
        config.n_ff,
    )
    tensors: dict[str, tuple[tuple[int, ...], bool, frozenset[int]]] = {
        "token_embd.weight": ((config.n_vocab, e), True, WEIGHT_TYPES),
        "output_norm.weight": ((e,), True, _F32),
        "output.weight": ((config.n_vocab, e), False, WEIGHT_TYPES),
        "rope_freqs.weight": ((config.n_embd_head // 2,), False, _F32),
    }
    matrices = {"attn_q": (q, e), "attn_k": (kv, e), "attn_v": (kv, e), "attn_output": (e, q)}
    matrices |= {"ffn_gate": (ff, e), "ffn_up": (ff, e), "ffn_down": (e, ff)}
    for i in range(config.n_layer):
        for name, shape in matrices.items():
            tensors[f"blk.{i}.{name}.weight"] = (shape, True, WEIGHT_TYPES)
            tensors[f"blk.{i}.{name}.bias"] = (shape[:1], False, _F32)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = ((e,), True, _F32)
    return tensors


def _check_tensors(gguf: GGUFFile, config: LLMConfig) -> None:
    expected = _expected(config)
    for name, (shape, required, kinds) in expected.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            if required:
                raise _error(gguf, f"tensor {name}", f"is missing; its shape is {list(shape)}")
            continue
        # Trailing dimensions of 1 in ggml's order are leading ones here.
        if tensor.shape[-len(shape) :] != shape or math.prod(tensor.shape) != math.prod(shape):
            raise _error(gguf, f"tensor {name}", f"has the shape {list(tensor.shape)}; it must be {list(shape)}")
        if tensor.type not in kinds:
            accepted = "F32" if kinds is _F32 else "floating-point and quantized types for weights"
            raise _error(gguf, f"tensor {name}", f"is {TYPES[tensor.type].name}; accepted: {accepted}")
    for name in gguf.tensors:
        if name not in expected:
            raise _error(gguf, f"tensor {name!a}", f"is not part of a llama model of {config.n_layer} layers")
