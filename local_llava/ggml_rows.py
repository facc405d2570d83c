"""Rows of numbers in ggml's types: float32 packed into them and read from them, by ggml's own functions.

Knows which types can be made and read, and what ggml would abort the process for, or read beyond its tables. Knows no
model and no file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from local_llava import ggml
from local_llava.ggml import BF16, F16, F32, Q8_0

QUANTIZABLE: dict[int, str] = {
    F32: "F32",
    F16: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    Q8_0: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    21: "IQ3_S",
    23: "IQ4_XS",
    BF16: "BF16",
}
"""`enum ggml_type` -> name, for the types that `ggml_quantize_chunk` makes without an importance matrix."""

GUIDED: dict[int, str] = {
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    22: "IQ2_S",
    29: "IQ1_M",
}
"""Those that llama.cpp makes of a layer's weights with one only (`tensor_requires_imatrix` in llama-quant.cpp)."""

ALWAYS_GUIDED = frozenset({16, 17, 19})
"""Those for which ggml aborts the process without one (`ggml_quantize_requires_imatrix`)."""

MAX_IMPORTANCE = 2.0**40
"""Of a column. Where products of it and of weights overflow, ggml aborts for types of `GUIDED`. The square of an
activation that F16 holds is less than 2^32."""

_MADE = QUANTIZABLE | GUIDED

_N_TYPES = 43
"""GGML_TYPE_COUNT: ggml reads beyond its table for types from there on."""


def _checked(type: int) -> int:
    if type not in _MADE:
        raise ValueError(f"{type!r} is no ggml type that is made from float32; those are {', '.join(_MADE.values())}")
    return int(type)


def block_size(type: int) -> int:
    """Values that share a scale; the length of a row must be a multiple of it. 1 for F32, F16 and BF16.

    Raises:
        ValueError: `type` is none of `QUANTIZABLE` and `GUIDED`.
    """
    return int(ggml.functions().blck_size(_checked(type)))


def row_size(type: int, n: int) -> int:
    """Bytes of a row of n values.

    Raises:
        ValueError: `type` is none of `QUANTIZABLE` and `GUIDED`, or n is not a positive multiple of its block size.
    """
    if n < 1 or n % block_size(type):
        raise ValueError(f"a {_MADE[type]} row holds a multiple of {block_size(type)} values, not {n}")
    return int(ggml.functions().row_size(type, n))


def quantize_chunk(
    type: int, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize rows with ggml's own kernels, bit for bit as `llama_model_quantize` does.

    Rows are independent, and the GIL is released: call it from several threads on blocks of rows.

    Args:
        type: A ggml type of `QUANTIZABLE` or `GUIDED`.
        rows: float32 [n_rows, n], C-contiguous, n a multiple of the block size. Finite: ggml does not check.
        importance: float32 [n], C-contiguous, 0 to `MAX_IMPORTANCE`: how much an error in each column matters, the same
            for all rows (a row of an importance matrix). Types of `ALWAYS_GUIDED` need one.

    Returns:
        uint8 [n_rows, row_size(type, n)].

    Raises:
        ValueError: The type, dtype, shape or memory order is another, or the importance is missing.
    """
    if type in ALWAYS_GUIDED and importance is None:
        raise ValueError(f"{GUIDED[type]} is made with an importance only")
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.flags.c_contiguous:
        raise ValueError(f"rows must be C-contiguous float32 [n_rows, n], not {rows.dtype} {rows.shape}")
    n_rows, n = rows.shape
    if importance is not None and (
        importance.dtype != np.float32 or importance.shape != (n,) or not importance.flags.c_contiguous
    ):
        raise ValueError(
            f"importance must be C-contiguous float32 [{n}], not {importance.dtype} {list(importance.shape)}"
        )
    out = np.empty((n_rows, row_size(type, n)), np.uint8)
    if n_rows:
        weights = None if importance is None else importance.ctypes.data
        ggml.functions().quantize_chunk(type, rows.ctypes.data, out.ctypes.data, 0, n_rows, n, weights)
    return out


def validate_row_data(type: int, data: NDArray[np.uint8]) -> bool:
    """Whether quantized data has no NaN and no infinity among its values or scales. ggml tells stderr which.

    Args:
        type: A ggml type of `QUANTIZABLE` or `GUIDED`.
        data: uint8 of any shape, C-contiguous, whole blocks.

    Raises:
        ValueError: The type, dtype, size or memory order is another.
    """
    size = int(ggml.functions().type_size(_checked(type)))
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.size % size:
        raise ValueError(
            f"data must be C-contiguous uint8, whole blocks of {size} bytes, not {data.dtype} {data.shape}"
        )
    return bool(ggml.functions().validate_row_data(type, data.ctypes.data, data.size))


def has_dequantizer(type: int) -> bool:
    """Whether `dequantize` knows a type: all that weights have, not those of integers and of activations."""
    return type == F32 or (0 <= type < _N_TYPES and bool(ggml.functions().get_type_traits(type).contents.to_float))


def dequantize(type: int, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of packed rows, by ggml's own functions, bit for bit those that `llama_model_quantize` starts from.

    Blocks are independent, and the GIL is released.

    Args:
        type: A ggml type for which `has_dequantizer` is true.
        data: uint8 of any shape, C-contiguous, whole blocks.

    Returns:
        float32 [n], in the order of the blocks.

    Raises:
        ValueError: The type, dtype, size or memory order is another.
    """
    if not has_dequantizer(type):
        raise ValueError(f"{type!r} is no ggml type of weights")
    g = ggml.functions()
    traits = g.get_type_traits(type).contents
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.size % traits.type_size:
        raise ValueError(
            f"data must be C-contiguous uint8, whole blocks of {traits.type_size} bytes, not {data.dtype} {data.shape}"
        )
    if type == F32:
        return data.reshape(-1).view(np.float32)
    out = np.empty(data.size // traits.type_size * traits.blck_size, np.float32)
    # Both are exact; the CPU backend's is compiled for this processor and four times as fast.
    fast = g.cpu_fp16_to_fp32 if type == F16 else None
    (fast or traits.to_float)(data.ctypes.data, out.ctypes.data, out.size)
    return out
