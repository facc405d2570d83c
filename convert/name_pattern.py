"""Patterns for tensor names: regular expressions as llama-quantize reads them.

llama-quantize puts a pattern in lower case and searches for it with std::regex (ECMAScript). Python's `re` means other
things by some patterns, and both may take for ever over one such as `(a*)*b`. So they are read and searched for here,
without backtracking: a search costs at most the pattern's size for each character. These are accepted, lazy quantifiers
too, and the rest is refused by name:

    abc  .  [a-z_]  [^0-9]  \\d  \\w  \\s  \\.  (...)  (?:...)  a|b  * + ? {2} {2,} {2,5}  ^  $  \\b  (?!...)
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import NoReturn

from local_llava.errors import UsageError

MAX_PATTERN = 256
"""Characters of a pattern."""
MAX_SIZE = 4096
"""Characters after all counts are written out: `a{3}` has three. std::regex does write them out."""
MAX_DEPTH = 32
"""Brackets within brackets."""

_DIGITS = frozenset(string.digits)
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": frozenset(" \t\n\v\f\r")}
_ANY = frozenset(map(chr, range(256))) - {"\n", "\r"}
_LETTERS_AND_DIGITS = frozenset(string.ascii_letters + string.digits)

Node = Callable[[str, int], int]
"""`node(text, starts)` gives where a match may end. Places between characters are bits: bit i is before character i."""


class NamePattern:
    """A pattern, ready to be searched for.

    Args:
        text: As llama-quantize takes it; capital letters count as small ones.

    Raises:
        UsageError: Not a pattern of the kind above; the message says where.
    """

    def __init__(self, text: str) -> None:
        self._node = _Parser(text).parse()

    def found_in(self, name: str) -> bool:
        """Whether the pattern matches anywhere in a name."""
        # std::regex reads bytes.
        text = name.encode("utf-8", "surrogateescape").decode("latin-1")
        return self._node(text, (2 << len(text)) - 1) != 0


class _Parser:
    """Recursive descent over the grammar above; a node comes with its size."""

    def __init__(self, text: str) -> None:
        self.source, self.text, self.at, self.depth, self.ahead = text, text.lower(), 0, 0, 0

    def parse(self) -> Node:
        if not self.text.isascii() or not self.text.isprintable() or not 1 <= len(self.text) <= MAX_PATTERN:
            self.fail(f"1 to {MAX_PATTERN} printable ASCII characters are accepted")
        node, _ = self.alternatives()
        if self.at < len(self.text):
            self.fail("a bracket is closed that was not opened")
        return node

    def fail(self, why: str) -> NoReturn:
        shown = ascii(self.source[: MAX_PATTERN + 1])
        raise UsageError(f"--tensor-type: the pattern {shown} cannot be used, at character {self.at + 1}: {why}")

    def peek(self, start: str = "") -> str:
        """The next character, "" at the end; or `start` if that is what comes."""
        if start:
            return start if self.source.startswith(start, self.at) else ""
        return self.text[self.at : self.at + 1]

    def take(self, start: str) -> bool:
        found = bool(self.peek(start))
        self.at += len(start) if found else 0
        return found

    def alternatives(self) -> tuple[Node, int]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"at most {MAX_DEPTH} brackets within brackets are accepted")
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        self.depth -= 1
        nodes = [node for node, _ in branches]
        return (nodes[0] if len(nodes) == 1 else _any_of(nodes)), sum(size for _, size in branches)

    def sequence(self) -> tuple[Node, int]:
        nodes, total = [], 1
        while self.peek() not in ("", "|", ")"):
            node, size = self.term()
            nodes.append(node)
            total += size
            if total > MAX_SIZE:
                self.fail(f"with its counts written out it has more than {MAX_SIZE} characters")
        return _in_turn(nodes), total

    def term(self) -> tuple[Node, int]:
        for start, assertion in _ASSERTIONS.items():
            if self.peek(start) and start != "$" and self.ahead:
                # libstdc++ takes the place where it looks ahead for the start of the name.
                self.fail(f"{start} is not accepted within (?!...)")
            if self.take(start):
                return self.unrepeated(assertion), 1
        if self.take("(?!"):
            self.ahead += 1
            node, size = self.group()
            self.ahead -= 1
            return self.unrepeated(_not_followed_by(node)), size
        if self.take("(?:") or (not self.peek("(?") and self.take("(")):
            return self.repeated(*self.group())
        return self.repeated(_one_of(self.characters()), 1)

    def group(self) -> tuple[Node, int]:
        found = self.alternatives()
        if not self.take(")"):
            self.fail("a bracket is not closed")
        return found

    def unrepeated(self, node: Node) -> Node:
        if self.peek() in ("*", "+", "?", "{"):
            self.fail(f"{self.peek()!r} must follow a character or a group")
        return node

    def repeated(self, node: Node, size: int) -> tuple[Node, int]:
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self.peek())
        if self.peek() == "{":
            low, high = self.counts()
        elif counts is None:
            return node, size
        else:
            low, high = counts
            self.at += 1
        self.take("?")  # a lazy one finds the same names
        return self.unrepeated(_repeat(node, low, high)), size * max(1, low if high is None else high)

    def counts(self) -> tuple[int, int | None]:
        """{n}, {n,} or {n,m}."""
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : max(end, 0)].partition(",")
        if not (low.isdigit() and (high.isdigit() or not high) and len(low) < 4 and len(high) < 4):
            self.fail("a count is {n}, {n,} or {n,m}, of at most three digits; a brace itself is \\{")
        least, most = int(low), int(high) if high else (None if comma else int(low))
        if most is not None and most < least:
            self.fail("a count's first number must not be the larger one")
        self.at = end + 1
        return least, most

    def characters(self) -> frozenset[str]:
        """One character, or a class of them."""
        character = self.peek()
        if character == "[":
            return self.set()
        if character == "\\":
            return self.escape()
        if character in ("*", "+", "?", "{"):
            self.fail(f"{character!r} must follow a character or a group")
        if character in ("]", "}", "("):
            reason = "only (?:...) and (?!...) are accepted of the groups with a question mark"
            self.fail(reason if character == "(" else f"write \\{character} for the character itself")
        self.at += 1
        return _ANY if character == "." else frozenset(character)

    def escape(self) -> frozenset[str]:
        r"""`\d`, `\w`, `\s`, or the character after the backslash where that is no letter or digit."""
        # A capital class is read as the small one by llama-quantize: the opposite of what is meant.
        character = self.source[self.at + 1 : self.at + 2]
        if character not in _CLASSES and (not character or character in _LETTERS_AND_DIGITS):
            self.fail("of the escapes \\d, \\w, \\s, \\b and those of punctuation are accepted")
        self.at += 2
        return _CLASSES.get(character, frozenset(character))

    def set(self) -> frozenset[str]:
        """[...] or [^...]."""
        self.at += 1
        negated = self.take("^")
        found: set[str] = set()
        first = True
        while first or self.peek() != "]":
            if self.peek() in ("", "[", "]"):
                self.fail("a set is not closed, or empty, or holds a bracket without a backslash")
            low = self.member(first)
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                high = self.member(False)
                if len(low) != 1 or len(high) != 1 or min(high) < min(low):
                    self.fail("a range is two characters, the smaller one first")
                low = frozenset(map(chr, range(ord(min(low)), ord(min(high)) + 1)))
            found |= low
            first = False
        self.at += 1
        return frozenset(map(chr, range(256))) - found if negated else frozenset(found)

    def member(self, first: bool) -> frozenset[str]:
        """A character of a set. A dash stands for itself at either end only."""
        if self.peek() == "-" and not first and self.text[self.at + 1 : self.at + 2] != "]":
            self.fail("a dash in a set comes first or last, or between the ends of a range")
        if self.peek() == "\\":
            return self.escape()
        if self.peek() in ("", "["):
            self.fail("a set is not closed, or holds a bracket without a backslash")
        self.at += 1
        return frozenset(self.text[self.at - 1])


def _one_of(characters: frozenset[str]) -> Node:
    return lambda text, at: (at & sum(1 << i for i, c in enumerate(text) if c in characters)) << 1


def _in_turn(nodes: list[Node]) -> Node:
    def run(text: str, at: int) -> int:
        for node in nodes:
            at = node(text, at)
        return at

    return run


def _any_of(nodes: list[Node]) -> Node:
    def run(text: str, at: int) -> int:
        ends = 0
        for node in nodes:
            ends |= node(text, at)
        return ends

    return run


def _repeat(node: Node, low: int, high: int | None) -> Node:
    def run(text: str, at: int) -> int:
        for _ in range(low):
            at = node(text, at)
        ends, step = at, 0
        while at and (high is None or low + step < high):
            at = node(text, at) & ~ends  # only places that were not reached before can lead further
            ends |= at
            step += 1
        return ends

    return run


def _not_followed_by(node: Node) -> Node:
    return lambda text, at: sum(1 << i for i in range(len(text) + 1) if at >> i & 1 and not node(text, 1 << i))


def _at_start(text: str, at: int) -> int:
    return at & 1


def _at_end(text: str, at: int) -> int:
    return at & 1 << len(text)


def _at_word_edge(text: str, at: int) -> int:
    inside = [False, *(c in _WORD for c in text), False]
    return at & sum(1 << i for i in range(len(text) + 1) if inside[i] != inside[i + 1])


_ASSERTIONS: dict[str, Node] = {"^": _at_start, "$": _at_end, r"\b": _at_word_edge}
