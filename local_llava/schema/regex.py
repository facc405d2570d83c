"""Regular expressions over characters: what `pattern` and `format` mean, as trees.

Knows the syntax that ECMA-262 and Python's `re` share, and reads it so that both agree: where they differ (is an
Arabic digit a `\\d`?) the tree matches only what both match. Does not know JSON's escapes, UTF-8 or automata.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]

MAX_PATTERN = 2000
"""Characters of the longest pattern that is read."""

MAX_SIZE = 6000
"""Characters that a pattern may stand for with its counts written out: `(ab){1,50}` is 100."""

MAX_NESTING = 40
"""Groups inside groups."""


class RegexError(ValueError):
    """A pattern cannot be used; the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of a set: sorted, disjoint ranges of code points."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Cat:
    """One after another; none is the empty text."""

    parts: tuple[Regex, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Any of them; none matches nothing."""

    parts: tuple[Regex, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`low` to `high` times; None for no limit."""

    part: Regex
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class _Anchor:
    """`^` or `$` while a pattern is read; gone from the finished tree."""

    start: bool


Regex: TypeAlias = Chars | Cat | Or | Repeat
_Raw: TypeAlias = Regex | _Anchor

_LAST = sys.maxunicode
_SURROGATES = (0xD800, 0xDFFF)


def union(*sets: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges of the characters that are in any of the sets."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(r for ranges in sets for r in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """Ranges of all other characters; surrogates are none, since no text in UTF-8 has them."""
    gaps, at = [], 0
    for low, high in union(ranges, [_SURROGATES]):
        if at < low:
            gaps.append((at, low - 1))
        at = high + 1
    return (*gaps, (at, _LAST)) if at <= _LAST else tuple(gaps)


def intersection(first: Ranges, second: Ranges) -> Ranges:
    """Ranges of the characters that are in both sets."""
    return complement(union(complement(first), complement(second)))


ANY = Chars(complement(()))
ANYTHING = Repeat(ANY, 0, None)


def text(characters: str) -> Cat:
    """The tree of a literal text."""
    return Cat(tuple(Chars(((ord(c), ord(c)),)) for c in characters))


def size(node: Regex) -> int:
    """Characters of the tree with its counts written out."""
    if isinstance(node, Chars):
        return 1
    if isinstance(node, Repeat):
        return size(node.part) * max(node.low, 1 if node.high is None else node.high, 1)
    return 1 + sum(size(part) for part in node.parts)


def lengths(node: Regex) -> tuple[int, int | None]:
    """Least and most characters of a match; None for no limit."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Repeat):
        low, high = lengths(node.part)
        return low * node.low, 0 if high == 0 else None if high is None or node.high is None else high * node.high
    parts = [lengths(part) for part in node.parts] or [(0, 0)]
    highs = [high for _, high in parts if high is not None]
    bounded, combine = len(highs) == len(parts), sum if isinstance(node, Cat) else max
    least = sum(low for low, _ in parts) if isinstance(node, Cat) else min(low for low, _ in parts)
    return least, combine(highs) if bounded else None


class _Class(NamedTuple):
    """A class that implementations disagree on: what all of them put in, and what any of them puts in."""

    sure: Ranges
    possible: Ranges

    def negated(self) -> _Class:
        return _Class(complement(self.possible), complement(self.sure))


def _exactly(*ranges: tuple[int, int]) -> _Class:
    return _Class(union(ranges), union(ranges))


@cache
def _class_escape(letter: str) -> _Class:
    """`\\d`, `\\w`, `\\s`: ASCII in ECMA-262, Unicode in Python; white space differs in a few characters."""
    if letter == "d":
        digits = [(c, c) for c in range(0x80, _LAST + 1) if unicodedata.category(chr(c)) == "Nd"]
        return _Class(((0x30, 0x39),), union([(0x30, 0x39)], digits))
    if letter == "w":
        word = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
        return _Class(word, union(word, [(0x80, _LAST)]))
    spaces = [(c, c) for c in range(_LAST + 1) if chr(c).isspace()]
    return _Class(((0x09, 0x0D), (0x20, 0x20)), union(spaces, [(0xFEFF, 0xFEFF)]))


# In ECMA-262 no line end matches, in Python only \n does not.
_DOT = _Class(complement(((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))), complement(((0x0A, 0x0A),)))
_LINE_END = Repeat(Chars(((0x0A, 0x0A),)), 0, 1)
_CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0x00}
_QUANTIFIER = re.compile(r"[*+?]|\{(\d{1,9})(?:(,)(\d{0,9}))?\}")


class _Reader:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str, possible: bool) -> None:
        self.pattern, self.possible, self.at, self.depth = pattern, possible, 0, 0

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        self.at += len(text) * found
        return found

    def next(self) -> str:
        if self.at >= len(self.pattern):
            raise RegexError("it ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def alternatives(self) -> list[list[_Raw]]:
        found: list[list[_Raw]] = [[]]
        while self.at < len(self.pattern) and not self.peek(")"):
            if self.take("|"):
                found.append([])
            else:
                found[-1].append(self.term())
        return found

    def term(self) -> _Raw:
        atom = self.atom()
        match = _QUANTIFIER.match(self.pattern, self.at)
        if not match:
            return atom
        self.at = match.end()
        self.take("?")  # lazy: the same texts match
        if _QUANTIFIER.match(self.pattern, self.at) or isinstance(atom, _Anchor):
            raise RegexError(f"nothing to repeat at character {self.at}")
        low, comma, high = match.groups()
        if low is None:
            counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}[match.group()[0]]
        else:
            counts = (int(low), int(high) if high else None if comma else int(low))
        if counts[1] is not None and counts[0] > counts[1]:
            raise RegexError(f"{match.group()} counts down")
        if _has_anchor(atom):
            raise RegexError("^ and $ are supported at its ends only")
        return Repeat(atom, *counts)

    def atom(self) -> _Raw:
        char = self.next()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char in "^$":
            return _Anchor(char == "^")
        if char == ".":
            return self.chars(_DOT)
        if char == "\\":
            return self.chars(self.escape(in_class=False))
        if char in "*+?" or (char == "{" and self.peek(",")):
            raise RegexError(f"nothing to repeat at character {self.at}")
        return Chars(((self.scalar(char), self.scalar(char)),))

    def group(self) -> _Raw:
        if self.peek("?") and not self.take("?:"):
            raise RegexError(f"(?{self.pattern[self.at + 1 : self.at + 2]}...) is not supported; of groups, (...) is")
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise RegexError(f"it nests more than {MAX_NESTING} groups")
        node = _joined(self.alternatives())
        self.depth -= 1
        if not self.take(")"):
            raise RegexError("a ( is not closed")
        return node

    def escape(self, in_class: bool) -> _Class:
        char = self.next()
        if char in "dwsDWS":
            found = _class_escape(char.lower())
            return found.negated() if char.isupper() else found
        if char in _CONTROLS:
            code = _CONTROLS[char]
            if char == "0" and self.pattern[self.at : self.at + 1].isdigit():
                raise RegexError("octal escapes are not supported")
        elif char in "xu":
            code = self.hexadecimal(2 if char == "x" else 4)
            if 0xD800 <= code < 0xDC00 and self.take("\\u"):
                code = 0x10000 + ((code - 0xD800) << 10) + (self.hexadecimal(4) - 0xDC00)
        elif char == "b" and in_class:
            code = 0x08
        elif char.isalnum():
            raise RegexError(f"\\{char} is not supported")
        else:
            code = ord(char)
        return _exactly((self.scalar(chr(code)), code))

    def hexadecimal(self, digits: int) -> int:
        found = self.pattern[self.at : self.at + digits]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{digits}}}", found):
            raise RegexError(f"\\x and \\u take {digits} hexadecimal digits, not {found!a}")
        self.at += digits
        return int(found, 16)

    def scalar(self, char: str) -> int:
        if _SURROGATES[0] <= ord(char) <= _SURROGATES[1]:
            raise RegexError("surrogates are not characters")
        return ord(char)

    def char_class(self) -> Chars:
        negated, members = self.take("^"), []
        if self.peek("]"):
            raise RegexError("[] and [^] are not supported")
        while not self.take("]"):
            low = self.member()
            if self.peek("-") and not self.peek("-]"):
                self.next()
                high = self.member()
                ends = [*low.sure, *high.sure]
                if len(ends) != 2 or any(a != b for a, b in ends) or ends[0] > ends[1]:
                    raise RegexError("a range in [...] must go from one character up to another")
                low = _exactly((ends[0][0], ends[-1][0]))
            members.append(low)
        found = _Class(union(*(m.sure for m in members)), union(*(m.possible for m in members)))
        return self.chars(found.negated() if negated else found)

    def chars(self, found: _Class) -> Chars:
        ranges = intersection(found.possible if self.possible else found.sure, ANY.ranges)
        if not ranges:
            raise RegexError("a [...] matches no character")
        return Chars(ranges)

    def member(self) -> _Class:
        char = self.next()
        if char == "\\":
            return self.escape(in_class=True)
        return _exactly((self.scalar(char), ord(char)))


