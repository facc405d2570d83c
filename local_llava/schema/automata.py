"""Automata over the bytes of one JSON token: which texts a string, number or name may be, and how each can end.

States are worked out as they are reached, so that a large automaton costs what is used of it. Each automaton also gives
itself as a terminal of llguidance's Lark dialect, which must accept the same texts. Knows nothing of schemas.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from local_llava.schema.regex import ANY, Cat, Or, Regex, Repeat, text
from local_llava.schema.text import escaped, lark, utf8

MAX_WORK = 1_000_000
"""States and edges that the automata of one schema may cost while it is checked: some seconds."""

MAX_REMEMBERED = 200_000
"""The same for what one automaton remembers: some tens of megabytes."""

MAX_POINTS = 64
"""Words of a choice that are weighed for the shortest way to its end: the shortest ones."""

_FILLERS = {byte: rank for rank, byte in enumerate(b'"0a A')}
"""Bytes that the shortest text is filled with where any will do, best first."""

_QUOTE = ord('"')

Key = TypeVar("Key", bound=Hashable)
Point = TypeVar("Point", bound=Hashable)


class TooComplexError(ValueError):
    """An automaton is more work than is spent on it."""


class Work:
    """What the automata of one schema may still cost."""

    def __init__(self) -> None:
        self._left: float = MAX_WORK

    def spend(self, amount: int) -> None:
        """Raises TooComplexError where nothing is left."""
        self._left -= amount
        if self._left < 0:
            raise TooComplexError

    def release(self) -> None:
        """End the limit: the schema has passed, and what is reached from now on is used."""
        self._left = math.inf


class Automaton(ABC, Generic[Key, Point]):
    """A deterministic automaton over bytes.

    A state is a key. How it can end is told by its points: from each of them one text leads to an end, and from the
    point that its first byte leads to, the rest of that text. So what is known of a point holds all along its way.

    Attributes:
        start: The first state.
    """

    def __init__(self, start: Key, work: Work) -> None:
        self.start, self._work = start, work
        self._edges: dict[Key, list[tuple[int, int, Key]]] = {}
        self._remembered = 0

    @property
    @abstractmethod
    def lark(self) -> str:
        """A terminal of llguidance's Lark dialect that accepts the same texts."""

    @abstractmethod
    def farthest(self, limit: int) -> tuple[int | None, int]:
        """A number of bytes within which every state that can be reached has an end; None if there is a state without
        one, or if more states than the limit would have to be visited. And how many states were visited."""

    @abstractmethod
    def accepts(self, key: Key) -> bool:
        """Whether the token may end here."""

    @abstractmethod
    def points(self, key: Key) -> Iterable[Point]:
        """The points of a state; none if it has no way to an end."""

    @abstractmethod
    def distance(self, point: Point) -> int:
        """Bytes from a point to its end."""

    @abstractmethod
    def way(self, point: Point) -> tuple[int, Point]:
        """The first byte on the way of a point that is not at its end, and the point after it."""

    @abstractmethod
    def _targets(self, key: Key) -> Iterable[tuple[int, int, Key]]:
        """Disjoint, sorted ranges of bytes and where they lead."""

    def edges(self, key: Key) -> list[tuple[int, int, Key]]:
        """Disjoint, sorted ranges of bytes, first and last, and the states that they lead to."""
        found = self._edges.get(key)
        if found is None:
            found = list(self._targets(key))
            self._remembered += sum(map(self._size, (target for _, _, target in found)))
            if self._remembered > MAX_REMEMBERED:
                self._edges.clear()
                self._remembered = 0
            self._edges[key] = found
        return found

    def _size(self, key: Key) -> int:
        return 1

    def step(self, key: Key, byte: int) -> Key | None:
        """The state after one more byte; None if the byte cannot come here."""
        for low, high, target in self.edges(key):
            if low <= byte <= high:
                return target
        return None

    def matches(self, text: bytes) -> bool:
        """Whether the whole text is a token."""
        key: Key | None = self.start
        for byte in text:
            key = None if key is None else self.step(key, byte)
        return key is not None and self.accepts(key)

    def to_go(self, key: Key) -> float:
        """Bytes from a state to its nearest end; inf if there is none.

        Raises:
            TooComplexError: That is not found with a reasonable effort.
        """
        return min(map(self.distance, self.points(key)), default=math.inf)

    def text(self, point: Point) -> bytes:
        """What leads from a point to its end."""
        found = bytearray()
        for _ in range(self.distance(point)):
            byte, point = self.way(point)
            found.append(byte)
        return bytes(found)


