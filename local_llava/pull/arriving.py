"""Tensors of a checkpoint whose files are still on their way.

Knows the headers of safetensors files before the files are there, which file comes next, and when one may go again.
Does not know what is made of the tensors (`convert`) or how a file arrives (`download`).

A thread downloads; whoever reads a tensor waits until its file is whole and verified.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from local_llava.convert.config import MAX_JSON_BYTES
from local_llava.convert.safetensors_file import read_safetensors
from local_llava.convert.source import StoredTensor
from local_llava.errors import CheckpointError, DownloadError, OutputError
from local_llava.pull import download
from local_llava.pull.hub_api import Listing, RemoteFile, retried

_FIRST_BYTES = 1 << 18
"""Asked for at first; most headers are shorter."""

Rows = TypeVar("Rows", NDArray[np.float32], NDArray[np.uint8])

AHEAD = 2
"""Files that may lie on the disk with little room: the one that is converted and the next."""


@dataclass(eq=False)
class Shard:
    """A safetensors file, here or not."""

    file: RemoteFile
    head: bytes
    """Its header, as it was before the file came."""
    tensors: dict[str, StoredTensor]
    path: Path | None = None
    """Where it is, whole and verified; None while it is not."""
    dropped: bool = False
    """It was there, and is used up."""
    kept: dict[str, StoredTensor] = field(default_factory=dict)
    """Copies of tensors that are needed in every go, also when the file is used up."""


@dataclass(frozen=True)
class ArrivingTensor:
    """A tensor that waits for its file when it is read. A `SourceTensor`."""

    stored: StoredTensor
    shard: Shard
    wait: Callable[[Shard], Path]

    def __str__(self) -> str:
        return str(self.stored)

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._read(lambda tensor: tensor.rows(start, stop))

    def raw_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        return self._read(lambda tensor: tensor.raw_rows(start, stop))

    def _read(self, read: Callable[[StoredTensor], Rows]) -> Rows:
        if self.shard.path is None and self.name in self.shard.kept:
            return read(self.shard.kept[self.name])
        while True:
            path = self.wait(self.shard)
            try:
                return read(replace(self.stored, path=path))
            except CheckpointError:
                if self.shard.path == path:
                    raise
                # It was dropped between the two: wait for it once more.


class HollowTensor(StoredTensor):
    """A tensor of zeros in place of one that is not there yet: enough to plan a conversion."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        return np.zeros((stop - start, self.shape[-1]), np.float32)

    def raw_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        n_rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return np.zeros((stop - start, self.nbytes // max(1, n_rows)), np.uint8)


class Arrivals:
    """The files of a checkpoint, arriving one after the other."""

    def __init__(self, listing: Listing, shards: Sequence[Shard], work: Path, low_disk: bool) -> None:
        """
        Args:
            listing: The repository.
            shards: Its files.
            work: A directory of this conversion alone; with `low_disk` what comes lies there and not in the cache.
            low_disk: Drop files that are used up, and come only so far ahead of the conversion.
        """
        self._listing, self._work, self._low_disk = listing, work, low_disk
        self.shards = list(shards)
        self._order: list[Shard] = []
        self._wanted: list[Shard] = []
        self._state = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        for shard in self.shards:
            if low_disk and (tensors := _kept(shard, self._kept_path(shard))):
                shard.kept = tensors

    def tensors(self) -> dict[str, ArrivingTensor]:
        """All tensors, by name."""
        return {
            name: ArrivingTensor(tensor, shard, self._wait)
            for shard in self.shards
            for name, tensor in shard.tensors.items()
        }

    def start(self, order: Iterable[Shard], progress: Callable[[int], None]) -> None:
        """Begin to download these files; others come when they are asked for.

        Args:
            order: As they are needed.
            progress: Told of bytes that arrived, in the downloading thread.
        """
        self._order = list(order)
        self._progress = progress
        threading.Thread(target=self._work_off, name="download", daemon=True).start()

    def is_here(self, shard: Shard) -> bool:
        """Whether it need not be downloaded."""
        return self._listing.cached(shard.file) is not None or self._own_path(shard).is_file()

    def check(self) -> None:
        """Raises what ended the downloads, if anything did."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the downloads; whoever waits for a file gets an error."""
        self._stop.set()
        with self._state:
            self._error = self._error or download.StoppedError("the download was stopped")
            self._state.notify_all()

    def drop(self, shards: Iterable[Shard]) -> None:
        """These files are used up; with little room those that this conversion brought are removed."""
        with self._state:
            for shard in shards:
                shard.dropped = True
                if shard.path == self._own_path(shard):
                    shard.path = None
                if self._low_disk:
                    with contextlib.suppress(OSError):  # it is in the way, but does no harm
                        self._own_path(shard).unlink(missing_ok=True)
            self._state.notify_all()

    def _wait(self, shard: Shard) -> Path:
        with self._state:
            while shard.path is None:
                self.check()
                if shard not in self._wanted:
                    self._wanted.append(shard)
                    self._state.notify_all()
                self._state.wait(0.5)  # so that an interrupt is noticed on every system
            return shard.path

    def _work_off(self) -> None:
        try:
            while (shard := self._next()) is not None:
                path = self._fetch(shard)
                with self._state:
                    shard.path, shard.dropped = path, False
                    self._state.notify_all()
        except BaseException as e:
            with self._state:
                self._error = self._error or e
                self._state.notify_all()

    def _next(self) -> Shard | None:
        with self._state:
            while not self._stop.is_set():
                self._wanted = [shard for shard in self._wanted if shard.path is None]
                if self._wanted:
                    return self._wanted[0]
                missing = [shard for shard in self._order if shard.path is None and not shard.dropped]
                here = sum(shard.path == self._own_path(shard) for shard in self.shards)
                if missing and not (self._low_disk and here >= AHEAD):
                    return missing[0]
                self._state.wait(0.5)
        return None

    def _fetch(self, shard: Shard) -> Path:
        file = shard.file
        path = self._own_path(shard)
        if path.is_file() or (self._low_disk and self._listing.cached(file) is None):
            download.to_path(self._listing, file, path, self._progress, self._stop)
        else:
            path = download.to_cache(self._listing, file, self._progress, self._stop)
        with path.open("rb") as content:
            if content.read(len(shard.head)) != shard.head:
                raise DownloadError(f"{self._listing.repository}/{file.name}: does not begin as it did at first")
        if self._low_disk and not shard.kept:
            shard.kept = _keep(shard, path, self._kept_path(shard))
        return path

    def _own_path(self, shard: Shard) -> Path:
        return self._work / f"{shard.file.etag}.safetensors"

    def _kept_path(self, shard: Shard) -> Path:
        return self._work / f"{shard.file.etag}.kept"


def read_shard(listing: Listing, file: RemoteFile) -> Shard:
    """The tensors of a safetensors file that need not be here: of what is not, only the header is downloaded.

    Raises:
        DownloadError: It cannot be had.
        CheckpointError: It is no safetensors file.
    """
    where = f"{listing.repository}/{file.name}"
    head = retried(lambda: b"".join(_head(listing, file)))
    try:
        with tempfile.TemporaryDirectory() as directory:
            # The library checks headers of files only. This one has a hole in place of the weights.
            path = Path(directory) / Path(file.name).name
            path.write_bytes(head)
            os.truncate(path, file.size)
            try:
                tensors = read_safetensors(path)
            except CheckpointError as e:
                raise CheckpointError(str(e).replace(str(path), where)) from e
    except OSError as e:
        raise OutputError(f"cannot write in {tempfile.gettempdir()}: {e.strerror or e}") from e
    target = listing.directory / file.name
    return Shard(file, head, {name: replace(tensor, path=target) for name, tensor in tensors.items()})


def _head(listing: Listing, file: RemoteFile) -> Iterator[bytes]:
    """The length and the header, from the cache if it is there."""
    where = f"{listing.repository}/{file.name}"

    def part(start: int, stop: int) -> bytes:
        path = listing.cached(file)
        if path is not None:
            with path.open("rb") as content:
                content.seek(start)
                return content.read(stop - start)
        data = bytearray()
        with listing.stream(file, start, stop) as (begin, pieces):
            for piece in pieces:
                data += piece
                if begin + len(data) >= stop:
                    break
        return bytes(data[start - begin : stop - begin])

    first = part(0, min(_FIRST_BYTES, file.size))
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or not 0 < length <= min(MAX_JSON_BYTES, file.size - 8):
        raise CheckpointError(f"{where}: not a whole safetensors file: a header of {length} bytes")
    yield first[: 8 + length]
    if 8 + length > len(first):
        rest = part(len(first), 8 + length)
        if len(first) + len(rest) < 8 + length:
            raise DownloadError(f"{where}: its header did not come whole")
        yield rest


def always_needed(name: str) -> bool:
    """Whether a tensor is read each time that a conversion is planned: its digest names the pair."""
    return "projector" in name or "newline" in name


def _keep(shard: Shard, source: Path, target: Path) -> dict[str, StoredTensor]:
    """Copies what is always needed of a file."""
    tensors = [tensor for name, tensor in shard.tensors.items() if always_needed(name)]
    if not tensors:
        return {}
    partial = target.with_name(target.name + ".incomplete")
    try:
        with source.open("rb") as content, partial.open("wb") as out:
            for tensor in tensors:
                content.seek(tensor.offset)
                out.write(content.read(tensor.nbytes))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(target)
    except OSError as e:
        raise OutputError(f"cannot write {target}: {e.strerror or e}") from e
    return _kept(shard, target)


def _kept(shard: Shard, path: Path) -> dict[str, StoredTensor]:
    """The copies of an earlier go."""
    tensors, offset = {}, 0
    for name, tensor in shard.tensors.items():
        if always_needed(name):
            tensors[name] = replace(tensor, path=path, offset=offset)
            offset += tensor.nbytes
    return tensors if path.is_file() and path.stat().st_size == offset else {}
