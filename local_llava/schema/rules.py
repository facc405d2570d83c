"""Makes the grammar of a schema's answers.

Knows how values are written: compact, in the order of the schema, with at most one space after a comma or a colon. What
a schema asks comes from `places`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from local_llava.errors import UsageError
from local_llava.schema import numbers
from local_llava.schema.automata import Automaton, Counted, Expression, TooComplexError, Words, string
from local_llava.schema.cases import (
    ArrayCase,
    Case,
    Extra,
    Key,
    Literal,
    NumberCase,
    ObjectCase,
    StringCase,
    canonical,
    least,
)
from local_llava.schema.formats import FORMATS
from local_llava.schema.grammar import Call, Choice, Grammar, Node, Repeated, Rule, Series, Terminal, inside
from local_llava.schema.intersection import Both
from local_llava.schema.places import Schemas, place
from local_llava.schema.regex import ANYTHING, Regex, Repeat, lengths, parse_pattern
from local_llava.schema.text import quote

MAX_NODES = 60_000
"""Nodes of the largest grammar."""

MAX_SHORTEST = 20_000
"""Bytes of the longest shortest answer."""

_Node = TypeVar("_Node", Terminal, Series, Choice, Repeated, Call)


def grammar(document: Any) -> Grammar:
    """The grammar of the answers to a schema that `json_schema` has checked.

    Raises:
        UsageError: Nothing satisfies the schema, it is too large, or it combines keywords in an unsupported way.
    """
    try:
        return _Builder(document).build()
    except RecursionError as e:
        raise UsageError("schema: its references are nested too deeply") from e


@dataclass(frozen=True)
class _Listing:
    """What an array or an object holds."""

    items: Sequence[tuple[Node, bool]]
    """Items in their order, and whether they are required."""
    more: Node | None = None
    """What may follow them, any number of times."""
    low: int = 0
    high: int | None = None
    """Least and most items, those that follow included; None for no limit."""
    once: bool = False
    """Whether only one of those that follow counts for sure: two may have the same name."""


class _Builder:
    def __init__(self, document: Any) -> None:
        self.schemas = Schemas(document)
        self.nodes: list[Node] = []
        self.rules: dict[Key, Rule] = {}
        self.calls: dict[Key, Call] = {}
        self.terminals: dict[Hashable, Terminal] = {}
        self.rule = Rule("#")  # the one that is being made
        self.queue: deque[Key] = deque()

    def build(self) -> Grammar:
        self.call(("",))
        while self.queue:
            key = self.queue.popleft()
            self.rule = self.rules[key]
            self.rule.body = self.choice([self.case(case) for case in self.merged(self.schemas.cases(key))])
        grammar = Grammar(list(self.rules.values()), self.nodes)
        weights = grammar.weights(lambda terminal: terminal.automaton.to_go(terminal.automaton.start))
        shortest = weights[grammar.body(grammar.rules[0]).index]
        if shortest == math.inf:
            raise UsageError(_why_not(grammar, weights))
        if shortest > MAX_SHORTEST:
            raise UsageError(
                f"schema: the shortest answer would have {shortest:,.0f} characters; {MAX_SHORTEST:,} are accepted"
            )
        grammar.prune(weights)
        self.schemas.work.release()
        return grammar

    # Nodes

    def add(self, node: _Node) -> _Node:
        if len(self.nodes) == MAX_NODES:
            raise UsageError(f"schema: it is too large: its grammar has more than {MAX_NODES} nodes")
        self.nodes.append(node)
        return node

    def series(self, parts: Iterable[Node]) -> Series:
        return self.add(Series(len(self.nodes), tuple(parts)))

    def choice(self, parts: Sequence[Node]) -> Node:
        return parts[0] if len(parts) == 1 else self.add(Choice(len(self.nodes), tuple(parts)))

    def repeated(self, part: Node, low: int, high: int | None) -> Node:
        return self.add(Repeated(len(self.nodes), part, low, high))

    def call(self, key: Key) -> Call:
        if key not in self.calls:
            self.rules[key] = Rule(place(key[0] if key else ""))
            self.calls[key] = self.add(Call(len(self.nodes), self.rules[key]))
            self.queue.append(key)
        return self.calls[key]

    def terminal(self, key: Hashable, make: Callable[[], Automaton[Any, Any]]) -> Terminal:
        """One terminal for each key, so that llguidance has as few to tell apart as possible."""
        if key not in self.terminals:
            try:
                automaton = make()
                automaton.to_go(automaton.start)
            except TooComplexError as e:
                raise UsageError(f"schema: the strings at {self.rule.name} are too complex to be searched") from e
            self.terminals[key] = self.add(Terminal(len(self.nodes), automaton))
        return self.terminals[key]

    def words(self, *words: str) -> Terminal:
        return self.terminal(words, lambda: Words((word.encode() for word in words), self.schemas.work))

    # Values

    def merged(self, cases: Iterable[Case]) -> list[Case | tuple[str, ...]]:
        """The cases, the simple literals among them as one choice of words, in the first one's place."""
        found: list[Case | tuple[str, ...]] = []
        words: list[str] = []
        for case in cases:
            if isinstance(case, Literal) and not isinstance(case.value, (list, dict)):
                if not words:
                    found.append(())
                words.append(_scalar(case.value))
            else:
                found.append(case)
        return [tuple(dict.fromkeys(words)) if case == () else case for case in found]

    def case(self, case: Case | tuple[str, ...]) -> Node:
        if isinstance(case, tuple):
            return self.words(*case)
        if isinstance(case, Literal):
            return self.literal(case.value)
        if isinstance(case, NumberCase):
            return self.number(case)
        if isinstance(case, StringCase):
            return self.string(case)
        if isinstance(case, ArrayCase):
            return self.array(case)
        return self.object(case)

    def literal(self, value: Any) -> Node:
        if isinstance(value, list):
            return self.listing("[]", _Listing([(self.literal(item), True) for item in value]))
        if isinstance(value, dict):
            members = [(self.member(self.words(quote(name)), self.literal(v)), True) for name, v in value.items()]
            return self.listing("{}", _Listing(members))
        return self.words(_scalar(value))

    def number(self, case: NumberCase) -> Node:
        try:
            tree = numbers.integer(case.bounds, case.multiple) if case.integral else numbers.number(case.bounds)
        except numbers.MultiplesError as e:
            raise UsageError(f"schema: at {self.rule.name}: {e}") from e
        return self.choice([]) if tree is None else self.terminal(tree, lambda: Expression(tree, self.schemas.work))

    def string(self, case: StringCase, unlike: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> Terminal:
        """A string; as a property's name it is none of `names` and matches none of the patterns `unlike`."""
        return self.terminal((case, unlike, names), lambda: self.automaton(case, unlike, names))

    def automaton(self, case: StringCase, unlike: Sequence[str], names: Sequence[str]) -> Automaton[Any, Any]:
        work, low, high = self.schemas.work, case.low, case.high
        patterns = dict.fromkeys((*case.patterns, *(FORMATS[name] for name in case.formats)))
        automata: list[Automaton[Any, Any]] = [self.schemas.pattern(pattern, False) for pattern in patterns]
        if len(automata) == 1 and (low or high is not None):
            counted = _counted(parse_pattern(*patterns), low, high)
            if counted:
                automata, low, high = [string(counted, work)], 0, None
        if low or high is not None:
            automata.append(Counted(low, high, work))
        refused: list[Automaton[Any, Any]] = [self.schemas.pattern(pattern, True) for pattern in unlike]
        if names:
            refused.append(Words((name.encode() for name in names), work))
        automata = automata or [string(ANYTHING, work)]
        return automata[0] if len(automata) == 1 and not refused else Both(automata, refused, work)

    def array(self, case: ArrayCase) -> Node:
        most = least(case.high, len(case.first) if case.rest is None else None)
        if case.unique and (most is None or most > 1):
            return self.unique(case)
        comma, n = self.comma(), len(case.first)
        if n == 0:
            rest = None if case.rest is None else self.call(case.rest)
            return self.listing("[]", _Listing([], rest, case.low, case.high))
        tail: Node = self.series(())
        if case.rest is not None and (case.high is None or case.high > n):
            room = None if case.high is None else case.high - n
            tail = self.repeated(self.series((comma, self.call(case.rest))), max(case.low - n, 0), room)
        elif case.low > n:
            tail = self.choice([])
        for i in reversed(range(n if case.high is None else min(n, case.high))):
            here = self.series((*((comma,) if i else ()), self.call(case.first[i]), tail))
            tail = here if i < case.low else self.choice([self.series(()), here])
        return self.series((self.words("["), tail, self.words("]")))

    def unique(self, case: ArrayCase) -> Node:
        """Items that differ: of a few known ones, each or not, in the schema's order."""
        cases = () if case.first or case.rest is None else self.schemas.cases(case.rest)
        values = {canonical(item.value): item.value for item in cases if isinstance(item, Literal)}
        if not values or not all(isinstance(item, Literal) for item in cases):
            raise UsageError(
                f'schema: "uniqueItems" at {self.rule.name} is supported where "items" is an enum or a boolean'
            )
        return self.listing(
            "[]", _Listing([(self.literal(v), False) for v in values.values()], None, case.low, case.high)
        )

    def object(self, case: ObjectCase) -> Node:
        names = tuple(quote(member.name) for member in case.members)
        taken = (*names, *(quote(name) for name in sorted(case.absent)))
        members = [
            (self.member(self.words(name), self.call(member.key)), member.required)
            for name, member in zip(names, case.members, strict=True)
        ]
        if case.extras and case.low > len(members) + 1:
            raise UsageError(
                f'schema: "minProperties" at {self.rule.name} is {case.low}; supported is at most one more than the '
                f"properties that are declared, {len(members) + 1}, since free names may repeat"
            )
        more = self.choice([self.extra(extra, taken) for extra in case.extras]) if case.extras else None
        return self.listing("{}", _Listing(members, more, case.low, case.high, once=True))

    def extra(self, extra: Extra, names: tuple[str, ...]) -> Node:
        return self.member(self.string(extra.names, extra.unlike, names), self.call(extra.key))

    def member(self, name: Node, value: Node) -> Node:
        return self.series((name, self.words(":", ": "), value))

    def comma(self) -> Terminal:
        return self.words(",", ", ")

    def listing(self, brackets: str, listing: _Listing) -> Node:
        """Items between brackets: each that is required, some others, and more."""
        required = sum(needed for _, needed in listing.items)
        low = 0 if listing.low <= required else listing.low
        high = listing.high
        if high is not None and listing.more is None and high >= len(listing.items):
            high = None
        listing = replace(listing, low=low, high=high)
        # What may come depends on how many came before, counted as far as it matters.
        most = max(low, 1 if high is None else high, 1)
        tails = [self.ending(listing, n) for n in range(min(len(listing.items), most) + 1)]
        for i in reversed(range(len(listing.items))):
            tails = [self.with_item(listing, i, n, tails) for n in range(min(i, most) + 1)]
        content = self.choice([tails[0]] if tails[0] else [])
        return self.series((self.words(brackets[0]), content, self.words(brackets[1])))

    def with_item(self, listing: _Listing, i: int, n: int, tails: Sequence[Node | None]) -> Node | None:
        """What may come from an item on, after `n` others; `tails` is what may come after it, by how many came."""
        node, required = listing.items[i]
        ways: list[Node] = []
        after = tails[min(n + 1, len(tails) - 1)]
        if (listing.high is None or n < listing.high) and after:
            ways.append(self.series((*((self.comma(),) if n else ()), node, after)))
        skipped = tails[n]
        if not required and skipped:
            ways.append(skipped)
        return self.choice(ways) if ways else None

    def ending(self, listing: _Listing, n: int) -> Node | None:
        """What may come after `n` items: more of them, as often as is asked."""
        need, room = max(listing.low - n, 0), None if listing.high is None else listing.high - n
        if (room is not None and need > room) or (listing.more is None and need) or (listing.once and need > 1):
            return None
        if listing.more is None or room == 0:
            return self.series(())
        others = self.series((self.comma(), listing.more))
        if n:
            return self.repeated(others, need, room)
        rest = self.repeated(others, max(need - 1, 0), None if room is None else room - 1)
        first = self.series((listing.more, rest))
        return first if need else self.choice([self.series(()), first])


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value)


def _counted(tree: Regex, low: int, high: int | None) -> Regex | None:
    """A tree that keeps to limits of its length by itself; None where that is not easy.

    It spares llguidance an intersection, in which it may run into dead ends.
    """
    shortest, longest = lengths(tree)
    if low <= shortest and (high is None or (longest is not None and longest <= high)):
        return tree
    if isinstance(tree, Repeat) and lengths(tree.part) == (1, 1):
        most = least(high, tree.high)
        if most is None or max(low, tree.low) <= most:
            return Repeat(tree.part, max(low, tree.low), most)
    return None


def _why_not(grammar: Grammar, weights: Sequence[float]) -> str:
    """Why there is no answer: the first place that has to be there and cannot."""
    rule, seen = grammar.rules[0], set[int]()
    while id(rule) not in seen:
        seen.add(id(rule))
        node: Node | None = grammar.body(rule)
        while node is not None and not isinstance(node, Call):
            node = next((part for part in inside(node) if weights[part.index] == math.inf), None)
        if node is None:
            return (
                f"schema: nothing can satisfy {rule.name}: what a value there must be contradicts itself, or is false"
            )
        rule = node.rule
    return f"schema: every value of {rule.name} would hold another one, without end"
