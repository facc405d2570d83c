"""Writes plans to GGUF files: all of them or none, and never a part of one under its name.

Knows the container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), the disk, and how to keep the processor
busy with little memory. Does not know what the tensors mean, how rows become bytes (`quantize.encode`), or how a file
is written in several goes (`resume`).

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
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType
from numpy.typing import NDArray

from local_llava.convert.plan import Field, GGUFPlan, TensorPlan
from local_llava.convert.quantize import encode
from local_llava.errors import OutputError

Progress = Callable[[int], None]
"""Called in the caller's thread with the bytes written since the last call; they add up to `output_size`."""

_BLOCK_VALUES = 1 << 19
"""Values that a thread quantizes at a time: 2 MB of float32. Milliseconds of work, and little even for 64 threads."""

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
        with contextlib.closing(chunks(plan.tensors, threads)) as parts:
            for chunk in parts:
                with naming(file.path):
                    out.write(chunk)
                progress(len(chunk))
        with naming(file.path):
            out.flush()
            os.fsync(out.fileno())
            out.close()
    finally:
        # After an error it may still hold bytes that find no room either.
        with contextlib.suppress(OSError):
            out.close()


def chunks(
    tensors: Sequence[TensorPlan], threads: int | None = None, on_stop: Callable[[], None] | None = None
) -> Generator[bytes | memoryview, None, None]:
    """The bytes of tensors in order, with at most two blocks a thread loaded or waiting to be written.

    Args:
        tensors: As they follow each other in the file; each is padded.
        threads: Threads that load and quantize; None for one a processor.
        on_stop: Called when the threads have to end early, before they are waited for: loaders that wait for something
            must then raise.
    """
    threads = threads or _processors()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")
    waiting: deque[tuple[Future[NDArray[np.uint8]], int]] = deque()
    try:
        for tensor, start, stop in _blocks(tensors):
            size = _tensor_size(tensor)
            padding = padded_size(tensor) - size if stop == tensor.n_rows else 0
            waiting.append((pool.submit(encode, tensor, start, stop), padding))
            if len(waiting) >= 2 * threads:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())
    except BaseException:
        if on_stop:
            on_stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(block: Future[NDArray[np.uint8]], padding: int) -> Iterator[bytes | memoryview]:
    yield block.result().data
    if padding:
        yield bytes(padding)


def _blocks(tensors: Sequence[TensorPlan]) -> Iterator[tuple[TensorPlan, int, int]]:
    for tensor in tensors:
        step = max(1, _BLOCK_VALUES // tensor.row_length)
        for start in range(0, tensor.n_rows, step):
            yield tensor, start, min(start + step, tensor.n_rows)


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
    return data + bytes(_padded(len(data)) - len(data))


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


def padded_size(tensor: TensorPlan) -> int:
    """Bytes that a tensor takes up in the file."""
    return _padded(_tensor_size(tensor))


def _tensor_size(tensor: TensorPlan) -> int:
    block_length, block_size = GGML_QUANT_SIZES[tensor.type]
    blocks, rest = divmod(tensor.row_length, block_length)
    if rest:
        raise ValueError(f"{tensor.name}: rows of {tensor.row_length} are no multiple of a {tensor.type.name} block")
    return tensor.n_rows * blocks * block_size


def _padded(size: int) -> int:
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _processors() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
