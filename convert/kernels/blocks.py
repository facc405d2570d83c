"""Blocks of a row, spread over lanes: how they are read, weighed and written.

Lane k is of block k of `WIDTH`. Their values lie in an array of vectors: vector i holds value i of all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from local_llava.convert.kernels.arithmetic import ZERO, Places, Vectors, compiled, f32
from local_llava.convert.kernels.lanes import (
    WIDTH,
    Floats,
    Ints,
    all_lanes,
    gather,
    load,
    scatter,
    sqrt,
    store,
)

Rows = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@compiled
def vectors(n: int) -> Vectors:
    return np.empty(n * WIDTH, f32)


@compiled
def places(first: int, n: int, size: int) -> Places:
    """Where blocks `first` to `first + WIDTH` of n begin."""
    starts = np.empty(WIDTH, np.int64)
    for lane in range(WIDTH):
        starts[lane] = min(first + lane, n - 1) * size
    return starts


@compiled
def fetch(rows: Rows, starts: Places, n: int, x: Vectors) -> None:
    for i in range(n):
        store(x, i, gather(rows, starts, i))


@compiled
def weigh(x: Vectors, first: int, n: int, importance: Rows, columns: Places, square: Floats, w: Vectors) -> Floats:
    """Puts the weights of n values beside each other that an importance matrix gives, and returns their sums."""
    total = all_lanes(ZERO)
    for i in range(n):
        v = load(x, first + i)
        weight = gather(importance, columns, first + i) * sqrt(square + v * v)
        store(w, i, weight)
        total += weight
    return total


@compiled
def scatter_half(out: Bytes, starts: Places, offset: int, bits: Ints) -> None:
    scatter(out, starts, offset, bits)
    scatter(out, starts, offset + 1, bits >> 8)
