"""llama.cpp's batch, in memory that is made once: what it costs to fill it is paid for every token of an answer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from local_llava.llm.rows import Rows

_INT8, _INT32 = ctypes.POINTER(ctypes.c_int8), ctypes.POINTER(ctypes.c_int32)


class Batch:
    """A `llama_batch` and the arrays that it points to. What is returned is valid until the next call."""

    def __init__(self, n_rows: int, n_sequences: int) -> None:
        """
        Args:
            n_rows: Most rows.
            n_sequences: Sequences are numbered from 0 to one less.
        """
        self._tokens, self._positions = np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int32)
        self._outputs, self._ones = np.zeros(n_rows, np.int8), np.ones(n_rows, np.int32)
        # A row has a pointer to its list of sequences: here, to one entry of a table of all numbers.
        self._numbers, self._lists = np.arange(n_sequences, dtype=np.int32), np.zeros(n_rows, np.uintp)
        self._first = self._numbers.ctypes.data
        self._token_pointer = self._tokens.ctypes.data_as(_INT32)
        self._batch = _empty()
        self._batch.pos = self._positions.ctypes.data_as(_INT32)
        self._batch.n_seq_id = self._ones.ctypes.data_as(_INT32)
        self._batch.seq_id = self._lists.ctypes.data_as(ctypes.POINTER(_INT32))
        self._batch.logits = self._outputs.ctypes.data_as(_INT8)
        self._embeddings: NDArray[np.float32] | None = None

    def of_tokens(self, rows: Rows, tokens: Sequence[int]) -> Any:
        """The `llama_batch` of rows that are all tokens."""
        self._fill(rows)
        self._tokens[: len(rows)] = tokens
        self._batch.token, self._batch.embd, self._embeddings = self._token_pointer, None, None
        return self._batch

    def of_embeddings(self, rows: Rows, embeddings: NDArray[np.float32]) -> Any:
        """The `llama_batch` of rows that are all embeddings: float32 [n, n_embd], contiguous."""
        self._fill(rows)
        self._embeddings = embeddings  # lives as long as the pointer to it
        self._batch.token, self._batch.embd = None, embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return self._batch

    def _fill(self, rows: Rows) -> None:
        n = self._batch.n_tokens = len(rows)
        self._positions[:n], self._outputs[:n] = rows.positions, rows.outputs
        self._lists[:n] = [self._first + self._numbers.itemsize * sequence for sequence in rows.sequences]


def _empty() -> Any:
    """The stubs have arrays where pointers may be."""
    return c.llama_batch()
