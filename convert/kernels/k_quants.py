"""Kernels of ggml's K-quants: blocks of 256 values, in sub-blocks whose scales are quantized, too.

Knows how blocks are laid out (block_q*_K in ggml-common.h) and what comes before and after the searches
(quantize_row_q*_K_ref and _impl in ggml-quants.c). A kernel takes float32 rows one after the other, the length of a
row, its importance or None, the place for the blocks, and what its type needs besides. `WIDTH` blocks are worked on at
once, one a lane; where fewer are left at the end, the last is made several times.
"""

from __future__ import annotations

import numpy as np

from local_llava.convert.kernels.arithmetic import (
    ONE,
    SMALLEST,
    ZERO,
    Places,
    Vectors,
    at_most,
    clamp,
    compiled,
    f32,
    from_half,
    kernel,
    larger,
    magnitude,
    nearest,
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
    all_lanes,
    as_floats,
    as_ints,
    gather,
    load,
    scatter,
    select,
    some,
    sqrt,
    store,
    to_floats,
    to_ints,
)
from local_llava.convert.kernels.searches import (
    affine,
    affine_level,
    largest_of,
    positive,
    refined,
    symmetric,
)


@compiled
def mean_square(x: Vectors, factor: np.float32) -> Floats:
    total = all_lanes(ZERO)
    for i in range(256):
        v = load(x, i)
        total += v * v
    return total * factor / f32(256)


@compiled
def scale_levels(scales: Vectors, n: int, top: int, levels: Vectors) -> Floats:
    """Quantizes scales that are not negative in steps of a `top`th of the largest; returns the step."""
    most = all_lanes(ZERO)
    for j in range(n):
        most = larger(load(scales, j), most)
    inverse = select(most > ZERO, f32(top) / most, all_lanes(ZERO))
    for j in range(n):
        store(levels, j, to_floats(nearest(inverse * load(scales, j)) & 0xFF))
    return most / f32(top)


# Q4_K and Q5_K: 8 sub-blocks with a scale and a minimum of 6 bits each.


@kernel
def q4_k(
    rows: Rows,
    row_length: int,
    importance: Rows | None,
    out: Bytes,
    size: int,
    top: int,
    start: np.float32,
    step: np.float32,
    tries: int,
) -> None:
    n = rows.size // 256
    x, w, room, scales, lows, sums = vectors(256), vectors(32), vectors(32), vectors(8), vectors(8), vectors(8)
    inverses, bases, scale_at, low_at = vectors(8), vectors(8), vectors(8), vectors(8)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 256), places(first, n, size)
        fetch(rows, starts, 256, x)
        columns = starts % row_length
        square = all_lanes(ZERO) if importance is None else mean_square(x, f32(2))
        for j in range(8):
            if importance is None:
                weigh_around_mean(x, 32 * j, w)
            else:
                store(sums, j, weigh(x, 32 * j, 32, importance, columns, square, w))
            scale, low, inverse, base = affine(x, 32 * j, w, room, 32, top, start, step, tries, False)
            store(scales, j, scale)
            store(lows, j, ZERO - low)
            store(inverses, j, inverse)
            store(bases, j, base)
        if importance is None:
            scale, low = scale_levels(scales, 8, 63, scale_at), scale_levels(lows, 8, 63, low_at)
        else:
            scale, low = positive(scales, sums, scale_at, 8, 63), positive(lows, sums, low_at, 8, 63)
        if importance is None or top > 15:
            for j in range(8):
                store(scale_at, j, smaller(load(scale_at, j), all_lanes(f32(63))))
                store(low_at, j, smaller(load(low_at, j), all_lanes(f32(63))))
        six_bits(out, blocks, scale_at, low_at)
        scale, low = to_half(scale), to_half(low)
        scatter_half(out, blocks, 0, scale)
        scatter_half(out, blocks, 2, low)
        affine_levels(x, 32, top, from_half(scale), from_half(low), scale_at, low_at, inverses, bases)
        nibbles(out, blocks, size - 128, x)
        if top > 15:
            fifth_bits(out, blocks, x)


@compiled
def weigh_around_mean(x: Vectors, first: int, w: Vectors) -> None:
    total = all_lanes(ZERO)
    for i in range(32):
        v = load(x, first + i)
        total += v * v
    mean = sqrt(total / f32(32))
    for i in range(32):
        store(w, i, mean + magnitude(load(x, first + i)))


@compiled
def six_bits(out: Bytes, starts: Places, scales: Vectors, lows: Vectors) -> None:
    """Packs 8 scales and 8 lows into 12 bytes, and gives what get_scale_min_k4 reads of them."""
    for j in range(4):
        scale, scale_2 = to_ints(load(scales, j)), to_ints(load(scales, j + 4))
        low, low_2 = to_ints(load(lows, j)), to_ints(load(lows, j + 4))
        scale = (scale | (scale_2 >> 4) << 6) & 0xFF
        low = (low | (low_2 >> 4) << 6) & 0xFF
        both = (scale_2 & 15) | (low_2 & 15) << 4
        scatter(out, starts, 4 + j, scale)
        scatter(out, starts, 8 + j, low)
        scatter(out, starts, 12 + j, both)
        store(scales, j, to_floats(scale & 63))
        store(lows, j, to_floats(low & 63))
        store(scales, j + 4, to_floats((both & 15) | (scale >> 6) << 4))
        store(lows, j + 4, to_floats((both >> 4) | (low >> 6) << 4))


