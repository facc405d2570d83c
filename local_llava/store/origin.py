"""What a kept pair says about itself: origin.json in its directory.

Knows the file's format, and when a directory holds a complete pair. Does not know where such directories are (`store`).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

from local_llava.errors import OutputError
from local_llava.types import ModelFiles

ORIGIN = "origin.json"
_FORMAT = 1
_MAX_BYTES = 1 << 16
_NAME = re.compile(r"[^\x00-\x1f/\\:]{1,200}\.gguf")


class DamagedError(Exception):
    """A directory holds no complete pair; the message says why, without the directory."""


@dataclass(frozen=True)
class Origin:
    """What a pair is, and what it was made from. The content of origin.json, besides files, version and date."""

    kind: Literal["converted", "downloaded"]
    name: str
    """What it is called: the name in the model list, else the repository (owner/name), else the checkpoint's name."""
    quant: str
    """Type of the language model, such as Q4_K_M."""
    mmproj_quant: str
    source: str
    """For people: the checkpoint's path, or the repository's address."""
    repository: str | None = None
    """owner/name, where it comes from the Hub."""
    revision: str | None = None
    """The commit there, 40 hex digits."""
    digest: str | None = None
    """Of the source, as `source_digest` gives it."""
    model_sha256: str | None = None
    """Of the language model's file, 64 hex digits, where it is known."""
    mmproj_sha256: str | None = None


@dataclass(frozen=True)
class Pair:
    """A complete pair in the store."""

    key: str
    directory: Path
    origin: Origin
    files: ModelFiles
    size: int
    """Bytes of both files."""
    created: datetime
    version: str
    """Of the local-llava that made it."""


def read_pair(directory: Path) -> Pair:
    """Read a pair's description, and check that both files are there in full length.

    Raises:
        DamagedError: They are not, or the description cannot be used.
    """
    values = read_json(directory / ORIGIN)
    if values.get("format") != _FORMAT:
        raise DamagedError(f"{ORIGIN}: format must be {_FORMAT}, not {values.get('format')!a:.40}")
    texts = {f.name: values.get(f.name) for f in fields(Origin)}
    required = [f.name for f in fields(Origin) if "None" not in str(f.type)]
    for name, text in texts.items():
        if not (isinstance(text, str) and len(text) <= 4096) and (name in required or text is not None):
            raise DamagedError(f"{ORIGIN}: {name} must be a text, not {text!a:.40}")
    if texts["kind"] not in ("converted", "downloaded"):
        raise DamagedError(f"{ORIGIN}: kind must be converted or downloaded, not {texts['kind']!a:.40}")
    files = [_check_file(directory, values, part) for part in ("model", "mmproj")]
    try:
        created = datetime.fromisoformat(str(values.get("created")))
    except ValueError as e:
        raise DamagedError(f"{ORIGIN}: created must be a date, not {values.get('created')!a:.40}") from e
    return Pair(
        key=directory.name,
        directory=directory,
        origin=Origin(**cast(Any, texts)),
        files=ModelFiles(*(path for path, _ in files)),
        size=sum(size for _, size in files),
        created=created if created.tzinfo else created.replace(tzinfo=timezone.utc),
        version=str(values.get("version"))[:40],
    )


def _check_file(directory: Path, values: dict[str, Any], part: str) -> tuple[Path, int]:
    entry = values.get(part)
    name, size = (entry.get("file"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or type(size) is not int:
        raise DamagedError(f"{ORIGIN}: {part} must have the name and the bytes of a GGUF file, not {entry!a:.80}")
    path = directory / name
    try:
        there = path.stat().st_size
    except OSError as e:
        raise DamagedError(f"{name} cannot be read: {e.strerror}") from e
    if there != size:
        raise DamagedError(f"{name} has {there} bytes; there were {size}")
    return path, size


def write_origin(directory: Path, origin: Origin, files: ModelFiles) -> None:
    """Write origin.json beside the two files, at once and for good.

    Raises:
        OutputError: A file is not there, or origin.json cannot be written.
    """
    from local_llava import __version__

    try:
        entries = {
            part: {"file": path.name, "bytes": (directory / path.name).stat().st_size}
            for part, path in (("model", files.model), ("mmproj", files.mmproj))
        }
    except OSError as e:
        raise OutputError(f"{e.filename}: cannot be kept: {e.strerror}") from e
    created = datetime.now(timezone.utc).isoformat()
    values = {"format": _FORMAT, **asdict(origin), **entries, "created": created, "version": __version__}
    write_json(directory / ORIGIN, values)


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object.

    Raises:
        DamagedError: The file is not there, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise DamagedError(f"{path.name} has more than {_MAX_BYTES} bytes")
        values = json.loads(data)
    except FileNotFoundError as e:
        raise DamagedError(f"{path.name} is missing") from e
    except OSError as e:
        raise DamagedError(f"{path.name} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DamagedError(f"{path.name} is not valid JSON") from e
    if not isinstance(values, dict):
        raise DamagedError(f"{path.name} must hold a JSON object")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file that is there as a whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as e:
        raise OutputError(f"cannot write {path}: {e.strerror or e}") from e
