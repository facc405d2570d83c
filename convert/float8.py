"""Weights in float8, which mean something only with their scales: they become float32 when they are read.

Knows how the scales are called and shaped by those who write them:

    NAME_scale        one, or one a row: [], [1], [n], [n, 1] (compressed-tensors, FBGEMM)
    NAME_scale_inv    one a block: [n / 128, k / 128], rounded up (DeepSeek, transformers); multiplied, too

Does not know what a tensor means. The formats: https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from local_llava.convert.source import FLOATS, SourceTensor
from local_llava.errors import CheckpointError

_BLOCK = 128
"""Rows and columns of a block, wherever they explain the shape of the scales. Other sizes have to divide the weight."""

_SCALES = ("_scale", "_scale_inv")
_NOT_OF_WEIGHTS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale")
"""Last parts of the names of scales for what is computed in float8, which it is not here."""


@runtime_checkable
class _Raw(SourceTensor, Protocol):
    """A tensor whose bytes can be read."""

    def raw_rows(self, start: int, stop: int) -> NDArray[np.uint8]: ...


def with_scales(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors, with those in float8 multiplied by their scales when they are read, and without the scales.

    Args:
        tensors: By name; F8_E4M3 (the kind without infinities, float8_e4m3fn) and F8_E5M2 are float8.

    Raises:
        CheckpointError: A weight in float8 has no scale, two, or one whose shape or dtype is not known.
    """
    result = dict(tensors)
    raw = {name: tensor for name, tensor in tensors.items() if tensor.dtype in _VALUES and isinstance(tensor, _Raw)}
    for name, tensor in raw.items():
        scales = [result.pop(name + suffix) for suffix in _SCALES if name + suffix in result]
        if len(scales) != 1:
            wanted = " or ".join(name + suffix for suffix in _SCALES)
            raise CheckpointError(f"{tensor} is {tensor.dtype} and has {len(scales)} scales; one is needed: {wanted}")
        result[name] = _Scaled(tensor, scales[0], _block(tensor, scales[0]))
    if raw:
        result = {name: t for name, t in result.items() if name.rpartition(".")[2] not in _NOT_OF_WEIGHTS}
    return result


def _block(weight: SourceTensor, scale: SourceTensor) -> tuple[int, int]:
    """Rows and columns of a weight that share a scale."""
    shape = (math.prod(weight.shape[:-1]), *(weight.shape[-1:] or (1,)))
    match scale.shape:
        case () | (1,):
            counts = (1, 1)
        case (n,) if len(weight.shape) == 2 and n == shape[0]:
            counts = (n, 1)
        case (n, m) if len(weight.shape) == 2:
            counts = (n, m)
        case _:
            counts = (0, 0)
    if scale.dtype in FLOATS and all(counts) and all(shape):
        if counts == tuple(-(-size // _BLOCK) for size in shape):
            return _BLOCK, _BLOCK
        if not any(size % count for size, count in zip(shape, counts, strict=True)):
            return shape[0] // counts[0], shape[1] // counts[1]
    raise CheckpointError(
        f"{scale} has the shape {scale.shape} and dtype {scale.dtype}, which are no scales for {weight.shape}; "
        f"one, one a row, or one a block are accepted, in {', '.join(FLOATS)}"
    )


@dataclass(frozen=True)
class _Scaled:
    """A weight in float8 with its scales. A `SourceTensor`."""

    weight: _Raw
    scale: SourceTensor
    block: tuple[int, int]

    def __str__(self) -> str:
        return str(self.weight)

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def dtype(self) -> str:
        """What its values have: those of the scales times those of the weight need more than a half."""
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        values = np.take(_VALUES[self.weight.dtype], self.weight.raw_rows(start, stop))  # faster than an index
        height, width = self.block
        first, last = start // height, -(-stop // height)
        if len(self.scale.shape) == 2:
            scales = self.scale.rows(first, last)
        else:  # a row of them all
            scales = self.scale.rows(0, 1).reshape(-1, 1)[first:last]
        across = np.repeat(scales, width, axis=1)[:, : values.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):
            values *= across[np.arange(start, stop) // height - first]
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self}: has values that are infinite or no numbers, in rows {start} to {stop}")
        return values


def _e4m3() -> NDArray[np.float32]:
    """Of each code: sign, 4 bits of exponent (bias 7), 3 of mantissa; S.1111.111 is no number, and nothing infinite."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(mantissa.astype(float), -9))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def _e5m2() -> NDArray[np.float32]:
    """Of each code: the upper half of a float16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


_VALUES = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2()}
