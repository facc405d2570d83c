from __future__ import annotations

from pathlib import Path

from local_llava.convert.source import StoredTensor
from local_llava.errors import CheckpointError


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    raise CheckpointError(f"{path}: PyTorch's format is not supported yet")