def filler(low: int, high: int) -> tuple[int, int]:
    """The byte of a range that a text is best filled with, and its rank, 0 being the best."""
    best = min((byte for byte in _FILLERS if low <= byte <= high), key=lambda byte: _FILLERS[byte], default=low)
    return _FILLERS.get(best, len(_FILLERS)), best


class Words(Automaton[tuple[int, int, int], tuple[int, int]]):
    """A choice of literal texts. A state is the part of the sorted texts that is left, and how many bytes were read."""

    def __init__(self, words: Iterable[bytes], work: Work) -> None:
        self.words = sorted(set(words))
        work.spend(len(self.words))
        super().__init__((0, len(self.words), 0), work)

    @property
    def lark(self) -> str:
        return f"/{lark(Or(tuple(text(word.decode()) for word in self.words)))}/"

    def farthest(self, limit: int) -> tuple[int | None, int]:
        return max(map(len, self.words)), 0

    def accepts(self, key: tuple[int, int, int]) -> bool:
        low, high, depth = key
        return low < high and len(self.words[low]) == depth

    def points(self, key: tuple[int, int, int]) -> Iterable[tuple[int, int]]:
        low, high, depth = key
        return [(i, depth) for i in heapq.nsmallest(MAX_POINTS, range(low, high), key=lambda i: len(self.words[i]))]

    def distance(self, point: tuple[int, int]) -> int:
        return len(self.words[point[0]]) - point[1]

    def way(self, point: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        word, depth = point
        return self.words[word][depth], (word, depth + 1)

    def _targets(self, key: tuple[int, int, int]) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
        low, high, depth = key
        low += self.accepts(key)
        while low < high:
            byte = self.words[low][depth]
            end = bisect_right(self.words, byte, low, high, key=lambda word: word[depth])
            yield byte, byte, (low, end, depth + 1)
            low = end


class Expression(Automaton[frozenset[int], int]):
    """A regular expression, by sets of the states of a non-deterministic automaton (Thompson's construction).

    The points of a state are the states that it consists of.
    """

    def __init__(self, tree: Regex, work: Work) -> None:
        self._tree, self._work = tree, work
        self._bytes: list[list[tuple[int, int, int]]] = []
        self._empty: list[list[int]] = []
        self._end = self._new()
        start = self._build(tree, self._end)
        self._distances, self._ways = self._measured()
        super().__init__(self._closure((start,)), work)

    @property
    def lark(self) -> str:
        return f"/{lark(self._tree)}/"

    def farthest(self, limit: int) -> tuple[int | None, int]:
        return max(self._distances), 0

    def accepts(self, key: frozenset[int]) -> bool:
        return self._end in key

    def points(self, key: frozenset[int]) -> Iterable[int]:
        return key

    def distance(self, point: int) -> int:
        return self._distances[point]

    def way(self, point: int) -> tuple[int, int]:
        return self._ways[point]

    def _size(self, key: frozenset[int]) -> int:
        return len(key) + 1

    def _new(self) -> int:
        self._work.spend(1)
        self._bytes.append([])
        self._empty.append([])
        return len(self._bytes) - 1

    def _build(self, node: Regex, target: int) -> int:
        """A state from which a match of the node leads to the target."""
        if isinstance(node, Cat):
            for part in reversed(node.parts):
                target = self._build(part, target)
            return target
        if isinstance(node, Repeat):
            return self._repeat(node, target)
        start = self._new()
        if isinstance(node, Or):
            self._empty[start] += [self._build(part, target) for part in node.parts]
        else:
            for sequence in utf8(node.ranges):
                self._chain(start, sequence, target)
        return start

    def _repeat(self, node: Repeat, target: int) -> int:
        if node.high is None:
            loop = self._new()
            self._empty[loop] += [target, self._build(node.part, loop)]
            state = loop
        else:
            state = target
            for _ in range(node.high - node.low):
                more = self._new()
                self._empty[more] += [target, self._build(node.part, state)]
                state = more
        for _ in range(node.low):
            state = self._build(node.part, state)
        return state

    def _chain(self, start: int, sequence: Sequence[tuple[int, int]], target: int) -> None:
        self._work.spend(len(sequence))
        for i, (low, high) in enumerate(sequence):
            after = target if i == len(sequence) - 1 else self._new()
            self._bytes[start].append((low, high, after))
            start = after

    def _measured(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Bytes from each state to the end, and the first step there. Every state has a way."""
        before: list[list[tuple[int, int]]] = [[] for _ in self._bytes]
        for state, (edges, empty) in enumerate(zip(self._bytes, self._empty, strict=True)):
            for after, cost in [*((after, 1) for _, _, after in edges), *((after, 0) for after in empty)]:
                before[after].append((state, cost))
        distances, ways = [-1] * len(before), [(0, self._end)] * len(before)
        queue = deque([(self._end, self._end, 0)])
        while queue:
            state, after, distance = queue.popleft()
            if distances[state] >= 0:
                continue
            distances[state] = distance
            if self._bytes[state]:
                near = [
                    (*filler(low, high), to) for low, high, to in self._bytes[state] if distances[to] == distance - 1
                ]
                ways[state] = min(near)[1:]
            else:
                ways[state] = ways[after]
            for other, cost in before[state]:
                (queue.append if cost else queue.appendleft)((other, state, distance + cost))
        return distances, ways

    def _closure(self, states: Iterable[int]) -> frozenset[int]:
        todo, seen = list(states), set(states)
        while todo:
            for state in self._empty[todo.pop()]:
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
        self._work.spend(len(seen))
        return frozenset(state for state in seen if self._bytes[state] or state == self._end)

    def _targets(self, key: frozenset[int]) -> Iterator[tuple[int, int, frozenset[int]]]:
        edges = [edge for state in key for edge in self._bytes[state]]
        self._work.spend(len(edges))
        cuts = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
        for low, end in pairwise(cuts):
            targets = {target for first, last, target in edges if first <= low <= last}
            if targets:
                yield low, end - 1, self._closure(targets)


_Count = tuple[int, frozenset[int]]


class Counted(Automaton[_Count, _Count]):
    """A JSON string of `low` to `high` characters (None for no limit), whatever they are.

    A state is a number of characters, and the state of an automaton of one character: one automaton with all of them
    written out would be as large as the limit.
    """

    _BEFORE, _AFTER = -1, -2

    def __init__(self, low: int, high: int | None, work: Work) -> None:
        self._low, self._high = low, high
        self._character = Expression(escaped(ANY), work)
        super().__init__((self._BEFORE, frozenset()), work)

    @property
    def lark(self) -> str:
        high = "" if self._high is None else self._high
        return f'/"{lark(escaped(ANY))}{{{self._low},{high}}}"/'

    def farthest(self, limit: int) -> tuple[int | None, int]:
        return self._low + 7, 0  # the rest of an escape, the other characters, the quotes

    def accepts(self, key: _Count) -> bool:
        return key[0] == self._AFTER

    def points(self, key: _Count) -> Iterable[_Count]:
        return (key,)

    def distance(self, point: _Count) -> int:
        count, inside = point
        if count < 0:
            return 0 if count == self._AFTER else self._low + 2
        if inside == self._character.start:
            return max(self._low - count, 0) + 1
        return int(self._character.to_go(inside)) + max(self._low - count - 1, 0) + 1

    def way(self, point: _Count) -> tuple[int, _Count]:
        count, inside = point
        if count < 0 or (inside == self._character.start and count >= self._low):
            byte = _QUOTE
        else:
            byte = self._character.way(min(inside, key=self._character.distance))[0]
        after = self.step(point, byte)
        assert after is not None  # since every character can be finished
        return byte, after

    def _targets(self, key: _Count) -> Iterator[tuple[int, int, _Count]]:
        count, inside = key
        start = self._character.start
        if count == self._BEFORE:
            yield _QUOTE, _QUOTE, (0, start)
        if count < 0:
            return
        edges: list[tuple[int, int, _Count]] = []
        if inside == start and count >= self._low:
            edges.append((_QUOTE, _QUOTE, (self._AFTER, frozenset())))
        if self._high is None or count < self._high:
            after = min(count + 1, self._low) if self._high is None else count + 1
            for low, high, target in self._character.edges(inside):
                done = self._character.accepts(target)
                edges.append((low, high, (after, start) if done else (count, target)))
        yield from sorted(edges, key=lambda edge: edge[:2])


def string(node: Regex, work: Work) -> Expression:
    """The automaton of the JSON strings whose text a tree matches."""
    return Expression(Cat((text('"'), escaped(node), text('"'))), work)
