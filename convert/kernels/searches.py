"""The searches for a block's scale, in `WIDTH` blocks at once: those of ggml-quants.c, with the same operations.

Knows vectors: lane k of everything is of block k. How many values, levels and tries a type has, and with which weights,
is `k_quants`'s and `legacy`'s. ggml also keeps the levels that belong to the best scale. They are used only where that
becomes zero when it is quantized itself, so what they are computed from is kept here: the inverse scale that was tried.

Source: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from local_llava.convert.kernels.arithmetic import (
    ONE,
    SMALLEST,
    TENTH,
    ZERO,
    Vectors,
    at_most,
    clamp,
    compiled,
    f32,
    larger,
    magnitude,
    nearest,
    ratio,
    smaller,
)
from local_llava.convert.kernels.lanes import (
    WIDTH,
    Bools,
    Floats,
    Ints,
    all_lanes,
    gather,
    load,
    scatter,
    select,
    some,
    store,
    to_floats,
)


@compiled
def affine_level(x: Floats, inverse: Floats, low: Floats, top: int) -> Ints:
    return clamp(nearest(inverse * (x - low)), 0, top)


@compiled
def affine(
    x: Vectors,
    first: int,
    w: Vectors,
    levels: Vectors,
    n: int,
    top: int,
    start: np.float32,
    step: np.float32,
    tries: int,
    absolute: bool,
) -> tuple[Floats, Floats, Floats, Floats]:
    """x is about scale * level + low, with levels 0 to top: make_qkx2_quants and make_qkx3_quants.

    Args:
        x: Values; those of the blocks begin at vector `first`.
        w: Their weights, from vector 0 on.
        levels: Room for n vectors.
        n: Values of a block.
        top: The highest level.
        start: What is added to `top` in the first try.
        step: How much more in every further one.
        tries: The last of them, counted from 0.
        absolute: The error is that of the difference and not of its square.

    Returns:
        The scale, the low, and the inverse scale and low that the levels were computed with.
    """
    highest = f32(top)
    low = high = load(x, first)
    sum_w = load(w, 0)
    sum_x = sum_w * low
    for i in range(1, n):
        v, weight = load(x, first + i), load(w, i)
        low, high = smaller(v, low), larger(v, high)
        sum_w += weight
        sum_x += weight * v
    low = select(low > ZERO, all_lanes(ZERO), low)
    varied = high != low
    inverse = highest / (high - low)
    scale = ONE / inverse
    best = all_lanes(ZERO)
    for i in range(n):
        v = load(x, first + i)
        difference = scale * to_floats(affine_level(v, inverse, low, top)) + low - v
        best += load(w, i) * (magnitude(difference) if absolute else difference * difference)
    best_inverse, best_low = inverse, low
    for k in range(tries + 1):
        inverse = (start + step * f32(k) + highest) / (high - low)
        sum_l = sum_l2 = sum_xl = all_lanes(ZERO)
        for i in range(n):
            v = load(x, first + i)
            level = to_floats(affine_level(v, inverse, low, top))
            store(levels, i, level)
            weighted = load(w, i) * level
            sum_l += weighted
            sum_l2 += weighted * level
            sum_xl += weighted * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > ZERO
        new_low = select(above, all_lanes(ZERO), new_low)
        new_scale = select(above, sum_xl / sum_l2, new_scale)
        error = all_lanes(ZERO)
        for i in range(n):
            difference = new_scale * load(levels, i) + new_low - load(x, first + i)
            error += load(w, i) * (magnitude(difference) if absolute else difference * difference)
        better = (determinant > ZERO) & (error < best)
        best, scale = select(better, error, best), select(better, new_scale, scale)
        best_inverse, best_low = select(better, inverse, best_inverse), select(better, low, best_low)
        low = select(better, new_low, low)  # the next try starts from it, as in C
    return select(varied, scale, all_lanes(ZERO)), low, best_inverse, best_low


@compiled
def largest_of(x: Vectors, first: int, n: int) -> tuple[Floats, Floats]:
    """The first of the values with the largest magnitude, and that."""
    largest = most = all_lanes(ZERO)
    for i in range(n):
        v = load(x, first + i)
        more = magnitude(v) > most
        most, largest = select(more, magnitude(v), most), select(more, v, largest)
    return largest, most


@compiled
def symmetric_level(x: Floats, inverse: Floats, top: int) -> Ints:
    return clamp(nearest(inverse * x), -top, top - 1)


@compiled
def _symmetric_sums(
    x: Vectors, first: int, w: Vectors, wx: Vectors, n: int, top: int, inverse: Floats
) -> tuple[Floats, Floats]:
    sum_xl = sum_l2 = all_lanes(ZERO)
    for i in range(n):
        level = to_floats(symmetric_level(load(x, first + i), inverse, top))
        sum_xl += load(wx, i) * level
        sum_l2 += load(w, i) * level * level
    return sum_xl, sum_l2


@compiled
def symmetric(x: Vectors, first: int, w: Vectors, wx: Vectors, levels: Vectors, n: int, top: int) -> Floats:
    """x is about scale * (level - top), with levels 0 to 2 top - 1: make_qx_quants.

    Args:
        x: Values; those of the blocks begin at vector `first`.
        w: Their weights, from vector 0 on.
        wx: Room for n vectors.
        levels: Where their levels go as floats, from vector `first` on: 0 in blocks that count as zero.
        n: Values of a block.
        top: How many levels are below zero.

    Returns:
        The scale.
    """
    for i in range(n):
        store(wx, i, load(w, i) * load(x, first + i))
    largest, most = largest_of(x, first, n)
    best_inverse = f32(-top) / largest
    sum_xl, sum_l2 = _symmetric_sums(x, first, w, wx, n, top, best_inverse)
    scale = select(sum_l2 != ZERO, sum_xl / sum_l2, all_lanes(ZERO))
    best = scale * sum_xl
    for k in range(-9, 10):
        if k == 0:
            continue
        inverse = -(f32(top) + TENTH * f32(k)) / largest
        sum_xl, sum_l2 = _symmetric_sums(x, first, w, wx, n, top, inverse)
        better = (sum_l2 > ZERO) & (sum_xl * sum_xl > best * sum_l2)
        scale = select(better, sum_xl / sum_l2, scale)
        best = select(better, scale * sum_xl, best)
        best_inverse = select(better, inverse, best_inverse)
    zero = most < SMALLEST
    for i in range(first, first + n):
        level = to_floats(symmetric_level(load(x, i), best_inverse, top) + top)
        store(levels, i, select(zero, all_lanes(ZERO), level))
    return select(zero, all_lanes(ZERO), scale)


@compiled
def refined(x: Vectors, n: int, top: int, levels: Vectors, scales: Vectors) -> None:
    """x is about scale * (level - top), with levels 0 to 2 top - 1, improved one by one: make_q3_quants.

    Args:
        x: 256 vectors of values; blocks of n follow each other.
        n: Values of a block.
        top: How many levels are below zero.
        levels: Where their levels go as floats: 0 in blocks that count as zero.
        scales: Where their scales go.
    """
    count = 256 // n
    sums_xl, sums_l2, changed = np.empty(count * WIDTH, f32), np.empty(count * WIDTH, f32), np.empty(count * WIDTH, f32)
    for j in range(count):
        _start_levels(x, j, n, top, levels, sums_xl, sums_l2)
    for j in range(0, count, 2):
        _improve(x, j, n, top, levels, sums_xl, sums_l2, changed)
    _improve_waiting(x, n, top, levels, sums_xl, sums_l2, changed)
    for j in range(count):
        _, most = largest_of(x, n * j, n)
        zero = most < SMALLEST
        for i in range(n * j, n * j + n):
            store(levels, i, select(zero, all_lanes(ZERO), load(levels, i) + f32(top)))
        store(scales, j, select(zero, all_lanes(ZERO), ratio(load(sums_xl, j), load(sums_l2, j))))


@compiled
def _improve_waiting(
    x: Vectors, n: int, top: int, levels: Vectors, sums_xl: Vectors, sums_l2: Vectors, changed: Vectors
) -> None:
    """The rest, for blocks that changed. Those are few, and lie anywhere: they are brought together."""
    waiting, count = np.empty(len(changed), np.int64), 0
    for block in range(len(changed)):
        waiting[count] = block
        count += changed[block] != ZERO
    values, own = np.empty(2 * n * WIDTH, f32), np.empty(2 * n * WIDTH, f32)
    xl, l2, again = np.empty(2 * WIDTH, f32), np.empty(2 * WIDTH, f32), np.empty(2 * WIDTH, f32)
    blocks, starts = np.empty((2, WIDTH), np.int64), np.empty((2, WIDTH), np.int64)
    for first in range(0, count, 2 * WIDTH):
        for half in range(2):
            for lane in range(WIDTH):
                block = waiting[min(first + half * WIDTH + lane, count - 1)]
                blocks[half, lane] = block
                starts[half, lane] = block // WIDTH * (n * WIDTH) + block % WIDTH
            for i in range(n):
                store(values, n * half + i, gather(x, starts[half], WIDTH * i))
                store(own, n * half + i, gather(levels, starts[half], WIDTH * i))
            store(xl, half, gather(sums_xl, blocks[half], 0))
            store(l2, half, gather(sums_l2, blocks[half], 0))
        for _ in range(4):
            _improve(values, 0, n, top, own, xl, l2, again)
            if not some((load(again, 0) + load(again, 1)) != ZERO):
                break
        for half in range(2):
            for i in range(n):
                scatter(levels, starts[half], WIDTH * i, load(own, n * half + i))
            scatter(sums_xl, blocks[half], 0, load(xl, half))
            scatter(sums_l2, blocks[half], 0, load(l2, half))


@compiled
def _start_levels(x: Vectors, j: int, n: int, top: int, levels: Vectors, sums_xl: Vectors, sums_l2: Vectors) -> None:
    largest, _ = largest_of(x, n * j, n)
    inverse = f32(-top) / largest
    sum_xl = sum_l2 = all_lanes(ZERO)
    for i in range(n * j, n * j + n):
        v = load(x, i)
        level = to_floats(symmetric_level(v, inverse, top))
        store(levels, i, level)
        sum_xl += v * v * v * level
        sum_l2 += v * v * level * level
    store(sums_xl, j, sum_xl)
    store(sums_l2, j, sum_l2)


@compiled
def _improve(
    x: Vectors, j: int, n: int, top: int, levels: Vectors, sums_xl: Vectors, sums_l2: Vectors, changed: Vectors
) -> None:
    """Goes once through the levels of blocks j and j + 1: a step waits for the one before, but not for the other's."""
    xl_a, l2_a, xl_b, l2_b = load(sums_xl, j), load(sums_l2, j), load(sums_xl, j + 1), load(sums_l2, j + 1)
    changed_a = changed_b = all_lanes(False)
    for i in range(n * j, n * j + n):
        change_a, xl_a, l2_a = _improved(x, levels, i, top, xl_a, l2_a)
        change_b, xl_b, l2_b = _improved(x, levels, i + n, top, xl_b, l2_b)
        changed_a |= change_a
        changed_b |= change_b
    store(sums_xl, j, xl_a)
    store(sums_l2, j, l2_a)
    store(sums_xl, j + 1, xl_b)
    store(sums_l2, j + 1, l2_b)
    store(changed, j, select(changed_a, all_lanes(ONE), all_lanes(ZERO)))
    store(changed, j + 1, select(changed_b, all_lanes(ONE), all_lanes(ZERO)))


