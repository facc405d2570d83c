"""What a conversion cannot be faster than on this machine: its reading, its writing, and its kernels."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from local_llava.convert import kernels
from local_llava.convert.quantize import encode_rows

_BUFFER = 16 << 20


@dataclass(frozen=True)
class Floor:
    """Seconds of each part by itself."""

    read: float
    write: float
    kernels: float

    @property
    def seconds(self) -> float:
        """A disk does one thing at a time; the processors compute meanwhile."""
        return max(self.read + self.write, self.kernels)

    def __str__(self) -> str:
        parts = f"read {self.read:.0f} s, write {self.write:.0f} s, kernels {self.kernels:.0f} s on all cores"
        return f"floor: {self.seconds:.0f} s ({parts})"


def measure(sources: list[Path], directory: Path, size: int, amounts: Mapping[kernels.Kind, int]) -> Floor:
    """The floor of a conversion.

    Args:
        sources: Files that it reads.
        directory: Where it writes.
        size: Bytes that it writes.
        amounts: How many values it quantizes, by kind.
    """
    return Floor(_read(sources), _write(directory / "floor.bin", size), _quantize(amounts))


def drop_caches() -> None:
    """Lets the disk be read anew, where the user may do so."""
    os.sync()
    if os.access("/proc/sys/vm/drop_caches", os.W_OK):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def _read(paths: list[Path]) -> float:
    drop_caches()
    buffer = bytearray(_BUFFER)
    started = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def _write(path: Path, size: int) -> float:
    noise = np.random.default_rng(0).bytes(_BUFFER)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, _BUFFER):
            file.write(noise[: size - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _quantize(amounts: Mapping[kernels.Kind, int]) -> float:
    """Of rows that are in memory, a second of each kind."""
    cores = os.cpu_count() or 1
    kernels.PROCESS.prepare(amounts)
    kernels.PROCESS.wait()
    return sum(amount / _rate(*kind, cores) for kind, amount in amounts.items())


def _rate(type: kernels.T, weighted: bool, cores: int) -> float:
    rows = (np.random.default_rng(0).standard_normal((128, 4096)) * 0.02).astype(np.float32)
    importance = np.ones(4096, np.float32) if weighted else None
    started = time.perf_counter()

    def work(_: int) -> int:
        done = 0
        while time.perf_counter() - started < 1:
            encode_rows(type, rows, importance)
            done += rows.size
        return done

    with ThreadPoolExecutor(cores) as pool:
        done = sum(pool.map(work, range(cores)))
    return done / (time.perf_counter() - started)
