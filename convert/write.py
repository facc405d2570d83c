"""Writes plans to GGUF files: all of them or none, and never a part of one under its name.

Knows the container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the disk. Does not know what the
tensors mean, where their bytes come from (`chunks`), or how a file is written in several goes (`resume`).

The header is packed here and not by `gguf.GGUFWriter`: its size is needed before there is a file, and that writer opens
the file itself, adds keys of its own and drops empty strings.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf import GGUF_MAGIC, GGUF_VERSION, GGUFValueType

from local_llava.convert.chunks import chunks, padded, padded_size
from local_llava.convert.plan import Field, GGUFPlan
from local_llava.errors import OutputError

Progress = Callable[[int], None]
"""Called in the caller's thread with the bytes written since the last call; they add up to `output_size`."""

_OUT_BYTES = 64 << 20
"""The system is asked to write out so much at a time: in the end there is nothing else to do while it does."""

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


def output_size(plan: GGUFPlan) -> int:
    """The size in bytes of the file that `write` makes of a plan."""
    return len(header(plan)) + sum(padded_size(tensor) for tensor in plan.tensors)


def check_writable(outputs: Sequence[tuple[Path, int]], overwrite: bool = False) -> None:
    """Finds out before the first byte whether files can be written.

    What is replaced counts for nothing: it keeps its room on the disk until the new file is complete.

    Args:
        outputs: Paths and their sizes in bytes.
        overwrite: Existing files may be replaced.

    Raises:
        OutputError: A file exists, its directory is missing or not writable, or the disk has too little room.
    """
    needed: dict[int, int] = {}
    for path, size in outputs:
        with naming(path):
            _check_target(path, overwrite)
            device = path.parent.stat().st_dev
            needed[device] = needed.get(device, 0) + size
            free = shutil.disk_usage(path.parent).free
        if free < needed[device]:
            sizes = f"{human_size(needed[device])} needed, {human_size(free)} free"
            raise OutputError(f"not enough room on the disk of {path.parent}: {sizes}")


