"""Importance matrices: how much an error in each column of a model's matrices matters, read from a file.

Knows llama.cpp's two formats (common/imatrix-loader.cpp of the version pinned in pyproject.toml): GGUF, and the older
one without a magic number, mostly called `.dat`. Every length is checked before it is used. Knows what llama-quantize
makes of the numbers, and what it writes of them into the file that it quantizes. How they are collected is
`local_llava.imatrix`'s.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from local_llava.convert.plan import Field
from local_llava.errors import ModelFileError
from local_llava.ggml_rows import MAX_IMPORTANCE
from local_llava.gguf_file import MAX_ENTRIES, MAX_NAME, TYPES, GGUFFile, TensorInfo

SUMS, COUNTS = ".in_sum2", ".counts"
"""What follows a tensor's name in those of the GGUF: its columns' sums of squares, and how many rows they are of."""

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
"""Keys of the metadata; llama-quantize takes no file that lacks one."""

MAX_BYTES = 1 << 30
"""Of a file. A model of 70B has 17 MB."""

_MAX_STRING = 127
"""Bytes of a text that llama-quantize writes into the metadata of what it makes (`llama_model_kv_override`)."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a file says."""

    path: Path
    importance: Mapping[str, NDArray[np.float32]]
    """By tensor name: float32 [n_columns], 0 to `MAX_IMPORTANCE`; of an old mixture of experts, one after the other."""
    datasets: tuple[str, ...]
    """What it was made with."""
    n_chunks: int

    def fields(self) -> tuple[Field, ...]:
        """The metadata by which llama-quantize tells what it used."""
        text, number = GGUFValueType.STRING, GGUFValueType.UINT32
        dataset = [Field("quantize.imatrix.dataset", _short(self.datasets[0]), text)] if self.datasets else []
        chunks = [Field("quantize.imatrix.chunks_count", self.n_chunks, number)] if self.n_chunks else []
        return (
            Field("quantize.imatrix.file", _short(str(self.path)), text),
            *dataset,
            Field("quantize.imatrix.entries_count", len(self.importance), number),
            *chunks,
        )

    def fitting(self, lengths: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
        """Those of a model's tensors that there is something for.

        Args:
            lengths: The columns of tensors, by name.

        Raises:
            ModelFileError: There is nothing for any of the layers, or a number of columns is another.
        """
        found: dict[str, NDArray[np.float32]] = {}
        for name, n_columns in lengths.items():
            values = self.importance.get(name)
            if values is not None and len(values) == n_columns:
                found[name] = values
            elif values is not None and name != "token_embd.weight":  # as llama.cpp, which only passes over that one
                raise ModelFileError(
                    f"{self.path}: has {len(values)} values for {name}, which has {n_columns} columns: it was made "
                    "with another model"
                )
        if not found and any(name.startswith("blk.") for name in lengths):
            raise ModelFileError(f"{self.path}: has nothing for this model's tensors: it was made with another model")
        return found


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read and check an importance matrix.

    Args:
        path: Of local-llava, or of llama.cpp's llama-imatrix, in either of its formats.

    Raises:
        ModelFileError: The file cannot be read, is something else, is cut short, or holds what cannot be.
    """
    path = Path(path)
    try:
        if path.is_file():
            if path.stat().st_size > MAX_BYTES:
                raise ModelFileError(f"{path}: has more than {MAX_BYTES >> 20} MiB: no importance matrix")
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    file.seek(0)
                    return _Legacy(path, file, path.stat().st_size).read()
        return _read_gguf(GGUFFile.open(path))
    except OSError as e:
        raise ModelFileError(f"{path}: cannot be read: {e.strerror or e}") from e


def _read_gguf(gguf: GGUFFile) -> ImportanceMatrix:
    datasets, n_chunks = gguf.metadata.get(DATASETS), gguf.metadata.get(CHUNK_COUNT)
    kinds = [gguf.types.get(key) for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE)]
    if kinds != ["arr[str]", "u32", "u32"] or not isinstance(datasets, list) or not isinstance(n_chunks, int):
        raise ModelFileError(
            f"{gguf.path}: is a GGUF, but no importance matrix: {DATASETS}, {CHUNK_COUNT} and {CHUNK_SIZE} are wanted, "
            "as local-llava imatrix and llama-imatrix write them"
        )
    names = {name.removesuffix(SUMS): None for name in gguf.tensors if name.endswith(SUMS)}
    names |= {name.removesuffix(COUNTS): None for name in gguf.tensors if name.endswith(COUNTS)}
    if not names:
        raise ModelFileError(f"{gguf.path}: is an importance matrix without tensors")
    importance = {name: _mean(gguf, name) for name in sorted(names)}
    return ImportanceMatrix(gguf.path, importance, tuple(datasets), n_chunks)


def _mean(gguf: GGUFFile, name: str) -> NDArray[np.float32]:
    """The mean squares of a tensor's inputs, as llama-quantize computes them; 1 where there were none."""
    infos = [gguf.tensors.get(name + suffix) for suffix in (SUMS, COUNTS)]
    if None in infos:
        missing = name + (SUMS, COUNTS)[infos.index(None)]
        raise ModelFileError(f"{gguf.path}: tensor {missing!a} is missing")
    sums, counts = (_load(gguf, info) for info in infos if info is not None)
    if len(sums) % len(counts):
        raise ModelFileError(f"{gguf.path}: {name + SUMS!a} has {len(sums)} values, for {len(counts)} matrices")
    # As std::lround: halves are rounded up, and none is negative.
    whole = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, np.newaxis]
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(whole > 0, sums.reshape(len(counts), -1) / whole, np.float32(1))
    return _checked(gguf.path, name, means.reshape(-1).astype(np.float32))


