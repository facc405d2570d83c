"""Errors as OpenAI's clients expect them. Knows their form, and no HTTP."""

from __future__ import annotations

import re

from pydantic import BaseModel, Field

from local_llava.errors import UsageError
from local_llava.server.errors import RequestError


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(None, description="The field that is wrong.")
    code: str | None = None


class ErrorBody(BaseModel):
    """An error, as OpenAI's clients expect it."""

    error: ErrorFields


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
