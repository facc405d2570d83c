"""The pictures of a request, by whatever it names them -> their bytes, as far as the server was told to let them in.

Knows what strangers may name: data URLs always, http(s) URLs of public servers and files below one directory if the
server was started so. How a URL is fetched is `pictures.fetch`'s; nothing is decoded here.
"""

from __future__ import annotations

import os
import re
import stat
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import anyio
import anyio.to_thread

from local_llava.errors import ImageError, UsageError
from local_llava.pictures import fetch
from local_llava.pictures.sources import printable, read_source
from local_llava.server.addresses import is_public
from local_llava.server.backend import Job
from local_llava.server.errors import RequestError
from local_llava.server.settings import ServerSettings
from local_llava.types import Message

_PAGE = re.compile(r"#page=0*1\Z")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_MAX_URL = 8192
"""Characters of a URL or path that is no data URL."""
_THREADS = 8
"""That read pictures at the same time. Slow servers must not take those that the rest of the server works with."""


class ImagePolicy:
    """What pictures a request may name, by the server's settings."""

    def __init__(self, settings: ServerSettings) -> None:
        """
        Raises:
            UsageError: The media root is no directory.
        """
        self._settings = settings
        self._limiter = anyio.CapacityLimiter(_THREADS)
        self._root = None
        if settings.media_root is not None:
            self._root = settings.media_root.resolve()
            if not self._root.is_dir():
                raise UsageError(f"--media-root: {settings.media_root} is no directory")

    async def resolve(self, job: Job) -> Job:
        """The job with the bytes of its pictures. Bytes that it has already stay as they are.

        Raises:
            RequestError: It has more pictures than `max_images`, or more bytes of them than `max_body_bytes`.
            ImageError: A picture is not allowed, or cannot be read or fetched.
        """
        pictures = [picture for message in job.messages for picture in message.images]
        if len(pictures) > self._settings.max_images:
            raise RequestError(
                f"the request has {len(pictures)} pictures; at most {self._settings.max_images} are accepted",
                param="messages",
                code="too_many_images",
            )
        if not any(isinstance(picture, str) for picture in pictures):
            return job
        # A thread that is left behind ends by itself, at the latest when the time for fetching is over.
        read = await anyio.to_thread.run_sync(self._read_all, pictures, abandon_on_cancel=True, limiter=self._limiter)
        return replace(job, messages=_with_pictures(job.messages, read))

    def _read_all(self, pictures: Sequence[Any]) -> list[Any]:
        """Each picture's bytes, in a thread. One that is named twice is read once."""
        end = time.monotonic() + fetch.MAX_SECONDS
        known: dict[str, bytes] = {}
        room = self._settings.max_body_bytes
        for number, name in enumerate(pictures, 1):
            if isinstance(name, str) and name not in known:
                try:
                    known[name] = self._read(name, room, end)
                except ImageError as e:
                    raise ImageError(f"picture {number}: {e}" if len(pictures) > 1 else str(e)) from e
                room -= len(known[name])
        return [known[name] if isinstance(name, str) else name for name in pictures]

    def _read(self, name: str, room: int, end: float) -> bytes:
        """The bytes that one name stands for, at most `room` of them, by the moment `end`."""
        start = name[:8].lower()
        if start.startswith("data:"):
            data = read_source(name, remote=False, local=False).data
            if len(data) > room:
                raise _too_large(self._settings)
            return data
        if len(name) > _MAX_URL:
            raise ImageError(f"a picture's URL has at most {_MAX_URL} characters; {self._accepted()}")
        if start.startswith(("http://", "https://")):
            return self._fetch(_first_page(name), room, end)
        scheme = _SCHEME.match(name)
        if scheme and not start.startswith("file:") and not _has_drive(name):
            raise ImageError(f"a picture cannot be named by a {scheme[1]:.40} URL; {self._accepted()}")
        if self._root is None:
            raise ImageError(f"files of this computer are not accepted here; {self._accepted()}")
        name = _first_page(name)
        return self._read_file(self._root, _path_of(name) if scheme and scheme[1].lower() == "file" else name, room)

    def _fetch(self, url: str, room: int, end: float) -> bytes:
        where = printable(fetch.without_secrets(url), 200)
        if not self._settings.allow_remote_images:
            raise ImageError(f"{where}: pictures are not fetched from the network here; {self._accepted()}")
        left = max(end - time.monotonic(), 0.0)
        return fetch.fetch(url, where, max(room, 0), allowed=is_public, max_seconds=left)

    def _read_file(self, root: Path, name: str, room: int) -> bytes:
        where = printable(name, 200)
        try:
            data = _read_below(root, name, room + 1)
        except (OSError, ValueError, RuntimeError) as e:  # the last one is pathlib's for links in a circle
            raise ImageError(f"{where}: cannot be read: {getattr(e, 'strerror', None) or 'no name of a file'}") from e
        if data is None:
            # The same for what is outside, whether it exists or not.
            raise ImageError(f"{where}: not a file below the directory that --media-root names")
        if len(data) > room:
            raise _too_large(self._settings)
        return data

    def _accepted(self) -> str:
        """What may be sent instead, in words."""
        words = ["data URLs (data:image/png;base64,...)"]
        words += ["http and https URLs"] * self._settings.allow_remote_images
        words += ["files below the media root"] * (self._root is not None)
        return f"accepted are {', '.join(words)}"


