"""A batch in the making: which tokens and embeddings are appended to which sequence."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray


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
