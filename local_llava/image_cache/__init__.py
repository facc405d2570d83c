"""What was computed for pictures, kept on disk for later processes.

Knows entries by kind and key, how much is kept, and which of them goes first; when a disk fails, the cache ends and
the program goes on. Does not know pictures, models or llama.cpp: whoever uses it makes keys that stand for all that a
payload depends on.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from local_llava.image_cache import directory as _directory
from local_llava.image_cache import entry as _entry
from local_llava.image_cache.directory import Entry, RefusedError, clear, default_dir, entries, leftovers, refusal
from local_llava.image_cache.entry import About, DamagedError, Header, Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Entry", "ImageCache", "Kind", "clear", "default_dir", "entries", "leftovers", "refusal"]

Payload: TypeAlias = "bytes | bytearray | memoryview | NDArray[np.generic]"

MAX_WAITING, MAX_WAITING_BYTES = 8, 1_000_000_000
"""Entries, and their bytes, that may wait for the disk; the memory is held until they are written."""

log = logging.getLogger("local_llava")


@dataclass(frozen=True)
class _Job:
    header: Header
    payload: memoryview


class ImageCache:
    """Entries of one directory. Threads may share it, and processes may share the directory.

    No method raises because of the disk: the first error ends what it hit (reading or writing) for this object, with
    one warning in the log.
    """

    def __init__(self, directory: Path | None = None, max_bytes: int = 4_000_000_000) -> None:
        """Nothing is read or made yet.

        Args:
            directory: None for `default_dir()`. It is made, for the user alone, when something is kept.
            max_bytes: Of all entries together; what was not used for the longest time goes first.
        """
        self.directory = (directory or default_dir()).absolute()
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: dict[tuple[Kind, str], _Job] = {}
        self._writer: threading.Thread | None = None
        self._reads = self._writes = True

    def get(self, kind: Kind, key: str) -> memoryview | None:
        """The payload of an entry, whose checksum is right; it is the one that was used last from now on.

        Returns:
            Bytes that cannot be written to; None if there is no such entry, or it is damaged (it is removed then).

        Raises:
            ValueError: The key is not 8 to 128 hex digits.
        """
        path = _directory.path_of(self.directory, kind, key)
        with self._lock:
            job = self._waiting.get((kind, key))
        if job or not self._may_read():
            return job.payload if job else None
        try:
            payload = _entry.read(path, kind, key)
        except FileNotFoundError:
            return None
        except DamagedError as e:
            _directory.remove_damaged(path, e)
            return None
        except MemoryError:
            log.debug("image cache: no memory to read %s", path.name)
            return None
        except OSError as e:
            self._stop(f"cannot read {path}: {e.strerror}", reads=True)
            return None
        _directory.touch(path)
        return payload.toreadonly()

    def has(self, kind: Kind, key: str) -> bool:
        """Whether there seems to be such an entry, written or waiting; only `get` reads enough to be certain.

        Raises:
            ValueError: The key is not 8 to 128 hex digits.
        """
        path = _directory.path_of(self.directory, kind, key)
        with self._lock:
            if (kind, key) in self._waiting:
                return True
        return self._may_read() and self._is_kept(path, kind, key)

    def put(self, kind: Kind, key: str, payload: Payload, about: About) -> None:
        """Keep an entry. A thread writes it, unless too much waits for the disk; an entry that is there stays.

        Args:
            kind: What the payload is.
            key: Hex digits of a digest over all that the payload depends on.
            payload: Not copied, so it must not be changed any more; without a copy, it is contiguous.
            about: For people: `local-llava cache ls`.

        Raises:
            ValueError: The key is not 8 to 128 hex digits, or `about` is too long.
        """
        path = _directory.path_of(self.directory, kind, key)
        data = _as_bytes(payload)
        header = _entry.make_header(kind, key, len(data), about)
        if header.size > self.max_bytes:
            log.debug("image cache: %s has %d bytes, more than the cache may have", path.name, header.size)
            return
        with self._lock:
            if not self._writes or (kind, key) in self._waiting:
                return
            size = sum(len(job.payload) for job in self._waiting.values()) + len(data)
            if self._waiting and (len(self._waiting) == MAX_WAITING or size > MAX_WAITING_BYTES):
                log.debug("image cache: the disk does not keep up; %s is not kept", path.name)
                return
            self._waiting[kind, key] = _Job(header, data)
            if self._writer is None:
                self._start()

    def flush(self) -> None:
        """Wait until nothing waits for the disk."""
        writer = self._writer
        if writer is not None:
            writer.join()

    def close(self) -> None:
        """Write what waits, and end; `get` finds nothing and `put` keeps nothing any more."""
        self.flush()
        with self._lock:
            self._reads = self._writes = False
        self.flush()

    def _start(self) -> None:
        # Not a daemon: the interpreter waits for it at exit, so that what waits is kept even without `close`. It ends
        # when nothing waits, so nobody waits for long.
        self._writer = threading.Thread(target=self._write_waiting, name="local-llava image cache")
        try:
            self._writer.start()
        except RuntimeError:  # the interpreter is about to exit
            self._writer = None
            self._waiting.clear()

    def _write_waiting(self) -> None:
        try:
            while job := self._next():
                try:
                    self._write(job)
                finally:
                    with self._lock:
                        del self._waiting[job.header.kind, job.header.key]
        except RefusedError as e:
            self._stop(str(e), reads=True)
        except OSError as e:
            self._stop(f"cannot write in {self.directory}: {e.strerror or e}", reads=False)
        finally:
            with self._lock:
                # After an error; `_next` has done it otherwise.
                if self._writer is threading.current_thread():
                    self._waiting.clear()
                    self._writer = None

    def _next(self) -> _Job | None:
        with self._lock:
            job = next(iter(self._waiting.values()), None)
            if job is None:
                # Under the same lock as the look at what waits, so that `put` starts another one from here on.
                self._writer = None
            return job

    def _write(self, job: _Job) -> None:
        header = job.header
        path = _directory.path_of(self.directory, header.kind, header.key)
        if self._is_kept(path, header.kind, header.key):
            _directory.touch(path)
        else:
            _directory.add(self.directory, header, job.payload, self.max_bytes)

    def _is_kept(self, path: Path, kind: Kind, key: str) -> bool:
        try:
            _entry.read_header(path, kind, key)
        except (DamagedError, OSError):
            return False
        return True

    def _may_read(self) -> bool:
        if self._reads:
            reason = _directory.refusal(self.directory)
            if reason:
                self._stop(reason, reads=True)
        return self._reads

    def _stop(self, reason: str, reads: bool) -> None:
        """Write no more, and read no more either; with one line, however often it is called."""
        with self._lock:
            news = self._reads if reads else self._writes
            self._writes = False
            self._reads = self._reads and not reads
        if news:
            log.warning("image cache: %s; %s", reason, "it is off" if reads else "nothing more is kept")


def _as_bytes(payload: Payload) -> memoryview:
    """A view that cannot be written through, [n bytes]; a copy only where the payload is not contiguous."""
    if isinstance(payload, np.ndarray):
        return np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data.toreadonly()
    view = memoryview(payload)
    if not view.c_contiguous or view.ndim != 1:
        view = memoryview(view.tobytes())
    return view.cast("B").toreadonly()
