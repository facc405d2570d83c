"""The embedding matrix, for tokens that go into a batch beside a picture's embeddings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from local_llava import ggml_rows
from local_llava.errors import EngineError
from local_llava.gguf_file import TensorInfo


class TokenEmbeddings:
    """Rows of the embedding matrix in a file, which are dequantized when they are asked for."""

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self._path, self._info = path, info

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Those of tokens, bit for bit as llama.cpp looks them up: float32 [n, n_embd].

        Raises:
            EngineError: The file is not there any more, or a token is none.
        """
        n_vocab = self._info.shape[0]
        if not all(0 <= token < n_vocab for token in tokens):
            raise EngineError(f"a token is out of the vocabulary of {n_vocab}")
        rows = self._matrix.reshape(n_vocab, -1)[np.asarray(tokens)]
        return ggml_rows.dequantize(self._info.type, rows).reshape(len(tokens), -1)

    @functools.cached_property
    def _matrix(self) -> NDArray[np.uint8]:
        """The bytes of it, mapped: llama.cpp has the same pages."""
        try:
            return np.memmap(self._path, np.uint8, "r", self._info.offset, self._info.nbytes)
        except (OSError, ValueError) as e:
            raise EngineError(f"{self._path}: cannot be read any more: {e}") from e