@compiled
def affine_levels(
    x: Vectors,
    n: int,
    top: int,
    scale: Floats,
    low: Floats,
    scale_at: Vectors,
    low_at: Vectors,
    inverses: Vectors,
    bases: Vectors,
) -> None:
    """Replaces values by the bits of their levels, given the quantized scales and lows of sub-blocks of n."""
    for j in range(256 // n):
        d, base = scale * load(scale_at, j), low * load(low_at, j)
        zero = d == ZERO
        if some(zero):
            for i in range(n * j, n * j + n):
                v = load(x, i)
                searched = affine_level(v, load(inverses, j), load(bases, j), top)
                level = select(zero, searched, clamp(nearest((v + base) / d), 0, top))
                store(x, i, as_floats(level))
        else:
            for i in range(n * j, n * j + n):
                store(x, i, as_floats(clamp(nearest((load(x, i) + base) / d), 0, top)))


@compiled
def nibbles(out: Bytes, starts: Places, offset: int, x: Vectors) -> None:
    for pair in range(4):
        for i in range(32):
            a, b = as_ints(load(x, 64 * pair + i)), as_ints(load(x, 64 * pair + 32 + i))
            scatter(out, starts, offset + 32 * pair + i, (a & 15) | b << 4)


@compiled
def fifth_bits(out: Bytes, starts: Places, x: Vectors) -> None:
    for i in range(32):
        bits = all_lanes(np.int32(0))
        for j in range(8):
            bits |= (as_ints(load(x, 32 * j + i)) >> 4) << j
        scatter(out, starts, 16 + i, bits)


# Q2_K: 16 sub-blocks with a scale and a minimum of 4 bits each.


@kernel
def q2_k(
    rows: Rows,
    row_length: int,
    importance: Rows | None,
    out: Bytes,
    start: np.float32,
    step: np.float32,
    tries: int,
    absolute: bool,
) -> None:
    n = rows.size // 256
    x, w, room, scales, lows, sums = vectors(256), vectors(16), vectors(16), vectors(16), vectors(16), vectors(16)
    inverses, bases, scale_at, low_at = vectors(16), vectors(16), vectors(16), vectors(16)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 256), places(first, n, 84)
        fetch(rows, starts, 256, x)
        columns = starts % row_length
        square = all_lanes(ZERO) if importance is None else mean_square(x, ONE)
        for j in range(16):
            if importance is None:
                for i in range(16):
                    store(w, i, magnitude(load(x, 16 * j + i)))
            else:
                store(sums, j, weigh(x, 16 * j, 16, importance, columns, square, w))
            scale, low, inverse, base = affine(x, 16 * j, w, room, 16, 3, start, step, tries, absolute)
            store(scales, j, scale)
            store(lows, j, ZERO - low)
            store(inverses, j, inverse)
            store(bases, j, base)
        if importance is None:
            scale, low = scale_levels(scales, 16, 15, scale_at), scale_levels(lows, 16, 15, low_at)
        else:
            scale, low = positive(scales, sums, scale_at, 16, 15), positive(lows, sums, low_at, 16, 15)
        for j in range(16):
            both = (to_ints(load(scale_at, j)) | to_ints(load(low_at, j)) << 4) & 0xFF
            scatter(out, blocks, j, both)
            store(scale_at, j, to_floats(both & 15))
            store(low_at, j, to_floats(both >> 4))
        scale, low = to_half(scale), to_half(low)
        scatter_half(out, blocks, 80, scale)
        scatter_half(out, blocks, 82, low)
        affine_levels(x, 16, 3, from_half(scale), from_half(low), scale_at, low_at, inverses, bases)
        two_bits(out, blocks, 16, x)


@compiled
def two_bits(out: Bytes, starts: Places, offset: int, x: Vectors) -> None:
    for half in range(2):
        for i in range(32):
            bits = all_lanes(np.int32(0))
            for j in range(4):
                bits |= (as_ints(load(x, 128 * half + 32 * j + i)) & 3) << 2 * j
            scatter(out, starts, offset + 32 * half + i, bits)


# Q3_K and Q6_K: 16 sub-blocks, each with a scale that has a sign.


