"""What pydantic says of a wrong request, in one line that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from local_llava.server.errors import RequestError

M = TypeVar("M", bound=BaseModel)

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def parsed(model: type[M], body: Mapping[str, Any]) -> M:
    """A request of the form that `model` describes.

    Raises:
        RequestError: It has another one; the message names the field.
    """
    try:
        return model.model_validate(body)
    except ValidationError as e:
        raise request_error(e.errors(include_url=False, include_input=False)) from e


def request_error(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of the errors that a `ValidationError` lists, as an error for the client.

    Where a field may have one of several forms, pydantic lists what speaks against each; the one that got furthest into
    the request is the one that was meant.
    """
    if not errors:
        return RequestError("the request is not valid", code="invalid_value")
    error = max(errors, key=lambda e: (e["type"] != "missing", len(_path(e["loc"]))))
    path = _path(error["loc"])
    if not path:
        return RequestError("the body of the request must be a JSON object", code="invalid_type")
    name = field_name(path)
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    return RequestError(f"{name}: {_words(error)}", param=name, code=code)


def field_name(path: Sequence[str | int]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name


def _path(loc: Sequence[str | int]) -> list[str | int]:
    """Where a value lies in the body; without the names of models and types that pydantic puts among the fields."""
    steps = loc[1:] if loc and loc[0] in ("body", "query", "path", "header") else loc
    return [step for step in steps if isinstance(step, int) or (_FIELD.fullmatch(step) and not _is_type(step))]


def _is_type(step: str) -> bool:
    return step[0].isupper() or step in ("str", "int", "float", "bool", "none", "bytes")


def _words(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "it is required"
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "should be a JSON object"  # pydantic would name classes of Python
    text = str(error["msg"])
    return text.removeprefix("Value error, ").removeprefix("Input ")
