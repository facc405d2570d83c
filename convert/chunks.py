"""The bytes of a plan's tensors, one block after the other: all processors busy, and little in memory.

Knows how tensors are cut into blocks and aligned, and how many may be under way. Does not know how rows become bytes
(`quantize.encode`) or where they go (`write`, `resume`).
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from numpy.typing import NDArray

from local_llava.convert import kernels
from local_llava.convert.plan import TensorPlan
from local_llava.convert.quantize import encode

_BLOCK_VALUES = 1 << 19
"""Values that a thread quantizes at a time: 2 MB of float32. Milliseconds of work, and little even for 64 threads."""

_AHEAD_BYTES = 64 << 20
"""Of blocks that are quantized before they can be written: tenths of a second for which a disk may let us wait."""


def chunks(
    tensors: Sequence[TensorPlan], threads: int | None = None, on_stop: Callable[[], None] | None = None
) -> Generator[bytes | memoryview, None, None]:
    """The bytes of tensors in order; at most two blocks a thread, or `_AHEAD_BYTES`, are loaded or wait to be written.

    Args:
        tensors: As they follow each other in the file; each is padded.
        threads: Threads that load and quantize; None for one a processor.
        on_stop: Called when the threads have to end early, before they are waited for: loaders that wait for something
            must then raise.
    """
    threads = threads or _processors()
    kernels.PROCESS.prepare(amounts(tensors))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
    waiting: deque[tuple[Future[NDArray[np.uint8]], int, int]] = deque()
    held = 0
    try:
        for tensor, start, stop in _blocks(tensors):
            size = _tensor_size(tensor)
            padding = padded_size(tensor) - size if stop == tensor.n_rows else 0
            part = size // tensor.n_rows * (stop - start)
            waiting.append((pool.submit(encode, tensor, start, stop), part, padding))
            held += part
            while len(waiting) >= 2 * threads and held > _AHEAD_BYTES:
                block, part, padding = waiting.popleft()
                yield from _finished(block, padding)
                held -= part
        while waiting:
            block, _, padding = waiting.popleft()
            yield from _finished(block, padding)
    except BaseException:
        if on_stop:
            on_stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(block: Future[NDArray[np.uint8]], padding: int) -> Iterator[bytes | memoryview]:
    yield block.result().data
    if padding:
        yield bytes(padding)


def amounts(tensors: Sequence[TensorPlan]) -> Counter[kernels.Kind]:
    """How many values are quantized into each type, without and with an importance matrix."""
    counts: Counter[kernels.Kind] = Counter()
    for tensor in tensors:
        if tensor.raw is None:
            counts[tensor.type, tensor.importance is not None] += tensor.n_rows * tensor.row_length
    return counts


def _blocks(tensors: Sequence[TensorPlan]) -> Iterator[tuple[TensorPlan, int, int]]:
    for tensor in tensors:
        step = max(1, _BLOCK_VALUES // tensor.row_length)
        for start in range(0, tensor.n_rows, step):
            yield tensor, start, min(start + step, tensor.n_rows)


def padded_size(tensor: TensorPlan) -> int:
    """Bytes that a tensor takes up in the file."""
    return padded(_tensor_size(tensor))


def _tensor_size(tensor: TensorPlan) -> int:
    block_length, block_size = GGML_QUANT_SIZES[tensor.type]
    blocks, rest = divmod(tensor.row_length, block_length)
    if rest:
        raise ValueError(f"{tensor.name}: rows of {tensor.row_length} are no multiple of a {tensor.type.name} block")
    return tensor.n_rows * blocks * block_size


def padded(size: int) -> int:
    """A size and what fills it up to the alignment."""
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _processors() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