@kernel
def q3_k(rows: Rows, row_length: int, importance: Rows | None, out: Bytes) -> None:
    n = rows.size // 256
    x, w, room, scales, sums = vectors(256), vectors(16), vectors(16), vectors(16), vectors(16)
    searched, scale_at = vectors(256), vectors(16)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 256), places(first, n, 110)
        fetch(rows, starts, 256, x)
        columns = starts % row_length
        square = all_lanes(ZERO) if importance is None else mean_square(x, f32(2))
        if importance is None:
            refined(x, 16, 4, searched, scales)
            scale = signed_levels(scales, scale_at)
        else:
            for j in range(16):
                store(sums, j, weigh(x, 16 * j, 16, importance, columns, square, w))
                store(scales, j, symmetric(x, 16 * j, w, room, searched, 16, 4))
            scale = symmetric(scales, 0, sums, room, scale_at, 16, 32)
        high_and_low_bits(out, blocks, scale_at)
        scale = to_half(scale)
        scatter_half(out, blocks, 108, scale)
        for j in range(16):
            store(scale_at, j, load(scale_at, j) - f32(32))
        symmetric_levels(x, 4, from_half(scale), scale_at, searched)
        third_bits(out, blocks, x)
        two_bits(out, blocks, 32, x)


@compiled
def signed_levels(scales: Vectors, levels: Vectors) -> Floats:
    """Quantizes 16 scales in levels 0 to 63, whose middle is 32; returns the step."""
    largest, _ = largest_of(scales, 0, 16)
    none = largest == ZERO
    inverse = f32(-32) / largest
    for j in range(16):
        level = nearest(inverse * load(scales, j)) & 0xFF
        level = clamp((level ^ 0x80) - 0x80, -32, 31) + 32  # an int8 in C
        store(levels, j, select(none, all_lanes(ZERO), to_floats(level)))
    return select(none, all_lanes(ZERO), ONE / inverse)


@compiled
def high_and_low_bits(out: Bytes, starts: Places, levels: Vectors) -> None:
    """Packs 16 levels of 6 bits as Q3_K does."""
    for j in range(8):
        a, b = to_ints(load(levels, j)), to_ints(load(levels, j + 8))
        scatter(out, starts, 96 + j, (a & 15) | (b & 15) << 4)
    for j in range(4):
        bits = all_lanes(np.int32(0))
        for k in range(4):
            bits |= (to_ints(load(levels, j + 4 * k)) >> 4) << 2 * k
        scatter(out, starts, 104 + j, bits)


@compiled
def symmetric_levels(x: Vectors, top: int, scale: Floats, scale_at: Vectors, searched: Vectors) -> None:
    """Replaces values by the bits of their levels, given the quantized scales of sub-blocks of 16."""
    for j in range(16):
        d = scale * load(scale_at, j)
        zero = d == ZERO
        if some(zero):
            for i in range(16 * j, 16 * j + 16):
                level = clamp(nearest(load(x, i) / d), -top, top - 1) + top
                store(x, i, as_floats(select(zero, to_ints(load(searched, i)), level)))
        else:
            for i in range(16 * j, 16 * j + 16):
                store(x, i, as_floats(clamp(nearest(load(x, i) / d), -top, top - 1) + top))


@compiled
def third_bits(out: Bytes, starts: Places, x: Vectors) -> None:
    for i in range(32):
        bits = all_lanes(np.int32(0))
        for j in range(8):
            bits |= (as_ints(load(x, 32 * j + i)) >> 2) << j
        scatter(out, starts, i, bits)


@kernel
def q6_k(rows: Rows, row_length: int, importance: Rows | None, out: Bytes) -> None:
    n = rows.size // 256
    x, w, room, scales = vectors(256), vectors(16), vectors(16), vectors(16)
    searched, scale_at = vectors(256), vectors(16)
    for first in range(0, n, WIDTH):
        starts, blocks = places(first, n, 256), places(first, n, 210)
        fetch(rows, starts, 256, x)
        columns = starts % row_length
        for j in range(16):
            for i in range(16):
                v = load(x, 16 * j + i)
                store(w, i, v * v if importance is None else gather(importance, columns, 16 * j + i))
            store(scales, j, symmetric(x, 16 * j, w, room, searched, 16, 32))
        largest, most = largest_of(scales, 0, 16)
        zero, none = most < SMALLEST, all_lanes(np.int32(0))
        inverse = f32(-128) / largest
        scale = select(zero, none, to_half(ONE / inverse))
        scatter_half(out, blocks, 208, scale)
        for j in range(16):
            level = select(zero, none, at_most(nearest(inverse * load(scales, j)), 127)) & 0xFF
            scatter(out, blocks, 192 + j, level)
            store(scale_at, j, to_floats((level ^ 0x80) - 0x80))  # an int8 in C
        symmetric_levels(x, 32, from_half(scale), scale_at, searched)
        if some(zero):
            for i in range(256):
                store(x, i, as_floats(select(zero, none, as_ints(load(x, i)))))
        six_bit_levels(out, blocks, x)


@compiled
def six_bit_levels(out: Bytes, starts: Places, x: Vectors) -> None:
    for half in range(2):
        for i in range(32):
            at = 128 * half + i
            a, b = as_ints(load(x, at)), as_ints(load(x, at + 32))
            c, d = as_ints(load(x, at + 64)), as_ints(load(x, at + 96))
            scatter(out, starts, 64 * half + i, (a & 15) | (c & 15) << 4)
            scatter(out, starts, 64 * half + 32 + i, (b & 15) | (d & 15) << 4)
            scatter(out, starts, 128 + 32 * half + i, a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6)
