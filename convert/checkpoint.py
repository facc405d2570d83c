"""Reads checkpoints: a directory with config.json and safetensors, single or sharded.

Knows files, dtypes and offsets. Does not know what a tensor means (`families`).

Weights are read by offset into buffers of a few megabytes, never mapped: mapped pages count as resident memory, and
a conversion promises to need little. Format: https://huggingface.co/docs/safetensors#format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from local_llava import ggml, ggml_rows
from local_llava.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is read whole; a real tokenizer.json has 9 MB."""

MAX_NAME = 200
"""Bytes in the name of a tensor or a shard; real ones have less than a hundred."""

FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""safetensors dtypes that weights may have, with what numpy reads them as."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file cannot be read, is larger than 64 MB, or is not a JSON object of Unicode text.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} that a JSON file may have")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if _SURROGATE.search(text):
            # Halves of a pair are no text: they could be neither written to a GGUF nor shown.
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{path}: not valid JSON: \\u{ord(e.object[e.start]):04x} is half of a character") from e
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e).splitlines()[0]
        raise CheckpointError(f"{path}: not valid JSON: {reason}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file, not yet read."""

    name: str
    dtype: str
    """As safetensors names it: F32, F16, BF16, I64, ..."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Of the first byte in the file."""
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start to stop of the tensor seen as [n_rows, row_length], as float32.

        Raises:
            CheckpointError: The dtype is not F32, F16 or BF16, or the file no longer holds the bytes it did.
        """
        dtype = FLOATS.get(self.dtype)
        if dtype is None:
            raise CheckpointError(f"{self}: dtype {self.dtype} is not supported; F32, F16 and BF16 are")
        row_length = self.shape[-1]
        raw = np.empty((stop - start, row_length), dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset + start * row_length * dtype.itemsize)
                _read_fully(file, raw.data.cast("B"))
        except OSError as e:
            raise CheckpointError(f"{self}: cannot be read: {e.strerror}") from e
        except EOFError as e:
            raise CheckpointError(f"{self}: the file ended before the tensor did; was it changed?") from e
        if self.dtype == "BF16":  # bfloat16 is the upper half of a float32
            return np.asarray((raw.astype(np.uint32) << 16).view(np.float32))
        if self.dtype == "F16":  # faster than numpy
            return np.reshape(ggml_rows.dequantize(ggml.F16, raw.view(np.uint8)), raw.shape)
        return np.asarray(raw, np.float32)


def _read_fully(file: Any, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError
        buffer = buffer[count:]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory: its configuration, and its tensors by name."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read config.json and the headers of all weight files; no weights.

        Raises:
            CheckpointError: A file is missing, damaged or contradicts another; the message names it.
        """
        if not directory.is_dir():
            kind = "a file" if directory.exists() else "nothing"
            raise CheckpointError(f"{directory}: {kind} is there; a directory with a checkpoint is needed")
        config_path = directory / "config.json"
        if not config_path.is_file():
            hint = (
                "; this directory holds GGUF files, which need no conversion" if any(directory.glob("*.gguf")) else ""
            )
            raise CheckpointError(f"{directory}: no config.json, so this is no transformers checkpoint{hint}")
        config = read_json(config_path)
        tensors: dict[str, SourceTensor] = {}
        wanted = _weight_files(directory)
        for path, names in wanted.items():
            found = read_safetensors(path)
            missing = sorted(names - found.keys()) if names is not None else []
            if missing:
                raise CheckpointError(f"{path}: {missing[0]} is missing, which the index says is in this file")
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                raise CheckpointError(f"{path}: {twice[0]} is also in {tensors[twice[0]].path.name}")
            tensors.update(found)
        return cls(directory, config, tensors)


def is_checkpoint(directory: Path) -> bool:
    """True for a directory that looks like a checkpoint: it has a config.json."""
    return (directory / "config.json").is_file()


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files, each with the names that an index promises in it (None without an index)."""
    index_path = directory / "model.safetensors.index.json"
    if not index_path.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pth")])
            also = f" ({pickled[0].name} is in PyTorch's pickle format)" if pickled else ""
            raise CheckpointError(f"{directory}: no *.safetensors file{also}; safetensors are what can be converted")
        single = directory / "model.safetensors"
        if single in files:
            return {single: None}
        if "-of-" in files[0].name:
            _check_complete(files)
        return dict.fromkeys(files)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map must name the file of each tensor")
    wanted: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A shard lies beside its index: a path that leads elsewhere is no honest checkpoint.
        if not isinstance(file, str) or Path(file).name != file or not _is_name(file):
            raise CheckpointError(f"{index_path}: weight_map[{name!a:.80}] must be a file name, not {file!a:.80}")
        if not _is_name(name):
            raise _bad_name(index_path, name)
        names = wanted.setdefault(directory / file, set())
        assert names is not None
        names.add(name)
    for path in wanted:
        if not path.is_file():
            missing = sum(not p.is_file() for p in wanted)
            raise CheckpointError(f"{path}: missing shard ({missing} of {len(wanted)} are missing)")
    return wanted


def _is_name(text: str) -> bool:
    """Whether a text can be a name that is shown on one line; as a file's, on every system."""
    return text.isprintable() and 1 <= len(text.encode()) <= MAX_NAME and text not in (".", "..")


def _bad_name(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: names a tensor {name!a:.80}; names of 1 to {MAX_NAME} bytes of printable text are accepted"
    )


def _check_complete(files: list[Path]) -> None:
    """Shards without an index still say in their names how many they are: `model-00001-of-00004.safetensors`."""
    total = files[0].stem.rpartition("-of-")[2]
    if total.isdecimal() and int(total) != len(files):
        raise CheckpointError(f"{files[0].parent}: {len(files)} of {int(total)} shards are there, and no index")


def read_safetensors(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a safetensors file, from its header; the safetensors library checks that header first.

    Raises:
        CheckpointError: The file cannot be read, or is damaged or truncated.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path}: is not a regular file")
    try:
        # Checks the header's size, that it is JSON, and that the tensors fill the rest of the file without overlap.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: a header of {length} bytes; at most {MAX_JSON_BYTES} are accepted")
            header = json.loads(file.read(length))
    except SafetensorError as e:
        reason = ascii(str(e))[1:-1]  # it quotes names from the file
        raise CheckpointError(f"{path}: not a whole safetensors file: {reason:.200}") from e
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not a whole safetensors file: its header is no JSON") from e
    header.pop("__metadata__", None)
    for name in header:
        if not _is_name(name):
            raise _bad_name(path, name)
    return {
        name: SourceTensor(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + start, stop - start)
        for name, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }
