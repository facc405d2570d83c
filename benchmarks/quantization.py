#!/usr/bin/env python3
"""Our quantization kernels beside ggml's, on one core: the same rows in turn, and the same bytes.

    python benchmarks/quantization.py [TYPE ...] [--rounds 5]

Prints millions of parameters that `ggml_quantize_chunk` and our kernel quantize in a second of a core's time, without
and with an importance matrix, the best of the rounds, and how many times faster ours is; and the seconds that the first
use costs: numba's import, and compiling each kernel in a process whose cache is empty. Fails where a byte differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import machine
import numpy as np
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from local_llava import ggml_rows
from local_llava.convert import kernels

N_ROWS, ROW_LENGTH = 128, 4096
"""As `convert` gives a thread at a time."""

_COMPILE = """
import sys, time
started = time.thread_time()
import numba
print(time.thread_time() - started)
from gguf import GGMLQuantizationType as T
from local_llava.convert import kernels
for argument in sys.argv[1:]:
    started = time.thread_time()
    kernels.load(T[argument.rstrip("*")], argument.endswith("*"))
    print(time.thread_time() - started)
"""


def rate(quantize: Callable[[], NDArray[np.uint8]], values: int) -> float:
    """Millions of parameters a second, of the core's time: other work on the machine changes it little."""
    times, started = 0, time.thread_time()
    while times == 0 or time.thread_time() - started < 0.05:
        quantize()
        times += 1
    return times * values / (time.thread_time() - started) / 1e6


def compare(type: T, importance: NDArray[np.float32] | None, rounds: int) -> tuple[float, float]:
    """The rates of ggml's kernel and of ours."""
    rows = (np.random.default_rng(0).standard_normal((N_ROWS, ROW_LENGTH)) * 0.02).astype(np.float32)
    ours = kernels.load(type, importance is not None)
    if not np.array_equal(ours(rows, importance), ggml_rows.quantize_chunk(type, rows, importance)):
        raise SystemExit(f"{type.name}: the bytes differ")
    rates = [
        (
            rate(lambda: ggml_rows.quantize_chunk(type, rows, importance), rows.size),
            rate(lambda: ours(rows, importance), rows.size),
        )
        for _ in range(rounds)
    ]
    return max(theirs for theirs, _ in rates), max(own for _, own in rates)


def compile_times(names: list[str]) -> list[float]:
    """Seconds of numba's import and of each kernel, in a process that finds nothing compiled. A * is with a matrix."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", _COMPILE, *names]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [float(line) for line in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [type.name for type in kernels.KERNELS]
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of each type")
    args = parser.parse_args()
    for name in args.types:
        if name not in names:
            parser.error(f"no kernel makes {name}: choose from {', '.join(names)}")
    print(machine.describe() + f", numba {version('numba')}")
    variants = [(T[name], weighted) for name in args.types or names for weighted in (False, True)]
    imported, *seconds = compile_times([type.name + "*" * weighted for type, weighted in variants])
    print(f"numba is imported in {imported:.1f} s\n")
    print(f"{'million parameters a second, one core':40} {'ggml':>6} {'ours':>6} {'ratio':>6} {'compiled in':>12}")
    importance = np.random.default_rng(1).random(ROW_LENGTH, np.float32)
    for (type, weighted), compiled in zip(variants, seconds, strict=True):
        theirs, own = compare(type, importance if weighted else None, args.rounds)
        name = f"{type.name}, importance matrix" if weighted else type.name
        print(f"{name:40} {theirs:6.1f} {own:6.1f} {own / theirs:6.1f} {compiled:10.1f} s", flush=True)


if __name__ == "__main__":
    main()
