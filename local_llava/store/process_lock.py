"""Locks between processes.

Knows how to take one, wait for it, and say why it cannot be had. Does not know what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from local_llava.errors import OutputError


class LockedError(OutputError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock that a file stands for. The system releases it when a process dies, however it does.

    Args:
        path: The file; it and its directory are made if they are missing, and stay.
        on_wait: Called once if another process holds the lock, before waiting for it; None not to wait.

    Raises:
        LockedError: Another process holds the lock, and there is no `on_wait`.
        OutputError: The file cannot be made, or the file system knows no locks.
    """
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            if on_wait is None:
                raise
            on_wait()
            lock.acquire()
    except filelock.Timeout as e:
        raise LockedError(f"{path}: another process holds this lock") from e
    except (OSError, NotImplementedError) as e:
        raise OutputError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    try:
        yield
    finally:
        lock.release()