def _with_pictures(messages: Sequence[Message], pictures: list[Any]) -> list[Message]:
    changed, at = [], 0
    for message in messages:
        end = at + len(message.images)
        changed.append(replace(message, images=tuple(pictures[at:end])) if message.images else message)
        at = end
    return changed


def _first_page(name: str) -> str:
    """A name without `#page=1`, which is what is shown anyhow.

    Raises:
        ImageError: It picks another page: the models get the bytes alone, and would silently see the first.
    """
    name = _PAGE.sub("", name)
    if re.search(r"#page=[0-9]+\Z", name):
        raise ImageError("#page= is not accepted here: of a PDF the first page is shown")
    return name


def _has_drive(name: str) -> bool:
    return os.name == "nt" and len(PurePath(name).drive) == 2


def _path_of(url: str) -> str:
    """The path in a `file:` URL: file:///path, file://localhost/path and file:path; of no other computer."""
    where = printable(url, 200)
    try:
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(parts.path, errors="strict")
    except ValueError as e:
        raise ImageError(f"{where}: not a valid file URL") from e
    if parts.netloc.lower() not in ("", "localhost") or parts.query or parts.fragment:
        raise ImageError(f"{where}: a file URL of another computer, or with more than a path; file:///path is accepted")
    # file:///C:/a.png: the slash before the drive is the URL's.
    return path[1:] if os.name == "nt" and _has_drive(path[1:]) else path


def _read_below(root: Path, name: str, most: int) -> bytes | None:
    """At most `most` bytes of a file below `root`, which is resolved; None if that is not what `name` is.

    Symbolic links are followed as long as they end below the root. Nothing is opened that is no regular file: a pipe
    would hang, and a device does things.

    Raises:
        OSError: It is below, and cannot be read.
        ValueError: No file can be called so.
    """
    path = PurePath(name)
    # A network's path (//server/share) is asked from that server before anything else about it is known.
    if name.startswith(("//", "\\\\", "/\\", "\\/")) or ".." in path.parts or not (root / path).is_relative_to(root):
        return None
    found = (root / path).resolve(strict=True)
    if not found.is_relative_to(root) or not found.is_file():
        return None
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(found, flags), "rb") as file:
        # Between the look and the opening it may have become something else.
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        return file.read(most)


def _too_large(settings: ServerSettings) -> RequestError:
    return RequestError(
        f"the pictures of the request are larger than {settings.max_body_bytes} bytes", status=413, param="messages"
    )
