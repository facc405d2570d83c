"""A schema's meaning, place by place: how its keywords combine into cases.

Knows references, `allOf`, `anyOf`, `oneOf`, and what each keyword asks. A case may be narrower than the schema, never
wider: where a schema is silent (a missing `type`, properties beside those that it declares) it is read as its author
most likely meant it. Expects a document that `json_schema` has checked. Does not know how values are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

from local_llava.errors import UsageError
from local_llava.schema.automata import Automaton, Work, string
from local_llava.schema.cases import (
    ArrayCase,
    Case,
    Extra,
    Key,
    Literal,
    Member,
    NumberCase,
    ObjectCase,
    StringCase,
    apart,
    canonical,
    decimal,
    holds,
    least,
)
from local_llava.schema.formats import FORMATS
from local_llava.schema.intersection import Both
from local_llava.schema.numbers import Bounds
from local_llava.schema.regex import parse_pattern
from local_llava.schema.text import quote

MAX_CHAIN = 100
"""References that lead from one to the next, without a property or an item between them."""

MAX_COMBINATIONS = 50_000
"""Steps on all ways through `anyOf`, `oneOf` and `allOf`, all places together."""

MAX_COMPARISONS = 200_000
"""Comparisons of values and cases, for `enum` beside other keywords and for `oneOf`."""

MAX_PATTERNS = 8
"""Patterns for the names of one object: each name must match one and none of the others."""

KIND_OF_KEYWORD = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), "number"),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"), "array"),
    **dict.fromkeys(("properties", "patternProperties", "additionalProperties", "propertyNames"), "object"),
    **dict.fromkeys(("required", "minProperties", "maxProperties"), "object"),
}
"""The kind of value that a keyword says something about."""

_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KINDS = frozenset(("null", "boolean", "number", "string", "array", "object"))

_Choice: TypeAlias = tuple[tuple[tuple[str, ...], ...], frozenset[str]]
"""Groups of fragments, one of which applies, and the schemas that it was reached through.

