"""What a user gives as a schema -> the text of a schema that answers can be held to.

Knows which keywords of JSON Schema are supported, and refuses every other one by name: a keyword that is silently
ignored would be a wrong answer later. Does not know what keywords mean (`places`) or how answers are sampled
(`constraint`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from local_llava.errors import UsageError
from local_llava.schema import numbers
from local_llava.schema.formats import FORMATS
from local_llava.schema.places import place, step, target
from local_llava.schema.regex import RegexError, parse_pattern, size

MAX_TEXT = 256 << 10
"""Characters of the largest schema."""

MAX_DEPTH = 100
"""Objects and arrays inside one another in the deepest schema."""

MAX_PATTERNS = 40_000
"""Characters that all patterns together may stand for with their counts written out."""

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

SUPPORTED: dict[str, str] = {
    "type": "One of null, boolean, integer, number, string, array, object, or a list of them.",
    "enum": "Any JSON values, also objects and arrays.",
    "const": "Any JSON value.",
    "minimum": "Exact, for numbers of any size up to 1e60.",
    "maximum": "As `minimum`.",
    "exclusiveMinimum": "As `minimum`; a number, as in drafts 6 and later.",
    "exclusiveMaximum": "As `exclusiveMinimum`.",
    "multipleOf": "Whole numbers: those that divide 1000, and others where bounds leave at most 1000 multiples.",
    "minLength": "In characters, as JSON Schema counts them.",
    "maxLength": "As `minLength`.",
    "pattern": "Characters, classes, groups, alternatives, counts, and ^ and $ at the ends; no look-around.",
    "format": f"{', '.join(f'`{name}`' for name in FORMATS)}; in their common forms.",
    "properties": "Written in the order of the schema.",
    "required": "Any names, declared or not.",
    "additionalProperties": "They follow those that are declared. Where it is missing beside `properties`, none do.",
    "patternProperties": "As `additionalProperties`; with the same patterns as `pattern`.",
    "propertyNames": "A schema of strings.",
    "minProperties": "Up to one more than the properties that are declared.",
    "maxProperties": "Any number.",
    "items": "A schema; in drafts up to 2019-09, also a list of them.",
    "prefixItems": "In draft 2020-12, or where no draft is named. Without `items`, no others follow.",
    "additionalItems": "Beside a list of `items`.",
    "minItems": "Any number.",
    "maxItems": "Any number.",
    "uniqueItems": "Where the items are an enum or booleans; they are written in the enum's order.",
    "allOf": "All of them together.",
    "anyOf": "Any of them.",
    "oneOf": "Branches that are told apart by type, by constants, which are then always written, or by the properties "
    "that they have.",
    "$ref": "To a place in the same document (`#/...`), also recursive, also beside other keywords.",
    "$defs": "Schemas to refer to.",
    "definitions": "As `$defs`.",
    "$schema": "At the root: drafts 4, 6, 7, 2019-09, 2020-12.",
    "$id": "At the root.",
    "$comment": "No effect.",
    "title": "No effect.",
    "description": "No effect.",
    "default": "No effect.",
    "examples": "No effect.",
    "deprecated": "No effect.",
    "readOnly": "No effect.",
    "writeOnly": "No effect.",
    "discriminator": "No effect; what pydantic writes beside `oneOf`.",
}
"""The keywords that are supported, and how."""

_SCHEMAS = ("additionalProperties", "propertyNames", "additionalItems")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COUNTS = tuple(f"{end}{of}" for of in ("Length", "Items", "Properties") for end in ("min", "max"))
_TEXTS = ("$comment", "title", "description", "$id", "$schema", "format", "pattern", "$ref")
_FLAGS = ("uniqueItems", "deprecated", "readOnly", "writeOnly")
_DRAFT = re.compile(r"https?://json-schema\.org/(?:draft-0([467])|draft/(2019-09|2020-12))/schema#?")


def compile_schema(value: object) -> str:
    """Check a schema and bring it into one form.

    Args:
        value: A mapping, JSON text, `True` for any JSON at all, a pydantic model class, a pydantic TypeAdapter, or,
            where pydantic is in use, a type that it can describe.

    Returns:
        JSON text of the schema, every keyword of which is honoured; what `constraint.Constraint` takes.

    Raises:
        UsageError: It is not a schema, uses what is not supported, is too large, or nothing satisfies it; one line that
            names the keyword and the place (a JSON pointer).
    """
    document = _document(value)
    _Checker(document).check_all(document)
    compiled = json.dumps(document, separators=(",", ":"))
    # Here, since a schema can be checked without llguidance or numpy up to this line.
    from local_llava.schema import constraint, rules

    constraint.check_grammar(rules.grammar(document))
    return compiled


def _document(value: object) -> Any:
    """The schema as plain JSON values."""
    if isinstance(value, str):
        text = value
    else:
        described = value if isinstance(value, (dict, bool)) else _described(value)
        try:
            text = json.dumps(described, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise UsageError(f"schema: it cannot be written as JSON: {_line(e)}") from e
    if len(text) > MAX_TEXT:
        raise UsageError(f"schema: it has {len(text)} characters; {MAX_TEXT} are accepted")
    try:
        document = json.loads(text, object_pairs_hook=_once, parse_constant=_not_json, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"schema: it is not JSON: {_line(e)}") from e
    if _depth(document) > MAX_DEPTH:
        raise UsageError(f"schema: it is nested more than {MAX_DEPTH} levels deep")
    return document


def _depth(value: Any) -> int:
    """Levels of objects and arrays inside one another."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, (dict, list))]:
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
        depth += 1
    return depth


