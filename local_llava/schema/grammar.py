"""The grammar of a schema's answers: rules over terminals, each of which is one JSON token.

Knows what a grammar is made of, what its shortest text is, and how llguidance wants to read it. `rules` makes it
from a schema, `parser` follows a text through it. Does not know schemas, nor the tokens of a model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from local_llava.schema.automata import Automaton


@dataclass(eq=False, slots=True)
class Terminal:
    """One JSON token. It is never empty."""

    index: int
    automaton: Automaton[Any, Any]


@dataclass(eq=False, slots=True)
class Series:
    """One after another; none is the empty text."""

    index: int
    parts: tuple[Node, ...]


@dataclass(eq=False, slots=True)
class Choice:
    """Any of them; none is nothing at all."""

    index: int
    parts: tuple[Node, ...]


@dataclass(eq=False, slots=True)
class Repeated:
    """`low` to `high` times; None for no limit. The part is never empty."""

    index: int
    part: Node
    low: int
    high: int | None


@dataclass(eq=False, slots=True)
class Call:
    """A rule, which is never empty and starts with a terminal."""

    index: int
    rule: Rule


_EMPTY = '""'

Node: TypeAlias = Terminal | Series | Choice | Repeated | Call


@dataclass(eq=False, slots=True)
class Rule:
    """The values of one place."""

    name: str
    """The place as errors show it."""
    body: Node | None = None


@dataclass(eq=False, slots=True)
class Grammar:
    """Rules, the first of which is the whole answer's.

    Attributes:
        nodes: All nodes by index.
    """

    rules: list[Rule]
    nodes: list[Node]

    def body(self, rule: Rule) -> Node:
        assert rule.body is not None  # since every rule of a finished grammar has one
        return rule.body

    def weights(self, cost: Callable[[Terminal], float]) -> list[float]:
        """The cost of the cheapest text of each node, by index; inf for a node that has no text.

        Args:
            cost: The cost of the cheapest text of a terminal.

        Nodes are settled from the cheapest to the dearest: D. E. Knuth, "A generalization of Dijkstra's algorithm",
        Information Processing Letters 6 (1977).
        """
        users: list[list[Node]] = [[] for _ in self.nodes]
        queue: list[tuple[float, int]] = []
        for node in self.nodes:
            if isinstance(node, Terminal):
                queue.append((cost(node), node.index))
            elif (isinstance(node, Repeated) and not node.low) or (isinstance(node, Series) and not node.parts):
                queue.append((0, node.index))
            for part in (_body(node),) if isinstance(node, Call) else inside(node):
                users[part.index].append(node)
        heapq.heapify(queue)
        weights = [math.inf] * len(self.nodes)
        missing = {node.index: len(node.parts) for node in self.nodes if isinstance(node, Series)}
        sums = [0.0] * len(self.nodes)
        while queue:
            weight, index = heapq.heappop(queue)
            if weights[index] <= weight:
                continue
            weights[index] = weight
            for user in users[index]:
                if isinstance(user, Series):
                    missing[user.index] -= 1
                    sums[user.index] += weight
                    if missing[user.index] == 0:
                        heapq.heappush(queue, (sums[user.index], user.index))
                else:
                    times = user.low if isinstance(user, Repeated) else 1
                    heapq.heappush(queue, (times * weight if times else 0, user.index))
        return weights

    def prune(self, weights: list[float]) -> None:
        """Take out what has no text, so that nothing leads into it."""
        for node in self.nodes:
            if isinstance(node, Choice):
                node.parts = tuple(part for part in node.parts if weights[part.index] < math.inf)
            elif isinstance(node, Repeated) and weights[node.part.index] == math.inf and not node.low:
                node.high = 0

    def lark(self) -> str:
        """The grammar in llguidance's dialect of Lark."""
        used = {node.index: node for node in self.used() if not isinstance(node, Call)}
        order = [used[index] for index in self._bottom_up()]
        rules = [_name(node) for node in order if not isinstance(node, Terminal)]
        # Without forcing, llguidance leaves it to the model how a text is split into tokens. It reads a rule where that
        # is first named, by recursion, and a deep grammar overflows its stack: so all rules are named from the bottom
        # up before, in an alternative that matches nothing.
        return "\n".join(
            [
                '%llguidance { "no_forcing": true }',
                f"start: NOTHING first | {_name(self.body(self.rules[0]))}",
                "NOTHING: /a/ & /b/",
                f"first: {' | '.join(rules) or _EMPTY}",
                *map(_line, order),
                "",
            ]
        )

    def depth(self) -> int:
        """How deep llguidance's recursion goes for it: more than one only where rules call each other in circles."""
        started: set[int] = set()
        deepest = 0
        nodes = self.nodes
        for index in self._bottom_up():
            stack = [iter((index,))]
            while stack:
                child = next((i for i in stack[-1] if i not in started), None)
                if child is None:
                    stack.pop()
                else:
                    started.add(child)
                    stack.append(iter([_body(part).index for part in inside(nodes[child])]))
                    deepest = max(deepest, len(stack))
        return deepest

    def _bottom_up(self) -> list[int]:
        """Indices of nodes, each after those that it is made of, except in circles."""
        root = self.body(self.rules[0])
        order: list[int] = []
        seen = {root.index}
        stack: list[tuple[Node, Iterator[Node]]] = [(root, iter(inside(root)))]
        while stack:
            node, parts = stack[-1]
            child = next((part for part in map(_body, parts) if part.index not in seen), None)
            if child is None:
                order.append(node.index)
                stack.pop()
            else:
                seen.add(child.index)
                stack.append((child, iter(inside(child))))
        return order

    def used(self) -> Iterator[Node]:
        """The nodes that an answer can have, calls of rules included."""
        todo: list[Node] = [self.body(self.rules[0])]
        seen: set[int] = set()
        while todo:
            node = todo.pop()
            if node.index not in seen:
                seen.add(node.index)
                yield node
                if isinstance(node, Call):
                    todo.append(self.body(node.rule))
                else:
                    todo += inside(node)


def inside(node: Node) -> tuple[Node, ...]:
    """What a node is made of; nothing for a call."""
    if isinstance(node, (Series, Choice)):
        return node.parts
    return (node.part,) if isinstance(node, Repeated) and node.high != 0 else ()


def _body(node: Node) -> Node:
    """The node itself, or what a call stands for."""
    if isinstance(node, Call):
        assert node.rule.body is not None  # since every rule of a finished grammar has one
        return node.rule.body
    return node


def _name(node: Node) -> str:
    node = _body(node)
    return f"{'T' if isinstance(node, Terminal) else 'n'}{node.index}"


def _line(node: Node) -> str:
    if isinstance(node, Terminal):
        return f"{_name(node)}: {node.automaton.lark}"
    if isinstance(node, Series):
        body = " ".join(map(_name, node.parts))
    elif isinstance(node, Choice):
        body = " | ".join(map(_name, node.parts))
    elif isinstance(node, Repeated) and node.high != 0:
        body = f"{_name(node.part)}{{{node.low},{'' if node.high is None else node.high}}}"
    else:
        body = ""
    return f"{_name(node)}: {body or _EMPTY}"
