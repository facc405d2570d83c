"""Makes schemas by chance, for the tests of constrained sampling."""

from __future__ import annotations

import random
import string
from typing import Any


def make(seed: int) -> Any:
    """A schema made by chance; most of them are supported."""
    return _Maker(random.Random(seed)).schema(3)


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def schema(self, depth: int) -> Any:
        simple = [self.integer, self.number, self.string, self.enum, self.pattern, self.plain]
        nested = [self.object, self.object, self.array, self.array, self.any_of, self.map, self.all_of, self.nullable]
        made = self.chance.choice(simple + nested * 2 if depth else simple)(depth - 1)
        if self.chance.random() < 0.1 and isinstance(made, dict):
            made["description"] = "made by chance"
        return made

    def word(self) -> str:
        letters = string.ascii_lowercase + '_ "\\\u00e9\U0001f600/'
        return "".join(self.chance.choice(letters) for _ in range(self.chance.randint(1, 8)))

    def maybe(self, **keywords: Any) -> dict[str, Any]:
        return {name: value for name, value in keywords.items() if self.chance.random() < 0.5}

    def plain(self, _: int) -> Any:
        return {"type": self.chance.choice(["boolean", "null", "string", "integer", "number"])}

    def integer(self, _: int) -> Any:
        low = self.chance.choice([0, -5, 17, 10 ** self.chance.randint(1, 30), -(10 ** self.chance.randint(1, 20))])
        high = low + self.chance.choice([0, 3, 99, 10 ** self.chance.randint(1, 25)])
        step = self.chance.choice([1, 1, 2, 5, 100]) if high - low > 200 else 1
        return {"type": "integer", **self.maybe(minimum=low, maximum=high, multipleOf=step)}

    def number(self, _: int) -> Any:
        low = round(self.chance.uniform(-100, 100), self.chance.randint(0, 6))
        high = low + round(self.chance.uniform(0.001, 50), 4)
        words = self.chance.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        return {"type": "number", **self.maybe(**{words[0]: low, words[1]: high})}

    def string(self, _: int) -> Any:
        low = self.chance.randint(0, 6)
        return {"type": "string", **self.maybe(minLength=low, maxLength=low + self.chance.randint(0, 20))}

    def pattern(self, _: int) -> Any:
        atoms = ["[a-z]", r"\d", "x", "[^,]", r"\w", "(ab|c)", ".", r"\.", "\u00e9", r"[\x20-\x7e]"]
        counts = ["", "?", "*", "+", "{2}", "{1,3}", "{2,}"]
        parts = (self.chance.choice(atoms) + self.chance.choice(counts) for _ in range(self.chance.randint(1, 4)))
        body = "".join(parts)
        return {"type": "string", "pattern": self.chance.choice([f"^{body}$", body, f"^{body}", f"^(?:{body}|no)$"])}

    def enum(self, _: int) -> Any:
        values = [
            self.word(),
            self.word(),
            self.chance.randint(-9, 10**9),
            None,
            True,
            0.5,
            [1, "a"],
            {"k": self.word()},
        ]
        return {"enum": self.chance.sample(values, self.chance.randint(1, 5))}

    def object(self, depth: int) -> Any:
        names = list(dict.fromkeys(self.word() for _ in range(self.chance.randint(0, 5))))
        made: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        made["required"] = [name for name in names if self.chance.random() < 0.6]
        extra = self.chance.choice([None, None, False, {"type": "integer"}])
        if extra is not None:
            made["additionalProperties"] = extra
        return made

    def map(self, depth: int) -> Any:
        return {
            "type": "object",
            "additionalProperties": self.schema(depth),
            **self.maybe(maxProperties=3, minProperties=1),
        }

    def array(self, depth: int) -> Any:
        low = self.chance.randint(0, 3)
        made = {
            "type": "array",
            "items": self.schema(depth),
            **self.maybe(minItems=low, maxItems=low + self.chance.randint(0, 4)),
        }
        if self.chance.random() < 0.2:
            made["prefixItems"] = [self.schema(0), self.schema(0)]
        return made

    def any_of(self, depth: int) -> Any:
        return {"anyOf": [self.schema(depth) for _ in range(self.chance.randint(1, 4))]}

    def nullable(self, depth: int) -> Any:
        return {"oneOf": [{"type": "null"}, {"type": "array", "items": self.schema(depth)}, self.integer(0)]}

    def all_of(self, depth: int) -> Any:
        return {
            "allOf": [
                self.object(depth),
                {"type": "object", "properties": {"also": self.schema(0)}, "required": ["also"]},
            ]
        }


PATTERNS = ["^a", "b$", "^[ab]*$", "^.$", "a|b", r"^\d+$", r"\w", r"^\W?x", r"^\S*$", "^(a|bc){1,3}$"]
NAMES = ["a", "b", "ab", "1", "x y", 'q"']
VALUES: list[Any] = [0, 1, 1.0, 2, -3, 2.5, 10**20, 1e-3, "", "a", "ab", "1", None, True, False]
VALUES += [[], [1], ["a", 1], {}, {"a": 1}, {"b": "a", "a": None}]


