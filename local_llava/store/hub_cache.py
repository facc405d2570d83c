"""What the Hugging Face cache on this computer holds. Never asks the network, and never changes the cache.

Knows the cache's layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Does not know what is done
with a repository's files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
_MAX_INDEX_BYTES = 64 << 20


def snapshots(repository: str) -> list[Path]:
    """The directories in which a repository's files lie, each a commit: that of its main branch first, then the newest.

    Args:
        repository: owner/name, in any case of letters.
    """
    directory = _directory(repository)
    if directory is None:
        return []
    try:
        main = (directory / "refs" / "main").read_text(encoding="ascii", errors="replace").strip()[:64]
    except OSError:
        main = ""
    try:
        found = [(path.name == main, path.stat().st_mtime, path) for path in (directory / "snapshots").iterdir()]
    except OSError:
        return []
    return [path for *_, path in sorted(found, reverse=True) if path.is_dir()]


def is_complete(snapshot: Path) -> bool:
    """Whether the weight files are there, all that indexes name or else any: a download may have been cut."""
    try:
        indexes = [*_find(snapshot, "*.index.json")]
        for index in indexes:
            if index.stat().st_size > _MAX_INDEX_BYTES:
                return False
            shards = set(json.loads(index.read_bytes())["weight_map"].values())
            if not all((index.parent / shard).is_file() for shard in shards):
                return False
        # A link whose file is missing is no file.
        return any(path.is_file() for pattern in _WEIGHTS for path in _find(snapshot, pattern))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _find(snapshot: Path, pattern: str) -> Iterator[Path]:
    """In a snapshot and, as XTuner has them, in directories of it."""
    yield from snapshot.glob(pattern)
    yield from snapshot.glob(f"*/{pattern}")


def _directory(repository: str) -> Path | None:
    from huggingface_hub import constants

    wanted = f"models--{repository.replace('/', '--')}".lower()
    try:
        # The Hub tells names apart by letters only, not by their case; a directory's name has the case that was typed.
        found = [path for path in Path(constants.HF_HUB_CACHE).iterdir() if path.name.lower() == wanted]
    except OSError:
        return None
    return found[0] if found else None