A fragment is a part of a key."""


def place(pointer: str) -> str:
    """A JSON pointer as errors show it: on one line, and not too long for that."""
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in pointer)
    return f"#{shown}" if len(shown) <= 120 else f"#{shown[:60]}...{shown[-55:]}"


def step(pointer: str, name: str | int) -> str:
    """The pointer of something inside (RFC 6901)."""
    return f"{pointer}/{str(name).replace('~', '~0').replace('/', '~1')}"


def target(reference: str) -> str:
    """The JSON pointer that a `$ref` to the same document holds."""
    return unquote(reference[1:])


class Schemas:
    """One document and the cases of its places: `cases.Places`."""

    def __init__(self, document: Any) -> None:
        self._document = document
        self._cases: dict[Key, tuple[Case, ...] | None] = {}
        self._guessed: set[Key] = set()
        self._exclusive: dict[str, tuple[tuple[str, ...], ...]] = {}
        self._automata: dict[tuple[str, bool], Automaton[Any, Any]] = {}
        self._combinations = self._comparisons = 0
        self.work = Work()

    def at(self, pointer: str) -> Any:
        """The schema at a JSON pointer (RFC 6901).

        Raises:
            UsageError: Nothing is there.
        """
        found = self._document
        for name in pointer.split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and re.fullmatch("0|[1-9][0-9]{0,8}", name) and int(name) < len(found):
                found = found[int(name)]
            else:
                raise UsageError(f'schema: a "$ref" names {place(pointer)}, where nothing is')
        return found

    def cases(self, key: Key) -> tuple[Case, ...]:
        """What may be written at a place: any of these.

        Raises:
            UsageError: The schemas there go in circles, or combine in a way that is not supported.
        """
        if key not in self._cases:
            self._cases[key] = None
            pending = tuple((((fragment,),), frozenset[str]()) for fragment in key)
            found = [case for owns in self._ways(pending, (), frozenset()) for case in self._merged(owns, key)]
            self._cases[key] = tuple(found)
        known = self._cases[key]
        if known is None:
            raise UsageError(f"schema: {place(key[0])} is defined by itself")
        return known

    def guessed(self, key: Key) -> bool:
        """Whether the kinds of values there were told from the keywords, for lack of a type."""
        return key in self._guessed

    def pattern(self, pattern: str, possible: bool) -> Automaton[Any, Any]:
        if (pattern, possible) not in self._automata:
            self._automata[pattern, possible] = string(parse_pattern(pattern, possible), self.work)
        return self._automata[pattern, possible]

    def format(self, name: str) -> Automaton[Any, Any]:
        return self.pattern(FORMATS[name], False)

    def common(self, automata: Sequence[Automaton[Any, Any]]) -> Automaton[Any, Any]:
        return Both(automata, (), self.work)

    def compare(self, times: int) -> None:
        self._comparisons += times
        if self._comparisons > MAX_COMPARISONS:
            raise UsageError(f"schema: enum and oneOf need more than {MAX_COMPARISONS} comparisons of values")

    def _ways(
        self, pending: tuple[_Choice, ...], owns: tuple[str, ...], seen: frozenset[str]
    ) -> Iterator[tuple[str, ...]]:
        """Each way to choose a branch of every anyOf and oneOf: the schemas that then speak together."""
        while pending:
            self._combinations += 1
            if self._combinations > MAX_COMBINATIONS:
                raise UsageError(f"schema: anyOf, oneOf and allOf combine in more than {MAX_COMBINATIONS} ways")
            (groups, above), pending = pending[0], pending[1:]
            if len(groups) != 1:
                for group in groups:
                    yield from self._ways((*((((f,),), above) for f in group), *pending), owns, seen)
                return
            for fragment in groups[0]:
                if fragment[:1] in ("=", "!", "-"):
                    owns = (*owns, fragment)
                    continue
                if fragment in above:
                    raise UsageError(f"schema: {place(fragment)} is defined by itself")
                if len(above) == MAX_CHAIN:
                    raise UsageError(
                        f"schema: {place(fragment)} comes after {MAX_CHAIN} others that refer to each other"
                    )
                schema = self.at(fragment)
                if schema is False:
                    return
                if schema is not True and fragment not in seen:
                    seen |= {fragment}
                    pending = (*self._parts(fragment, schema, above | {fragment}), *pending)
        yield owns

    def _parts(self, pointer: str, schema: Mapping[str, Any], above: frozenset[str]) -> Iterator[_Choice]:
        """What a schema consists of, in its own order, which is that of properties in an answer."""
        own: _Choice = ((("=" + pointer,),), above)
        for keyword, value in schema.items():
            if keyword == "$ref":
                yield ((target(value),),), above
            elif keyword == "allOf":
                yield from (((((step(step(pointer, keyword), i)),),), above) for i in range(len(value)))
            elif keyword == "anyOf":
                yield tuple((step(step(pointer, keyword), i),) for i in range(len(value))), above
            elif keyword == "oneOf":
                yield self._one_of(step(pointer, keyword), len(value)), above
            elif keyword == "properties":
                yield own
        if "properties" not in schema:
            yield own

    def _one_of(self, pointer: str, n: int) -> tuple[tuple[str, ...], ...]:
        """The branches, with the properties that must be there or not for no value to be in two of them."""
        if pointer not in self._exclusive:
            branches = [step(pointer, i) for i in range(n)]
            parent = pointer.rpartition("/")[0]
            asked: list[set[str]] = [set() for _ in branches]
            for i, j in ((i, j) for i in range(n) for j in range(n) if i != j):
                found = apart(self, (branches[i], f"={parent}"), (branches[j], f"={parent}"))
                asked[i] |= found or set()
                if found is None or any(f"-{word[1:]}" in asked[i] for word in asked[i] if word[0] == "!"):
                    raise UsageError(
                        f'schema: "oneOf" at {place(parent)}: its branches {min(i, j)} and {max(i, j)} are not told '
                        "apart by type, by required properties or by constants; use anyOf"
                    )
            self._exclusive[pointer] = tuple((b, *sorted(words)) for b, words in zip(branches, asked, strict=True))
        return self._exclusive[pointer]

    def _merged(self, owns: tuple[str, ...], key: Key) -> Iterator[Case]:
        """The cases of schemas that all apply."""
        pointers = [own[1:] for own in owns if own.startswith("=")]
        forced = {own[1:] for own in owns if own.startswith("!")}
        absent = frozenset(own[1:] for own in owns if own.startswith("-"))
        schemas = [(pointer, self.at(pointer)) for pointer in pointers]
        values = _values([schema for _, schema in schemas])
        kinds, integral, guessed = _kinds([schema for _, schema in schemas], values is not None)
        if guessed:
            self._guessed.add(key)
        typed = list(self._typed(schemas, kinds, integral, forced, absent))
        if values is None:
            yield from typed
        else:
            yield from (Literal(v) for v in values if any(holds(self, case, v) for case in typed))

    def _typed(
        self,
        schemas: Sequence[tuple[str, Any]],
        kinds: Iterable[str],
        integral: bool,
        forced: set[str],
        absent: frozenset[str],
    ) -> Iterator[Case]:
        raws = [schema for _, schema in schemas]
        for kind in sorted(kinds):
            if kind == "null":
                yield Literal(None)
            elif kind == "boolean":
                yield from (Literal(False), Literal(True))
            elif kind == "number":
                yield _number(raws, integral)
            elif kind == "string":
                yield _string(raws)
            elif kind == "array":
                yield _array(schemas)
            else:
                yield from self._object(schemas, forced, absent)

    def _object(
        self, schemas: Sequence[tuple[str, Any]], forced: set[str], absent: frozenset[str]
    ) -> Iterator[ObjectCase]:
        raws = [schema for _, schema in schemas]
        naming = tuple(step(pointer, "propertyNames") for pointer, schema in schemas if "propertyNames" in schema)
        looks = [case for case in self.cases(naming) if isinstance(case, (StringCase, Literal))] if naming else []
        required = forced.union(*(schema.get("required", ()) for schema in raws))
        names = [name for schema in raws for name in schema.get("properties", ())]
        names += [name for schema in raws for name in schema.get("required", ())]
        silent = not any("additionalProperties" in schema for schema in raws)
        # Beside properties that it declares, a schema is meant to have others only if it says so.
        closed = silent and (bool(names) or any("patternProperties" in schema for schema in raws))
        if not closed:
            names += [case.value for case in looks if isinstance(case, Literal) and isinstance(case.value, str)]
        names = [name for name in names if name not in absent]
        if naming:
            names = [name for name in names if any(holds(self, case, name) for case in looks)]
        if not required.issubset(names):
            return
        members = (Member(name, self._property(schemas, name), name in required) for name in dict.fromkeys(names))
        strings = [case for case in looks if isinstance(case, StringCase)] if naming else [StringCase()]
        all_names = tuple(looks) if naming else None
        extras = [extra for names_like in strings for extra in self._extras(schemas, names_like, closed)]
        low, high = _counts(raws, "Properties")
        yield ObjectCase(tuple(members), tuple(extras), low, high, all_names, absent, open=silent)

    def _property(self, schemas: Iterable[tuple[str, Any]], name: str) -> Key:
        """The place of a property's value."""
        found: list[str] = []
        for pointer, schema in schemas:
            here = [step(step(pointer, "properties"), name)] if name in schema.get("properties", ()) else []
            for pattern in schema.get("patternProperties", ()):
                text = quote(name).encode()
                matches = self.pattern(pattern, False).matches(text)
                if matches != self.pattern(pattern, True).matches(text):
                    raise UsageError(
                        f'schema: "patternProperties" at {place(pointer)}: validators differ on whether {name[:40]!a} '
                        "matches one of its patterns; write the characters out"
                    )
                here += [step(step(pointer, "patternProperties"), pattern)] if matches else []
            if not here and "additionalProperties" in schema:
                here = [step(pointer, "additionalProperties")]
            found += here
        return tuple(dict.fromkeys(found))

    def _extras(self, schemas: Sequence[tuple[str, Any]], names: StringCase, closed: bool) -> Iterator[Extra]:
        """Properties that are not declared: those that match one pattern and no other, and those that match none."""
        patterns = list(dict.fromkeys(p for _, schema in schemas for p in schema.get("patternProperties", ())))
        if len(patterns) > MAX_PATTERNS:
            raise UsageError(
                f'schema: "patternProperties" at {place(schemas[0][0])} has {len(patterns)} patterns; '
                f"{MAX_PATTERNS} are accepted"
            )
        for pattern in patterns:
            key = []
            for pointer, schema in schemas:
                if pattern in schema.get("patternProperties", ()):
                    key.append(step(step(pointer, "patternProperties"), pattern))
                elif "additionalProperties" in schema:
                    key.append(step(pointer, "additionalProperties"))
            others = tuple(other for other in patterns if other != pattern)
            yield Extra(names.both(StringCase(patterns=(pattern,))), others, tuple(key))
        if not closed:
            key = [step(pointer, "additionalProperties") for pointer, s in schemas if "additionalProperties" in s]
            yield Extra(names, tuple(patterns), tuple(key))


