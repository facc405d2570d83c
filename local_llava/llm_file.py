"""Checks a language model's GGUF before llama.cpp loads it.

Knows which hyperparameters and tensors llama.cpp's architectures `llama`, `phi3` and `qwen2` need (src/llama-model.cpp
and src/models/ of llama-cpp-python 0.3.36), and on which values it aborts the process, loads something else than was
meant, or fails without saying why. The vocabulary is `llm_vocab`'s, the container `gguf_file`'s.
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


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's models of one kind differ in."""

    matrices: Mapping[str, tuple[str, str]]
    """Matrices of a layer: rows and columns, by what `_sizes` calls them."""
    biases: tuple[str, ...]
    """Matrices that may have one."""
    scalings: tuple[str, ...]
    """Kinds of `rope.scaling.type`."""
    output_bias: bool = False
    rope_freqs: bool = False
    """Whether frequencies may be divided by a tensor, as in Llama 3.1."""
    long_rope: bool = False
    """Whether they may be by one of two, of which llama.cpp takes the second for contexts longer than the original."""
    any_width: bool = False
    """Whether all heads together may be wider or narrower than the model."""
    any_rotation: bool = False
    """Whether a part of each head may stay as it is."""
    ignored_window: bool = False
    """Whether llama.cpp reads `attention.sliding_window`, and then attends to all of the context."""


_FEED_FORWARD = {"ffn_gate": ("ff", "embd"), "ffn_up": ("ff", "embd"), "ffn_down": ("embd", "ff")}
_LLAMA = {
    "attn_q": ("q", "embd"),
    "attn_k": ("kv", "embd"),
    "attn_v": ("kv", "embd"),
    "attn_output": ("embd", "q"),
    **_FEED_FORWARD,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_LLAMA, tuple(_LLAMA), ("none", "linear", "yarn"), rope_freqs=True, any_width=True),
    "phi3": Architecture(
        {
            "attn_qkv": ("qkv", "embd"),
            "attn_output": ("embd", "q"),
            "ffn_up": ("gate and up", "embd"),
            "ffn_down": ("embd", "ff"),
        },
        ("attn_qkv",),
        ("none", "linear", "longrope"),
        long_rope=True,
        any_rotation=True,
        ignored_window=True,
    ),
    "qwen2": Architecture(_LLAMA, ("attn_q", "attn_k", "attn_v"), ("none", "linear", "yarn"), output_bias=True),
}
"""By the name in `general.architecture`."""

WEIGHT_TYPES = frozenset(
    number for number, traits in TYPES.items() if traits.name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)
"""Types that ggml's CPU backend can look up rows in and multiply with. The others are of activations or indices."""
_F32 = frozenset({0})

_MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS; more abort."""

NUMBERS: dict[str, tuple[str, bool, float, float]] = {
    # key after the architecture -> type, required, lowest, highest
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
    "attention.sliding_window": ("u32", False, 0, (1 << 32) - 1),
}

_ONLY: dict[str, tuple[str, object, str]] = {
    # Key -> type, the one value accepted where the key is there, what any other would mean. Of those that begin with a
    # dot, the architecture comes before it.
    "general.type": ("str", "model", "it is no model"),
    "split.count": ("u16", 1, "it is one part of a split model; join the parts with llama-gguf-split --merge"),
    ".attention.causal": ("bool", True, "it reads text in both directions and cannot generate"),
    ".pooling_type": ("u32", 0, "it is an embedding model and cannot generate"),
    ".expert_count": ("u32", 0, "mixtures of experts are not supported"),
    ".expert_used_count": ("u32", 0, "mixtures of experts are not supported"),
    ".expert_group_count": ("u32", 0, "mixtures of experts are not supported"),
    ".expert_group_used_count": ("u32", 0, "mixtures of experts are not supported"),
    ".nextn_predict_layers": ("u32", 0, "multi-token prediction is not supported"),
}

_OTHER_TYPES = {
    "general.file_type": "u32",
    ".vocab_size": "u32",
    ".embedding_length_out": "u32",
    ".rope.scaling.type": "str",
    ".rope.scaling.finetuned": "bool",
}

_CELLS = 256
"""llama.cpp rounds a context up to a multiple of this many tokens."""


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
    """Longest context the model was trained for and llama.cpp computes as it was, tokens."""
    tied: bool
    """Whether the output matrix is the embedding's."""
    vocab: Vocab
    architecture: str = "llama"
    """One of `ARCHITECTURES`."""
    n_rot: int = 0
    """Dimensions of a head that are rotated."""

    @property
    def n_vocab(self) -> int:
        return self.vocab.n_vocab

    @property
    def overrides(self) -> Mapping[str, str | int]:
        """Metadata to load the file with (`kv_overrides` of llama_cpp), where it lacks some."""
        return self.vocab.overrides


