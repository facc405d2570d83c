"""What the kernels compute with: functions of vectors that ggml has for one value, with C's results in every case.

Source: nearest_int in ggml-quants.c, ggml_compute_fp32_to_fp16 in ggml-impl.h, of
https://github.com/ggml-org/llama.cpp/tree/master/ggml/src.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from local_llava.convert.kernels.lanes import Floats, Ints, all_lanes, as_floats, as_ints, select

Function = TypeVar("Function", bound=Callable[..., Any])
Vectors = NDArray[np.float32]
"""Vectors one after the other, as `load` takes them."""
Places = NDArray[np.int64]
"""Where each lane is in an array."""


def kernel(function: Function) -> Function:
    """Compiled by numba for Python to call. As C: without the GIL, and a division by 0 is no exception."""
    return numba.njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def compiled(function: Function) -> Function:
    """Compiled as part of kernels: Python cannot call it, which saves a quarter of the time."""
    options = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(**options)(function)  # type: ignore[no-any-return]


# Constants are float32: beside a Python number numba would compute in double precision.
f32 = np.float32
ZERO, ONE, TENTH = f32(0), f32(1), f32(0.1)
SMALLEST = f32(1e-15)
"""GROUP_MAX_EPS: blocks whose values all are smaller are zero."""


@compiled
def smaller(a: Any, b: Any) -> Any:
    return select(a < b, a, b)


@compiled
def larger(a: Any, b: Any) -> Any:
    return select(a > b, a, b)


@compiled
def clamp(value: Ints, low: int, high: int) -> Ints:
    return larger(all_lanes(np.int32(low)), smaller(all_lanes(np.int32(high)), value))


@compiled
def magnitude(value: Floats) -> Floats:
    return as_floats(as_ints(value) & 0x7FFFFFFF)


@compiled
def nearest(value: Floats) -> Ints:
    """The nearest int, halves to even: nearest_int. Of what is larger than 2^22 and of NaN, what C's bits give."""
    return (as_ints(value + f32(12582912)) & 0x7FFFFF) - 0x400000


@compiled
def ratio(a: Floats, b: Floats) -> Floats:
    """Their quotient, or 0 where the second is not positive."""
    return select(b > ZERO, a / b, all_lanes(ZERO))


@compiled
def at_most(value: Ints, top: int) -> Ints:
    return smaller(all_lanes(np.int32(top)), value)


@compiled
def to_half(value: Floats) -> Ints:
    """The bits of the nearest float16, halves to even."""
    bits = as_ints(value)
    base = magnitude(value) * f32(2.0**112) * f32(2.0**-110)
    exponent = larger(bits & 0x7F800000, all_lanes(np.int32(0x38800000)))
    rounded = as_ints(as_floats(exponent + 0x07800000) + base)
    number = ((rounded >> 13) & 0x7C00) + (rounded & 0xFFF)
    number = select((bits & 0x7FFFFFFF) > 0x7F800000, all_lanes(np.int32(0x7E00)), number)
    return ((bits >> 16) & 0x8000) | number


@compiled
def from_half(bits: Ints) -> Floats:
    """The float of a float16."""
    number = (bits & 0x7FFF) << 13
    value = as_floats(number) * f32(2.0**112)
    value = select((bits & 0x7C00) == 0x7C00, as_floats(number | 0x7F800000), value)
    return as_floats(as_ints(value) | ((bits & 0x8000) << 16))
