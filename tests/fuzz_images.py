"""Damaged pictures through load_image, in child processes: each must give a picture or an ImageError.

    python tests/fuzz_images.py --count 5000 --seed 1 [--kinds tiff,pdf]

A child has a limit of memory, and time for each file; when it dies or hangs, that file is reported and the next child
goes on behind it. Every file follows from the seed and its number: `--show NUMBER` writes one to standard output.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

MEMORY = 3 << 30
SECONDS = 90.0  # what the extras' own process may take, and some more


def truncated(data: bytes) -> list[bytes]:
    """Cut at ten places, from nothing to all but the last bytes."""
    return [data[: len(data) * i // 10] for i in range(9)] + [data[:-3]]


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One of many ways of being broken."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        # Headers decide more than pixels do.
        at = rng.randrange(min(len(out), 200) + 1) if rng.random() < 0.5 else at
        n = rng.choice((1, 2, 4, 8, 16, 64, 500))
        match rng.randrange(9):
            case 0:
                del out[at:]
            case 1 | 2:
                for i in range(at, min(at + rng.choice((1, 1, 1, 4)), len(out))):
                    out[i] ^= 1 << rng.randrange(8)
            case 3:
                number = rng.choice(
                    (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32))
                )
                packed = struct.pack(rng.choice(("<I", ">I")), number)
                out[at : at + 4] = packed if rng.random() < 0.6 else packed[:2]
            case 4:
                del out[at : at + n]
            case 5:
                out[at:at] = out[at : at + n]
            case 6:
                out[at : at + n] = rng.randbytes(n)
            case 7:
                out[at : at + n] = bytes(n)
            case 8:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                out[at : at + n] = other[start : start + n]
    return with_good_checksums(bytes(out)) if rng.random() < 0.7 else bytes(out)


def with_good_checksums(data: bytes) -> bytes:
    """A PNG whose chunks pass Pillow's first check, so that the damage behind them is seen."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + struct.unpack_from(">I", out, at)[0]
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def cases(seed: int, kinds: str = "") -> Iterator[tuple[str, bytes]]:
    """Kind and bytes, without end: first every kind cut at ten places, then damaged files of all kinds in turn."""
    from picture_files import every_kind

    files = every_kind()
    wanted = set(kinds.split(",")) if kinds else {kind.split("-")[0] for kind in files}
    chosen = {k: v for k, v in files.items() if wanted & {k, k.split("-")[0]}}
    for kind, data in chosen.items():
        for cut in truncated(data):
            yield kind, cut
    number = 0
    while True:
        for kind, data in chosen.items():
            number += 1
            yield kind, damaged(data, list(files.values()), random.Random(f"{seed}/{number}"))


def peak_memory() -> int:
    """MiB of resident memory that this process had at most. ru_maxrss begins with what its parent had."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def child(seed: int, kinds: str, start: int, count: int) -> None:
    """Load files `start` to `count`, and say what became of each on standard output."""
    from local_llava.errors import ImageError
    from local_llava.images import load_image

    # The kinds are made before the limit: encoders take more than decoders.
    made = cases(seed, kinds)
    first = next(made)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for i in range(count):
        kind, data = first if i == 0 else next(made)
        if i < start:
            continue
        print(f"{i} {kind} ", end="", flush=True)
        began = time.monotonic()
        try:
            image = load_image(data)
            result = "picture" if image.mode == "RGB" and image.load() is not None else "WRONG-MODE"
        except ImageError as e:
            result = "error" if str(e).startswith("bytes: ") and str(e).isprintable() else f"UNCLEAR {e!r}"
        except BaseException as e:
            result = f"ESCAPED {type(e).__name__}: {e}"
        memory = peak_memory()
        print(f"{time.monotonic() - began:.2f} {memory} {result}", flush=True)


def run(seed: int, count: int, kinds: str = "") -> tuple[collections.Counter[str], list[str], float, int, bytes]:
    """Outcomes, what went wrong, the most seconds for one file, the most MiB, and what was written to stderr."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest, memory, start, noise = 0.0, 0, 0, bytearray()
    while start < count:
        command = [sys.executable, __file__, "--child", str(start), "--seed", str(seed), "--count", str(count)]
        process = subprocess.Popen(
            [*command, "--kinds", kinds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}
        )
        assert process.stdout and process.stderr
        drain = threading.Thread(target=lambda pipe: noise.extend(pipe.read()), args=(process.stderr,))
        drain.start()
        last, dog = f"{start} before the first", threading.Timer(SECONDS, process.kill)
        dog.start()
        for line in process.stdout:
            dog.cancel()
            dog = threading.Timer(SECONDS, process.kill)
            dog.start()
            last = line.decode().rstrip("\n")
            fields = last.split(" ", 4)
            if len(fields) < 5:
                break
            start = int(fields[0]) + 1
            slowest, memory = max(slowest, float(fields[2])), max(memory, int(fields[3]))
            outcomes[f"{fields[1].split('-')[0]} {fields[4].split()[0]}"] += 1
            if fields[4] not in ("picture", "error"):
                wrong.append(last)
        code = process.wait()
        dog.cancel()
        drain.join()
        if start < count:
            wrong.append(f"{last}: the process ended with {code}")
            outcomes["DIED"] += 1
            start += 1
    return outcomes, wrong, slowest, memory, bytes(noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only these formats or kinds, with commas")
    parser.add_argument("--show", type=int, metavar="NUMBER", help="write this file to standard output")
    parser.add_argument("--child", type=int, metavar="START", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.seed, given.kinds, given.child, given.count)
        return
    if given.show is not None:
        for i, (_, data) in enumerate(cases(given.seed, given.kinds)):
            if i == given.show:
                sys.stdout.buffer.write(data)
                return
    outcomes, wrong, slowest, memory, noise = run(given.seed, given.count, given.kinds)
    for outcome, n in sorted(outcomes.items()):
        print(f"{n:7} {outcome}")
    print(f"slowest {slowest:.1f} s, peak {memory} MiB, {len(noise)} bytes on stderr, {len(wrong)} wrong")
    for line in wrong[:50]:
        print(line)
    if noise:
        print(noise[:2000].decode(errors="replace"))
    sys.exit(bool(wrong or noise))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