def _values(schemas: Sequence[Any]) -> list[Any] | None:
    """What `enum` and `const` leave, None if there are none of them."""
    lists = [schema["enum"] for schema in schemas if "enum" in schema]
    lists += [[schema["const"]] for schema in schemas if "const" in schema]
    if not lists:
        return None
    others = [set(map(canonical, values)) for values in lists[1:]]
    return [value for value in lists[0] if all(canonical(value) in other for other in others)]


def _kinds(schemas: Sequence[Any], has_values: bool) -> tuple[frozenset[str], bool, bool]:
    """Kinds of values, whether numbers are integers, and whether the kinds were only guessed."""
    kinds, integral, typed = _KINDS, False, False
    for schema in schemas:
        if "type" in schema:
            names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            kinds &= {"number" if name == "integer" else name for name in names}
            integral |= "integer" in names and "number" not in names
            typed = True
    hints = frozenset(KIND_OF_KEYWORD[word] for schema in schemas for word in schema if word in KIND_OF_KEYWORD)
    if typed or has_values or not hints:
        return kinds, integral, False
    return hints, integral, True


def _counts(schemas: Sequence[Any], of: str) -> tuple[int, int | None]:
    """The limits that `minLength` and `maxLength`, or their like, set together."""
    highs = [int(schema[f"max{of}"]) for schema in schemas if f"max{of}" in schema]
    return int(max((schema.get(f"min{of}", 0) for schema in schemas), default=0)), min(highs, default=None)