def soup(seed: int) -> Any:
    """Keywords thrown together, whether they make sense or not: what is accepted must hold all the same."""
    return _Soup(random.Random(seed)).document()


def one_of(seed: int) -> Any:
    """A `oneOf` of objects and other things that are hard to tell apart, alone and among other keywords."""
    return _Soup(random.Random(seed)).one_of()


class _Soup:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def document(self) -> Any:
        made = self.schema(3)
        return {**made, "$defs": {"x": self.schema(2), "y": self.schema(1)}} if isinstance(made, dict) else made

    def schema(self, depth: int) -> Any:
        if self.chance.random() < 0.05:
            return self.chance.random() < 0.7
        flat = ["type"] * 4 + ["enum", "const", "multipleOf", "pattern", "pattern", "format", "uniqueItems", "required"]
        flat += [f"{end}{of}" for end in ("min", "max") for of in ("Length", "Items", "Properties", "imum")]
        flat += ["exclusiveMinimum", "exclusiveMaximum"]
        nested = ["properties"] * 3 + ["items", "items", "prefixItems", "additionalProperties", "patternProperties"]
        nested += ["propertyNames", "allOf", "anyOf", "oneOf", "oneOf", "$ref"]
        words = (self.chance.choice(flat + nested * 2 if depth else flat) for _ in range(self.chance.randint(1, 5)))
        return {word: self.value(word, depth - 1) for word in words}

    def value(self, word: str, depth: int) -> Any:
        chance = self.chance
        if word == "type":
            names = ["null", "boolean", "integer", "number", "string", "array", "object", "array", "object"]
            return chance.choice([*names, ["string", "null"], ["integer", "array"], ["object", "number"]])
        if word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            return chance.choice([-3, -1, 0, 0.5, 1, 1, 2, 2.5, 3, 10, 1e3, 10**18])
        if word[:3] in ("min", "max"):
            return chance.choice([0, 0, 1, 1, 2, 3, 5])
        if word in ("allOf", "anyOf", "oneOf", "prefixItems"):
            return [self.schema(depth) for _ in range(chance.randint(1, 3))]
        if word in ("additionalProperties", "items"):
            return self.schema(depth)
        made: dict[str, Any] = {
            "enum": lambda: [chance.choice(VALUES) for _ in range(chance.randint(1, 6))],
            "const": lambda: chance.choice(VALUES),
            "multipleOf": lambda: chance.choice([1, 2, 3, 5, 10]),
            "pattern": lambda: chance.choice(PATTERNS),
            "format": lambda: chance.choice(["date", "ipv4", "uuid", "time", "email"]),
            "uniqueItems": lambda: chance.random() < 0.5,
            "required": lambda: chance.sample(NAMES, chance.randint(0, 2)),
            "properties": lambda: {name: self.schema(depth) for name in chance.sample(NAMES, chance.randint(1, 3))},
            "patternProperties": lambda: {p: self.schema(depth) for p in chance.sample(PATTERNS, chance.randint(1, 3))},
            "propertyNames": lambda: chance.choice([{"pattern": chance.choice(PATTERNS)}, {"enum": ["a", "b", 1]}]),
            "$ref": lambda: chance.choice(["#/$defs/x", "#/$defs/y", "#"]),
        }
        return made[word]()

    def object(self) -> Any:
        chance, names = self.chance, ["a", "b", "c"]
        inner = {"type": "object", "properties": {"k": {"const": chance.choice([1, 2])}}}
        values = [
            {"type": "integer"},
            {"const": "y"},
            {"const": "z"},
            {"type": "string"},
            True,
            {"enum": [1, 2]},
            inner,
        ]
        made: dict[str, Any] = {"type": "object"} if chance.random() < 0.6 else {}
        if chance.random() < 0.8:
            made["properties"] = {n: chance.choice(values) for n in chance.sample(names, chance.randint(1, 3))}
        if chance.random() < 0.6:
            made["required"] = chance.sample(names, chance.randint(0, 2))
        if chance.random() < 0.3:
            made["additionalProperties"] = chance.choice([False, {"type": "integer"}])
        return made

    def branch(self) -> Any:
        others: list[Any] = [
            {"type": "integer", "minimum": self.chance.randint(0, 5)},
            {"type": "string", "maxLength": self.chance.randint(0, 4)},
            {"enum": [1, "a", {"a": 1}]},
            {
                "type": "array",
                "minItems": self.chance.randint(0, 3),
                "prefixItems": [{"const": self.chance.randint(0, 2)}],
            },
        ]
        return self.object() if self.chance.random() < 0.5 else self.chance.choice(others)

    def one_of(self) -> Any:
        made = {**self.chance.choice([{}, self.object()]), "oneOf": [self.branch() for _ in range(2)]}
        beside = [self.object(), {"enum": [1, "a", {"a": 1}, {"b": 1, "a": 2}, {}]}, {"items": True}]
        beside.append({"properties": {"b": {"type": "integer"}, "c": {}}})
        if self.chance.random() < 0.4:
            made = {"allOf": [made, self.chance.choice(beside)]}
        return {"type": "array", "items": made, "minItems": 1} if self.chance.random() < 0.2 else made