def write(
    plan: GGUFPlan,
    path: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one file. It appears under its name when it is complete; on any error nothing is left.

    Args:
        plan: The file; `TensorPlan.load` is called from several threads at once.
        path: The file's name. Until it is complete a hidden file with a random name lies beside it.
        threads: Threads that load and quantize; None for one a processor. The bytes do not depend on it.
        progress: Told of the bytes written. What it raises stops the writing.
        overwrite: An existing file may be replaced.

    Raises:
        OutputError: The file exists or cannot be written.
        CheckpointError: A tensor cannot be read or quantized.
    """
    with Pending(overwrite=overwrite) as pending:
        pending.write(plan, path, threads=threads, progress=progress)


class Pending:
    """Files that appear together: complete at the end of the `with` block, or not at all if it raises.

    with Pending() as pending:
        pending.write(llm, directory / "model-Q4_K_M.gguf")
        pending.write(mmproj, directory / "model-mmproj-F16.gguf")
    """

    def __init__(self, *, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        self._files: list[_File] = []

    def __enter__(self) -> Pending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            for file in self._files:
                _remove(file.partial)

    def adopt(self, finished: Path, path: Path) -> None:
        """Takes a complete file from elsewhere on the same file system as one of the files, to be called `path`."""
        with naming(path):
            _check_target(path, self._overwrite)
        self._files.append(replace(_File.beside(path), partial=finished))

    def write(
        self, plan: GGUFPlan, path: Path, *, threads: int | None = None, progress: Progress | None = None
    ) -> None:
        """Writes one of the files under a temporary name; as the function `write`, but for the name."""
        with naming(path):
            _check_target(path, self._overwrite)
        file = _File.beside(path)
        try:
            _write_file(plan, file, threads, progress or (lambda _: None))
        except BaseException:
            _remove(file.partial)
            raise
        self._files.append(file)

    def _publish(self) -> None:
        published: list[_File] = []
        try:
            for file in self._files:
                with naming(file.path):
                    file.publish(self._overwrite)
                published.append(file)
        except BaseException:
            for file in self._files:
                file.withdraw(file in published)
            raise
        for file in self._files:
            _remove(file.previous)


@dataclass(frozen=True)
class _File:
    """An output under its temporary name, and how it gets and loses its own."""

    path: Path
    partial: Path
    previous: Path
    """Where the file that `path` named before is kept until all are published."""

    @classmethod
    def beside(cls, path: Path) -> _File:
        token = secrets.token_hex(4)
        # A name has at most 255 bytes; what a crash leaves behind should still tell what it was.
        stem = f".{path.name[:50]}.{token}"
        return cls(path, path.with_name(f"{stem}.partial"), path.with_name(f"{stem}.previous"))

    def publish(self, overwrite: bool) -> None:
        _check_target(self.path, overwrite)  # once more: writing took minutes
        if overwrite:
            self._keep_previous()
            self.partial.replace(self.path)
            return
        try:
            os.link(self.partial, self.path)  # Unlike a rename, it fails where the name is taken.
        except FileExistsError:
            raise
        except OSError:  # no hard links here, as on FAT
            self.partial.rename(self.path)
        else:
            self.partial.unlink()

    def _keep_previous(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # nothing to keep
            try:
                os.link(self.path, self.previous)  # So there is no moment without a file of that name.
            except FileNotFoundError:
                raise
            except OSError:  # no hard links here
                self.path.replace(self.previous)

    def withdraw(self, published: bool) -> None:
        with contextlib.suppress(OSError):
            if self.previous.exists():
                self.previous.replace(self.path)
                self.previous.unlink(missing_ok=True)  # renaming a link to its own file does nothing
            elif published:
                self.path.unlink()


def _write_file(plan: GGUFPlan, file: _File, threads: int | None, progress: Progress) -> None:
    with naming(file.path):
        out = file.partial.open("xb")
    try:
        start = header(plan)
        with naming(file.path):
            out.write(start)
        progress(len(start))
        written = sent = len(start)
        with contextlib.closing(chunks(plan.tensors, threads)) as parts:
            for chunk in parts:
                with naming(file.path):
                    out.write(chunk)
                progress(len(chunk))
                written += len(chunk)
                if written - sent >= _OUT_BYTES:
                    _send_to_disk(out.fileno(), sent, written - sent)
                    sent = written
        with naming(file.path):
            out.flush()
            os.fsync(out.fileno())
            out.close()
    finally:
        # After an error it may still hold bytes that find no room either.
        with contextlib.suppress(OSError):
            out.close()


def _send_to_disk(descriptor: int, start: int, size: int) -> None:
    """Has the system begin to write out a part of a file, where it can be told, and does not wait."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a pipe, or a file system that does not know
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def header(plan: GGUFPlan) -> bytes:
    """All before the tensor data, padded."""
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(plan.tensors), len(plan.metadata))]
    for entry in plan.metadata:
        parts += (_string(entry.key), _value(entry))
    offset = 0
    for tensor in plan.tensors:
        dims = tensor.shape[::-1]
        parts += (_string(tensor.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset))
        offset += padded_size(tensor)
    data = b"".join(parts)
    return data + bytes(padded(len(data)) - len(data))


def _value(entry: Field) -> bytes:
    if entry.type is not GGUFValueType.ARRAY:
        return struct.pack("<I", entry.type) + _item(entry.type, entry.value)
    if entry.item_type is None:
        raise ValueError(f"{entry.key}: an array needs an item_type")
    start = struct.pack("<IIQ", entry.type, entry.item_type, len(entry.value))
    return start + b"".join(_item(entry.item_type, item) for item in entry.value)


def _item(type: GGUFValueType, value: Any) -> bytes:
    return _string(value) if type is GGUFValueType.STRING else struct.pack(_SCALARS[type], value)


def _string(value: str | bytes) -> bytes:
    # Bytes of a GGUF's string that are not UTF-8 are read as surrogates (`gguf_file`), and are the same bytes again.
    data = value.encode(errors="surrogateescape") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: {path.parent} is not a directory")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory")
    if not overwrite:
        _check_absent(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {path.parent}")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _check_absent(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes the system's errors one line that names the output, not the temporary file."""
    try:
        yield
    except FileExistsError as error:
        raise OutputError(f"{path} already exists; --force replaces it") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def human_size(size: int) -> str:
    """Bytes as a person reads them, in powers of 1000, as disks are sold: 4.9 GB."""
    steps = max(0, min(4, (len(str(size)) - 1) // 3))
    return f"{size / 1000**steps:.{1 if steps else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[steps]}"