@compiled
def _improved(
    x: Vectors, levels: Vectors, i: int, top: int, sum_xl: Floats, sum_l2: Floats
) -> tuple[Bools, Floats, Floats]:
    v, level = load(x, i), load(levels, i)
    weight = v * v
    xl, l2 = sum_xl - weight * v * level, sum_l2 - weight * level * level
    new = to_floats(clamp(nearest(v * l2 / xl), -top, top - 1))
    better = (xl > ZERO) & (new != level)
    xl, l2 = xl + weight * v * new, l2 + weight * new * new
    better &= (l2 > ZERO) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
    store(levels, i, select(better, new, level))
    return better, select(better, xl, sum_xl), select(better, l2, sum_l2)


@compiled
def positive(x: Vectors, w: Vectors, levels: Vectors, n: int, top: int) -> Floats:
    """x is about scale * level, with levels 0 to top: make_qp_quants. Of scales, which are not negative as a rule.

    Args:
        x: Values, from vector 0 on.
        w: Their weights.
        levels: Where their levels go as floats. A level below zero is cut to 8 bits, as in C.
        n: Values of a block.
        top: The highest level.

    Returns:
        The scale.
    """
    highest = f32(top)
    most = all_lanes(ZERO)
    for i in range(n):
        most = larger(most, load(x, i))
    best_inverse = highest / most
    scale = ONE / best_inverse
    best = all_lanes(ZERO)
    for i in range(n):
        v = load(x, i)
        difference = v - scale * to_floats(nearest(best_inverse * v) & 0xFF)
        best += load(w, i) * difference * difference
    for k in range(-4, 5):
        if k == 0:
            continue
        inverse = (TENTH * f32(k) + highest) / most
        scale = ONE / inverse
        error = all_lanes(ZERO)
        for i in range(n):
            v = load(x, i)
            difference = v - scale * to_floats(at_most(nearest(inverse * v), top))
            error += load(w, i) * difference * difference
        better = error < best
        best, best_inverse = select(better, error, best), select(better, inverse, best_inverse)
    return _positive_refined(x, w, levels, n, top, best_inverse, most < SMALLEST)


