"""Gets a file of a repository onto the disk, whole, in as many goes as it takes.

Knows how to go on after a cut (`NAME.incomplete` beside the target), and that nothing gets its name before its size and
digest are right. Does not know where files belong (`pull`), or how the Hub is asked (`hub_api`).

The library's own downloads are not used for this: since huggingface_hub 1.x each begins with an empty file.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from local_llava.errors import DownloadError, OutputError
from local_llava.pull.hub_api import Listing, PassingError, RemoteFile, wait_before_retry

log = logging.getLogger("local_llava")

_PIECE = 1 << 20


class StoppedError(DownloadError):
    """The caller wants no more of it."""


def no_progress(_: int) -> None:
    """Takes no notice."""


def to_cache(
    listing: Listing,
    file: RemoteFile,
    progress: Callable[[int], None] = no_progress,
    stop: threading.Event | None = None,
) -> Path:
    """A file in the Hub's cache: what is there already and right, else downloaded.

    Args:
        listing: The repository.
        file: One of its files.
        progress: Told of bytes that arrived, also in an earlier go; of fewer than none when they have to come again.
        stop: Ends the download.

    Raises:
        DownloadError: It cannot be had.
        OutputError: It cannot be written.
    """
    try:
        path = listing.cached(file)
        if path is not None and _is_whole(path, file, stop):
            return path
        with listing.lock(file):
            path = listing.cached(file)  # another process may have been at it
            if path is not None and not _is_whole(path, file, stop):
                log.warning("%s/%s: the copy in the Hub's cache is damaged: removed", listing.repository, file.name)
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                listing.blob(file).unlink(missing_ok=True)
                path = None
            if path is None:
                listing.blob(file).parent.mkdir(parents=True, exist_ok=True)
                to_path(listing, file, listing.blob(file), progress, stop)
                path = listing.link(file)
            return path
    except OSError as e:
        raise OutputError(f"cannot write {e.filename or listing.cache}: {e.strerror or e}") from e


def to_path(
    listing: Listing,
    file: RemoteFile,
    target: Path,
    progress: Callable[[int], None] = no_progress,
    stop: threading.Event | None = None,
) -> None:
    """A file outside the cache, in a directory that nobody else writes to now; arguments and errors as of `to_cache`.

    Args:
        target: Its name. An existing file of the right size was put there by an earlier call, and is kept.
    """
    partial = target.with_name(target.name + ".incomplete")
    try:
        if target.is_file() and target.stat().st_size == file.size:
            return
        for last in (False, True):
            found = _receive(listing, file, partial, progress, stop)
            _, wanted = file.digest()
            if wanted is None or found == wanted:
                break
            partial.unlink()
            progress(-file.size)
            where = f"{listing.repository}/{file.name}"
            message = f"{where}: not what the Hub announced (digest {found:.12}…, not {wanted:.12}…); it was deleted"
            if last:
                raise DownloadError(f"{message}, and came so twice")
            log.warning("%s, and comes once more", message)
        partial.replace(target)
    except OSError as e:
        raise OutputError(f"cannot write {target}: {e.strerror or e}; what has arrived is kept") from e


def _receive(
    listing: Listing, file: RemoteFile, partial: Path, progress: Callable[[int], None], stop: threading.Event | None
) -> str:
    """Downloads what is missing of a file; gives the digest of all of it."""
    failures = 0
    with partial.open("ab", buffering=0) as out:
        digest, have = file.digest()[0], 0
        if out.tell() > file.size:
            out.truncate(0)
        elif out.tell():
            have = _add(partial, digest, stop)
            progress(have)
        while have < file.size:
            before = have
            try:
                with listing.stream(file, have) as (start, pieces):
                    if start != have:  # the server serves no parts
                        out.truncate(0)
                        progress(-have)
                        digest, have, before = file.digest()[0], 0, 0
                    for piece in pieces:
                        _check(stop)
                        piece = piece[: file.size - have]  # if more comes, the digest tells what that is worth
                        _write_fully(out, piece)
                        digest.update(piece)
                        have += len(piece)
                        progress(len(piece))
                        if have == file.size:
                            break
                if have < file.size:
                    raise PassingError(f"{listing.repository}/{file.name}: {have} of {file.size} bytes came")
            except PassingError as e:
                failures = 1 if have > before else failures + 1
                log.info("%s; trying again", e)
                wait_before_retry(e, failures - 1, stop)
        os.fsync(out.fileno())
    return str(digest.hexdigest())


def _is_whole(path: Path, file: RemoteFile, stop: threading.Event | None) -> bool:
    digest, wanted = file.digest()
    if wanted is None:
        return True
    _add(path, digest, stop)
    return bool(digest.hexdigest() == wanted)


def _add(path: Path, digest: Any, stop: threading.Event | None) -> int:
    """Adds a file's content to a digest; gives the number of bytes."""
    size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            _check(stop)
            digest.update(piece)
            size += len(piece)
    return size


def _write_fully(out: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise StoppedError("the download was stopped")
