"""The directory of the image cache, shared between processes.

    default_dir()/           $LOCAL_LLAVA_CACHE, or the platform's directory for what a user can do without
        KEY.kv               an entry; its time of change is when it was last used
        KEY.embeddings
        .writing-*           an entry that a process writes, or wrote when it was killed
        .lock                held while room is made and an entry gets its name

Knows who may see it, what is in it, how an entry appears all at once, and which one goes first. Does not know what
entries hold (`entry`), nor when they are wanted. Entries are read without the lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import cast

import filelock
import platformdirs

from local_llava.errors import OutputError
from local_llava.image_cache import entry
from local_llava.image_cache.entry import DamagedError, Header, Kind

KEEP_FREE = 1_000_000_000
"""Bytes of the disk that the cache leaves to others."""

_LOCK = ".lock"
_LOCK_TIMEOUT_S = 10.0
_TEMPORARY = ".writing-"
_MAX_AGE_S = 3600.0
"""Of a temporary file: whoever wrote it is gone."""
_ENTRY = re.compile(r"([0-9a-f]{8,128})\.(kv|embeddings)")

log = logging.getLogger("local_llava")


class RefusedError(Exception):
    """A directory is not private to the user."""


@dataclass(frozen=True)
class Entry:
    """Something that is kept of a picture."""

    kind: Kind
    key: str
    size: int
    """Bytes of the file."""
    about: dict[str, str | int]
    """What its maker told of it; empty if that is damaged or of another version."""
    last_used: datetime


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    used_ns: int


def default_dir() -> Path:
    """Where the image cache is: $LOCAL_LLAVA_CACHE, or the platform's directory for caches."""
    named = os.environ.get("LOCAL_LLAVA_CACHE")
    if named:
        return Path(named).absolute()
    return Path(platformdirs.user_cache_dir("local-llava", appauthor=False)) / "pictures"


def path_of(directory: Path, kind: Kind, key: str) -> Path:
    """The file of an entry, there or not.

    Raises:
        ValueError: The key is not 8 to 128 hex digits, or the kind is none.
    """
    name = f"{key}.{kind}"
    if not _ENTRY.fullmatch(name):
        raise ValueError(f"{name!a:.80} is not KEY.kv or KEY.embeddings, with 8 to 128 hex digits")
    return directory / name


def refusal(directory: Path) -> str | None:
    """Why a directory cannot be the cache; None if it can, or is not there yet.

    Who writes into it decides what models see, and who lists it can tell whether a picture that they have was asked
    about. Windows keeps other users out of a user's directories by itself.
    """
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    except OSError as e:
        return f"{directory} cannot be used: {e.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{directory} is not a directory"
    if not hasattr(os, "geteuid"):
        return None
    if status.st_uid != os.geteuid():
        return f"{directory} belongs to another user"
    if status.st_mode & 0o022:
        return f"{directory} can be written by other users; chmod 700 makes it private"
    if status.st_mode & 0o055 and not _only_ours(directory):
        return f"{directory} holds other files, and other users can see it; chmod 700 makes it private"
    return None