@compiled
def _positive_refined(
    x: Vectors, w: Vectors, levels: Vectors, n: int, top: int, inverse: Floats, zero: Bools
) -> Floats:
    sum_xl = sum_l2 = all_lanes(ZERO)
    for i in range(n):
        v, weight = load(x, i), load(w, i)
        number = at_most(nearest(inverse * v), top)
        level = to_floats(number)
        store(levels, i, to_floats(number & 0xFF))
        sum_xl += weight * v * level
        sum_l2 += weight * level * level
    for _ in range(5):
        changed = all_lanes(False)
        for i in range(n):
            v, weight, level = load(x, i), load(w, i), load(levels, i)
            xl, l2 = sum_xl - weight * v * level, sum_l2 - weight * level * level
            number = at_most(nearest(v * l2 / xl), top)
            new = to_floats(number)
            better = (xl > ZERO) & (l2 > ZERO) & (new != level)
            xl, l2 = xl + weight * v * new, l2 + weight * new * new
            better &= xl * xl * sum_l2 > sum_xl * sum_xl * l2
            store(levels, i, select(better, to_floats(number & 0xFF), level))
            sum_xl, sum_l2 = select(better, xl, sum_xl), select(better, l2, sum_l2)
            changed |= better
        if not some(changed):
            break
    for i in range(n):
        store(levels, i, select(zero, all_lanes(ZERO), load(levels, i)))
    return select(zero, all_lanes(ZERO), ratio(sum_xl, sum_l2))
