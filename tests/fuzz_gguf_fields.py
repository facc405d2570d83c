"""Damages GGUF files in place: a field of the header gets an odd value, or the file ends at one.

Knows where the container has which field, and nothing of what is in it (`fuzz_gguf` does).
"""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass

from gguf_bytes import CODES

WIDTHS = {number: struct.calcsize("<" + code) for number, code in CODES.values() if code}


@dataclass(frozen=True)
class Span:
    """A field of a file."""

    what: str
    at: int
    size: int


def spans(data: bytes) -> list[Span]:
    """The fields of a whole GGUF's header, in their order."""
    found: list[Span] = []
    at = 0

    def take(what: str, size: int) -> int:
        nonlocal at
        found.append(Span(what, at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    take("magic", 4)
    take("version", 4)
    n_tensors, n_entries = take("tensor count", 8), take("entry count", 8)
    for _ in range(n_entries):
        take("key", take("key length", 8))
        kind = take("value type", 4)
        n, item = (1, kind) if kind != 9 else (0, take("item type", 4))
        n = n or take("array length", 8)
        where = "item" if kind == 9 else "value"
        for _ in range(n):
            if item == 8:
                take("text", take(f"{where} length", 8))
            else:
                take(where, WIDTHS[item])
    for _ in range(n_tensors):
        take("name", take("name length", 8))
        for _ in range(take("dimension count", 4)):
            take("dimension", 8)
        take("tensor type", 4)
        take("offset", 8)
    return found


def odd_field(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One field of the header changed in place; kinds of fields are equally likely, however many there are."""
    fields = spans(data)
    what = rng.choice(sorted({f.what for f in fields}))
    field = rng.choice([f for f in fields if f.what == what and f.size] or fields[:1])
    old = int.from_bytes(data[field.at : field.at + field.size], "little")
    extremes = (0, 1, 7, 8, 9, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
    floats = [struct.unpack("<I", struct.pack("<f", x))[0] for x in (math.nan, math.inf, -1.0, 1e-40, 3e38)]
    new = rng.choice((*extremes, old + 1, old - 1, old * 2, old // 2, len(data), *floats, rng.getrandbits(64)))
    packed = (new % (1 << 8 * field.size)).to_bytes(field.size, "little")
    return data[: field.at] + packed + data[field.at + field.size :], f"{what} at {field.at}: {old} -> {new}"[:120]


def cut(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Cut where a field begins or ends, or somewhere in the data."""
    end = rng.choice([*(s.at + rng.choice((0, s.size // 2)) for s in rng.choices(spans(data), k=3)), len(data) - 1])
    if rng.random() < 0.3:
        end = rng.randrange(len(data))
    return data[:end], f"cut at {end} of {len(data)}"