def _joined(alternatives: Sequence[Sequence[_Raw]]) -> _Raw:
    nodes = [a[0] if len(a) == 1 else Cat(tuple(a)) for a in alternatives]  # type: ignore[arg-type]
    return nodes[0] if len(nodes) == 1 else Or(tuple(nodes))  # type: ignore[arg-type]


def _has_anchor(node: _Raw) -> bool:
    if isinstance(node, (Cat, Or)):
        return any(_has_anchor(part) for part in node.parts)
    return isinstance(node, _Anchor) or (isinstance(node, Repeat) and _has_anchor(node.part))


def _whole(node: _Raw, end: tuple[Regex, ...]) -> Regex:
    """The tree of all texts in which the pattern is found somewhere; `end` is what may come where it says `$`."""
    if isinstance(node, Or):
        return Or(tuple(_whole(part, end) for part in node.parts))
    parts: list[_Raw] = list(node.parts) if isinstance(node, Cat) else [node]
    if len(parts) == 1 and isinstance(parts[0], (Or, Cat)):
        return _whole(parts[0], end)
    before: tuple[Regex, ...] = (ANYTHING,)
    after: tuple[Regex, ...] = (ANYTHING,)
    while parts and parts[0] == _Anchor(start=True):
        before, parts = (), parts[1:]
    while parts and parts[-1] == _Anchor(start=False):
        after, parts = end, parts[:-1]
    inner: list[Regex] = []
    for part in parts:
        if isinstance(part, _Anchor) or _has_anchor(part):
            raise RegexError("^ and $ are supported at its ends only")
        inner.append(part)
    found = (*before, *inner, *after)
    return found[0] if len(found) == 1 else Cat(found)


@lru_cache(maxsize=256)
def parse_pattern(pattern: str, possible: bool = False) -> Regex:
    """The tree of all texts that a `pattern` lets through.

    Supported is what ECMA-262 and Python share without looking around: characters, classes, groups, alternatives,
    counts, and anchors at the ends.

    Args:
        pattern: The regular expression.
        possible: Where they differ, match what either of them matches; by default only what both match.

    Raises:
        RegexError: The pattern is malformed, too large, or uses something else.
    """
    if len(pattern) > MAX_PATTERN:
        raise RegexError(f"it has {len(pattern)} characters; {MAX_PATTERN} are accepted")
    reader = _Reader(pattern, possible)
    raw = _joined(reader.alternatives())
    if reader.at < len(pattern):
        raise RegexError("a ) is not opened")
    # In Python, $ also matches before a last line end.
    node = _whole(raw, (_LINE_END,) if possible else ())
    if size(node) > MAX_SIZE:
        raise RegexError(f"it stands for {size(node)} characters with its counts written out; {MAX_SIZE} are accepted")
    return node