def _number(schemas: Sequence[Any], integral: bool) -> NumberCase:
    bounds, multiple = Bounds(), 1
    for schema in schemas:
        limits = {word: decimal(schema[word]) for word in _LIMITS if word in schema}
        bounds = bounds.both(Bounds(limits.get("minimum"), limits.get("maximum")))
        bounds = bounds.both(Bounds(limits.get("exclusiveMinimum"), limits.get("exclusiveMaximum"), True, True))
        multiple = math.lcm(multiple, int(schema.get("multipleOf", 1)))
        integral |= "multipleOf" in schema
    return NumberCase(bounds, integral, multiple)


def _string(schemas: Sequence[Any]) -> StringCase:
    low, high = _counts(schemas, "Length")
    patterns = (schema["pattern"] for schema in schemas if "pattern" in schema)
    formats = (schema["format"] for schema in schemas if "format" in schema)
    return StringCase(low, high, tuple(dict.fromkeys(patterns)), tuple(dict.fromkeys(formats)))


def _known(pointers: Iterable[str | None]) -> Key:
    return tuple(pointer for pointer in pointers if pointer is not None)


def _array(schemas: Sequence[tuple[str, Any]]) -> ArrayCase:
    firsts: list[list[str]] = []
    rests: list[str | None] = []
    for pointer, schema in schemas:
        items = schema.get("items")
        word = "items" if isinstance(items, list) else "prefixItems"
        firsts.append([step(step(pointer, word), i) for i in range(len(schema.get(word, ())))])
        word = "additionalItems" if isinstance(items, list) else "items"
        rests.append(step(pointer, word) if word in schema else None)
    n = max(map(len, firsts), default=0)
    first = (
        _known(own[i] if i < len(own) else rest for own, rest in zip(firsts, rests, strict=True)) for i in range(n)
    )
    rest = _known(rests)
    low, high = _counts([schema for _, schema in schemas], "Items")
    # Beside items that it lists, a schema is meant to have others only if it says so.
    ends = n >= low and n > 0 and not rest
    unique = any(schema.get("uniqueItems", False) for _, schema in schemas)
    return ArrayCase(tuple(first), None if ends else rest, low, least(high, n) if ends else high, unique, open=ends)
