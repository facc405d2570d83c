"""Quantization types and mixes: which type every tensor gets, and how rows of it become bytes.

Knows llama.cpp's choices for the Llama architecture (src/llama-quant.cpp of the version pinned in pyproject.toml), what
its CLIP loader needs, and what a type cannot hold. Does not know where tensors come from (`checkpoint`, `families`) or
where their bytes go (`write`); the arithmetic is ggml's own.

A new LLM type is a row in `LLM_MIXES`, with a row in `_FALLBACK` and in `_SCALES` for each tensor type that it brings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType
from numpy.typing import NDArray

from local_llava import ggml
from local_llava.convert.plan import Field, TensorPlan
from local_llava.errors import CheckpointError, UsageError

T = GGMLQuantizationType
NamedShape = tuple[str, tuple[int, ...]]
"""A tensor's name and shape, in numpy's order."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands among those that do the same work in other layers."""

    index: int
    """How many of them come before it."""
    count: int
    """How many of them llama.cpp reckons with."""
    n_gqa: int
    """Query heads for each key and value head."""


def _more_bits(place: Place) -> bool:
    """The first and the last eighth, and every third in between (`use_more_bits` in llama-quant.cpp)."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


Rule = tuple[Callable[[Place], bool], GGMLQuantizationType]
"""The type of the tensors for which the condition holds."""


@dataclass(frozen=True)
class Mix:
    """What a name such as Q4_K_M stands for."""

    base: GGMLQuantizationType
    """The type of every matrix that nothing else speaks for."""
    file_type: LlamaFileType
    """`general.file_type`."""
    rules: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    """By role (see `_ROLES`); the first rule that holds decides."""


LLM_MIXES: Mapping[str, Mix] = {
    "F32": Mix(T.F32, LlamaFileType.ALL_F32),
    "F16": Mix(T.F16, LlamaFileType.MOSTLY_F16),
    "BF16": Mix(T.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": Mix(T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q6_K": Mix(T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "Q4_K_M": Mix(
        T.Q4_K,
        LlamaFileType.MOSTLY_Q4_K_M,
        {"attn_v": [(_more_bits, T.Q6_K)], "ffn_down": [(_more_bits, T.Q6_K)]},
    ),
}

MMPROJ_MIXES: Mapping[str, Mix] = {name: LLM_MIXES[name] for name in ("F32", "F16", "Q8_0")}

# A part of the name -> the role that rules are looked up by.
_ROLES = {"attn_v.weight": "attn_v", "attn_qkv.weight": "attn_v", "ffn_down": "ffn_down"}

# In models with 80 layers and grouped queries attn_v is an eighth of attn_q, so that better types cost next to nothing.
_ATTN_V_OF_70B = {T.Q4_K: T.Q5_K}

# Where rows are not a multiple of the block: first this, and F16 where that does not fit either.
_FALLBACK = {T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0}

# Byte offsets of the float16 scales in a block (the block_* structs in ggml-common.h).
_SCALES = {T.Q8_0: (0,), T.Q5_0: (0,), T.Q5_1: (0, 2), T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,)}

# The smallest magnitude that rounds to infinity: half a step above the largest finite number.
_OVERFLOW = {T.F16: 65520.0, T.BF16: 2.0**127 * (2 - 2.0**-8)}

_IS_FLOAT = (T.F32, T.F16, T.BF16)


def get_mix(name: str, mixes: Mapping[str, Mix]) -> Mix:
    """Looks up what a user typed.

    Args:
        name: A quantization type, as in `mixes`.
        mixes: `LLM_MIXES` or `MMPROJ_MIXES`.

    Raises:
        UsageError: There is no such type; the message lists those that there are.
    """
    if name not in mixes:
        raise UsageError(f"unknown quantization type {name!r}: use one of {', '.join(mixes)}")
    return mixes[name]


def type_fields(mix: Mix) -> tuple[Field, Field]:
    """The metadata that says how a file is quantized, as `llama_model_quantize` writes it for every type."""
    return (
        Field("general.quantization_version", GGML_QUANT_VERSION, GGUFValueType.UINT32),
        Field("general.file_type", int(mix.file_type), GGUFValueType.UINT32),
    )


def llm_types(
    mix: Mix, tensors: Iterable[NamedShape], *, n_layer: int, n_head: int, n_head_kv: int
) -> dict[str, GGMLQuantizationType]:
    """Gives every tensor of a Llama model the type that `llama_model_quantize` gives it, read from an F32 GGUF.

    The order of `tensors` does not matter: llama.cpp sorts them by layer before it counts. Embeddings are tied to the
    output when there is no `output.weight`.

    Args:
        mix: A row of `LLM_MIXES`.
        tensors: Names and shapes of all tensors of the file.
        n_layer: `llama.block_count`.
        n_head: `llama.attention.head_count`.
        n_head_kv: `llama.attention.head_count_kv`.

    Returns:
        Types by tensor name.
    """
    ordered = sorted(tensors, key=lambda tensor: (_layer(tensor[0]), tensor[0]))
    head = next((name for name, _ in ordered if name == "output.weight"), "token_embd.weight")
    counts = Counter(_role(name) for name, _ in ordered)
    counts["ffn_down"] = n_layer
    seen: Counter[str] = Counter()
    types: dict[str, GGMLQuantizationType] = {}
    for name, shape in ordered:
        if not _is_matrix(shape) or not name.endswith("weight") or "_norm.weight" in name:
            types[name] = T.F32
        elif mix.base in _IS_FLOAT:
            types[name] = mix.base
        elif name == head:
            types[name] = _fit(_head_type(mix, shape[-1]), shape[-1])
        else:
            role = _role(name)
            place = Place(seen[role], counts[role], n_head // n_head_kv)
            chosen = next((type for holds, type in mix.rules.get(role, ()) if holds(place)), mix.base)
            if role == "attn_v" and n_layer == 80 and n_head != n_head_kv:
                chosen = _ATTN_V_OF_70B.get(chosen, chosen)
            types[name] = _fit(chosen, shape[-1])
            seen[role] += 1
    return types


def mmproj_types(mix: Mix, tensors: Iterable[NamedShape]) -> dict[str, GGMLQuantizationType]:
    """Gives every tensor of a CLIP tower and projector its type.

    Vectors and the position and class embeddings stay F32: they are small, and ggml adds them as they are. The patch
    embedding is a convolution, whose rows (14 or 16 columns) no block fits: F16 unless everything is F32.

    Args:
        mix: A row of `MMPROJ_MIXES`.
        tensors: Names and shapes of all tensors of the file.

    Returns:
        Types by tensor name.
    """
    types: dict[str, GGMLQuantizationType] = {}
    for name, shape in tensors:
        if not _is_matrix(shape) or ".position_embd" in name or ".class_embd" in name:
            types[name] = T.F32
        elif len(shape) > 2 and mix.base is not T.F32:
            types[name] = T.F16
        else:
            types[name] = _fit(mix.base, shape[-1])
    return types


def encode(tensor: TensorPlan, start: int, stop: int) -> NDArray[np.uint8]:
    """Loads rows of a tensor and gives their bytes in the output file. Safe to call from several threads at once.

    Args:
        tensor: What to load and into which type.
        start: First row.
        stop: Row after the last.

    Returns:
        uint8 `[(stop - start) * row_size]`, for whole rows the bytes that llama.cpp writes.

    Raises:
        CheckpointError: The source holds NaN, infinity or a number that the type cannot hold.
        ValueError: `load` gave another shape than the plan says, or the type's block does not divide the row.
    """
    loaded = tensor.load(start, stop)
    if loaded.shape != (stop - start, tensor.row_length):
        raise ValueError(f"{tensor.name}: rows {start} to {stop} came as {loaded.shape}, length {tensor.row_length}")
    rows = np.ascontiguousarray(loaded, dtype=np.float32)
    _check_values(tensor, rows, start)
    data = encode_rows(tensor.type, rows)
    _check_scales(tensor, rows, data, start)
    return data


def encode_rows(type: GGMLQuantizationType, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Gives the bytes of rows in a type. Rows are independent: any split of a tensor gives the same bytes.

    Args:
        type: A type whose block divides the row length.
        rows: float32 `[n_rows, row_length]`, C order, finite.

    Returns:
        uint8 `[n_rows * row_size]`. F16 and BF16 round to nearest even.
    """
    if type is T.F32:
        return rows.reshape(-1).view(np.uint8)
    return ggml.quantize_chunk(int(type), rows).reshape(-1)


