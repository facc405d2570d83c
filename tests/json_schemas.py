"""Schemas for the tests of constrained sampling: written by hand; `make` is for those made by chance."""

from __future__ import annotations

from typing import Any

from random_schemas import make

__all__ = ["BY_HAND", "make"]

PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "Full name"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "nickname": {"type": ["string", "null"]},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": r"^\d{5}(-\d{4})?$"}},
            "required": ["street"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age"],
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCENE = {
    "type": "object",
    "properties": {
        "caption": {"type": "string", "minLength": 1, "maxLength": 120},
        "objects": {
            "type": "array",
            "minItems": 1,
            "maxItems": 6,
            "items": {
                "type": "object",
                "properties": {
                    "label": {"enum": ["cat", "dog", 'the "other"', "caf\u00e9", "\U0001f600", "back\\slash"]},
                    "box": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 1023},
                        "minItems": 4,
                        "maxItems": 4,
                    },
                    "score": {"type": "number", "minimum": 0, "maximum": 1},
                },
                "required": ["label", "box"],
                "additionalProperties": False,
            },
        },
        "tags": {"type": "array", "items": {"enum": ["indoor", "outdoor", "night", "day"]}, "uniqueItems": True},
        "is_photo": {"type": "boolean"},
    },
    "required": ["caption", "objects", "is_photo"],
}
SHAPE = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "circle"}, "r": {"type": "number", "exclusiveMinimum": 0}},
            "required": ["kind", "r"],
        },
        {
            "type": "object",
            "properties": {"kind": {"const": "box"}, "w": {"type": "integer"}, "h": {"type": "integer"}},
            "required": ["kind", "w", "h"],
        },
        {
            "type": "object",
            "properties": {"kind": {"const": "group"}, "of": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["kind"],
        },
    ]
}
EXPRESSION = {
    "$ref": "#/definitions/e",
    "definitions": {
        "e": {
            "anyOf": [
                {"type": "number"},
                {
                    "type": "object",
                    "properties": {
                        "args": {"type": "array", "items": {"$ref": "#/definitions/e"}, "minItems": 2, "maxItems": 3},
                        "op": {"enum": ["+", "*"]},
                    },
                    "required": ["args", "op"],
                },
                {
                    "type": "object",
                    "properties": {
                        "args": {"type": "array", "items": {"$ref": "#/definitions/e"}},
                        "name": {"type": "string"},
                    },
                    "required": ["args", "name"],
                },
            ]
        }
    },
}
BY_HAND: dict[str, Any] = {
    "person": PERSON,
    "tree": TREE,
    "scene": SCENE,
    "shape": SHAPE,
    "expression": EXPRESSION,
    "anything": {},
    "true": True,
    "any of a type": {"type": ["integer", "boolean", "null"]},
    "string": {"type": "string"},
    "array": {"type": "array"},
    "object": {"type": "object"},
    "null": {"const": None},
    "one value": {"const": 1.5e-7},
    "false": {"const": False},
    "big constant": {"const": 2**70},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "beyond 64 bit": {"type": "integer", "minimum": 10**30, "maximum": 10**30 + 12345},
    "negative": {"type": "integer", "minimum": -(10**25), "exclusiveMaximum": -17},
    "half open": {"type": "integer", "exclusiveMinimum": 999},
    "unit": {"type": "number", "minimum": 0, "maximum": 1},
    "open unit": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "tiny": {"type": "number", "exclusiveMinimum": 1e-9, "maximum": 3e-9},
    "awkward floats": {"type": "number", "exclusiveMinimum": 0.1, "exclusiveMaximum": 0.30000000000000004},
    "large floats": {"type": "number", "minimum": -1e22, "exclusiveMaximum": 1e22},
    "even": {"type": "integer", "multipleOf": 2},
    "steps of 7": {"type": "number", "multipleOf": 7, "minimum": -100, "maximum": 1000},
    "steps of 25": {"type": "integer", "multipleOf": 25, "minimum": 10**6 + 1},
    "mixed enum": {"enum": [1, "1", None, True, 1.25, {"a": [1, {"b": 'q"'}]}, [], {}, ["x", None]]},
    "quotes in enum": {"enum": ['a"b', "\\", "\n\t\x01", "\u2028", "\U0001f600", "/", "\x7f"]},
    "prefixes in enum": {"enum": ["a", "ab", "abc", "b", ""]},
    "surrogate in const": {"const": "\ud800x"},
    "odd names": {
        "type": "object",
        "properties": {
            'say "hi"': {"type": "integer"},
            "back\\slash": {"type": "null"},
            "\U0001f600": {"type": "boolean"},
            "a/b~c%d": {"const": 1},
            "": {"const": 2},
        },
        "required": ['say "hi"', "back\\slash", "\U0001f600", "a/b~c%d", ""],
    },
    "enum and bounds": {"enum": [1, 5, 9, "x", 11], "type": "integer", "minimum": 2, "maximum": 10},
    "nullable": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
    "counted string": {"type": "string", "minLength": 3, "maxLength": 3},
    "long string": {"type": "string", "minLength": 40},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3,5}$"},
    "found anywhere": {"type": "string", "pattern": "needle", "maxLength": 12},
    "alternatives": {"type": "string", "pattern": "^(foo|ba[rz])+$|^x$"},
    "pattern and length": {"type": "string", "pattern": "^[a-z]+(-[a-z]+)*$", "minLength": 5, "maxLength": 9},
    "must end in abb": {"type": "string", "pattern": "^(a|b)*abb$", "maxLength": 6},
    "classes": {"type": "string", "pattern": r"^\w+\s\S+\D\W$"},
    "two patterns": {"allOf": [{"pattern": "^[a-f]*$"}, {"pattern": "^..c"}], "type": "string", "maxLength": 8},
    "escapes in pattern": {"type": "string", "pattern": r'^["\\/\n\u00e9]{2,4}$'},
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
    },
    "short uri": {"type": "string", "format": "uri", "maxLength": 30},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "map with one": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "minProperties": 1,
        "maxProperties": 3,
    },
    "map of names": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]{1,3}$"},
        "additionalProperties": {"type": "null"},
    },
    "enum of names": {
        "type": "object",
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": {"type": "integer"},
        "minProperties": 2,
    },
    "declared and free": {
        "type": "object",
        "properties": {"id": {"type": "integer"}},
        "required": ["id"],
        "additionalProperties": {"type": "string"},
    },
    "by pattern": {
        "type": "object",
        "patternProperties": {r"^\d+$": {"type": "integer"}, "^s": {"type": "string"}},
        "additionalProperties": {"type": "boolean"},
    },
    "some of many": {
        "type": "object",
        "properties": {c: {"type": "integer"} for c in "abcdef"},
        "minProperties": 2,
        "maxProperties": 3,
        "required": ["d"],
    },
    "required but not declared": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z"]},
    "forbidden property": {
        "type": "object",
        "properties": {"a": False, "b": {"type": "integer"}},
        "additionalProperties": {"type": "null"},
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "string"}, {"type": "null"}],
        "minItems": 2,
    },
    "tuple and rest": {
        "type": "array",
        "prefixItems": [{"const": "head"}],
        "items": {"type": "boolean"},
        "minItems": 3,
        "maxItems": 5,
    },
    "old tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "null"}],
        "additionalItems": False,
        "minItems": 1,
    },
    "matrix": {
        "type": "array",
        "items": {
            "type": "array",
            "items": {"type": "integer", "minimum": -1, "maximum": 1},
            "minItems": 3,
            "maxItems": 3,
        },
        "minItems": 3,
        "maxItems": 3,
    },
    "empty array": {"type": "array", "maxItems": 0},
    "set of booleans": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 1},
    "set of an enum": {
        "type": "array",
        "items": {"enum": ["a", "b", 1, None]},
        "uniqueItems": True,
        "minItems": 2,
        "maxItems": 3,
    },
    "allOf": {
        "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": {"type": "string"}}, "required": ["b"]}],
        "$defs": {"base": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
    },
    "allOf of bounds": {"allOf": [{"type": "number", "minimum": 1}, {"maximum": 2}, {"type": "integer"}]},
    "anyOf in allOf": {
        "allOf": [
            {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"}]},
        ]
    },
    "anyOf beside": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "oneOf by type": {
        "oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "array", "items": {"type": "integer"}}]
    },
    "oneOf by bounds": {"oneOf": [{"type": "integer", "maximum": 0}, {"type": "integer", "minimum": 10}]},
    "oneOf by length": {
        "oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 5, "pattern": "^x"}]
    },
    "oneOf by what is required": {
        "type": "object",
        "oneOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ],
    },
    "oneOf by an optional constant": {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": i, "default": i}, "x": {"type": "integer"}}}
            for i in ("p", "q")
        ]
    },
    "ref with siblings": {"$ref": "#/$defs/n", "maximum": 5, "$defs": {"n": {"type": "integer", "minimum": 3}}},
    "refs in a ring": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]},
            "b": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]},
        },
    },
    "list of lists": {"type": "array", "items": {"$ref": "#"}},
    "deep": {
        "type": "array",
        "minItems": 1,
        "maxItems": 1,
        "items": {
            "type": "object",
            "properties": {
                "x": {
                    "type": "array",
                    "minItems": 2,
                    "items": {"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"]},
                }
            },
            "required": ["x"],
        },
    },
    "no type": {"properties": {"a": {"minimum": 3}}, "required": ["a"]},
    "integer or float": {"type": ["integer", "string"], "minimum": 2.5, "maximum": 7.5},
    "annotations": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.org/x",
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [2],
        "deprecated": True,
        "$comment": "c",
        "type": "integer",
    },
    "long enum": {"enum": [f"label {i:04}" for i in range(1000)]},
    "many optional": {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(60)}},
}
"""Name -> schema; every one is supported."""
