"""Digests of checkpoints and model files, to find again what was made of them.

Knows which files a conversion reads, and how much of a large file must be looked at. Does not know what they mean.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from local_llava.errors import CheckpointError, ModelFileError

_SMALL = (".json", ".jinja", ".model", ".txt", ".md")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")

_WHOLE_BYTES = 64 << 20
"""Files up to this size are read whole."""
_HEADER_BYTES = 1 << 20
_N_BLOCKS, _BLOCK_BYTES = 256, 4096

_MAX_DEPTH, _MAX_FILES = 2, 10_000

_SHA256 = re.compile("[0-9a-f]{64}")


def source_digest(*directories: Path) -> str:
    """A digest of a checkpoint, and of the parts that lie outside it; the same wherever they lie.

    Configurations, tokenizers and all files up to 64 MB are read whole. Reading 16 GB of weights to find what was made
    of them would take as long as making it anew, so of a larger file its size, the first megabyte (which holds the
    header of a safetensors file), 256 blocks of 4 kB at equal distances, and the last of them are looked at: whoever
    changes only some numbers in between, and nothing else, has to remove the kept pair. In the Hub's cache, a weight
    file's link has the SHA-256 of the file in its target's name, which is taken instead.

    Args:
        directories: Of the checkpoint and its companions.

    Returns:
        64 hex digits.

    Raises:
        CheckpointError: A file cannot be read.
    """
    total = hashlib.sha256(b"1")  # the version of this method
    for directory in directories:
        total.update(b"directory")
        try:
            for path in _files(directory):
                name = path.relative_to(directory).as_posix().encode(errors="surrogateescape")
                total.update(hashlib.sha256(name).digest() + _content_digest(path))
        except OSError as e:
            raise CheckpointError(f"{e.filename or directory}: cannot be read: {e.strerror}") from e
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """A digest of a model file, for the keys of what was computed with it.

    Up to 64 MB are read whole, and of a larger file what `source_digest` looks at, which takes milliseconds. Its size
    and the time of its last change enter as well, so that an edit in place is noticed also between the blocks that are
    read, unless whoever makes it sets the time back. So a copy has another digest where its time is not kept, and what
    was computed with the original is computed anew.

    Returns:
        64 hex digits.

    Raises:
        ModelFileError: The file cannot be read.
    """
    try:
        status = path.stat()
        content = _content_digest(path)
    except OSError as e:
        raise ModelFileError(f"{path}: cannot be read: {e.strerror or e}") from e
    return hashlib.sha256(f"1 {status.st_size} {status.st_mtime_ns} ".encode() + content).hexdigest()


def _files(directory: Path) -> list[Path]:
    """Those that a conversion may read, in a fixed order."""
    found = sorted(_walk(directory, 0))
    if len(found) > _MAX_FILES:
        raise CheckpointError(f"{directory}: more than {_MAX_FILES} files: not the directory of a checkpoint")
    return found


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    with os.scandir(directory) as entries:
        for entry in entries:
            path = directory / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if depth < _MAX_DEPTH:
                    yield from _walk(path, depth + 1)
            elif path.suffix in (*_SMALL, *_WEIGHTS) and entry.is_file():
                yield path


def _content_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    size = path.stat().st_size
    if size > _WHOLE_BYTES and path.is_symlink():
        target = path.resolve()
        if target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
            return bytes.fromhex(target.name)
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.digest()
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_HEADER_BYTES))
        for i in range(_N_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * (i + 1) // _N_BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.digest()