def quant_of(gguf: GGUFFile) -> str:
    """The type that a language model says it has; "" where it does not say."""
    from gguf import LlamaFileType

    number = gguf.metadata.get("general.file_type")
    if not isinstance(number, int) or number not in list(LlamaFileType):
        return ""
    return LlamaFileType(number).name.partition("_")[2]  # MOSTLY_Q4_K_M, ALL_F32


def check_llm(gguf: GGUFFile) -> LLMConfig:
    """Check that llama.cpp will load a GGUF as a language model that can be asked.

    Args:
        gguf: The file's header; tensor data is not looked at.

    Returns:
        The model's sizes.

    Raises:
        ModelFileError: One line that names the file, the metadata key or the tensor, and what would be accepted.
    """
    name = _check_architecture(gguf)
    sizes = _check_numbers(gguf, name)
    vocab = check_vocab(gguf)
    n_embd, n_head, n_head_kv, n_embd_head = _check_heads(gguf, name, sizes)
    config = LLMConfig(
        path=gguf.path,
        n_embd=n_embd,
        n_layer=sizes["block_count"],
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head=n_embd_head,
        n_ff=sizes["feed_forward_length"],
        n_ctx_train=_n_ctx(gguf, name, sizes),
        tied="output.weight" not in gguf.tensors,
        vocab=vocab,
        architecture=name,
        n_rot=sizes.get("rope.dimension_count", n_embd_head),
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
            f"({llm.architecture}.embedding_length): the two files are not of the same model"
        )


def _error(gguf: GGUFFile, what: str, problem: str) -> ModelFileError:
    return ModelFileError(f"{gguf.path}: {what} {problem}")


def _check_type(gguf: GGUFFile, key: str, kind: str, required: bool = False) -> None:
    if key not in gguf.types:
        if required:
            raise _error(gguf, key, f"is missing; a language model has it, as {kind}")
    elif gguf.types[key] != kind:
        raise _error(gguf, key, f"is stored as {gguf.types[key]}; it must be {kind}")


def _check_architecture(gguf: GGUFFile) -> str:
    key = "general.architecture"
    _check_type(gguf, key, "str", required=True)
    name: str = gguf.metadata[key]
    if name == "clip":
        raise _error(gguf, key, "is clip: this is the mmproj; give the language model's GGUF as the model")
    if name not in ARCHITECTURES:
        raise _error(gguf, key, f"is {name[:40]!a}; supported: {', '.join(ARCHITECTURES)}")
    for key, (kind, accepted, meaning) in _ONLY.items():
        key = name + key if key.startswith(".") else key
        _check_type(gguf, key, kind)
        if gguf.metadata.get(key, accepted) != accepted:
            raise _error(gguf, key, f"is {gguf.metadata[key]!a:.80}: {meaning}")
    for key, kind in _OTHER_TYPES.items():
        _check_type(gguf, name + key if key.startswith(".") else key, kind)
    scaling, known = gguf.metadata.get(f"{name}.rope.scaling.type", "none"), ARCHITECTURES[name].scalings
    if scaling not in known:
        raise _error(gguf, f"{name}.rope.scaling.type", f"is {scaling[:40]!a}; supported: {', '.join(known)}")
    return name


def _check_numbers(gguf: GGUFFile, architecture: str) -> dict[str, Any]:
    """Values of `NUMBERS` that the file has, by the key without the architecture."""
    values = {}
    for name, (kind, required, low, high) in NUMBERS.items():
        key = f"{architecture}.{name}"
        _check_type(gguf, key, kind, required)
        if key not in gguf.metadata:
            continue
        value = gguf.metadata[key]
        if not math.isfinite(value) or not low <= value <= high:
            raise _error(gguf, key, f"is {value:g}; it must be {low:g} to {high:g}")
        values[name] = value
    return values


