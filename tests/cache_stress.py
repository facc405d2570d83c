"""Eight processes that write, read, make room in and clear one image cache at once, for as long as they are told.

    python cache_stress.py DIRECTORY MAX_BYTES SECONDS

prints hits, payloads that were not those of their key, and entries cleared.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

from local_llava import image_cache
from local_llava.image_cache import ImageCache, directory

N_PROCESSES = 8


def payload(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest() * (100 + int(key[-2:], 16) * 10)


def use(place: Path, max_bytes: int, seconds: float, seed: int) -> tuple[int, int, int]:
    directory.KEEP_FREE = 0
    chance, cache = random.Random(seed), ImageCache(place, max_bytes)
    hits = wrong = cleared = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        key, what = f"{chance.randrange(20):032x}", chance.random()
        if what < 0.4:
            cache.put("kv", key, payload(key), {"seed": seed})
            if what < 0.2:
                cache.flush()
        elif what < 0.98:
            found = cache.get("kv", key)
            hits += found is not None
            wrong += found is not None and found != payload(key)
        elif what < 0.99:
            cleared += image_cache.clear(place)[0]
        else:
            image_cache.entries(place)
    cache.close()
    return hits, wrong, cleared


def main() -> None:
    place, max_bytes, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    # Forks need no second start of Python; this process has no threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(N_PROCESSES) as pool:
        counts = pool.starmap(use, [(place, max_bytes, seconds, seed) for seed in range(N_PROCESSES)], chunksize=1)
    print(json.dumps([sum(column) for column in zip(*counts, strict=True)]))


if __name__ == "__main__":
    main()
