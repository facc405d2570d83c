"""Kinds of JSON values, each with all that is asked of it: what a schema comes to at one of its places.

Knows when a value belongs to a case and when no value can belong to two. What `pattern` and `format` let through is
known as far as all validators agree; where that leaves a doubt, the caller says which way to lean. Does not read
schemas: `Places` does.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, TypeAlias

from local_llava.schema.automata import Automaton, TooComplexError
from local_llava.schema.numbers import Bounds
from local_llava.schema.text import quote

Key: TypeAlias = tuple[str, ...]
"""A place: JSON pointers of schemas that all apply to the same value. `=` before one leaves out what it refers to or
combines; `!name` and `-name` ask for a property to be there, or not. Nothing is the place of any value at all."""


@dataclass(frozen=True)
class Literal:
    """One value."""

    value: Any


@dataclass(frozen=True)
class NumberCase:
    bounds: Bounds
    integral: bool
    multiple: int


@dataclass(frozen=True)
class StringCase:
    low: int = 0
    high: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()

    def both(self, other: StringCase) -> StringCase:
        """The strings that are in both."""
        return StringCase(
            max(self.low, other.low),
            least(self.high, other.high),
            tuple(dict.fromkeys(self.patterns + other.patterns)),
            tuple(dict.fromkeys(self.formats + other.formats)),
        )


@dataclass(frozen=True)
class ArrayCase:
    first: tuple[Key, ...]
    """Places of the first items."""
    rest: Key | None
    """Place of each item after them; None if none is written."""
    low: int
    high: int | None
    unique: bool
    open: bool
    """Whether the schema would allow more items than those."""

    def place(self, i: int) -> Key | None:
        return self.first[i] if i < len(self.first) else self.rest


class Member(NamedTuple):
    name: str
    key: Key
    required: bool


class Extra(NamedTuple):
    """Properties known by the look of their names."""

    names: StringCase
    unlike: tuple[str, ...]
    """Patterns that the names must not match."""
    key: Key


@dataclass(frozen=True)
class ObjectCase:
    members: tuple[Member, ...]
    extras: tuple[Extra, ...]
    """Other names, which are never those of members."""
    low: int
    high: int | None
    names: tuple[StringCase | Literal, ...] | None
    """What every name must be; None for anything."""
    absent: frozenset[str]
    """Names that must not be there."""
    open: bool
    """Whether the schema would allow more properties than those."""

    def member(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)


Case: TypeAlias = Literal | NumberCase | StringCase | ArrayCase | ObjectCase


class Places(Protocol):
    """What a schema comes to, place by place."""

    def cases(self, key: Key) -> tuple[Case, ...]:
        """What may be written at a place: any of these."""

    def guessed(self, key: Key) -> bool:
        """Whether the schema would allow other kinds of values there, too."""

    def pattern(self, pattern: str, possible: bool) -> Automaton[Any, Any]:
        """The strings that a pattern lets through for sure, or that it may let through."""

    def format(self, name: str) -> Automaton[Any, Any]:
        """The strings that are written for a format."""

    def common(self, automata: Sequence[Automaton[Any, Any]]) -> Automaton[Any, Any]:
        """The strings that all of them accept."""

    def compare(self, times: int) -> None:
        """Count comparisons, and raise UsageError where a schema needs too many."""


def least(first: int | None, second: int | None) -> int | None:
    return min((n for n in (first, second) if n is not None), default=None)


def decimal(value: float) -> Decimal:
    """A JSON number as it is written."""
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def canonical(value: Any) -> Hashable:
    """Equal for equal JSON values, and for no others: 1 is 1.0, but true is not 1."""
    if isinstance(value, list):
        return "array", tuple(map(canonical, value))
    if isinstance(value, dict):
        return "object", frozenset((name, canonical(item)) for name, item in value.items())
    return kind(value), value


def kind(value: Any) -> str:
    """What JSON Schema calls the type of a value, an integer being a number."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def case_kind(case: Case) -> str:
    if isinstance(case, Literal):
        return kind(case.value)
    return {NumberCase: "number", StringCase: "string", ArrayCase: "array", ObjectCase: "object"}[type(case)]


def holds(places: Places, case: Case, value: Any, doubt: bool = False) -> bool:
    """Whether a value belongs to a case; `doubt` is the answer where validators may disagree."""
    places.compare(1)
    if isinstance(case, Literal):
        return canonical(case.value) == canonical(value)
    if case_kind(case) != kind(value):
        return False
    if isinstance(case, NumberCase):
        number = decimal(value)
        whole = number == int(number)
        return case.bounds.holds(number) and (not case.integral or (whole and int(number) % case.multiple == 0))
    if isinstance(case, StringCase):
        return _string_holds(places, case, value, doubt)
    if isinstance(case, ArrayCase):
        return _array_holds(places, case, value, doubt)
    return _object_holds(places, case, value, doubt)


def _any_holds(places: Places, key: Key, value: Any, doubt: bool) -> bool:
    cases = places.cases(key)
    if doubt and places.guessed(key) and all(case_kind(case) != kind(value) for case in cases):
        return True
    return any(holds(places, case, value, doubt) for case in cases)


def _string_holds(places: Places, case: StringCase, value: str, doubt: bool) -> bool:
    if len(value) < case.low or (case.high is not None and len(value) > case.high):
        return False
    text = quote(value).encode()
    if not all(places.pattern(pattern, doubt).matches(text) for pattern in case.patterns):
        return False
    return doubt or all(places.format(name).matches(text) for name in case.formats)


