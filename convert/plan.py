"""A conversion, decided before a byte is written: what each output file will hold, and how to load it.

Knows what a GGUF consists of. Does not know where tensors come from (`checkpoint`, `families`) or how they are
quantized and written (`quantize`, `write`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

Load = Callable[[int, int], NDArray[np.float32]]
"""`load(start, stop)` gives rows start to stop of a tensor seen as [n_rows, row_length], float32."""

Raw = Callable[[int, int], NDArray[np.uint8]]
"""`raw(start, stop)` gives the bytes of these rows."""


@dataclass(frozen=True)
class Field:
    """One metadata entry of a GGUF."""

    key: str
    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None
    """Type of the items where `type` is ARRAY."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of an output file."""

    name: str
    shape: tuple[int, ...]
    """numpy's order: the last is the row length (ggml's ne[0])."""
    type: GGMLQuantizationType
    load: Load
    source: str
    """Where it comes from, for error messages: file and tensor name."""
    raw: Raw | None = None
    """The bytes to be written, where the source is quantized in this very type: quantizing anew would change them."""
    importance: NDArray[np.float32] | None = None
    """How much an error in each column matters, float32 [row_length]: a row of an importance matrix."""

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def row_length(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True)
class GGUFPlan:
    """One output file."""

    metadata: tuple[Field, ...]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()
    """What the user should know of it before it is written, one line each."""
