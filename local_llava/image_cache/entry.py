"""One entry of the image cache: a file whose bytes are those that were written, under the name they were written for.

    magic, format version, length of `about`, length of the payload    24 bytes, little-endian
    about                                                               JSON: what `local-llava cache ls` shows
    payload
    SHA-256 of the above, and of kind and key                           last, so that it is written as it is computed

Knows the file. Does not know where it lies, how long it stays, or what the payload means.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["kv", "embeddings"]
About: TypeAlias = Mapping[str, str | int]

VERSION = 1
MAX_ABOUT = 64 << 10
"""Bytes of the longest `about`."""

_MAGIC = b"\x89LLpics\n"
_FIXED = struct.Struct("<8sIIQ")
_DIGEST_SIZE = 32
_BLOCK = 4 << 20

# SHA-256, since most processors of the last years have instructions for it: 1.6 GB/s on an AMD EPYC (Zen 3), where
# BLAKE2b comes to 0.8 GB/s. A picture of 300 MB takes 0.2 s.
_new_digest = hashlib.sha256


class DamagedError(Exception):
    """A file is no entry of this kind and key, in this version of the format."""


@dataclass(frozen=True)
class Header:
    """What an entry is, before its payload."""

    kind: Kind
    key: str
    about: bytes
    """JSON."""
    length: int
    """Bytes of the payload."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return _FIXED.size + len(self.about) + self.length + _DIGEST_SIZE

    def packed(self) -> bytes:
        """Its bytes in the file."""
        return _FIXED.pack(_MAGIC, VERSION, len(self.about), self.length) + self.about

    def digest(self) -> hashlib._Hash:
        """A digest of all but the payload."""
        return _new_digest(b"%s %s\n" % (self.kind.encode(), self.key.encode()) + self.packed())


def make_header(kind: Kind, key: str, length: int, about: About) -> Header:
    """The header of a new entry.

    Raises:
        ValueError: `about` is longer than `MAX_ABOUT` as JSON.
    """
    text = json.dumps(dict(about)).encode()
    if len(text) > MAX_ABOUT:
        raise ValueError(f"about may have {MAX_ABOUT} bytes, not {len(text)}")
    return Header(kind, key, text, length)


def write(file: RawIOBase, header: Header, payload: memoryview) -> None:
    """Write an entry to an unbuffered file.

    Args:
        file: Empty, and not under the entry's name.
        header: Of this payload.
        payload: Bytes, [header.length].

    Raises:
        OSError: It cannot be written as a whole.
    """
    digest = header.digest()
    _write_all(file, memoryview(header.packed()))
    for start in range(0, len(payload), _BLOCK):
        block = payload[start : start + _BLOCK]
        digest.update(block)
        _write_all(file, block)
    _write_all(file, memoryview(digest.digest()))


def read(path: Path, kind: Kind, key: str) -> memoryview:
    """The payload of an entry, after its digest was found right. It is in memory once.

    Raises:
        DamagedError: The file is not what was written for this kind and key.
        FileNotFoundError: There is no regular file of that name; links are not followed.
        OSError: It cannot be read.
        MemoryError: The payload does not fit.
    """
    with _open(path) as file:
        header = _read_header(file, kind, key)
        digest = header.digest()
        # Not a bytearray, which would be filled with zeros first.
        payload = np.empty(header.length, np.uint8).data
        done = 0
        while done < header.length:
            count = file.readinto(payload[done : done + _BLOCK])
            if not count:
                raise DamagedError("it is cut short")
            digest.update(payload[done : done + count])
            done += count
        if file.read(_DIGEST_SIZE) != digest.digest():
            raise DamagedError("its checksum is wrong")
    return payload


def read_header(path: Path, kind: Kind, key: str) -> Header:
    """What an entry says it is. The file has the right length, and nothing else is certain.

    Raises:
        DamagedError: The file is no entry of this version.
        FileNotFoundError: There is no regular file of that name; links are not followed.
        OSError: It cannot be read.
    """
    with _open(path) as file:
        return _read_header(file, kind, key)


def parse_about(header: Header) -> dict[str, str | int]:
    """`about` as it was given; empty if it is damaged."""
    try:
        values = json.loads(header.about)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if type(value) in (str, int)}


def _open(path: Path) -> BufferedReader:
    """Open a regular file to read it; see `read`. O_NONBLOCK: opening a pipe would wait for a writer."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    if not hasattr(os, "O_NOFOLLOW") and path.is_symlink():
        raise FileNotFoundError(errno.ENOENT, "a link", str(path))
    try:
        fd = os.open(path, flags)
    except OSError as e:
        # A link; a socket.
        if e.errno in (errno.ELOOP, errno.ENXIO):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path)) from e
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    except OSError:
        os.close(fd)
        raise
    return os.fdopen(fd, "rb")


def _read_header(file: BufferedReader, kind: Kind, key: str) -> Header:
    fixed = file.read(_FIXED.size)
    if len(fixed) < _FIXED.size:
        raise DamagedError("it is cut short")
    magic, version, n_about, length = _FIXED.unpack(fixed)
    if magic != _MAGIC or n_about > MAX_ABOUT:
        raise DamagedError("it has no header")
    if version != VERSION:
        raise DamagedError(f"it is of version {version} of the format, not {VERSION}")
    header = Header(kind, key, file.read(n_about), length)
    # Also what keeps a damaged length from asking for more memory than there is file.
    if len(header.about) != n_about or os.fstat(file.fileno()).st_size != header.size:
        raise DamagedError("it is cut short, or has another's length")
    return header


def _write_all(file: RawIOBase, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) or 0 :]
