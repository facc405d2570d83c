"""What several automata accept together, and others do not: a pattern and a length, a name and none of those declared.

Knows that a state may have no way to an end, which the automata that it consists of cannot tell, and looks for one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, TypeAlias

from local_llava.schema.automata import MAX_REMEMBERED, Automaton, TooComplexError, Work, filler

MAX_STATES = 2000
"""States that one search for an end may visit."""

_Keys: TypeAlias = tuple[Any, ...]
"""The states of the automata; None where one of those that must not accept is done with the text."""


class Both(Automaton[_Keys, _Keys]):
    """A state is that of all the automata together, and its own only point."""

    def __init__(
        self, all_of: Sequence[Automaton[Any, Any]], none_of: Sequence[Automaton[Any, Any]], work: Work
    ) -> None:
        self._all_of, self._none_of = tuple(all_of), tuple(none_of)
        self._ways: dict[_Keys, tuple[int, int, _Keys] | None] = {}
        super().__init__(tuple(a.start for a in (*all_of, *none_of)), work)

    @property
    def lark(self) -> str:
        return " & ".join([*(a.lark for a in self._all_of), *(f"~{a.lark}" for a in self._none_of)])

    def farthest(self, limit: int) -> tuple[int | None, int]:
        todo, seen, most = [self.start], {self.start}, 0
        try:
            while todo and len(seen) <= limit:
                key = todo.pop()
                way = self._way(key)
                if way is None:
                    return None, len(seen)
                most = max(most, way[0])
                for _, _, target in self.edges(key):
                    if target not in seen:
                        seen.add(target)
                        todo.append(target)
        except TooComplexError:
            return None, len(seen)
        return None if todo else most, len(seen)

    def accepts(self, key: _Keys) -> bool:
        n = len(self._all_of)
        return all(a.accepts(inner) for a, inner in zip(self._all_of, key[:n], strict=True)) and not any(
            inner is not None and a.accepts(inner) for a, inner in zip(self._none_of, key[n:], strict=True)
        )

    def points(self, key: _Keys) -> Iterable[_Keys]:
        return () if self._way(key) is None else (key,)

    def distance(self, point: _Keys) -> int:
        way = self._way(point)
        assert way is not None  # or it would not be a point
        return way[0]

    def way(self, point: _Keys) -> tuple[int, _Keys]:
        way = self._way(point)
        assert way is not None
        return way[1:]

    def _targets(self, key: _Keys) -> Iterator[tuple[int, int, _Keys]]:
        merged: list[tuple[int, int, _Keys]] = [(0, 255, ())]
        n = len(self._all_of)
        for automaton, inner in zip(self._all_of, key[:n], strict=True):
            merged = self._overlaid(merged, automaton.edges(inner))
        for automaton, inner in zip(self._none_of, key[n:], strict=True):
            merged = self._overlaid(merged, _filled(automaton.edges(inner) if inner is not None else []))
        # A text that is complete for one and refused by another leads nowhere: llguidance sees that, too.
        yield from (edge for edge in merged if self.accepts(edge[2]) or self._goes_on(edge[2]))

    def _goes_on(self, key: _Keys) -> bool:
        return all(a.edges(inner) for a, inner in zip(self._all_of, key, strict=False))

    def _overlaid(
        self, ranges: Sequence[tuple[int, int, _Keys]], edges: Iterable[tuple[int, int, Any]]
    ) -> list[tuple[int, int, _Keys]]:
        edges = list(edges)
        self._work.spend(len(ranges) * len(edges))
        return [
            (max(low, first), min(high, last), (*keys, target))
            for low, high, keys in ranges
            for first, last, target in edges
            if max(low, first) <= min(high, last)
        ]

    def _way(self, key: _Keys) -> tuple[int, int, _Keys] | None:
        """Bytes to go, the first of them and the state after it; None if there is no way."""
        if key not in self._ways:
            if len(self._ways) > MAX_REMEMBERED:
                self._ways.clear()
            self._search(key)
        return self._ways[key]

    def _search(self, start: _Keys) -> None:
        """A* search, ended by an accepting state or by one whose way is known."""
        came: dict[_Keys, tuple[_Keys, int]] = {}
        serial = count()
        # Estimate, rank of the byte, serial number, bytes so far, state, the one before it, the byte. No byte marks a
        # state that is back in the queue with all that is left of its way.
        queue: list[tuple[float, int, int, int, _Keys, _Keys, int | None]]
        queue = [(0, 0, next(serial), 0, start, start, 0)]
        while queue:
            _, _, _, cost, key, before, byte = heapq.heappop(queue)
            if byte is None:
                self._record(start, key, came)
                return
            if key in came:
                continue
            if len(came) == MAX_STATES:
                raise TooComplexError
            came[key] = (before, byte)
            if self.accepts(key):
                self._ways[key] = (0, 0, key)
            if key in self._ways:
                known = self._ways[key]
                if known:
                    heapq.heappush(queue, (cost + known[0], 0, next(serial), cost, key, key, None))
                continue
            for low, high, target in self.edges(key):
                rank, best = filler(low, high)
                estimate = cost + 1 + self._at_least(target)
                heapq.heappush(queue, (estimate, rank, next(serial), cost + 1, target, key, best))
        self._ways[start] = None

    def _at_least(self, key: _Keys) -> float:
        return max(a.to_go(inner) for a, inner in zip(self._all_of, key, strict=False))

    def _record(self, start: _Keys, end: _Keys, came: dict[_Keys, tuple[_Keys, int]]) -> None:
        known = self._ways[end]
        to_go = known[0] if known else 0
        while end != start:
            before, byte = came[end]
            to_go += 1
            self._ways[before] = (to_go, byte, end)
            end = before


def _filled(edges: Iterable[tuple[int, int, Any]]) -> Iterator[tuple[int, int, Any]]:
    """The edges, and None for all other bytes: a text that an automaton is done with may go on as it likes."""
    at = 0
    for low, high, target in edges:
        if at < low:
            yield at, low - 1, None
        yield low, high, target
        at = high + 1
    if at <= 255:
        yield at, 255, None
