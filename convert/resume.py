"""Writes a GGUF in several goes: what a cut leaves on the disk is kept, and the next go writes the rest.

Knows which tensors of a half-written file are safe. The file's bytes are those of `write`.

    model.gguf.partial     the file from its start
    model.gguf.journal     a line for each time that data was on the disk for good: how many tensors

A line of the journal is written after the data it speaks of was synced, so it holds after a power cut as well. What
follows the last such tensor is written anew. That both goes mean the same file is seen by its header, which tells the
types, shapes and names of all tensors and the digest of the projector; that the other weights are the same is up to the
caller.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from local_llava.convert.chunks import chunks, padded_size
from local_llava.convert.plan import GGUFPlan
from local_llava.convert.write import Progress, header, naming, output_size

SYNC_BYTES = 64 << 20
"""At least so much is written between two lines of the journal: a sync costs milliseconds."""

_MAX_JOURNAL = 1 << 20
"""Bytes of the journal that are read; a line has fewer than ten, and there is one per `SYNC_BYTES`."""


def write_resumable(
    plan: GGUFPlan,
    path: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    on_safe: Callable[[int], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> None:
    """Writes one file, or the rest of it. It appears under its name when it is complete; an existing one is replaced.

    One process at a time may do so: the caller holds a lock.

    Args:
        plan: The file; `TensorPlan.load` is called from several threads at once.
        path: The file's name.
        threads: Threads that load and quantize; None for one a processor.
        progress: Told of the bytes written; first of those that were there already. What it raises stops the writing.
        on_safe: Told how many of the plan's tensors are on the disk for good, first at the start.
        on_stop: Called when the writing ends early, before the threads are waited for: loaders that wait for something
            must then raise.

    Raises:
        OutputError: The file cannot be written; what was written is kept.
        CheckpointError: A tensor cannot be read or quantized.
    """
    progress, on_safe = progress or (lambda _: None), on_safe or (lambda _: None)
    partial, journal = _partial(path), _journal(path)
    start = header(plan)
    with naming(path):
        if _begins_with(path, start) and path.stat().st_size == output_size(plan):
            progress(output_size(plan))
            on_safe(len(plan.tensors))
            return
        done = safe_tensors(plan, path) if _begins_with(partial, start) else 0
        if not done:
            journal.unlink(missing_ok=True)
            _sync_directory(path.parent)
            partial.write_bytes(start)
        position = _ends(plan, len(start))[done]
        os.truncate(partial, position)
    progress(position)
    on_safe(done)
    _append(plan, path, done, threads, progress, on_safe, on_stop)
    with naming(path):
        partial.replace(path)
        journal.unlink(missing_ok=True)


def safe_tensors(plan: GGUFPlan, path: Path) -> int:
    """How many of the plan's first tensors an earlier go left on the disk for good, by the journal and the sizes."""
    if path.is_file() and path.stat().st_size == output_size(plan):
        return len(plan.tensors)
    try:
        with _journal(path).open("rb") as file:
            # What a cut left of a last line has no end.
            lines = file.read(_MAX_JOURNAL).split(b"\n")[:-1]
        size = _partial(path).stat().st_size
    except OSError:
        return 0
    done = int(lines[-1]) if lines and lines[-1].isdigit() and len(lines[-1]) < 10 else 0
    if done > len(plan.tensors) or size < _ends(plan, len(header(plan)))[done]:
        return 0
    return done


def _append(
    plan: GGUFPlan,
    path: Path,
    done: int,
    threads: int | None,
    progress: Progress,
    on_safe: Callable[[int], None],
    on_stop: Callable[[], None] | None,
) -> None:
    """Writes the tensors from the one with the number `done` on."""
    ends = _ends(plan, len(header(plan)))
    position = synced = ends[done]
    with contextlib.ExitStack() as files:
        with naming(path):
            out = files.enter_context(_partial(path).open("ab", buffering=0))
            journal = files.enter_context(_journal(path).open("ab", buffering=0))
        for chunk in files.enter_context(contextlib.closing(chunks(plan.tensors[done:], threads, on_stop))):
            with naming(path):
                _write_fully(out.write, memoryview(chunk))
            position += len(chunk)
            progress(len(chunk))
            complete = done
            while complete < len(plan.tensors) and ends[complete + 1] <= position:
                complete += 1
            if complete > done and (position - synced >= SYNC_BYTES or position == ends[-1]):
                with naming(path):
                    os.fsync(out.fileno())
                    _write_fully(journal.write, memoryview(f"{complete}\n".encode()))
                    os.fsync(journal.fileno())
                done, synced = complete, position
                on_safe(done)


def _write_fully(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    while data:
        data = data[write(data) or 0 :]


def _ends(plan: GGUFPlan, start: int) -> list[int]:
    """Bytes of the file when its first 0, 1, 2, ... tensors are complete."""
    return list(accumulate((padded_size(tensor) for tensor in plan.tensors), initial=start))


def _begins_with(path: Path, start: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _journal(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def _sync_directory(directory: Path) -> None:
    """Makes sure that a removal outlives a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
