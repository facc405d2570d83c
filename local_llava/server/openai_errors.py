"""What is wrong with a request, and what went wrong with an answer -> OpenAI's JSON.

Knows pydantic's lists of errors and OpenAI's form of them, and no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from local_llava.errors import UsageError
from local_llava.server.errors import Failure, RequestError
from local_llava.server.validation import request_error

M = TypeVar("M", bound=BaseModel)


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(None, description="The field that is wrong.")
    code: str | None = None


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients expect it."""

    error: ErrorFields


def error_body(failure: Failure) -> dict[str, Any]:
    """An error, as OpenAI's clients expect it."""
    return {
        "error": {
            "message": failure.message,
            "type": failure.type,
            "param": failure.param,
            "code": failure.code,
        }
    }


def checked(model: type[M], body: Mapping[str, Any]) -> M:
    """A request of the form that `model` describes.

    Raises:
        RequestError: It has another one; the message names the field, and nothing that is no field.
    """
    try:
        return model.model_validate(body)
    except ValidationError as e:
        errors = [_placed(error, body) for error in e.errors(include_url=False, include_input=False)]
        raise request_error([_meant(errors)]) from e


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
        path.append(step)
    return {**error, "loc": tuple(path), "type": kind, "msg": text}


def _tag_field(discriminator: str) -> str:
    """The field that tells the kinds of a value apart; where a function does (`_kind()`), it goes by the type, too."""
    return "type" if discriminator.endswith("()") else discriminator.strip("'")


_PLACE = re.compile(r"#/\$defs/([a-z]+(?:\[\d+\])?(?:\.[a-z_]+)+)")


def located(error: Exception, schema_field: str | None) -> Exception:
    """An error of the engine's about a schema, by the name of the request's field that it came from.

    Args:
        error: Any error.
        schema_field: The field, where the error does not tell it better.
    """
    text = str(error)
    if not isinstance(error, UsageError) or not text.startswith("schema: "):
        return error
    place = _PLACE.search(text) if schema_field == "tools" else None
    return RequestError(text, param=place[1] if place else schema_field, code="invalid_schema")
