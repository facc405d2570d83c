"""Kernels of ggml's older types: blocks of 32 values with one scale, and in some a minimum.

Knows how blocks are laid out (block_q*_0 and block_q*_1 in ggml-common.h) and what makes them (quantize_row_q*_ref and
_impl in ggml-quants.c). A kernel takes what those of `k_quants` take; `WIDTH` blocks are worked on at once.
"""

from __future__ import annotations

import numpy as np

from local_llava.convert.kernels.arithmetic import (
    ONE,
    ZERO,
    Places,
    Vectors,
    at_most,
    compiled,
    f32,
    kernel,
    larger,
    magnitude,
    smaller,
    to_half,
)
from local_llava.convert.kernels.blocks import (
    Bytes,
    Rows,
    fetch,
    places,
    scatter_half,
    vectors,
    weigh,
)
from local_llava.convert.kernels.lanes import (
    WIDTH,
    Floats,
    Ints,
    all_lanes,
    as_floats,
    as_ints,
    gather,
    load,
    scatter,
    select,
    store,
    to_ints,
)
from local_llava.convert.kernels.searches import affine, affine_level, largest_of, symmetric


@compiled
def inverse_of(d: Floats) -> Floats:
    return select(d != ZERO, ONE / d, all_lanes(ZERO))


@compiled
def cut(value: Floats) -> Ints:
    """C's conversion to int8, as long as the processor's is the one to int32."""
    return ((to_ints(value) & 0xFF) ^ 0x80) - 0x80


@kernel
def q8_0(rows: Rows, row_length: int, importance: Rows | None, out: Bytes) -> None:
    n = rows.size // 32
    x = vectors(32)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 32), places(first, n, 34)
        fetch(rows, starts, 32, x)
        most = all_lanes(ZERO)
        for i in range(32):
            most = larger(most, magnitude(load(x, i)))
        d = most / f32(127)
        inverse = inverse_of(d)
        scatter_half(out, blocks, 0, to_half(d))
        for i in range(32):
            scatter(out, blocks, 2 + i, rounded(load(x, i) * inverse))


@compiled
def rounded(value: Floats) -> Ints:
    """The nearest int, halves away from zero: roundf. What lies just below a half is not to become one when added."""
    half = as_floats(as_ints(all_lanes(f32(0.49999997))) | (as_ints(value) & -0x80000000))
    return to_ints(value + half)


@compiled
def mean_squares(rows: Rows, row_length: int) -> Rows:
    """Of each row. Added in its order: rows are side by side, not the values of one."""
    n = rows.size // row_length
    squares = np.empty(-(-n // WIDTH) * WIDTH, f32)
    for first in range(0, n, WIDTH):
        starts = places(first, n, row_length)
        total = all_lanes(ZERO)
        for i in range(row_length):
            v = gather(rows, starts, i)
            total += v * v
        store(squares, first // WIDTH, total / f32(row_length))
    return squares


# Q4_0 and Q5_0: a scale.


@kernel
def q_0(rows: Rows, row_length: int, importance: Rows | None, out: Bytes, size: int, top: int) -> None:
    n = rows.size // 32
    x, w, room, levels = vectors(32), vectors(32), vectors(32), vectors(32)
    squares = rows if importance is None else mean_squares(rows, row_length)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 32), places(first, n, size)
        fetch(rows, starts, 32, x)
        if importance is None:
            largest, _ = largest_of(x, 0, 32)
            d = largest / f32(-top)
            inverse = inverse_of(d)
            for i in range(32):
                level = cut(load(x, i) * inverse + (f32(top) + f32(0.5)))
                store(x, i, as_floats(at_most(level, 2 * top - 1)))
        else:
            square = gather(squares, starts // row_length, 0)
            weigh(x, 0, 32, importance, starts % row_length, square, w)
            d = symmetric(x, 0, w, room, levels, 32, top)
            for i in range(32):
                store(x, i, as_floats(to_ints(load(levels, i))))
        scatter_half(out, blocks, 0, to_half(d))
        pack(out, blocks, size, x)


@compiled
def pack(out: Bytes, starts: Places, size: int, x: Vectors) -> None:
    """Writes levels of 4 bits at the end of a block, and fifth bits before them where a block has room for them."""
    for i in range(16):
        scatter(out, starts, size - 16 + i, (as_ints(load(x, i)) & 15) | as_ints(load(x, i + 16)) << 4)
    if size > 20:
        for byte in range(4):
            bits = all_lanes(np.int32(0))
            for k in range(8):
                bits |= ((as_ints(load(x, 8 * byte + k)) >> 4) & 1) << k
            scatter(out, starts, size - 20 + byte, bits)


# Q4_1 and Q5_1: a scale and a minimum.


@kernel
def q_1(rows: Rows, row_length: int, importance: Rows | None, out: Bytes, size: int, top: int) -> None:
    n = rows.size // 32
    x, w, room = vectors(32), vectors(32), vectors(32)
    squares = rows if importance is None else mean_squares(rows, row_length)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 32), places(first, n, size)
        fetch(rows, starts, 32, x)
        if importance is None:
            low = high = load(x, 0)
            for i in range(1, 32):
                low, high = smaller(load(x, i), low), larger(load(x, i), high)
            d = (high - low) / f32(top)
            inverse = inverse_of(d)
            for i in range(32):
                level = cut((load(x, i) - low) * inverse + f32(0.5))
                store(x, i, as_floats(at_most(level, top)))
        else:
            square = gather(squares, starts // row_length, 0)
            weigh(x, 0, 32, importance, starts % row_length, square, w)
            d, low, inverse, base = affine(x, 0, w, room, 32, top, f32(-0.9), f32(0.05), 36, False)
            for i in range(32):
                store(x, i, as_floats(affine_level(load(x, i), inverse, base, top)))
        scatter_half(out, blocks, 0, to_half(d))
        scatter_half(out, blocks, 2, to_half(low))
        pack(out, blocks, size, x)