def _load(gguf: GGUFFile, info: TensorInfo) -> NDArray[np.float32]:
    if TYPES[info.type].name != "F32":
        raise ModelFileError(f"{gguf.path}: tensor {info.name!a} is {TYPES[info.type].name}; F32 is wanted")
    values = np.fromfile(gguf.path, "<f4", info.nbytes // 4, offset=info.offset)
    if 4 * len(values) != info.nbytes:
        raise ModelFileError(f"{gguf.path}: ends inside tensor {info.name!a}: it shrank while it was read")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ModelFileError(f"{gguf.path}: tensor {info.name!a} has values that are no sums of squares; damaged")
    return values.astype(np.float32, copy=False)


class _Legacy:
    """One pass over a file of the older format."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.left = path, file, size

    def read(self) -> ImportanceMatrix:
        n_entries = self.number("the number of entries")
        if not 1 <= n_entries <= MAX_ENTRIES:
            raise ModelFileError(
                f"{self.path}: is not an importance matrix, neither as GGUF nor in llama.cpp's older form"
            )
        importance = dict(self.entries(n_entries))
        if len(importance) < n_entries:
            raise ModelFileError(f"{self.path}: a tensor appears twice")
        n_chunks = self.number("the number of chunks") if self.left else 0
        length = self.number("a dataset's name") if self.left else 0
        if n_chunks < 0 or not 0 <= length <= self.left:
            raise ModelFileError(f"{self.path}: says nothing that can be of what it was made with; damaged")
        dataset = self.take(length, "a dataset's name").decode("utf-8", "surrogateescape")
        return ImportanceMatrix(self.path, importance, (dataset,) if dataset else (), n_chunks)

    def entries(self, n: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for i in range(n):
            length = self.number(f"entry {i}")
            if not 1 <= length <= MAX_NAME:
                raise ModelFileError(
                    f"{self.path}: entry {i} has a name of {length} bytes; 1 to {MAX_NAME} are accepted"
                )
            name = self.take(length, f"entry {i}").decode("utf-8", "surrogateescape")
            if not name.isprintable():
                raise ModelFileError(f"{self.path}: entry {i} is called {name!a}, which is no tensor's name")
            n_calls, n_values = self.number(f"entry {name!a}"), self.number(f"entry {name!a}")
            if n_calls < 0 or n_values < 1:
                raise ModelFileError(f"{self.path}: entry {name!a} has {n_values} values of {n_calls} calls; damaged")
            values = np.frombuffer(self.take(4 * n_values, f"entry {name!a}"), "<f4").astype(np.float32)
            # llama-imatrix multiplied by it; files of others may have 0 there.
            with np.errstate(invalid="ignore"):  # damaged files hold signalling NaNs; `_checked` names what is none
                means = values / np.float32(n_calls) if n_calls else values
            yield name, _checked(self.path, name, means)

    def number(self, what: str) -> int:
        (value,) = struct.unpack("<i", self.take(4, what))
        return int(value)

    def take(self, n: int, what: str) -> bytes:
        data = self.file.read(n) if n <= self.left else b""
        self.left -= n
        if len(data) < n:
            raise ModelFileError(f"{self.path}: ends inside {what}: cut short, or no importance matrix")
        return data


def _checked(path: Path, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What ggml computes with: contiguous, nothing that it would abort on."""
    bad = ~((values >= 0) & (values <= MAX_IMPORTANCE))
    if bad.any():
        column = int(bad.argmax())
        raise ModelFileError(
            f"{path}: {name!a}, column {column}: {values[column]:g} is no importance; 0 to {MAX_IMPORTANCE:.3g} are "
            "accepted"
        )
    return np.ascontiguousarray(values)


def _short(text: str) -> bytes:
    """As much of a text as the metadata gets, without half a character at its end."""
    data = text.encode(errors="surrogateescape")
    end = min(len(data), _MAX_STRING)
    while end < len(data) and end and data[end] & 0xC0 == 0x80:
        end -= 1
    return data[:end]


def some(names: Iterable[str]) -> str:
    """How many tensors, and which the first is."""
    first, *rest = names
    return f"{1 + len(rest)} tensor{'s' * bool(rest)} ({first}{', ...' * bool(rest)})"
