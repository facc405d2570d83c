"""What is in a GGUF or a checkpoint, for `local-llava inspect`.

Knows how to list it and print it. The files are read by `gguf_file` and `convert.checkpoint`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_llava.convert.write import human_size
from local_llava.errors import ModelFileError
from local_llava.gguf_file import TYPES, GGUFFile

_LONGEST = 100


@dataclass(frozen=True)
class Entry:
    """One tensor."""

    name: str
    type: str
    shape: tuple[int, ...]
    """numpy's order: the row length is the last."""
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """A model file or checkpoint, without its weights."""

    path: Path
    kind: str
    metadata: Mapping[str, Any]
    tensors: tuple[Entry, ...]

    def as_json(self) -> dict[str, Any]:
        tensors = [{"name": t.name, "type": t.type, "shape": list(t.shape), "bytes": t.nbytes} for t in self.tensors]
        return {"path": str(self.path), "kind": self.kind, "metadata": dict(self.metadata), "tensors": tensors}


def read(path: Path) -> Contents:
    """Read a GGUF file, or a checkpoint's directory.

    Raises:
        ModelFileError: The file is no GGUF, or damaged.
        CheckpointError: The checkpoint is damaged.
    """
    if not path.is_dir():
        gguf = GGUFFile.open(path)
        entries = tuple(Entry(t.name, TYPES[t.type].name, t.shape, t.nbytes) for t in gguf.tensors.values())
        return Contents(path, f"GGUF version {gguf.version}", gguf.metadata, entries)
    from local_llava.convert.checkpoint import read_config
    from local_llava.convert.families import is_checkpoint
    from local_llava.convert.weights import has_weights, read_weights

    if not is_checkpoint(path):
        raise ModelFileError(f"{path}: a directory without config.json; name a GGUF file or a checkpoint")
    config = read_config(path) if (path / "config.json").is_file() else {}
    listed: tuple[Entry, ...] = ()
    # XTuner keeps each part in a directory of its own.
    for part in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        if has_weights(part):
            prefix = "" if part == path else f"{part.name}/"
            tensors = read_weights(part).values()
            listed += tuple(Entry(prefix + t.name, t.dtype, t.shape, t.nbytes) for t in tensors)
    if not listed:
        read_weights(path)  # which says what is missing
    return Contents(path, "checkpoint", config, listed)


def describe(contents: Contents) -> Iterator[str]:
    """Lines for a person: metadata, a summary of the types, and every tensor."""
    total = sum(t.nbytes for t in contents.tensors)
    yield f"{contents.path}: {contents.kind}, {len(contents.tensors)} tensors, {human_size(total)}"
    yield ""
    for key, value in contents.metadata.items():
        yield f"  {key} = {_short(value)}"
    yield ""
    sizes: Counter[str] = Counter()
    for t in contents.tensors:
        sizes[t.type] += t.nbytes
    for name, size in sizes.most_common():
        count = sum(t.type == name for t in contents.tensors)
        yield f"  {name:6} {count:5} tensors {human_size(size):>10}"
    yield ""
    width = max((len(t.name) for t in contents.tensors), default=0)
    for t in contents.tensors:
        yield f"  {t.name:{width}}  {t.type:6} {human_size(t.nbytes):>10}  {list(t.shape)}"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"[{', '.join(ascii(v) for v in value[:4])}, ... {len(value)} in all]"
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