def _layer(name: str) -> int:
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first == "blk" and number.isdecimal() else -1


def _role(name: str) -> str:
    return next((role for part, role in _ROLES.items() if part in name), "")


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether ggml counts two dimensions or more (`ggml_n_dims`): outer ones of size 1 are not counted."""
    return any(size > 1 for size in shape[:-1])


def _head_type(mix: Mix, row_length: int) -> GGMLQuantizationType:
    if mix.base is T.Q8_0 or row_length % GGML_QUANT_SIZES[mix.base][0]:
        return T.Q8_0
    return T.Q6_K


def _fit(type: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    """The type itself, or what takes its place where blocks do not divide the row (`tensor_type_fallback`)."""
    for candidate in (type, _FALLBACK.get(type, type)):
        if row_length % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return T.F16


def _check_values(tensor: TensorPlan, rows: NDArray[np.float32], start: int) -> None:
    # Two reductions instead of isfinite(): no temporary, and NaN passes through both.
    with np.errstate(invalid="ignore"):
        low, high = float(rows.min()), float(rows.max())
    limit = _OVERFLOW.get(tensor.type, np.inf)
    if -limit < low and high < limit:
        return
    bad = ~(np.abs(rows) < limit)
    row, column = (int(index) for index in np.unravel_index(int(bad.argmax()), rows.shape))
    value = float(rows[row, column])
    where = f"{tensor.source} ({tensor.name}), row {start + row}, column {column}"
    if not np.isfinite(value):
        raise CheckpointError(f"{where}: {value} is not a weight; the checkpoint is damaged")
    raise CheckpointError(f"{where}: {value:g} does not fit into {tensor.type.name}; F32 would hold it")


def _check_scales(tensor: TensorPlan, rows: NDArray[np.float32], data: NDArray[np.uint8], start: int) -> None:
    """Refuses blocks whose float16 scale overflowed, as llama.cpp does (`ggml_validate_row_data`)."""
    if tensor.type in _IS_FLOAT:
        return
    block_length, block_size = GGML_QUANT_SIZES[tensor.type]
    blocks = data.view("<u2").reshape(-1, block_size // 2)
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for offset in _SCALES[tensor.type]:
        bad |= (blocks[:, offset // 2] & 0x7C00) == 0x7C00
    if not bad.any():
        return
    block = int(bad.argmax())
    largest = float(np.abs(rows.reshape(-1, block_length)[block]).max())
    row = start + block * block_length // tensor.row_length
    where = f"{tensor.source} ({tensor.name}), row {row}"
    raise CheckpointError(f"{where}: {largest:g} does not fit into {tensor.type.name}; F32 would hold it")
