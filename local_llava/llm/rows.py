"""A batch in the making: which tokens and embeddings are appended to which sequence."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

_TILE, _SMALL_TILE = 16, 4
"""Rows that llama.cpp's CPU kernels for quantized weights take at once; what is left over of 4 goes one by one. So 16
rows take less time than 13 to 15, and by the row a fourth less than 4 to 12."""

ATTENTION_TILE = 64
"""Rows from which on flash attention on CPUs takes many at once: 64 take hardly more time than 48."""


def faster_size(n: int) -> int:
    """The number of rows, at least n, that a batch takes least time with on CPUs.

    Measured on two cores with AVX2, Q4_K_M, at depth 600: 13 to 15 rows took 4 to 17 % longer than 16.
    """
    if ATTENTION_TILE - 8 <= n < ATTENTION_TILE:
        return ATTENTION_TILE
    missing = -n % _TILE
    return n + missing if missing <= 3 else n


def efficient_size(n: int) -> int:
    """A number of rows near n that takes no more time on CPUs, give or take little, and less by the row."""
    if faster_size(n) < _TILE:
        return n // _SMALL_TILE * _SMALL_TILE
    whole = faster_size(n) // _TILE * _TILE
    return ATTENTION_TILE if whole == ATTENTION_TILE - _TILE else whole


class Rows:
    """A batch in the making: what is appended to which sequence."""

    def __init__(self) -> None:
        self.inputs: list[list[int] | NDArray[np.float32]] = []
        self.sequences: list[int] = []
        self.positions: list[int] = []
        self.outputs: list[bool] = []

    def __len__(self) -> int:
        return len(self.positions)

    def add(
        self, sequence: int, position: int, inputs: list[int] | NDArray[np.float32], outputs: Literal["all", "last", ""]
    ) -> int:
        """Append tokens, or embeddings float32 [n, n_embd], to a sequence.

        Args:
            sequence: Its number.
            position: Tokens that it holds before.
            inputs: What is appended.
            outputs: Of which of them logits are wanted.

        Returns:
            The row of the first of them.
        """
        row, n = len(self), len(inputs)
        self.inputs.append(inputs)
        self.sequences += [sequence] * n
        self.positions += range(position, position + n)
        self.outputs += [outputs == "all"] * (n - 1) + [outputs != ""]
        return row

    def filled_up(self, n: int, sequence: int) -> Rows:
        """These rows and n more, of an otherwise empty sequence, which nobody reads."""
        filled = Rows()
        filled.inputs, filled.sequences = self.inputs.copy(), self.sequences.copy()
        filled.positions, filled.outputs = self.positions.copy(), self.outputs.copy()
        filled.add(sequence, 0, [0] * n, "")
        return filled