def _described(value: object) -> Any:
    """What pydantic says of a type. It is not imported for that: who passes a model has done so."""
    if isinstance(value, Mapping):
        return dict(value)
    for method in ("model_json_schema", "json_schema"):  # of a model class, of a TypeAdapter
        describe = getattr(value, method, None)
        if callable(describe):
            return _call(describe)
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and value is not None and not isinstance(value, (bytes, int, float, list, tuple)):
        return _call(lambda: pydantic.TypeAdapter(value).json_schema())
    raise UsageError(
        f"schema: it must be a mapping, JSON text, or a pydantic model class, not {type(value).__name__} {value!r:.60}"
    )


def _call(describe: Callable[[], object]) -> object:
    try:
        return describe()
    # Whatever pydantic raises, it says that it cannot describe what the user passed.
    except Exception as e:
        raise UsageError(f"schema: pydantic cannot describe it: {_line(e)}") from e


def _line(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the name {next(n for n in names if names.count(n) > 1)!a} twice")
    return found


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return float(text)


class _Checker:
    """Walks over all schemas of a document."""

    def __init__(self, document: Any) -> None:
        self.draft = self.named_draft(document)
        self.places: set[str] = set()
        self.references: list[tuple[str, str]] = []
        self.patterns = 0

    def named_draft(self, document: Any) -> str:
        if not isinstance(document, dict) or "$schema" not in document:
            return ""
        match = _DRAFT.fullmatch(str(document["$schema"]))
        if not match:
            raise UsageError(
                f'schema: "$schema" at # is {str(document["$schema"])[:80]!a}; supported are drafts 4, 6, 7, 2019-09 '
                "and 2020-12"
            )
        return match[1] or match[2]

    def check_all(self, document: Any) -> None:
        self.check("", document)
        for pointer, reference in self.references:
            # Only places where schemas are were checked.
            if reference not in self.places:
                raise UsageError(f'schema: "$ref" at {place(pointer)} names {place(reference)}, where no schema is')

    def check(self, pointer: str, schema: Any) -> None:
        self.places.add(pointer)
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise UsageError(f"schema: {place(pointer)} must be an object or a boolean, not {_shown(schema)}")
        for keyword, value in schema.items():
            self.keyword(pointer, keyword, value)
        self.together(pointer, schema)
        for inner, child in _children(pointer, schema):
            self.check(inner, child)

    def keyword(self, pointer: str, keyword: str, value: Any) -> None:
        if keyword not in SUPPORTED:
            raise UsageError(
                f"schema: {keyword[:60]!a} at {place(pointer)} is not supported; supported are {', '.join(SUPPORTED)}"
            )
        wanted = _wrong(keyword, value)
        if wanted:
            raise UsageError(f'schema: "{keyword}" at {place(pointer)} must be {wanted}, not {_shown(value)}')
        if keyword in ("$id", "$schema") and pointer:
            raise UsageError(f'schema: "{keyword}" at {place(pointer)} is supported at the root only')
        if keyword == "prefixItems" and self.draft not in ("", "2020-12"):
            raise UsageError(f'schema: "prefixItems" at {place(pointer)} is not in draft {self.draft}; it has "items"')
        if keyword == "items" and isinstance(value, list) and self.draft in ("", "2020-12"):
            raise UsageError(
                f'schema: "items" at {place(pointer)} is a list, which draft 2020-12 calls "prefixItems"; '
                'supported is that, or an older draft in "$schema"'
            )
        if keyword == "$ref":
            if not re.fullmatch(r"#(?:/.*)?", value, re.DOTALL):
                raise UsageError(
                    f'schema: "$ref" at {place(pointer)} is {value[:80]!a}; supported is "#" and a JSON pointer'
                )
            self.references.append((pointer, target(value)))
        if keyword in ("pattern", "patternProperties"):
            for pattern in [value] if keyword == "pattern" else value:
                self.pattern(pointer, keyword, pattern)

    def pattern(self, pointer: str, keyword: str, pattern: str) -> None:
        try:
            self.patterns += size(parse_pattern(pattern))
            parse_pattern(pattern, possible=True)
        except RegexError as e:
            raise UsageError(f'schema: "{keyword}" at {place(pointer)}: {pattern[:60]!a} cannot be used: {e}') from e
        if self.patterns > MAX_PATTERNS:
            raise UsageError(
                f"schema: its patterns stand for more than {MAX_PATTERNS} characters with their counts written out"
            )

    def together(self, pointer: str, schema: dict[str, Any]) -> None:
        """What keywords of one schema say to each other."""
        for of in ("Length", "Items", "Properties"):
            low, high = schema.get(f"min{of}", 0), schema.get(f"max{of}", math.inf)
            if low > high:
                raise _contradiction(pointer, f"min{of}", low, f"max{of}", high)
        for low_word in ("minimum", "exclusiveMinimum"):
            for high_word in ("maximum", "exclusiveMaximum"):
                low, high = schema.get(low_word, -math.inf), schema.get(high_word, math.inf)
                if low > high or (low == high and "exclusive" in low_word + high_word):
                    raise _contradiction(pointer, low_word, low, high_word, high)
        if "additionalItems" in schema and not isinstance(schema.get("items"), list):
            raise UsageError(f'schema: "additionalItems" at {place(pointer)} is supported beside a list of "items"')
        if isinstance(schema.get("items"), list) and "prefixItems" in schema:
            raise UsageError(f'schema: "prefixItems" at {place(pointer)} and a list of "items" exclude each other')


def _contradiction(pointer: str, low_word: str, low: float, high_word: str, high: float) -> UsageError:
    return UsageError(f'schema: "{low_word}" {low} and "{high_word}" {high} at {place(pointer)} contradict each other')


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _children(pointer: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema and their pointers."""
    for keyword, value in schema.items():
        here = step(pointer, keyword)
        if keyword in _SCHEMAS or (keyword == "items" and not isinstance(value, list)):
            yield here, value
        elif (keyword in _SCHEMA_LISTS or keyword == "items") and isinstance(value, list):
            yield from ((step(here, i), child) for i, child in enumerate(value))
        elif keyword in _SCHEMA_MAPS and isinstance(value, dict):
            yield from ((step(here, name), child) for name, child in value.items())


def _wrong(keyword: str, value: Any) -> str:
    """What a keyword's value must be, if it is not."""
    checks: list[tuple[bool, bool, str]] = [
        (keyword in _COUNTS, _is_count(value), "a whole number from 0 to 1e9"),
        (keyword in _NUMBERS, _is_bound(value), "a number up to 1e60 with at most 40 decimals"),
        (keyword == "multipleOf", _is_count(value) and value > 0, "a whole number from 1 to 1e9"),
        (keyword in _TEXTS, isinstance(value, str), "text"),
        (keyword in _FLAGS, isinstance(value, bool), "true or false"),
        (keyword in _SCHEMA_MAPS, isinstance(value, dict), "an object"),
        (keyword in _SCHEMA_LISTS, isinstance(value, list) and value != [], "a list of at least one schema"),
        (keyword == "enum", isinstance(value, list) and value != [], "a list of at least one value"),
        (keyword == "type", _are_types(value), f"{', '.join(TYPES)}, or a list of them"),
        (keyword == "format", value in FORMATS if isinstance(value, str) else False, f"one of {', '.join(FORMATS)}"),
        (keyword == "required", isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of names"),
    ]
    return next((wanted for applies, right, wanted in checks if applies and not right), "")


def _is_number(value: Any) -> bool:
    # Of whole numbers there are some that no float can hold.
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == int(value) and 0 <= value <= 1e9


def _is_bound(value: Any) -> bool:
    return _is_number(value) and numbers.in_reach(value)


def _are_types(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and names != [] and all(isinstance(n, str) and n in TYPES for n in names)
