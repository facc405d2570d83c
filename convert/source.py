"""A tensor of a checkpoint before it is read, wherever its values come from.

Knows what the rest of a conversion may ask of one, and tensors that lie in a file as they are. Those that have to be
computed first are elsewhere: `lora`, `float8`.

Weights are read by offset into buffers of a few megabytes, never mapped: mapped pages count as resident memory, and
a conversion promises to need little.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from local_llava import ggml, ggml_rows
from local_llava.errors import CheckpointError

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Dtypes that weights may have, as safetensors names them, with what numpy reads them as."""


_AHEAD = 16 << 20
"""Bytes by which the disk is ahead of what is asked for: some 20 blocks of a conversion."""


class SourceTensor(Protocol):
    """A tensor that can be read in parts. `str()` of it says where it comes from: file and name, for errors."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def dtype(self) -> str:
        """As safetensors names it: F32, F16, BF16, I64, ...; of a merged tensor its base's, of float8 F32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """numpy's order: the last is the row length."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop of the tensor seen as [n_rows, row_length], as float32. Several threads may call it.

        Raises:
            CheckpointError: The dtype is not one of `FLOATS`, or the file no longer holds the bytes it did.
        """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose values lie one after the other in a file. A `SourceTensor`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of the first byte in the file."""
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        dtype = FLOATS.get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"{self}: dtype {self.dtype} is not supported; F32, F16 and BF16 are")
        raw = self.raw_rows(start, stop).view(dtype)
        if self.dtype == "BF16":  # bfloat16 is the upper half of a float32
            return np.asarray((raw.astype(np.uint32) << 16).view(np.float32))
        if self.dtype == "F16":  # faster than numpy
            return np.reshape(ggml_rows.dequantize(ggml.F16, raw.view(np.uint8)), raw.shape)
        return np.asarray(raw, np.float32)

    def raw_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows start to stop: uint8 [stop - start, bytes of a row].

        Raises:
            CheckpointError: The file no longer holds the bytes it did.
        """
        n_rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        row_size = self.nbytes // n_rows if n_rows else 0
        raw = np.empty((stop - start, row_size), np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * row_size)
                if raw.nbytes:
                    _read_fully(file, raw.data.cast("B"))
                    _expect(file.fileno(), self.offset + stop * row_size, raw.nbytes)
        except OSError as e:
            raise CheckpointError(f"{self}: cannot be read: {e.strerror}") from e
        except EOFError as e:
            raise CheckpointError(f"{self}: the file ended before the tensor did; was it changed?") from e
        return raw


def _expect(descriptor: int, offset: int, size: int) -> None:
    """Has the system read as much as was just read of what comes next, where it can be told, and does not wait."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, offset + _AHEAD, size, os.POSIX_FADV_WILLNEED)


def _read_fully(file: Any, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]


MAX_NAME = 200
"""Bytes in the name of a tensor or a shard; real ones have less than a hundred."""


def is_name(text: str) -> bool:
    """Whether a text can be a name that is shown on one line; as a file's, on every system."""
    return text.isprintable() and 1 <= len(text.encode()) <= MAX_NAME and text not in (".", "..")


def check_name(path: Path, name: str) -> None:
    """Check the name that a file gives a tensor.

    Raises:
        CheckpointError: It cannot be one.
    """
    if not is_name(name):
        raise CheckpointError(
            f"{path}: names a tensor {name!a:.80}; names of 1 to {MAX_NAME} bytes of printable text are accepted"
        )
