"""The header of a GGUF while it is put right: what was changed so far, and why.

Knows how entries are read safely from a file that nobody has checked, and nothing of what they should say: that is
`corrections` and `vocab_corrections`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from local_llava.gguf_file import GGUFFile

_BOUNDS = {
    name: (-(1 << bits - 1), (1 << bits - 1) - 1) if name[0] == "i" else (0, (1 << bits) - 1)
    for bits in (8, 16, 32, 64)
    for name in (f"u{bits}", f"i{bits}")
}
"""Whole numbers by type, as `GGUFFile.types` names it."""


_F32 = struct.Struct("<f")


@dataclass(frozen=True)
class Correction:
    """One thing that a file gets wrong."""

    key: str
    """Of the metadata; or the name of a tensor."""
    old: Any
    """Its value; None where it is missing."""
    new: Any
    """What it should be."""
    why: str
    """What shows that, and what comes of it."""
    on_disk: bool = False
    """llama.cpp reads this from the file and from nowhere else: only a repaired file can be loaded."""

    def __str__(self) -> str:
        if self.old == self.new:
            return _printable(f"{self.key} {self.why}")
        old, new = ascii(self.old), ascii(self.new)
        state = "is missing" if self.old is None else f"is {old}" if len(old) <= 60 else "is wrong"
        return _printable(f"{self.key} {state}{f', taken as {new}' if len(new) <= 60 else ''}: {self.why}")


class Draft:
    """A header that can be changed, with a list of what was.

    Attributes:
        metadata: Entries by key, as of `GGUFFile`.
        types: Their types.
        corrections: What was changed.
        notes: What looks wrong, but cannot be proved; one line each.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self._original = gguf
        self.metadata, self.types, self.tensors = dict(gguf.metadata), dict(gguf.types), dict(gguf.tensors)
        self.corrections: list[Correction] = []
        self.notes: list[str] = []

    @property
    def gguf(self) -> GGUFFile:
        """The file as it should be. Its `overrides` are the entries that differ from the file on the disk."""
        old = self._original
        changed = {
            key: value
            for key, value in self.metadata.items()
            if key not in old.metadata or old.types[key] != self.types[key] or old.metadata[key] is not value
        }
        views: list[Mapping[str, Any]] = [
            MappingProxyType(view) for view in (self.metadata, self.types, self.tensors, changed)
        ]
        metadata, types, tensors, overrides = views
        return replace(old, metadata=metadata, types=types, tensors=tensors, overrides=overrides)

    def get(self, key: str, kind: str) -> Any:
        """The value of an entry, or None if there is none of that type."""
        return self.metadata[key] if self.types.get(key) == kind else None

    def set(self, key: str, kind: str, value: Any, why: str, on_disk: bool = False) -> None:
        """Give an entry its right value and type."""
        self.corrections.append(Correction(key, self.metadata.get(key), value, why, on_disk))
        self.metadata[key], self.types[key] = value, kind

    def retype(self, key: str, kind: str) -> None:
        """Store an entry as the type that llama.cpp takes for it, if that can hold its value exactly."""
        stored = self.types.get(key)
        if stored in (None, kind):
            return
        value = self.metadata[key]
        new: list[Any] = [_as(item, kind.removeprefix("arr[").removesuffix("]")) for item in _listed(value)]
        is_array = kind.startswith("arr[")
        if is_array == isinstance(value, list) and None not in new:
            why = f"is stored as {stored}; llama.cpp takes only {kind}"
            self.set(key, kind, new if is_array else new[0], why, on_disk=is_array)

    def note(self, text: str) -> None:
        """Tell what looks wrong."""
        self.notes.append(_printable(text))

    def rename(self, keys: Mapping[str, str], correction: Correction) -> None:
        """Move entries to their right keys. It is one correction; the order stays."""
        self.metadata = {keys.get(key, key): value for key, value in self.metadata.items()}
        self.types = {keys.get(key, key): kind for key, kind in self.types.items()}
        self.corrections.append(correction)

    def rename_tensors(self, names: Mapping[str, str], correction: Correction) -> None:
        """Give tensors other names, all at once."""
        self.tensors = {
            names.get(name, name): replace(info, name=names.get(name, name)) for name, info in self.tensors.items()
        }
        self.corrections.append(correction)


def _printable(text: str) -> str:
    """Text for one line, with parts from a file that nobody has checked."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as(value: Any, kind: str) -> Any:
    """A number as another type, or None if that does not hold it."""
    if kind == "bool":
        return bool(value) if isinstance(value, int) and value in (0, 1) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if kind == "f32":
        fits = math.isfinite(value) and abs(value) < 3e38
        return _F32.unpack(_F32.pack(value))[0] if fits else None
    low, high = _BOUNDS.get(kind, (0, -1))
    return value if isinstance(value, int) and low <= value <= high else None
