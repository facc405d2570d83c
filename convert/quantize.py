"""Rows become bytes: quantization by ggml's kernels or by ours, and what a type cannot hold.

Does not know which tensor gets which type (`tensor_types`), where tensors come from (`checkpoint`, `families`,
`requantize`) or where their bytes go (`write`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from local_llava.convert import kernels
from local_llava.convert.mixes import FLOATS
from local_llava.convert.plan import TensorPlan
from local_llava.errors import CheckpointError
from local_llava.ggml_rows import GUIDED

T = GGMLQuantizationType

# Byte offsets of the float16 scales in a block (the block_* structs in ggml-common.h).
_SCALES: dict[GGMLQuantizationType, tuple[int, ...]] = {
    T.Q4_0: (0,),
    T.Q4_1: (0, 2),
    T.Q5_0: (0,),
    T.Q5_1: (0, 2),
    T.Q8_0: (0,),
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.IQ1_S: (0,),
    T.IQ1_M: (),  # see `_exponents`
    T.IQ2_XXS: (0,),
    T.IQ2_XS: (0,),
    T.IQ2_S: (0,),
    T.IQ3_XXS: (0,),
    T.IQ3_S: (0,),
    T.IQ4_NL: (0,),
    T.IQ4_XS: (0,),
}

# The smallest magnitude that is refused. Of floats, that which rounds to infinity: half a step above the largest finite
# number. The largest that any block holds is 65504 * 127 * 32 (Q6_K); ggml's kernels take squares, and where these
# overflow Q3_K, Q6_K and IQ4_XS make zeros of the block, and IQ3_S aborts the process.
_OVERFLOW = {T.F32: np.inf, T.F16: 65520.0, T.BF16: 2.0**127 * (2 - 2.0**-8)} | dict.fromkeys(_SCALES, 2.0**30)

# And under an importance of at most 2^40, and for the types that are made with one: there IQ1_S takes
# 1400 * importance * weight^3, and aborts the process where that overflows.
_OVERFLOW_GUIDED = 2.0**24


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
    if tensor.raw is not None:
        return tensor.raw(start, stop)
    data = encode_rows(tensor.type, rows, tensor.importance)
    _check_scales(tensor, rows, data, start)
    return data


def encode_rows(
    type: GGMLQuantizationType, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Gives the bytes of rows in a type. Rows are independent: any split of a tensor gives the same bytes.

    Args:
        type: A type whose block divides the row length.
        rows: float32 `[n_rows, row_length]`, C order, finite.
        importance: float32 `[row_length]`, as in `TensorPlan.importance`.

    Returns:
        uint8 `[n_rows * row_size]`. F16 and BF16 round to nearest even.
    """
    if type is T.F32:
        return rows.reshape(-1).view(np.uint8)
    return kernels.PROCESS.quantize(type, rows, importance).reshape(-1)


def _check_values(tensor: TensorPlan, rows: NDArray[np.float32], start: int) -> None:
    # Two reductions instead of isfinite(): no temporary, and NaN passes through both.
    with np.errstate(invalid="ignore"):
        low, high = float(rows.min()), float(rows.max())
    limit = _OVERFLOW.get(tensor.type, np.inf)  # what is copied may be of any type
    if tensor.importance is not None or tensor.type in GUIDED:
        limit = min(limit, _OVERFLOW_GUIDED)
    if -limit < low and high < limit:
        return
    bad = ~(np.abs(rows) < limit)
    row, column = (int(index) for index in np.unravel_index(int(bad.argmax()), rows.shape))
    value = float(rows[row, column])
    where = f"{tensor.source} ({tensor.name}), row {start + row}, column {column}"
    if not np.isfinite(value):
        raise CheckpointError(f"{where}: {value} is not a weight; the file is damaged")
    raise CheckpointError(f"{where}: {value:g} does not fit into {tensor.type.name}; F32 would hold it")


def _check_scales(tensor: TensorPlan, rows: NDArray[np.float32], data: NDArray[np.uint8], start: int) -> None:
    """Refuses blocks whose float16 scale overflowed, as llama.cpp does (`ggml_validate_row_data`)."""
    if tensor.type in FLOATS:
        return
    block_length, block_size = GGML_QUANT_SIZES[tensor.type]
    blocks = data.view("<u2").reshape(-1, block_size // 2)
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for exponent in _exponents(tensor.type, blocks):
        bad |= exponent == 0x7C00
    if not bad.any():
        return
    block = int(bad.argmax())
    largest = float(np.abs(rows.reshape(-1, block_length)[block]).max())
    row = start + block * block_length // tensor.row_length
    where = f"{tensor.source} ({tensor.name}), row {row}"
    raise CheckpointError(f"{where}: {largest:g} does not fit into {tensor.type.name}; F32 would hold it")


def _exponents(type: GGMLQuantizationType, blocks: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    """Those of the float16 scales of blocks, uint16 [n_blocks], in their place in the number."""
    for offset in _SCALES[type]:
        yield blocks[:, offset // 2] & np.uint16(0x7C00)
    if type is T.IQ1_M:  # has its scale in the upper four bits of four numbers
        yield ((blocks[:, 26] >> 4) & np.uint16(0x0C00)) | (blocks[:, 27] & np.uint16(0x7000))
