"""Where the bytes of a picture come from: a path, a URL, a data URL, bytes, a file object, standard input.

Knows how each is named and how much of it is read. Knows no picture format; http is `fetch`'s.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from local_llava.errors import ImageError

ByteSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]

MAX_BYTES = 256 << 20
"""Most bytes that are read of a picture, wherever it comes from, decoded from base64."""

_PAGE = re.compile(r"#page=([0-9]{1,9})\Z")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True)
class Encoded:
    """A picture's file, wherever it came from."""

    data: bytes
    where: str
    """Names it in errors; secrets of a URL are left out."""
    page: int | None = None
    """The page that was asked for with `#page=`, from 1."""


def read_source(source: ByteSource, *, remote: bool = True, local: bool = True) -> Encoded:
    """Read all bytes of a picture.

    Args:
        source: A path, which may end in `#page=3`; as text also an http(s) URL, a data URL, or "-" for standard input.
            Bytes, or a file object that gives bytes, which is read from where it stands and not closed.
        remote: Whether an http(s) URL may be fetched.
        local: Whether text and paths may name what is on this computer: files and standard input.

    Raises:
        ImageError: It cannot be read, is larger than MAX_BYTES, is not allowed, or is nothing of this kind.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _bounded(bytes(source), "bytes")
    if isinstance(source, (str, os.PathLike)):
        return _read_text(source, remote, local) if isinstance(source, str) else _read_path(os.fspath(source), local)
    if hasattr(source, "read"):
        return _read_file_object(source)
    raise ImageError(
        f"a picture cannot be given as {type(source).__name__}; accepted are a path, a URL, bytes, a binary file, "
        "a PIL image and a numpy array"
    )


def printable(text: str, most: int = 1000) -> str:
    """Text for an error: one line, without control characters, not endless."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _read_text(text: str, remote: bool, local: bool) -> Encoded:
    start = text[:8].lower()
    if start.startswith("data:"):
        return _read_data_url(text)
    if start.startswith(("http://", "https://")):
        return _read_url(text, remote)
    if text == "-":
        return _read_stdin(local)
    return _read_path(text, local)


def _read_path(name: str, local: bool) -> Encoded:
    if not local:
        raise ImageError("files of this computer are not accepted here; accepted are data URLs and URLs")
    # A file that has such a name is meant; else the end picks a page.
    found = _PAGE.search(name)
    page = None
    if found and not os.path.lexists(name):
        name, page = name[: found.start()], int(found[1])
    where = printable(name)
    try:
        with Path(name).open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise _too_large(where)
            return _bounded(_read_all(file), where, page)
    except OSError as e:
        scheme = _SCHEME.match(name)
        if scheme and isinstance(e, FileNotFoundError):
            raise ImageError(f"{where}: a {scheme[1]} URL; accepted are http and https URLs, and paths") from e
        # Windows denies permission to open a directory.
        is_directory = isinstance(e, (IsADirectoryError, PermissionError)) and Path(name).is_dir()
        what = "a directory" if is_directory else f"cannot be read: {e.strerror or e}"
        raise ImageError(f"{where}: {what}") from e
    except ValueError as e:  # a NUL in the name
        raise ImageError(f"{where}: cannot be the name of a file") from e


def _read_url(url: str, remote: bool) -> Encoded:
    from local_llava.pictures.fetch import fetch, without_secrets

    where = printable(without_secrets(url))
    if not remote:
        raise ImageError(f"{where}: pictures are not fetched from the network here; send the picture itself")
    found = _PAGE.search(url)
    return Encoded(fetch(url, where, MAX_BYTES), where, int(found[1]) if found else None)


def _read_data_url(url: str) -> Encoded:
    """`data:[<media type>][;base64],<data>`, RFC 2397. The media type is not believed: the content decides."""
    where = "data URL"
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError(f"{where}: no comma; data:image/png;base64,... is accepted")
    data = _unquoted(body, where)
    if head.lower().endswith(";base64"):
        # Line breaks and missing padding are common, and so is base64url.
        data = data.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as e:
            raise ImageError(f"{where}: not valid base64") from e
    return _bounded(data, where)


def _unquoted(text: str, where: str) -> bytes:
    """Text with its %XX replaced: a piece at a time, since the library makes an object of each."""
    out, at = bytearray(), 0
    while at < len(text):
        end = at + (1 << 20)
        cut = text.rfind("%", end - 2, end) if end < len(text) else -1
        end = end if cut < 0 else cut
        out += urllib.parse.unquote_to_bytes(text[at:end])
        if len(out) > 2 * MAX_BYTES:  # which base64 stays below, line breaks and all
            raise _too_large(where)
        at = end
    return bytes(out)


def _read_stdin(local: bool) -> Encoded:
    where = "standard input"
    if not local:
        raise ImageError(f"{where} is not accepted here; accepted are data URLs and URLs")
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError(f"{where} is no file: pipe a picture in, as in `cat picture.png | ...`, or name one")
    try:
        return _bounded(_read_all(sys.stdin.buffer), where)
    except OSError as e:
        raise ImageError(f"{where}: cannot be read: {e.strerror}") from e


def _read_file_object(file: IO[bytes]) -> Encoded:
    name = getattr(file, "name", None)
    where = printable(name) if isinstance(name, str) else "file object"
    try:
        return _bounded(_read_all(file), where)
    except _NotBytesError as e:
        raise ImageError(f"{where}: gives {e}, not bytes; open it in binary mode (rb)") from e
    except (OSError, ValueError) as e:  # closed, written only, or bytes that are no text
        raise ImageError(f"{where}: cannot be read: {printable(str(e))}") from e


class _NotBytesError(Exception):
    """A file object gives something else; the message is its type."""


def _read_all(file: IO[bytes]) -> bytes:
    """All bytes, or one more than are accepted. One call of `read` may give fewer than there are."""
    content = bytearray()
    while len(content) <= MAX_BYTES:
        piece = file.read(MAX_BYTES + 1 - len(content))
        if not isinstance(piece, bytes):
            raise _NotBytesError(type(piece).__name__)
        if not piece:
            break
        content += piece
    return bytes(content)


def _bounded(data: bytes, where: str, page: int | None = None) -> Encoded:
    if len(data) > MAX_BYTES:
        raise _too_large(where)
    return Encoded(data, where, page)


def _too_large(where: str) -> ImageError:
    return ImageError(f"{where}: larger than {MAX_BYTES >> 20} MiB")
