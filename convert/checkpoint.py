"""Reads checkpoints: a directory with config.json and weights.

Knows what a checkpoint consists of. Its files are `config`'s and `weights`'s; what a tensor means, `families`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from local_llava.convert.config import Config, read_json
from local_llava.convert.float8 import with_scales
from local_llava.convert.source import SourceTensor
from local_llava.convert.weights import read_weights
from local_llava.errors import CheckpointError

ReadWeights: TypeAlias = Callable[[Path], Mapping[str, SourceTensor]]
"""Gives the tensors of a directory by name, as `read_weights` does."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory: its configuration, and its tensors by name."""

    directory: Path
    values: Mapping[str, Any]
    """Of config.json; empty where the file is, as in old repositories of XTuner."""
    tensors: Mapping[str, SourceTensor]

    @property
    def config(self) -> Config:
        """config.json."""
        return Config(self.directory / "config.json", self.values)

    @classmethod
    def open(cls, directory: Path, read: ReadWeights = read_weights) -> Checkpoint:
        """Read config.json and the headers of all weight files; no weights.

        Args:
            directory: The checkpoint.
            read: What reads the headers.

        Raises:
            CheckpointError: A file is missing, damaged or contradicts another; the message names it.
        """
        return cls(directory, read_config(directory), with_scales(read(directory)))


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    path = check_directory(directory) / "config.json"
    if not path.is_file():
        hint = "; this directory holds GGUF files, which need no conversion" if any(directory.glob("*.gguf")) else ""
        raise CheckpointError(f"{directory}: no config.json, so this is no checkpoint{hint}")
    return read_json(path) if path.stat().st_size else {}


def check_directory(directory: Path) -> Path:
    """The directory of a checkpoint.

    Raises:
        CheckpointError: It is none.
    """
    if not directory.is_dir():
        kind = "a file" if directory.exists() else "nothing"
        raise CheckpointError(f"{directory}: {kind} is there; a directory with a checkpoint is needed")
    return directory
