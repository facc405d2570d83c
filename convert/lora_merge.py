"""The arithmetic of LoRA: weights that are merged with an adapter's matrices when they are read, in blocks of rows.

Knows matrices, memory and threads. Which matrices belong to which weight is `lora`'s.

A merged weight is W + scale * B A, in float32: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from local_llava.convert.source import SourceTensor
from local_llava.errors import CheckpointError

CACHE_BYTES = 64 << 20
"""Of an adapter's matrices in memory; of a model's largest, rank 512 and 14336 wide, one takes 29 MB."""


class Pair(NamedTuple):
    """What a module's weight is adapted by."""

    a: SourceTensor
    """[r, in]; of an embedding [r, n_vocab]."""
    b: SourceTensor
    """[out, r]; of an embedding [n_embd, r]."""
    scale: float
    embedding: bool


class Matrices:
    """The matrices that were read last, whole. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matrices: dict[str, NDArray[np.float32]] = {}

    def get(self, tensor: SourceTensor) -> NDArray[np.float32]:
        with self._lock:
            matrix = self._matrices.pop(tensor.name, None)
            if matrix is None:
                matrix = tensor.rows(0, tensor.shape[0])
            self._matrices[tensor.name] = matrix
            # Two are kept in any case: a transposed weight needs both its matrices for each block.
            while len(self._matrices) > 2 and sum(m.nbytes for m in self._matrices.values()) > CACHE_BYTES:
                del self._matrices[next(iter(self._matrices))]
            return matrix


class _OneThread:
    """While it is held by any thread, numpy's matrix products take one thread each.

    Blocks are merged by several threads as it is. Were each to start as many again, they would wait for each other:
    that took five times as long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._limit = _libraries().limit(limits=1, user_api="blas")
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._limit.restore_original_limits()


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


_ONE_THREAD = _OneThread()


@dataclass(frozen=True)
class MergedTensor:
    """A weight with its adapter. A `SourceTensor`."""

    base: SourceTensor
    pair: Pair
    transposed: bool
    matrices: Matrices = field(repr=False)

    def __str__(self) -> str:
        return f"{self.base} with {self.pair.a}"

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        if self.transposed:
            left, right = self.matrices.get(self.pair.a)[:, start:stop].T, self.matrices.get(self.pair.b).T
        else:
            left, right = self.pair.b.rows(start, stop), self.matrices.get(self.pair.a)
        base = self.base.rows(start, stop)
        with _ONE_THREAD, np.errstate(over="ignore", invalid="ignore"):
            change = left @ right
            change *= np.float32(self.pair.scale)
            change += base
        if not np.isfinite(change).all():
            raise CheckpointError(f"{self}: has values that are infinite or no numbers, in rows {start} to {stop}")
        return np.asarray(change)


@dataclass(frozen=True)
class RenamedTensor:
    """A tensor under the name of the one it replaces. A `SourceTensor`."""

    tensor: SourceTensor
    name: str

    def __str__(self) -> str:
        return str(self.tensor)

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return self.tensor.rows(start, stop)
