"""The part of Go's text/template that our Modelfiles use, and the part of Ollama's Modelfile, read independently."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_PIECE = re.compile(r'\{\{ ((?:[^"}]|"(?:[^"\\]|\\.)*")*) \}\}|([^{]+|\{(?!\{))', re.DOTALL)


def render(template: str, messages: list[tuple[str, str]]) -> str:
    """As Ollama calls it: roles and texts, with the system's texts joined beside them."""
    system = "\n\n".join(text for role, text in messages if role == "system")
    data = {"System": system, "Messages": [{"Role": role, "Content": text} for role, text in messages]}
    nodes = list(_pieces(template))
    out: list[str] = []
    end = _run(nodes, 0, data, {}, out, True)
    assert end == len(nodes), "every block is closed"
    return "".join(out)


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(template):
        match = _PIECE.match(template, at)
        assert match, template[at : at + 40]
        yield ("action", match[1]) if match[1] is not None else ("text", match[2])
        at = match.end()


def _run(
    nodes: list[tuple[str, str]], at: int, dot: dict[str, Any], names: dict[str, str], out: list[str], live: bool
) -> int:
    """Runs nodes to the `end` or `else` that closes their block; gives its place."""
    while at < len(nodes):
        kind, text = nodes[at]
        word = text.split()[0] if kind == "action" else ""
        if word in ("end", "else"):
            return at
        if word == "range":
            for item in dot[text.split()[1][1:]]:
                end = _run(nodes, at + 1, item, names, out, live)
            at = end
        elif word == "if":
            at = _branch(nodes, at, dot, names, out, live)
        elif live and kind == "text":
            out.append(text)
        elif live and len(text.split()) > 2 and text.split()[1] in (":=", "="):
            names[word] = _value(text.split(maxsplit=2)[2], dot, names)
        elif live:
            out.append(_value(text, dot, names))
        at += 1
    return at


def _branch(
    nodes: list[tuple[str, str]], at: int, dot: dict[str, Any], names: dict[str, str], out: list[str], live: bool
) -> int:
    taken = False
    condition: str | None = nodes[at][1].removeprefix("if ")
    while True:
        holds = not taken and (condition is None or _holds(condition, dot, names))
        at = _run(nodes, at + 1, dot, names, out, live and holds)
        taken = taken or holds
        if nodes[at][1] == "end":
            return at
        condition = nodes[at][1].removeprefix("else if ") if " if " in nodes[at][1] else None


def _holds(condition: str, dot: dict[str, Any], names: dict[str, str]) -> bool:
    function, *arguments = condition.split()
    if not arguments:
        return bool(_value(function, dot, names))
    left, right = (_value(a, dot, names) for a in arguments)
    return {"eq": left == right, "ne": left != right}[function]


def _value(text: str, dot: dict[str, Any], names: dict[str, str]) -> str:
    if text.startswith('"'):
        return str(json.loads(text))
    return str(dot[text[1:]]) if text.startswith(".") else names[text]


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Instructions with what they are given, by the rules of Ollama's parser: a value ends with the line, but for one
    that begins with quotes, which ends with a line that ends with them."""
    found = []
    rest = text
    while rest:
        name, rest = rest.split(" ", 1)
        if name == "PARAMETER":
            parameter, rest = rest.split(" ", 1)
            name = f"{name} {parameter}"
        quotes = '"""' if rest.startswith('"""') else '"' if rest.startswith('"') else ""
        end = rest.index(f"{quotes}\n", len(quotes))
        found.append((name, rest[len(quotes) : end]))
        rest = rest[end + len(quotes) + 1 :]
    return found