def make(directory: Path) -> None:
    """Make the directory if it is missing, and private if it is not.

    Raises:
        RefusedError: It is somebody else's; the message says how.
        OSError: It cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    reason = refusal(directory)
    if reason:
        raise RefusedError(reason)
    if hasattr(os, "geteuid") and directory.stat().st_mode & 0o077:
        directory.chmod(0o700)


def add(directory: Path, header: Header, payload: memoryview, max_bytes: int) -> None:
    """Write an entry and give it its name, unless there is no room for it, or another process is in the way.

    No entry is ever incomplete under its name, and all together never take more than `max_bytes`; those that are
    being written come on top of that.

    Raises:
        RefusedError: The directory is somebody else's.
        OSError: It cannot be written.
    """
    make(directory)
    path = path_of(directory, header.kind, header.key)
    if shutil.disk_usage(directory).free < header.size + KEEP_FREE:
        log.debug("image cache: the disk is too full to keep %s", path.name)
        return
    # Opened by mkstemp with rights for the user alone. Not synced: that would make the disk write at once what may be
    # deleted soon, and an entry that a power failure leaves with a name and half of its bytes fails its checksum.
    fd, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=directory)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            entry.write(file, header, payload)
        with _locked(directory):
            if _make_room(directory, header.size, max_bytes):
                _rename(temporary, path)
            else:
                log.debug("image cache: no room could be made for %s", path.name)
    except filelock.Timeout:
        log.debug("image cache: other processes keep the lock; %s is not kept", path.name)
    finally:
        _remove(temporary)


def touch(path: Path) -> None:
    """Make an entry the one that was used last."""
    now = time.time_ns()
    # Entries of a read-only directory can be used, too.
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))


def remove_damaged(path: Path, error: DamagedError) -> None:
    """Remove an entry that cannot be used, and say so."""
    log.warning("image cache: %s is removed: %s", path, error)
    _remove(path)


def entries(directory: Path) -> list[Entry]:
    """What is kept, last used first.

    Raises:
        OutputError: The directory cannot be read.
    """
    found = []
    for file in sorted(_files(directory, entry_files=True), key=lambda f: (-f.used_ns, f.path.name)):
        key, kind = file.path.name.split(".")
        last_used = datetime.fromtimestamp(file.used_ns / 1e9, timezone.utc)
        try:
            about = entry.parse_about(entry.read_header(file.path, cast(Kind, kind), key))
        except FileNotFoundError:  # another process made room
            continue
        except (DamagedError, OSError):
            about = {}
        found.append(Entry(cast(Kind, kind), key, file.size, about, last_used))
    return found


def leftovers(directory: Path) -> int:
    """Bytes of entries that are being written, or that killed processes left unfinished.

    Raises:
        OutputError: The directory cannot be read.
    """
    return sum(file.size for file in _files(directory, entry_files=False))


def clear(directory: Path) -> tuple[int, int]:
    """Remove all entries, and those that are being written; other files stay.

    Returns:
        The number of entries, and bytes, unfinished ones included.

    Raises:
        OutputError: Something cannot be removed.
    """
    count = size = 0
    # The unfinished first: one of them may get its name meanwhile, and then it is found as an entry.
    for entry_files in (False, True):
        for file in _files(directory, entry_files):
            try:
                file.path.unlink()
            except FileNotFoundError:
                continue
            except OSError as e:
                raise OutputError(f"cannot remove {file.path}: {e.strerror}") from e
            count += entry_files
            size += file.size
    return count, size


def _files(directory: Path, entry_files: bool) -> list[_File]:
    try:
        return list(_scan(directory, entry_files))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise OutputError(f"cannot read {directory}: {e.strerror}") from e


def _scan(directory: Path, entry_files: bool) -> Iterator[_File]:
    """Regular files of the cache: entries, or those without their name yet.

    Raises:
        OSError: The directory cannot be read.
    """
    for path in directory.iterdir():
        if _ENTRY.fullmatch(path.name) if entry_files else path.name.startswith(_TEMPORARY):
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    yield _File(path, status.st_size, status.st_mtime_ns)


def _only_ours(directory: Path) -> bool:
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return False
    return all(name == _LOCK or name.startswith(_TEMPORARY) or _ENTRY.fullmatch(name) for name in names)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the cache's lock, which the system releases if the process dies.

    Raises:
        filelock.Timeout: Another process holds it for long.
        OSError: It cannot be had.
    """
    try:
        with filelock.FileLock(directory / _LOCK, timeout=_LOCK_TIMEOUT_S, mode=0o600):
            yield
    except NotImplementedError as e:
        raise OSError(None, "the file system has no locks") from e


def _make_room(directory: Path, needed: int, max_bytes: int) -> bool:
    """Remove what was not used for the longest time until `needed` bytes fit. Under the lock."""
    for file in _scan(directory, entry_files=False):
        if file.used_ns < time.time_ns() - _MAX_AGE_S * 1e9:
            _remove(file.path)
    files = sorted(_scan(directory, entry_files=True), key=lambda f: f.used_ns)
    total = sum(file.size for file in files)
    for file in files:
        if total + needed <= max_bytes:
            break
        if _remove(file.path):
            log.debug("image cache: %s makes room", file.path.name)
            total -= file.size
    return total + needed <= max_bytes


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.replace(path)
    except FileNotFoundError:
        log.debug("image cache: %s was removed before it was complete", path.name)
    except PermissionError:
        # Windows keeps the name of a file that another process reads: an entry of that key is there already.
        if hasattr(os, "geteuid"):
            raise
        log.debug("image cache: %s is in use", path.name)


def _remove(path: Path) -> bool:
    """Whether it is gone. Windows keeps files that are being read."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