def _check_heads(gguf: GGUFFile, architecture: str, sizes: dict[str, Any]) -> tuple[int, int, int, int]:
    """Width, heads, KV heads, width of a head."""
    kind = ARCHITECTURES[architecture]
    n_embd, n_head = sizes["embedding_length"], sizes["attention.head_count"]
    n_head_kv = sizes.get("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise _error(
            gguf, f"{architecture}.attention.head_count_kv", f"is {n_head_kv}; it must divide head_count, {n_head}"
        )
    if ("attention.key_length" not in sizes or not kind.any_width) and n_embd % n_head:
        raise _error(
            gguf, f"{architecture}.attention.head_count", f"is {n_head}; it must divide embedding_length, {n_embd}"
        )
    n_embd_head = sizes.get("attention.key_length", n_embd // n_head)
    if not kind.any_width and n_embd_head != n_embd // n_head:
        raise _error(
            gguf, f"{architecture}.attention.key_length", f"is {n_embd_head}; {n_head} heads must make {n_embd}"
        )
    n_rot = sizes.get("rope.dimension_count", n_embd_head)
    if kind.any_rotation and (n_rot > n_embd_head or n_rot % 2):
        problem = f"is {n_rot}; an even number of at most a head's width, {n_embd_head}, is needed"
        raise _error(gguf, f"{architecture}.rope.dimension_count", problem)
    for name in ("attention.value_length", "rope.dimension_count")[: 1 if kind.any_rotation else 2]:
        default = n_embd_head if name.startswith("rope") else n_embd // n_head
        if sizes.get(name, default) != n_embd_head:
            problem = f"is {sizes.get(name, default)}; a head's width, {n_embd_head}, is needed"
            raise _error(gguf, f"{architecture}.{name}", problem)
    if n_embd_head % 2:
        problem = f"gives heads of width {n_embd_head}; it must be even"
        raise _error(gguf, f"{architecture}.attention.head_count", problem)
    if gguf.metadata.get(f"{architecture}.embedding_length_out", n_embd) != n_embd:
        raise _error(gguf, f"{architecture}.embedding_length_out", f"must equal embedding_length, {n_embd}")
    return n_embd, n_head, n_head_kv, n_embd_head


def _n_ctx(gguf: GGUFFile, architecture: str, sizes: dict[str, Any]) -> int:
    """The file's context length, or less where llama.cpp computes longer ones otherwise than the model was trained.

    llama.cpp's phi3 has no sliding window. With two sets of factors it takes the long ones by the size of the context,
    which it rounds up, and for short texts, too.
    """
    n_ctx: int = sizes["context_length"]
    kind = ARCHITECTURES[architecture]
    window = sizes.get("attention.sliding_window", 0) if kind.ignored_window else 0
    if window:
        n_ctx = min(n_ctx, window)
    if kind.long_rope and "rope_factors_long.weight" in gguf.tensors:
        original = sizes.get("rope.scaling.original_context_length", n_ctx)
        if original < _CELLS:
            key = f"{architecture}.rope.scaling.original_context_length"
            raise _error(gguf, key, f"is {original}; with rope_factors_long.weight it must be {_CELLS} or more")
        n_ctx = min(n_ctx, original // _CELLS * _CELLS)
    return n_ctx


def _sizes(config: LLMConfig) -> dict[str, int]:
    """Rows and columns by their names in `Architecture.matrices`."""
    q, kv = config.n_head * config.n_embd_head, config.n_head_kv * config.n_embd_head
    ff = config.n_ff
    return {"embd": config.n_embd, "q": q, "kv": kv, "qkv": q + 2 * kv, "ff": ff, "gate and up": 2 * ff}


def _expected(gguf: GGUFFile, config: LLMConfig) -> dict[str, tuple[tuple[int, ...], bool, frozenset[int]]]:
    """Every tensor that may be there: shape in numpy's order, whether it must be, types."""
    kind, e = ARCHITECTURES[config.architecture], config.n_embd
    sizes = _sizes(config)
    tensors: dict[str, tuple[tuple[int, ...], bool, frozenset[int]]] = {
        "token_embd.weight": ((config.n_vocab, e), True, WEIGHT_TYPES),
        "output_norm.weight": ((e,), True, _F32),
        "output.weight": ((config.n_vocab, e), False, WEIGHT_TYPES),
    }
    if kind.output_bias:
        tensors["output.bias"] = ((config.n_vocab,), False, _F32)
    if kind.rope_freqs:
        tensors["rope_freqs.weight"] = ((config.n_rot // 2,), False, _F32)
    factors = ("rope_factors_long.weight", "rope_factors_short.weight")
    for name in factors if kind.long_rope else ():
        # With one of them llama.cpp would take none for the contexts of the other.
        tensors[name] = ((config.n_rot // 2,), any(n in gguf.tensors for n in factors), _F32)
    for i in range(config.n_layer):
        for name, shape in kind.matrices.items():
            rows, columns = (sizes[size] for size in shape)
            tensors[f"blk.{i}.{name}.weight"] = ((rows, columns), True, WEIGHT_TYPES)
            if name in kind.biases:
                tensors[f"blk.{i}.{name}.bias"] = ((rows,), False, _F32)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = ((e,), True, _F32)
    return tensors


def _check_tensors(gguf: GGUFFile, config: LLMConfig) -> None:
    expected = _expected(gguf, config)
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
            raise _error(
                gguf, f"tensor {name!a}", f"is not part of a {config.architecture} model of {config.n_layer} layers"
            )
