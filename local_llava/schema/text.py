"""How characters are written: as JSON, as UTF-8, and as a regular expression of llguidance.

Knows JSON's escapes. A text has one way to be written here, so that two JSON strings are equal if and only if their
bytes are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from local_llava.schema.regex import Cat, Chars, Or, Ranges, Regex, Repeat, complement, intersection, text, union


def quote(value: str) -> str:
    """The one way in which a text is written as a JSON string: escapes only where JSON needs them."""
    written = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\u{ord(c):04x}" if 0xD800 <= ord(c) <= 0xDFFF else c for c in written)


_SHORT = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r"}
_UNESCAPED = complement(((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)))


def escaped(node: Regex) -> Regex:
    """The tree of what a text is written as inside a JSON string; see `quote`."""
    if isinstance(node, Cat):
        return Cat(tuple(escaped(part) for part in node.parts))
    if isinstance(node, Or):
        return Or(tuple(escaped(part) for part in node.parts))
    if isinstance(node, Repeat):
        return Repeat(escaped(node.part), node.low, node.high)
    raw = intersection(node.ranges, _UNESCAPED)
    ways: list[Regex] = [Chars(raw)] if raw else []
    codes = [code for low, high in node.ranges for code in range(low, min(high, 0x5C) + 1)]
    _add(ways, "\\", [_SHORT[code] for code in codes if code in _SHORT])
    for row in (0x00, 0x10):
        digits = [f"{code - row:x}" for code in codes if row <= code < row + 0x10 and code not in _SHORT]
        _add(ways, f"\\u00{row >> 4}", digits)
    return ways[0] if len(ways) == 1 else Or(tuple(ways))


def _add(ways: list[Regex], before: str, last: list[str]) -> None:
    if last:
        ways.append(Cat((text(before), Chars(union((ord(char), ord(char)) for char in last)))))


def utf8(ranges: Ranges) -> Iterator[list[tuple[int, int]]]:
    """Ranges of bytes, first to last, that together spell the characters and nothing else."""
    for low, high in ranges:
        for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)):
            if max(low, first) <= min(high, last):
                start, end = chr(max(low, first)).encode(), chr(min(high, last)).encode()
                yield from _byte_ranges(start, end)


def _byte_ranges(low: bytes, high: bytes) -> Iterator[list[tuple[int, int]]]:
    """Split two encodings of one length so that each position is a range of its own."""
    if len(low) == 1:
        yield [(low[0], high[0])]
        return
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    first, last = low[0], high[0]
    if first == last:
        yield from ([(first, first), *rest] for rest in _byte_ranges(low[1:], high[1:]))
        return
    if low[1:] != least:
        yield from ([(first, first), *rest] for rest in _byte_ranges(low[1:], most))
        first += 1
    if high[1:] != most:
        last -= 1
    if first <= last:
        yield [(first, last), *((0x80, 0xBF) for _ in least)]
    if high[1:] != most:
        yield from ([(high[0], high[0]), *rest] for rest in _byte_ranges(least, high[1:]))


def _code(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"


def lark(node: Regex) -> str:
    """In the syntax of Rust's regex crate, without the slashes that Lark puts around it."""
    if isinstance(node, Chars):
        spans = ((_code(chr(low)), _code(chr(high))) for low, high in node.ranges)
        listed = [low if low == high else f"{low}-{high}" for low, high in spans]
        return listed[0] if listed[0].count("x") == len(listed) == 1 else f"[{''.join(listed)}]"
    if isinstance(node, Cat):
        return "".join(lark(part) for part in node.parts)
    if isinstance(node, Or):
        return "(?:" + "|".join(lark(part) for part in node.parts) + ")"
    counts = "*" if (node.low, node.high) == (0, None) else f"{{{node.low},{'' if node.high is None else node.high}}}"
    return f"(?:{lark(node.part)}){counts}"
