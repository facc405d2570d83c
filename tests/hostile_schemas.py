"""Schemas made to hang or crash whoever reads them. Run as a program, it tries each and says how it went.

    python hostile_schemas.py [NAME...]

The test runs it in a process of its own, with limits on time and memory.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _nested(n: int) -> Any:
    made: Any = {"type": "integer"}
    for _ in range(n):
        made = {"type": "array", "items": made}
    return made


def _chain(n: int, link: Callable[[Any], Any], last: Any = None) -> Any:
    """Definitions, each of which refers to the next."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{n}": last or {"type": "integer"}}}


def _ring(n: int) -> Any:
    made = _chain(n, lambda ref: {"type": "array", "items": ref})
    made["$defs"][f"d{n}"] = {"type": "array", "items": {"$ref": "#/$defs/d0"}}
    return made


def _pattern(pattern: str, **more: Any) -> Any:
    return {"type": "string", "pattern": pattern, **more}


def _constant(**values: Any) -> Any:
    return {"type": "object", "properties": {name: {"const": v} for name, v in values.items()}, "required": [*values]}


HOSTILE: dict[str, Callable[[], Any]] = {
    "nested text": lambda: "[" * 100_000,
    "nested schema as text": lambda: '{"items":' * 5000 + "{}" + "}" * 5000,
    "45 levels": lambda: _nested(45),
    "200 levels": lambda: _nested(200),
    "a chain of references": lambda: _chain(3000, lambda ref: ref),
    "a chain of anyOf": lambda: _chain(2000, lambda ref: {"anyOf": [ref, {"type": "null"}]}),
    "a chain of oneOf": lambda: _chain(1500, lambda ref: {"oneOf": [ref, {"type": "null"}]}),
    "a chain of names": lambda: _chain(2000, lambda ref: {"propertyNames": ref}, {"type": "string"}),
    "a chain of required properties": lambda: _chain(
        2000, lambda ref: {"type": "object", "properties": {"x": ref}, "required": ["x"]}
    ),
    "a long ring": lambda: _ring(2000),
    "doubling": lambda: _chain(60, lambda ref: {"type": "array", "minItems": 2, "items": ref}),
    "references in a circle": lambda: {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "endless": lambda: {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
    "exponential pattern": lambda: _pattern("^(a|b)*a(a|b){500}$"),
    "exponential pattern and length": lambda: _pattern("^(a|b)*a(a|b){500}$", maxLength=700),
    "backtracking": lambda: _pattern("^((a+)+)+$"),
    "backtracking of options": lambda: _pattern("a?" * 900 + "a" * 150),
    "counts of counts": lambda: _pattern("^((a{1,80}){1,80})$"),
    "a large count": lambda: _pattern("^.{1,5000}$"),
    "many patterns": lambda: {"anyOf": [_pattern(f"^(a|b|c)*{i}(x|y){{{i}}}$", maxLength=50 + i) for i in range(100)]},
    "one pattern, many lengths": lambda: {
        "type": "object",
        "properties": {f"p{i}": _pattern("^(a|b)*a(a|b){12}$", maxLength=1000 + i) for i in range(300)},
    },
    "patterns that all apply": lambda: {
        "type": "string",
        "allOf": [{"pattern": f"[a-{chr(98 + i)}].*{chr(97 + i)}"} for i in range(20)],
    },
    "classes of thousands of characters": lambda: {
        "type": "object",
        "properties": {f"p{i}": _pattern(rf"^[\W\D\S]{{1,{i + 1}}}$") for i in range(100)},
    },
    "patterns of names": lambda: {
        "type": "object",
        "patternProperties": {f"^[a-z]*{chr(97 + i)}[a-z]*{i}": {"type": "integer"} for i in range(15)},
    },
    "20,000 words": lambda: {"enum": [f"{i:06}" for i in range(20_000)]},
    "20,000 words and a pattern": lambda: {"enum": [f"{i:05}" for i in range(20_000)], "pattern": "^(0|1)*"},
    "8,000 objects": lambda: {"enum": [{"a": i, "b": [i]} for i in range(8000)]},
    "more than is read": lambda: {"enum": list(range(60_000))},
    "anyOf times anyOf": lambda: {
        "allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}, {"type": "string"}]} for i in range(20)]
    },
    "400 branches": lambda: {"oneOf": [_constant(k=i) for i in range(400)]},
    "anyOf in oneOf": lambda: {"oneOf": [{"anyOf": [_constant(k=i * 100 + j) for j in range(100)]} for i in range(20)]},
    "2,500 objects to choose from": lambda: {"anyOf": [_constant(**{f"p{i}": i}) for i in range(2500)]},
    "ambiguous": lambda: {
        "$defs": {
            "n": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": i} for i in range(40)]}
        },
        "$ref": "#/$defs/n",
    },
    "a billion items": lambda: {"type": "array", "minItems": 10**9},
    "up to a billion items": lambda: {"type": "array", "maxItems": 10**9, "items": {"type": "integer"}},
    "a billion characters": lambda: {"type": "string", "minLength": 10**9},
    "up to a billion characters": lambda: {"type": "string", "maxLength": 10**9},
    "15,000 characters": lambda: {"type": "string", "minLength": 15_000},
    "half of 800 properties": lambda: {
        "type": "object",
        "properties": {f"p{i}": {} for i in range(800)},
        "maxProperties": 400,
    },
    "1,500 properties": lambda: {"type": "object", "properties": {f"p{i}": {} for i in range(1500)}},
    "2,000 names and others": lambda: {
        "type": "object",
        "properties": {f"property{i}": {"type": "integer"} for i in range(2000)},
        "additionalProperties": {"type": "string"},
    },
    "a long name": lambda: {"type": "object", "properties": {"k" * 100_000: {}}, "required": ["k" * 100_000]},
    "wide bounds": lambda: {"type": "number", "minimum": -1e60, "exclusiveMaximum": 1e-39},
    "large multiples": lambda: {
        "allOf": [{"multipleOf": 999999937}, {"multipleOf": 999999929}],
        "type": "integer",
        "minimum": 1,
        "maximum": 10**30,
    },
}


def attempt(schema: Any) -> str:
    """How it goes: `refused`, or the number of tokens of an answer that is held to it."""
    import numpy as np

    from local_llava.errors import EngineError, UsageError
    from local_llava.schema.compiler import compile_schema
    from local_llava.schema.constraint import Constraint, Vocabulary

    vocabulary = Vocabulary([*(bytes((byte,)) for byte in range(256)), b"[[", b'":', b"</s>"], [258], [258])
    try:
        constraint = Constraint(compile_schema(schema), vocabulary)
        chance = np.random.default_rng(1)
        budget = constraint.shortest + 60 if constraint.shortest < 2000 else 200
        text = b""
        for remaining in range(budget, 0, -1):
            logits = chance.normal(0, 3, vocabulary.n_tokens).astype(np.float32)
            constraint.apply(logits, remaining)
            token = int(np.argmax(logits + chance.gumbel(size=vocabulary.n_tokens)))
            constraint.accept(token)
            text += vocabulary.text(token)
            if constraint.finished:
                break
    except (UsageError, EngineError) as e:
        assert "\n" not in str(e) and len(str(e)) < 1000, str(e)
        return f"refused: {e}"
    if constraint.shortest < 2000:
        json.loads(text)
    return f"{len(text)} bytes"


def _peak_mib() -> int:
    """Of this program alone: ru_maxrss begins with the size of the process that started it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) >> 10  # type: ignore[index]


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    for name, make in HOSTILE.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        print(json.dumps({"trying": name}), flush=True)
        start = time.process_time()
        result = attempt(make())
        peak = _peak_mib()
        done = {"name": name, "result": result, "seconds": round(time.process_time() - start, 2), "peak_MiB": peak}
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