def _array_holds(places: Places, case: ArrayCase, value: list[Any], doubt: bool) -> bool:
    if len(value) < case.low or (case.high is not None and len(value) > case.high and not case.open):
        return False
    if case.unique and len(set(map(canonical, value))) < len(value):
        return False
    keys = [case.place(i) for i in range(len(value))]
    return all(key is None or _any_holds(places, key, item, doubt) for key, item in zip(keys, value, strict=True))


def _object_holds(places: Places, case: ObjectCase, value: dict[str, Any], doubt: bool) -> bool:
    if len(value) < case.low or (case.high is not None and len(value) > case.high):
        return False
    if any(member.required and member.name not in value for member in case.members):
        return False
    for name, item in value.items():
        if case.names is not None and not any(holds(places, look, name, doubt) for look in case.names):
            return False
        if name in case.absent:
            return False
        member = case.member(name)
        keys = [member.key] if member else [extra.key for extra in case.extras if _is_extra(places, extra, name, doubt)]
        if not keys and any(_matches_any(places, extra.unlike, name) for extra in case.extras):
            return doubt  # several patterns at once, which no extra stands for
        if not any(_any_holds(places, key, item, doubt) for key in keys) and (keys or not case.open):
            return False
    return True


def _matches_any(places: Places, patterns: Iterable[str], name: str) -> bool:
    return any(places.pattern(pattern, True).matches(quote(name).encode()) for pattern in patterns)


def _is_extra(places: Places, extra: Extra, name: str, doubt: bool) -> bool:
    text = quote(name).encode()
    alike = any(places.pattern(pattern, not doubt).matches(text) for pattern in extra.unlike)
    return not alike and _string_holds(places, extra.names, name, doubt)


def apart(places: Places, first: Key, second: Key, depth: int = 3) -> frozenset[str] | None:
    """Whether no value that is written for one place is allowed at another, whatever else is asked of it.

    Args:
        places: Where the keys are looked up.
        first: The place that is written for.
        second: The other one.
        depth: How far to look into properties and items.

    Returns:
        What must be asked of the first besides for that: `!name` and `-name`, as in keys. None if it cannot be shown.
    """
    ones, others = places.cases(first), places.cases(second)
    places.compare(len(ones) * len(others))
    kinds, other_kinds = set(map(case_kind, ones)), set(map(case_kind, others))
    # Where kinds are guessed, values of all others are allowed.
    if places.guessed(first) and (places.guessed(second) or not other_kinds <= kinds):
        return None
    if places.guessed(second) and not kinds <= other_kinds:
        return None
    asked: set[str] = set()
    for one, other in ((one, other) for one in ones for other in others if case_kind(one) == case_kind(other)):
        found = _cases_apart(places, one, other, depth)
        if found is None:
            return None
        asked |= found
    return frozenset(asked)


def _cases_apart(places: Places, first: Case, second: Case, depth: int) -> frozenset[str] | None:
    """The same for two cases of one kind."""
    if isinstance(first, Literal):
        found = not holds(places, second, first.value, doubt=True)
    elif isinstance(second, Literal):
        found = not holds(places, first, second.value, doubt=True)
    elif isinstance(first, NumberCase) and isinstance(second, NumberCase):
        found = first.bounds.both(second.bounds).empty
    elif isinstance(first, StringCase) and isinstance(second, StringCase):
        found = _strings_apart(places, first, second)
    elif isinstance(first, ArrayCase) and isinstance(second, ArrayCase):
        found = _arrays_apart(places, first, second, depth)
    elif isinstance(first, ObjectCase) and isinstance(second, ObjectCase):
        return _objects_apart(places, first, second, depth)
    return frozenset() if found else None


def _strings_apart(places: Places, first: StringCase, second: StringCase) -> bool:
    both = first.both(second)
    if both.high is not None and both.low > both.high:
        return True
    automata = [places.pattern(pattern, False) for pattern in first.patterns]
    automata += [places.format(name) for name in first.formats]
    automata += [places.pattern(pattern, True) for pattern in second.patterns]
    common = places.common(automata)
    try:
        return bool(automata) and not common.points(common.start)
    except TooComplexError:
        return False


def _arrays_apart(places: Places, first: ArrayCase, second: ArrayCase, depth: int) -> bool:
    if first.high is not None and not first.open and first.high < second.low:
        return True
    if second.high is not None and not second.open and first.low > second.high:
        return True
    pairs = ((first.place(i), second.place(i)) for i in range(min(first.low, len(first.first) + 1)))
    return depth > 0 and any(a is not None and b is not None and _differ(places, a, b, depth) for a, b in pairs)


def _differ(places: Places, first: Key, second: Key, depth: int) -> bool:
    return apart(places, first, second, depth - 1) == frozenset()


def _objects_apart(places: Places, first: ObjectCase, second: ObjectCase, depth: int) -> frozenset[str] | None:
    telling = list(_tell_apart(places, first, second, depth))
    if any(member.required for member in telling):
        return frozenset()
    needed = [member.name for member in second.members if member.required]
    own = {member.name: member.required for member in first.members}
    ways = [
        # A constant is there to tell the two apart, for whoever reads the answer, too.
        *(f"!{m.name}" for m in telling if all(isinstance(case, Literal) for case in places.cases(m.key))),
        # What the first does not have anyway, and the second needs.
        *(f"-{name}" for name in needed if name not in own),
        *(f"!{member.name}" for member in telling),
        *(f"-{name}" for name in needed if not own.get(name, True)),
    ]
    return frozenset(ways[:1]) if ways else None


def _tell_apart(places: Places, first: ObjectCase, second: ObjectCase, depth: int) -> Iterator[Member]:
    """Members of the first whose values, if they are there, the second does not allow."""
    for member in first.members:
        other = second.member(member.name)
        if other is None:
            if not second.extras and not second.open:
                yield member
        elif depth > 0 and _differ(places, member.key, other.key, depth):
            yield member
