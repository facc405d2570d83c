"""Our own quantization kernels: ggml's bytes, in a fraction of the time.

ggml's search goes through the values of a block one after the other, and no compiler may reorder its sums. Here `WIDTH`
blocks lie side by side, so that every step is one vector instruction, and each block still sees the same operations in
the same order. numba compiles that for the processor at hand and keeps the result on the disk.

Knows the numbers of each type, and whether there is a kernel to be used: numba is installed, there is enough to do, and
what it makes of a few blocks is what ggml makes of them. Where a compiler fuses products with sums, as those for
aarch64 may, ggml's bytes are others, and ggml is what is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from local_llava import ggml_rows

_logger = logging.getLogger("local_llava")

WORTHWHILE = 1 << 24
"""Values of a kind for which a kernel is loaded: a second of ggml's time. To compile one takes two, or a tenth of one
where it was done before; ggml's goes on meanwhile."""

Kind = tuple[T, bool]
"""A type, without or with an importance matrix."""

Quantize = Callable[[NDArray[np.float32], NDArray[np.float32] | None], NDArray[np.uint8]]
"""From rows, float32 [n_rows, n], and the importance of columns, float32 [n] or None, to uint8 [n_rows, row_size]."""


class _Numbers(NamedTuple):
    """What makes a type, and of which numbers."""

    function: str
    """`module.name` in this package."""
    plain: tuple[float, ...] = ()
    """What the function takes besides rows, their length, their importance and the place of the blocks."""
    weighted: tuple[float, ...] = ()
    """The same with an importance matrix."""


# The bytes of a block and the highest level; and of a search for scale and minimum what is added to that level in the
# first try, how much more in each further one, how many those are, and whether errors are not squared.
KERNELS = {
    T.Q4_0: _Numbers("legacy.q_0", (18, 8), (18, 8)),
    T.Q4_1: _Numbers("legacy.q_1", (20, 15), (20, 15)),
    T.Q5_0: _Numbers("legacy.q_0", (22, 16), (22, 16)),
    T.Q5_1: _Numbers("legacy.q_1", (24, 31), (24, 31)),
    T.Q8_0: _Numbers("legacy.q8_0"),
    T.Q2_K: _Numbers("k_quants.q2_k", (-0.5, 0.1, 15, True), (-0.9, 0.05, 36, False)),
    T.Q3_K: _Numbers("k_quants.q3_k"),
    T.Q4_K: _Numbers("k_quants.q4_k", (144, 15, -1.0, 0.1, 20), (144, 15, -0.9, 0.05, 36)),
    T.Q5_K: _Numbers("k_quants.q4_k", (176, 31, -0.5, 0.1, 15), (176, 31, -0.9, 0.05, 36)),
    T.Q6_K: _Numbers("k_quants.q6_k"),
}


def load(type: T, weighted: bool) -> Quantize:
    """Compile the kernel of a type, or take it from numba's cache.

    Args:
        type: One of `KERNELS`.
        weighted: For rows with an importance matrix.

    Raises:
        ImportError: numba is not installed.
        Exception: Whatever numba raises where it does not work.
    """
    import numba

    module, _, name = KERNELS[type].function.partition(".")
    function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    given = KERNELS[type].weighted if weighted else KERNELS[type].plain
    # A Python float would be a double to numba.
    numbers = [np.float32(number) if isinstance(number, float) else number for number in given]
    with contextlib.suppress(RuntimeError):  # no directory for the cache: every process compiles anew
        function.enable_caching()
    with contextlib.suppress(AttributeError):
        # numba looks at the date of one file, and knows of no other whose functions that one calls.
        function._cache._cache_file._source_stamp = _sources()
    floats, optional = numba.float32[::1], numba.float32[::1] if weighted else numba.none
    function.compile((floats, numba.int64, optional, numba.uint8[::1], *map(numba.typeof, numbers)))

    def quantize(rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        if importance is not None and importance.shape != rows.shape[1:]:
            raise ValueError(f"importance must be of {rows.shape[1]} columns, not {importance.shape}")
        # Of arrays that are read-only or not aligned numba would compile another function.
        rows = np.require(rows, np.float32, ("C", "A", "W"))
        if importance is not None:
            importance = np.require(importance, np.float32, ("C", "A", "W"))
        n_rows, n = rows.shape
        out = np.empty((n_rows, ggml_rows.row_size(type, n)), np.uint8)
        function(rows.reshape(-1), n, importance, out.reshape(-1), *numbers)
        return out

    return quantize


def _sources() -> str:
    """What changes when any module of this package does."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Kernels:
    """The kernels of a process: those that were prepared, as soon as they are there. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: set[Kind] = set()
        self._thread: threading.Thread | None = None
        self._ready: dict[Kind, Quantize] = {}
        self._complained = False

    def prepare(self, amounts: Mapping[Kind, int]) -> None:
        """Have kernels compiled, in another thread, where there is enough to do for them.

        Args:
            amounts: How many values are going to be quantized.
        """
        kinds = [kind for kind in amounts if kind[0] in KERNELS and amounts[kind] >= WORTHWHILE]
        with self._lock:
            kinds = sorted({*kinds} - self._asked, key=lambda kind: -amounts[kind])
            if kinds:
                self._asked.update(kinds)
                # No daemon: an interpreter that ends would pull LLVM from under it.
                self._thread = threading.Thread(target=self._load, args=(kinds, self._thread), name="compile")
                self._thread.start()

    def wait(self) -> None:
        """Wait until the kernels are there that were asked for."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def quantize(
        self, type: T, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """As `ggml_rows.quantize_chunk`, which does it until there is a kernel."""
        kernel = self._ready.get((type, importance is not None))
        return (kernel or partial(ggml_rows.quantize_chunk, type))(rows, importance)

    def _load(self, kinds: Sequence[Kind], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        for kind in kinds:
            try:
                kernel = load(*kind)
                if not _agrees(kernel, *kind):
                    raise ArithmeticError(f"ggml's {kind[0].name} rounds differently here")
            except Exception as error:  # of numba, llvmlite or LLVM: whatever it is, ggml does it, too
                self._complain(error)
            else:
                self._ready[kind] = kernel

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            _logger.warning("ggml's own kernels quantize, several times slower than ours: %.200s", reason)
        self._complained = True


def _agrees(kernel: Quantize, type: T, weighted: bool) -> bool:
    """Whether a kernel's bytes are ggml's, of blocks some of which are others where products are fused with sums."""
    rows = _sample()
    importance = np.linspace(0, 1, rows.shape[1], dtype=np.float32) if weighted else None
    return np.array_equal(kernel(rows, importance), ggml_rows.quantize_chunk(type, rows, importance))


@cache
def _sample() -> NDArray[np.float32]:
    """Rows of noise, of hundredths, whose levels are halves now and then, and of equal values, whose sums cancel."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((16, 512), np.float32) * np.float32(0.02)
    hundredths = rng.integers(-100, 101, (16, 512)).astype(np.float32) / np.float32(100)
    equal = np.repeat(rng.standard_normal((16, 16), np.float32), 32, axis=1)
    return np.concatenate([noise, hundredths, equal, noise * (hundredths > 0)])


PROCESS = Kernels()
"""Of this process."""
