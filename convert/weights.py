"""Finds the weight files of a checkpoint and reads what tensors are in them.

Knows how such files are named, sharded and indexed. Their formats are `safetensors_file`'s and `pickle_file`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from local_llava.convert.config import read_json
from local_llava.convert.pickle_file import read_pickle
from local_llava.convert.safetensors_file import read_safetensors
from local_llava.convert.source import StoredTensor, check_name, is_name
from local_llava.errors import CheckpointError


class _Format(NamedTuple):
    suffix: str
    whole: tuple[str, ...]
    """Names of the file where all is in one; others beside it are of other tools."""
    indexes: tuple[str, ...]
    read: Callable[[Path], dict[str, StoredTensor]]


FORMATS = (
    _Format(
        ".safetensors",
        ("model.safetensors", "adapter_model.safetensors"),
        ("model.safetensors.index.json",),
        read_safetensors,
    ),
    _Format(
        ".bin",
        ("pytorch_model.bin", "adapter_model.bin"),
        ("pytorch_model.bin.index.json",),
        read_pickle,
    ),
    _Format(".pth", (), (), read_pickle),
)
"""Where a directory holds several, the first is read."""

_NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.pth", "optimizer.pth", "scheduler.pth"}
"""Files of trainers that end as weights do."""


def has_weights(directory: Path) -> bool:
    """Whether files of a known format are there."""
    return any(_files(directory, form) for form in FORMATS)


def read_weights(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all weight files of a directory, by name; from their headers.

    Raises:
        CheckpointError: A file is missing, damaged or contradicts another; the message names it.
    """
    for form in FORMATS:
        if any((directory / name).is_file() for name in form.indexes) or _files(directory, form):
            return _read(weight_files(directory, form), form)
    raise CheckpointError(f"{directory}: no weights; *.safetensors and PyTorch's *.bin are what can be converted")


def _read(wanted: dict[Path, set[str] | None], form: _Format) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path, names in wanted.items():
        found = form.read(path)
        missing = sorted(names - found.keys()) if names is not None else []
        if missing:
            raise CheckpointError(f"{path}: {missing[0]} is missing, which the index says is in this file")
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: {twice[0]} is also in {tensors[twice[0]].path.name}")
        tensors.update(found)
    return tensors


def weight_files(directory: Path, form: _Format) -> dict[Path, set[str] | None]:
    """The files of a format, each with the names that an index promises in it (None without an index)."""
    index = next((directory / name for name in form.indexes if (directory / name).is_file()), None)
    if index is not None:
        return _indexed(index)
    files = _files(directory, form)
    for whole in form.whole:
        if directory / whole in files:
            return {directory / whole: None}
    if files and "-of-" in files[0].name:
        _check_complete(files)
    return dict.fromkeys(files)


def _files(directory: Path, form: _Format) -> list[Path]:
    return sorted(p for p in directory.glob(f"*{form.suffix}") if p.name not in _NO_WEIGHTS)


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must name the file of each tensor")
    wanted: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A shard lies beside its index: a path that leads elsewhere is no honest checkpoint.
        if not isinstance(file, str) or Path(file).name != file or not is_name(file):
            raise CheckpointError(f"{index}: weight_map[{name!a:.80}] must be a file name, not {file!a:.80}")
        check_name(index, name)
        names = wanted.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    for path in wanted:
        if not path.is_file():
            missing = sum(not p.is_file() for p in wanted)
            raise CheckpointError(f"{path}: missing shard ({missing} of {len(wanted)} are missing)")
    return wanted


def _check_complete(files: list[Path]) -> None:
    """Shards without an index still say in their names how many they are: `model-00001-of-00004.safetensors`."""
    total = files[0].stem.rpartition("-of-")[2]
    if total.isdecimal() and int(total) != len(files):
        raise CheckpointError(f"{files[0].parent}: {len(files)} of {int(total)} shards are there, and no index")
