"""Follows an answer through its grammar, byte by byte, and knows at any point the shortest way to its end.

llguidance says which tokens may come next, and does it fast; it does not say how far the end is. This does, in tokens:
a set of positions in the grammar, with shared stacks (M. Tomita, "An efficient augmented-context-free parsing
algorithm", 1987), each weighed by the cheapest text that completes it. States never change, so trying a token costs no
copy.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Iterable, Iterator
from typing import Any, TypeAlias

from local_llava.schema.automata import MAX_REMEMBERED, TooComplexError
from local_llava.schema.grammar import Call, Choice, Grammar, Node, Repeated, Rule, Series, Terminal

MAX_VISITED = 4000
"""States that are visited in all to find out how far JSON tokens can be from their end."""


class Frame:
    """A rule that was called: what may come after it, in all the places that called it at this byte."""

    __slots__ = ("after", "cost", "depth")

    def __init__(self) -> None:
        self.after: list[Stack] = []
        self.cost = math.inf
        self.depth = 0


Stack: TypeAlias = "tuple[Node, int, Stack] | Frame | None"
"""What is still to come: a node, how often it was repeated if it is `Repeated`, and what comes after it. A Frame goes
on with what its callers have; None is the end of the answer."""

_Position: TypeAlias = tuple[Terminal, Any, Stack]
"""A terminal, the state of its automaton, and what comes after it."""


class State:
    """Where an answer stands: in any of these positions."""

    __slots__ = ("after", "ends", "positions")

    def __init__(self, positions: tuple[_Position, ...]) -> None:
        self.positions = positions
        self.after: tuple[_Position, ...] | None = None
        """Positions behind the terminals that may end here; None if they were not asked for yet."""
        self.ends = False


class Parser:
    """A grammar with what its texts cost, in tokens.

    A text costs as many tokens as each of its JSON tokens takes by itself. Tokens of the model that span several of
    them can make it cheaper; that is left to the caller.

    Attributes:
        start: The state before an answer.
        growth: Where a JSON token begins, a choice costs at most this much more than the cheapest one.
    """

    def __init__(self, grammar: Grammar, tokens: Container[bytes], longest: int) -> None:
        """Weigh a grammar.

        Args:
            grammar: The grammar.
            tokens: The texts that a token can have.
            longest: Bytes of the longest of them.
        """
        self._tokens, self._longest = tokens, longest
        self._point_costs: dict[tuple[int, Hashable], float] = {}
        self._key_costs: dict[tuple[int, Hashable], float] = {}
        self._weights = grammar.weights(lambda terminal: self._key_cost(terminal, terminal.automaton.start))
        self._body = {id(rule): grammar.body(rule) for rule in grammar.rules}
        self._used = list(grammar.used())
        self.growth = self._growth()
        self.start = State(())
        self.start.after, _ = self._expanded([(grammar.body(grammar.rules[0]), 0, None)])

    def farthest(self) -> float:
        """Bytes within which every JSON token can be ended from anywhere inside; inf if that is not known."""
        most, left = 0, MAX_VISITED
        for node in self._used:
            if isinstance(node, Terminal):
                found, visited = node.automaton.farthest(left)
                left -= visited
                if found is None:
                    return math.inf
                most = max(most, found)
        return most

    def step(self, state: State, byte: int) -> State | None:
        """The state after one more byte; None if the byte cannot come there."""
        found: dict[_Position, None] = {}
        for terminal, at, stack in (*state.positions, *self._after(state)):
            after = terminal.automaton.step(at, byte)
            if after is not None:
                found[terminal, after, stack] = None
        return State(tuple(found)) if found else None

    def walk(self, state: State, text: bytes) -> State | None:
        """The state after a text."""
        at: State | None = state
        for byte in text:
            if at is None:
                return None
            at = self.step(at, byte)
        return at

    def complete(self, state: State) -> bool:
        """Whether the answer may end here."""
        self._after(state)
        return state.ends

    def final(self, state: State) -> bool:
        """Whether it must."""
        more = any(terminal.automaton.edges(at) for terminal, at, _ in state.positions)
        return self.complete(state) and not more and not self._after(state)

    def cost(self, state: State) -> float:
        """What the cheapest rest of the answer costs."""
        return min((self._position_cost(position) for position in self._all(state)), default=0)

    def depth(self, state: State) -> int:
        """How many values are open, one inside the other, the outermost included."""
        return max((self._depth(stack) for _, _, stack in self._all(state)), default=0)

    def rest(self, state: State) -> bytes:
        """The cheapest rest of the answer. Its cost must be finite."""
        return b"".join(self._pieces(state))

    def next_token(self, state: State) -> bytes:
        """The first token of it; there must be one."""
        return next(self._pieces(state))

    def _pieces(self, state: State) -> Iterator[bytes]:
        """The cheapest rest, token by token."""
        terminal, key, stack = min(self._all(state), key=self._position_cost)
        yield from self._ending(terminal, key)
        while stack is not None:
            if isinstance(stack, Frame):
                stack = min(stack.after, key=self._stack_cost)
                continue
            node, count, stack = stack
            if isinstance(node, Terminal):
                yield from self._ending(node, node.automaton.start)
            elif isinstance(node, Call):
                stack = (self._body[id(node.rule)], 0, stack)
            elif isinstance(node, Series):
                for part in reversed(node.parts):
                    stack = (part, 0, stack)
            elif isinstance(node, Choice):
                stack = (min(node.parts, key=lambda part: self._weights[part.index]), 0, stack)
            elif count < node.low:
                stack = (node.part, 0, (node, count + 1, stack))

    def _ending(self, terminal: Terminal, key: Any) -> Iterator[bytes]:
        """The cheapest end of a JSON token, token by token."""
        automaton = terminal.automaton
        point = min(automaton.points(key), key=lambda point: self._point_cost(terminal, point))
        while left := self._point_cost(terminal, point):
            text, best, after = b"", b"", point
            for _ in range(min(self._longest, automaton.distance(point))):
                byte, after = automaton.way(after)
                text += bytes((byte,))
                if text in self._tokens and self._point_cost(terminal, after) == left - 1:
                    best, point = text, after
            yield best

    def _all(self, state: State) -> tuple[_Position, ...]:
        return state.positions or self._after(state)

    def _after(self, state: State) -> tuple[_Position, ...]:
        if state.after is None:
            stacks = [stack for terminal, at, stack in state.positions if terminal.automaton.accepts(at)]
            state.after, state.ends = self._expanded(stacks) if stacks else ((), False)
        return state.after

    def _expanded(self, stacks: Iterable[Stack]) -> tuple[tuple[_Position, ...], bool]:
        """The terminals that may come next, and whether the answer may end instead."""
        todo, seen = list(stacks), set[Stack]()
        found: dict[_Position, None] = {}
        frames: dict[int, Frame] = {}
        while todo:
            stack = todo.pop()
            if stack is None or stack in seen:
                seen.add(stack)
                continue
            seen.add(stack)
            if isinstance(stack, Frame):
                todo += stack.after
                continue
            node, count, rest = stack
            if isinstance(node, Terminal):
                found[node, node.automaton.start, rest] = None
            elif isinstance(node, Call):
                self._enter(node.rule, rest, frames, todo)
            elif isinstance(node, Series):
                for part in reversed(node.parts):
                    rest = (part, 0, rest)
                todo.append(rest)
            elif isinstance(node, Choice):
                todo += [(part, 0, rest) for part in node.parts]
            else:
                if count >= node.low:
                    todo.append(rest)
                if node.high is None or count < node.high:
                    again = min(count + 1, node.low) if node.high is None else count + 1
                    todo.append((node.part, 0, (node, again, rest)))
        return tuple(found), None in seen

    def _enter(self, rule: Rule, rest: Stack, frames: dict[int, Frame], todo: list[Stack]) -> None:
        frame = frames.get(id(rule))
        if frame is None:
            frame = frames[id(rule)] = Frame()
            todo.append((self._body[id(rule)], 0, frame))
        if rest not in frame.after:
            # Since rules start with terminals, no caller's own frame is made at this byte: its cost is known.
            frame.after.append(rest)
            frame.cost = min(frame.cost, self._stack_cost(rest))
            frame.depth = max(frame.depth, self._depth(rest) + 1)

    # Costs

    def _key_cost(self, terminal: Terminal, key: Any) -> float:
        """The fewest tokens that end a JSON token from a state of its automaton."""
        known = self._key_costs.get((terminal.index, key))
        if known is None:
            try:
                points = list(terminal.automaton.points(key))
            except TooComplexError:
                points = []  # as good as no way
            known = min((self._point_cost(terminal, point) for point in points), default=math.inf)
            if len(self._key_costs) > MAX_REMEMBERED:
                self._key_costs.clear()
            self._key_costs[terminal.index, key] = known
        return known

    def _point_cost(self, terminal: Terminal, point: Any) -> float:
        """The fewest tokens that spell the text of a point, worked out for all points on its way."""
        costs, index, automaton = self._point_costs, terminal.index, terminal.automaton
        if (index, point) in costs:
            return costs[index, point]
        if len(costs) > MAX_REMEMBERED:
            costs.clear()
        points, text, known = [point], bytearray(), 0
        # On to a point that is known, and then as far as a token reaches.
        while known < self._longest and automaton.distance(points[-1]):
            known = known + 1 if known or (index, points[-1]) in costs else 0
            byte, point = automaton.way(points[-1])
            text.append(byte)
            points.append(point)
        for i in reversed(range(len(points))):
            if (index, points[i]) not in costs:
                ends = range(i + 1, min(i + self._longest, len(text)) + 1)
                ways = (costs[index, points[end]] for end in ends if bytes(text[i:end]) in self._tokens)
                costs[index, points[i]] = min(ways, default=math.inf) + 1 if i < len(text) else 0
        return costs[index, points[0]]

    def _position_cost(self, position: _Position) -> float:
        terminal, at, stack = position
        return self._key_cost(terminal, at) + self._stack_cost(stack)

    def _stack_cost(self, stack: Stack) -> float:
        total = 0.0
        while stack is not None:
            if isinstance(stack, Frame):
                return total + stack.cost
            node, count, stack = stack
            if isinstance(node, Repeated):
                total += (node.low - count) * self._weights[node.part.index] if count < node.low else 0
            else:
                total += self._weights[node.index]
        return total

    def _depth(self, stack: Stack) -> int:
        while stack is not None:
            if isinstance(stack, Frame):
                return stack.depth
            stack = stack[2]
        return 1

    def _growth(self) -> float:
        weights = self._weights
        growth = [0.0] * len(weights)

        def of(node: Node) -> float:
            if weights[node.index] == math.inf:
                return math.inf
            if isinstance(node, Choice):
                return max(weights[p.index] + growth[p.index] for p in node.parts) - weights[node.index]
            if isinstance(node, Repeated):
                part = growth[node.part.index]
                return 0 if node.high == 0 else part if node.high == node.low else part + weights[node.part.index]
            if isinstance(node, Call):
                return growth[self._body[id(node.rule)].index]
            most = 0.0
            for inner in node.parts if isinstance(node, Series) else ():
                most = max(most, growth[inner.index])
                if weights[inner.index]:
                    break
            return most

        # Rules start with terminals: a second round knows the growth of all that are called.
        reachable = sorted(self._used, key=lambda node: node.index)
        for _ in range(2):
            for node in reachable:
                growth[node.index] = of(node)
        return max(growth)
