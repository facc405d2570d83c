"""What schemas are taken, in which forms, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import hostile_schemas
import jsonschema
import pydantic
import pytest
from json_schemas import BY_HAND, PERSON

from local_llava.errors import UsageError
from local_llava.schema.compiler import SUPPORTED, compile_schema
from local_llava.schema.formats import FORMATS

DOCS = Path(__file__).parent.parent / "docs" / "json-schema.md"


def test_the_documentation_lists_what_is_supported() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == SUPPORTED
    assert all(f"`{name}`" in DOCS.read_text(encoding="utf-8") for name in FORMATS)


def test_the_examples_of_the_documentation() -> None:
    text = DOCS.read_text(encoding="utf-8")
    (schema,), (program,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("json", "python"))
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(program.partition("with Llava")[0], str(DOCS), "exec", dont_inherit=True), names)
    written, described = json.loads(compile_schema(schema)), json.loads(compile_schema(names["Scene"]))
    assert list(written["properties"]) == list(described["properties"]) == described["required"]
    with pytest.raises(UsageError) as caught:
        compile_schema({"properties": {"tags": {"contains": {}}}})
    assert str(caught.value).partition(", minimum")[0] in text


@pytest.mark.parametrize("name", BY_HAND)
def test_schemas_are_taken_as_they_are(name: str) -> None:
    schema = BY_HAND[name]
    text = compile_schema(schema)
    assert json.loads(text) == schema
    assert compile_schema(text) == text == compile_schema(json.dumps(schema, indent=2))
    if isinstance(schema, dict):
        assert list(json.loads(text)) == list(schema)
        jsonschema.validators.validator_for(schema).check_schema(schema)


def test_every_supported_keyword_is_in_a_schema_that_the_tests_sample() -> None:
    def words(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set(value if isinstance(value, dict) else ()).union(*map(words, inner))

    used = words(BY_HAND)
    assert set(SUPPORTED) - used == {"examples", "readOnly", "writeOnly", "discriminator"} - used


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, pydantic.Field(ge=0, le=9)]


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: set[Colour] = set()
    friend: Dog | None = None


class Everything(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: Annotated[str, pydantic.Field(min_length=1, max_length=40, pattern="^[A-Z]")]
    born: date
    id: UUID
    pets: list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]]
    scores: dict[Annotated[str, pydantic.Field(pattern="^[a-z]+$")], float]
    pair: tuple[int, str]
    maybe: Colour | None = None
    link: pydantic.HttpUrl | None = None
    flags: dict[Literal["a", "b"], bool] = {}


@dataclasses.dataclass
class Point:
    x: float
    y: float


@pytest.mark.parametrize(
    "value", [Everything, Cat, Dog, Point, list[Point], Colour, int | str, pydantic.TypeAdapter(dict[str, list[Cat]])]
)
def test_types_are_described_by_pydantic(value: Any) -> None:
    adapter = value if isinstance(value, pydantic.TypeAdapter) else pydantic.TypeAdapter(value)
    assert json.loads(compile_schema(value)) == adapter.json_schema()


def test_pydantic_is_imported_only_for_who_uses_it() -> None:
    code = (
        "import sys\nfrom local_llava.schema.compiler import compile_schema\ncompile_schema({'type': 'string'})\n"
        "assert 'pydantic' not in sys.modules\n"
        "try: compile_schema(int)\nexcept ValueError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "schema: it must be a mapping, JSON text, or a pydantic model class, not type <class 'int'>\n"
    ), done.stderr


class Undescribable(pydantic.BaseModel):
    function: Callable[[int], int]


SUPPORTED_LIST = f"; supported are {', '.join(SUPPORTED)}"
ITEMS_ARE = {"type": "array", "items": {"type": "string", "minLength": 2}}
REFUSED: list[tuple[Any, str]] = [
    # Keywords that are not supported, wherever they are
    ({"not": {"type": "string"}}, "'not' at # is not supported" + SUPPORTED_LIST),
    ({"if": {}, "then": {}}, "'if' at # is not supported" + SUPPORTED_LIST),
    ({"type": "array", "contains": {"const": 1}}, "'contains' at # is not supported"),
    ({"properties": {"a/b": {"items": {"nullable": True}}}}, "'nullable' at #/properties/a~1b/items is not supported"),
    ({"$defs": {"x": {"dependentRequired": {}}}}, "'dependentRequired' at #/$defs/x is not supported"),
    ({"anyOf": [{}, {"unevaluatedProperties": False}]}, "'unevaluatedProperties' at #/anyOf/1 is not supported"),
    ({"dependencies": {}}, "'dependencies' at #"),
    ({"$dynamicRef": "#x"}, "'$dynamicRef' at #"),
    ({"$anchor": "x"}, "'$anchor' at #"),
    ({"contentEncoding": "base64"}, "'contentEncoding' at #"),
    ({"tpye": "string"}, "'tpye' at # is not supported"),
    ({"line\nbreak": 1}, "'line\\nbreak' at # is not supported"),
    ({"properties": {"a\nb": {"no": 1}}}, "'no' at #/properties/a\\nb is not supported"),
    # Values that are not supported, or make no sense
    ({"type": "text"}, '"type" at # must be null, boolean, integer, number, string, array, object, or a list of them'),
    ({"type": []}, '"type" at # must be'),
    ({"format": "binary"}, f'"format" at # must be one of {", ".join(FORMATS)}, not "binary"'),
    ({"pattern": "(?=x)"}, "\"pattern\" at #: '(?=x)' cannot be used: (?=...) is not supported; of groups, (...) is"),
    ({"pattern": 3}, '"pattern" at # must be text, not 3'),
    ({"patternProperties": {"(": {}}}, "\"patternProperties\" at #: '(' cannot be used: a ( is not closed"),
    ({"minimum": "3"}, '"minimum" at # must be a number up to 1e60 with at most 40 decimals, not "3"'),
    ({"minimum": 10**61}, '"minimum" at # must be a number up to 1e60'),
    ({"exclusiveMinimum": True, "minimum": 1}, '"exclusiveMinimum" at # must be a number'),
    ({"multipleOf": 0.01}, '"multipleOf" at # must be a whole number from 1 to 1e9, not 0.01'),
    ({"type": "integer", "multipleOf": 7}, "at #: multipleOf 7 needs minimum and maximum with at most 1000 multiples"),
    ({"maxLength": -1}, '"maxLength" at # must be a whole number from 0 to 1e9, not -1'),
    ({"maxLength": 10**400}, '"maxLength" at # must be a whole number from 0 to 1e9, not 1000'),
    ({"minimum": -(10**400)}, '"minimum" at # must be a number up to 1e60'),
    ({"minItems": 1.5}, '"minItems" at # must be a whole number'),
    ({"enum": []}, '"enum" at # must be a list of at least one value, not []'),
    ({"enum": "abc"}, '"enum" at # must be a list of at least one value, not "abc"'),
    ({"required": "name"}, '"required" at # must be a list of names, not "name"'),
    ({"properties": []}, '"properties" at # must be an object, not []'),
    ({"anyOf": []}, '"anyOf" at # must be a list of at least one schema, not []'),
    ({"items": 3}, "#/items must be an object or a boolean, not 3"),
    ({"uniqueItems": 1}, '"uniqueItems" at # must be true or false, not 1'),
    ({**ITEMS_ARE, "uniqueItems": True}, '"uniqueItems" at # is supported where "items" is an enum or a boolean'),
    ({"items": [{}]}, '"items" at # is a list, which draft 2020-12 calls "prefixItems"'),
    ({"additionalItems": False}, '"additionalItems" at # is supported beside a list of "items"'),
    ({"type": "object", "minProperties": 3}, '"minProperties" at # is 3; supported is at most one more'),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, '"$schema" at # is \'http://json-schema.org/draft-03'),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "is not in draft 7"),
    ({"properties": {"a": {"$id": "b"}}}, '"$id" at #/properties/a is supported at the root only'),
    # References
    ({"$ref": "#/$defs/x"}, '"$ref" at # names #/$defs/x, where no schema is'),
    ({"$ref": "#/$defs", "$defs": {}}, '"$ref" at # names #/$defs, where no schema is'),
    ({"$ref": "#/enum/0", "enum": [{"type": "string"}]}, '"$ref" at # names #/enum/0, where no schema is'),
    ({"$ref": "https://example.org/x.json"}, '"$ref" at # is \'https://example.org/x.json\'; supported is "#"'),
    ({"$ref": "#name"}, '"$ref" at # is \'#name\'; supported is "#" and a JSON pointer'),
    ({"$ref": 1}, '"$ref" at # must be text, not 1'),
    ({"$ref": "#"}, "# is defined by itself"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "# is defined by itself"),
    # What contradicts itself
    ({"minimum": 3, "maximum": 2}, '"minimum" 3 and "maximum" 2 at # contradict each other'),
    ({"minimum": 3, "exclusiveMaximum": 3}, '"minimum" 3 and "exclusiveMaximum" 3 at # contradict each other'),
    ({"items": {"minLength": 2, "maxLength": 1}}, '"minLength" 2 and "maxLength" 1 at #/items contradict each other'),
    ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "nothing can satisfy #"),
    ({"type": "string", "enum": [1, 2]}, "nothing can satisfy #"),
    ({"type": "string", "pattern": "^a{9}$", "maxLength": 5}, "nothing can satisfy #"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "nothing can satisfy #/properties/a"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "nothing can satisfy #"),
    ({"type": "array", "uniqueItems": True, "minItems": 3, "items": {"type": "boolean"}}, "nothing can satisfy #"),
    (False, "nothing can satisfy #"),
    ({"properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "every value of #/properties/x would hold another one"),
    # oneOf whose branches both may hold
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, '"oneOf" at #: its branches 0 and 1 are not told apart'),
    ({"oneOf": [{"minimum": 3}, {"minLength": 2}]}, '"oneOf" at #: its branches 0 and 1 are not told apart'),
    ({"items": {"oneOf": [PERSON, {"type": "null"}, PERSON]}}, '"oneOf" at #/items: its branches 0 and 2'),
    # What is not a schema at all
    ("{", "it is not JSON: Expecting property name"),
    ("", "it is not JSON: Expecting value"),
    ('{"type": "string", "type": "null"}', "it is not JSON: an object has the name 'type' twice"),
    ('{"minimum": NaN}', "it is not JSON: NaN is not a JSON number"),
    ('{"minimum": 1e999}', "it is not JSON: 1e999 is too large a number"),
    ('"string"', '# must be an object or a boolean, not "string"'),
    ("[]", "# must be an object or a boolean, not []"),
    (None, "it must be a mapping, JSON text, or a pydantic model class, not NoneType None"),
    (b"{}", "it must be a mapping, JSON text, or a pydantic model class, not bytes"),
    (12, "it must be a mapping, JSON text, or a pydantic model class, not int 12"),
    ({"const": {1, 2}}, "it cannot be written as JSON: Object of type set is not JSON serializable"),
    ({"const": float("inf")}, "it cannot be written as JSON: Out of range float values"),
    ({"const": 10**5000}, "it cannot be written as JSON: Exceeds the limit"),
    (Undescribable, "pydantic cannot describe it"),
    ({"enum": ["x" * 300_000]}, "characters; 262144 are accepted"),
]


@pytest.mark.parametrize(("schema", "problem"), REFUSED, ids=[problem[:50] for _, problem in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(schema: Any, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        compile_schema(schema)
    message = str(caught.value)
    assert message.startswith("schema: ") and problem in message
    assert "\n" not in message and len(message) < 1200


def test_a_schema_that_holds_itself_is_refused() -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(UsageError, match="it cannot be written as JSON: Circular reference detected"):
        compile_schema(schema)


def test_hostile_schemas_are_refused_or_followed_in_bounded_time_and_memory() -> None:
    """In a process with limits: a crash, a hang or a traceback names the schema that it came from."""
    program = [sys.executable, hostile_schemas.__file__]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    last = next((row["trying"] for row in reversed(rows) if "trying" in row), "none")
    assert done.returncode == 0, f"{last}: exit {done.returncode}: {done.stderr[-2000:]}"
    results = {row["name"]: row for row in rows if "name" in row}
    assert list(results) == list(hostile_schemas.HOSTILE)
    assert max(row["seconds"] for row in rows if "name" in row) < 30, results
    assert rows[-1]["peak_MiB"] < 1024
