"""Functions that a model may call, for models that were never trained to call any.

Chat templates of LLaVA know no tools. So the functions are described in the system prompt, and the answer is held to a
JSON schema: it has one of two forms, neither of which the client sees.

    {"answer": "Two cats."}
    {"calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]}

With `tool_choice` "auto" the model takes either; "required" leaves the second only, and a named function one call of
that function. Whatever the model is worth, the names are those of the client's functions, and the arguments follow
their schemas. It can still call the wrong one, or one where none was needed. `tool_reader` takes answers apart again
while they come. What the model said and called before is shown to it in the same two forms; results come as a part of
the user's next turn.

Knows neither HTTP nor an API's field names, except that those of schemas are keys of `$defs`, to be named by errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

MAX_CALLS = 8
"""In one answer: a small model may not know when to stop."""

Mode: TypeAlias = Literal["auto", "required", "one"]
"""Whether the model may call, must call, or must call once."""


@dataclass(frozen=True)
class Call:
    """A function called by the model."""

    id: str
    name: str
    arguments: str
    """JSON text of an object."""


@dataclass(frozen=True)
class Tool:
    """A function of the client's."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of an object."""
    where: str
    """The field that `parameters` came from."""


@dataclass(frozen=True)
class Toolbox:
    """What may be called in one answer, and how."""

    tools: Sequence[Tool]
    mode: Mode = "auto"
    parallel: bool = True
    """Whether there may be several calls in one answer."""
    answer: Mapping[str, Any] | None = None
    """Schema of the answer where it is JSON; None for a text."""
    answer_where: str = "answer"
    """The field that `answer` came from."""

    def schema(self) -> dict[str, Any]:
        """What the model's answer must follow."""
        one = [
            _object({"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{tool.where}"}})
            for tool in self.tools
        ]
        most = MAX_CALLS if self.parallel and self.mode != "one" else 1
        calls = _object({"calls": {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": most}})
        definitions = {tool.where: embedded(tool.parameters, tool.where) for tool in self.tools}
        if self.mode != "auto":
            return {**calls, "$defs": definitions}
        answer: dict[str, Any] = {"type": "string"}
        if self.answer is not None:
            answer = {"$ref": f"#/$defs/{self.answer_where}"}
            definitions[self.answer_where] = embedded(self.answer, self.answer_where)
        return {"anyOf": [_object({"answer": answer}), calls], "$defs": definitions}

    def explanation(self) -> str:
        """What the model is told of the functions, as a part of the system prompt."""
        functions = [
            json.dumps(
                {"name": tool.name, "description": tool.description, "parameters": tool.parameters}, ensure_ascii=False
            )
            for tool in self.tools
        ]
        calls = '{"calls": [{"name": "the name of a function", "arguments": {its arguments}}]}'
        answer = '{"answer": "what you say"}' if self.answer is None else '{"answer": {what you say, as JSON}}'
        forms = {
            "auto": f"Answer with JSON. To call functions:\n{calls}\nTo say something without calling any:\n{answer}",
            "required": f"Call one or more of them by answering with JSON:\n{calls}",
            "one": f"Call it once by answering with JSON:\n{calls}",
        }
        return "\n".join(
            [
                "These functions can be called. Each has a JSON schema of its arguments:",
                *functions,
                forms[self.mode],
                "The results of calls are given to you.",
            ]
        )

    def said(self, text: str) -> str:
        """What the client saw as `text`, in the form of answers."""
        if self.answer is not None and _is_json(text):
            return f'{{"answer": {text}}}'
        return f'{{"answer": {json.dumps(text, ensure_ascii=False)}}}'


def called(calls: Sequence[Call]) -> str:
    """What the client saw as calls, in the form of answers."""
    written = [
        f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": '
        f"{call.arguments if _is_json(call.arguments) else json.dumps(call.arguments, ensure_ascii=False)}}}"
        for call in calls
    ]
    return f'{{"calls": [{", ".join(written)}]}}'


def embedded(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A document's schema as a part of another document, where it is `#/$defs/NAME`.

    References are turned to the new place. What only a whole document may say of itself is left out.
    """
    found: dict[str, Any] = _moved(schema, f"#/$defs/{name}")
    return {key: value for key, value in found.items() if key not in ("$schema", "$id")}


_NAMED = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose values are schemas by names, which are no keywords themselves."""

_VALUES = ("enum", "const", "default", "examples")
"""Keywords whose values are not schemas."""


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            moved[key] = value
        elif key in _NAMED and isinstance(value, Mapping):
            moved[key] = {name: _moved(part, root) for name, part in value.items()}
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        else:
            moved[key] = _moved(value, root)
    return moved


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
