"""Batches as llama.cpp gets them: rows that are added for speed change nothing, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp.llama_cpp as c
import numpy as np
import pytest
from numpy.typing import NDArray

from local_llava.errors import EngineError
from local_llava.llm import LLM, Rows
from local_llava.llm.rows import efficient_size, faster_size
from local_llava.types import ModelFiles

N_SEQ_MAX = 3
HIDDEN = N_SEQ_MAX
"""The sequence of the rows that are added."""


@pytest.fixture(scope="module")
def llm(tiny: ModelFiles) -> Iterator[LLM]:
    llm = LLM.load(tiny.model, n_cells=256, n_seq_max=N_SEQ_MAX, n_batch=64, kv_type="F32", n_threads=1, n_gpu_layers=0)
    yield llm
    llm.close()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that llama.cpp got, batch by batch."""
    seen: list[int] = []
    decode = c.llama_decode

    def watched(context: int, batch: Any) -> Any:
        seen.append(batch.n_tokens)
        return decode(context, batch)

    monkeypatch.setattr("local_llava.llm.c.llama_decode", watched)
    return seen


def after(llm: LLM, inputs: Any, n_spare: int) -> NDArray[np.float32]:
    llm.keep(0, 0)
    rows = Rows()
    row = rows.add(0, 0, inputs, "last") + len(inputs) - 1
    llm.decode(rows, None, n_spare)
    assert len(rows) == len(inputs)
    return llm.logits(row).copy()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 14, 15, 16, 27, 59])
@pytest.mark.parametrize("embedded", [False, True])
def test_filling_up_changes_nothing(llm: LLM, sizes: list[int], n: int, embedded: bool) -> None:
    tokens = np.random.default_rng(n).integers(10, 400, n).tolist()
    inputs = llm.token_embeddings(tokens) if embedded else tokens
    plain, filled = after(llm, inputs, 0), after(llm, inputs, 100)
    assert sizes == [n, faster_size(n)]
    np.testing.assert_allclose(filled, plain, atol=2e-5)
    assert c.llama_memory_seq_pos_max(llm._memory, HIDDEN) == -1, "nothing stays"


def test_rows_are_added_only_where_there_is_room(llm: LLM, sizes: list[int]) -> None:
    for n, n_spare, expected in ((14, 1, 14), (14, 2, 16), (63, 0, 63), (63, 100, 64), (14, -3, 14)):
        after(llm, list(range(20, 20 + n)), n_spare)
        assert sizes.pop() == expected, (n, n_spare)
    llm.n_batch, before = 62, llm.n_batch
    try:
        after(llm, list(range(20, 79)), 100)
        assert sizes.pop() == 59, "a batch has at most n_batch rows"
    finally:
        llm.n_batch = before


def test_they_are_gone_after_a_failure(llm: LLM, sizes: list[int]) -> None:
    with pytest.raises(EngineError, match="evaluate 13 tokens"):
        after(llm, [*range(5, 17), 99_999], 100)
    assert sizes == [16] and c.llama_memory_seq_pos_max(llm._memory, HIDDEN) == -1
    llm.keep(0, 0)
    np.testing.assert_array_equal(after(llm, [5, 6], 0), after(llm, [5, 6], 0))


def test_sizes() -> None:
    for n in range(1, 600):
        assert n <= faster_size(n) <= n + 8 and faster_size(faster_size(n)) == faster_size(n)
        assert efficient_size(n) % 4 == 0 and n - 16 < efficient_size(n) < n + 20
        assert faster_size(efficient_size(n)) == efficient_size(n)
    assert [faster_size(n) for n in (3, 9, 12, 13, 16, 17, 29, 56)] == [3, 9, 12, 16, 16, 17, 32, 64]
    assert [efficient_size(n) for n in (3, 4, 11, 13, 28, 29, 44, 45, 64, 76, 80)] == [
        0,
        4,
        8,
        16,
        16,
        32,
        32,
        64,
        64,
        64,
        80,
    ]
