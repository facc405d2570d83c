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
        RequestError: It has another one; the message names the field, and nothing that is no field.
    """
    try:
        return model.model_validate(body)
    except ValidationError as e:
        errors = [_placed(error, body) for error in e.errors(include_url=False, include_input=False)]
        raise _told(_meant(errors)) from e


def _meant(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The error that helps most.

    Where a value may be of several forms, there is one or more for each form. The form that the value is of, or comes
    nearest to, is the one that was meant.
    """
    depth = max(len(error["loc"]) for error in errors)
    furthest = [error for error in errors if len(error["loc"]) == depth]
    other_kind = [error for error in furthest if error["loc"][-1:] == ("type",) and error["type"] == "literal_error"]
    if other_kind:  # what such a thing must have besides was not to be known
        return other_kind[0]
    of_right_type = [error for error in furthest if not error["type"].endswith(("_type", "literal_error"))]
    if of_right_type or len(furthest) == 1:
        return (of_right_type or furthest)[0]
    same_place = [error for error in furthest if error["loc"] == furthest[0]["loc"]]
    accepted = dict.fromkeys(error["msg"].removeprefix("should be ") for error in same_place)
    return {**furthest[0], "msg": f"should be {' or '.join(accepted)}"}


def _placed(error: Mapping[str, Any], body: object) -> dict[str, Any]:
    """An error with the place in the body that it speaks of.

    Among the fields, pydantic puts the kinds that a value may be of: the role of a message, the type of a part.
    """
    loc, kind, context = list(error["loc"]), error["type"], error.get("ctx", {})
    text = error["msg"].removeprefix("Input ")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        loc.append(_tag_field(str(context["discriminator"])))
        kind = "missing" if kind == "union_tag_not_found" else kind
        text = f"should be one of {context.get('expected_tags', '')}"
    if kind in ("too_short", "string_too_short"):
        text = "should not be empty"
    elif kind == "too_long":
        text = f"should have at most {context['max_length']} items"
    elif kind in ("model_attributes_type", "model_type", "dict_type"):
        text = "should be a JSON object"
    path: list[str | int] = []
    value = body
    for i, step in enumerate(loc):
        if (isinstance(value, Mapping) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            value = value[step]
        elif not (kind == "missing" and i == len(loc) - 1):
            continue
        if isinstance(step, int) or _FIELD.fullmatch(step):  # keys of the client's own may be anything
            path.append(step)
    return {**error, "loc": tuple(path), "type": kind, "msg": text}


def _tag_field(discriminator: str) -> str:
    """The field that tells the kinds of a value apart; where a function does (`_kind()`), it goes by the type, too."""
    return "type" if discriminator.endswith("()") else discriminator.strip("'")


def _told(error: Mapping[str, Any]) -> RequestError:
    """An error of pydantic's, for the client."""
    if not error["loc"]:
        return RequestError("the body of the request must be a JSON object", code="invalid_type")
    name, missing = _field_name(error["loc"]), error["type"] == "missing"
    words = "it is required" if missing else str(error["msg"]).removeprefix("Value error, ")
    code = "missing_required_parameter" if missing else "invalid_value"
    return RequestError(f"{name}: {words}", param=name, code=code)


def _field_name(path: Sequence[str | int]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else step
    return name
