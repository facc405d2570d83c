"""The JSON of a request: the one way in which the routes read a body.

Knows the content types that clients send and what JSON is accepted. What the values mean is read by the wire modules;
how long a body may be and may take is `limits`'s.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from local_llava.server.errors import RequestError

MAX_DEPTH = 200
"""Of lists and objects in each other: the limit of pydantic's parser, which stops there and overflows no stack."""

# curl sends the second with `-d`, as many write it from Ollama's documentation; fetch() sends the third with text.
_AS_JSON = ("application/json", "application/x-www-form-urlencoded", "text/plain")


async def read_json(request: Request) -> dict[str, Any]:
    """The object in a request's body. Numbers may be infinite (1e999) and texts hold any character but half a pair.

    Raises:
        RequestError: The body is of another content type (415), or no JSON object (400): the message says where it ends
            to be one.
    """
    check_content_type(request.headers.get("content-type"))
    return parse_object(await request.body())


def check_content_type(value: str | None) -> None:
    """Refuse what is known not to be JSON; None, where the client does not say, is let through.

    Raises:
        RequestError: Status 415.
    """
    kind, _, parameters = (value or "").lower().partition(";")
    kind, charset = kind.strip(), parameters.partition("charset=")[2].strip(' "')
    if kind and kind not in _AS_JSON and not (kind.startswith("application/") and kind.endswith("+json")):
        shown = kind if kind.isprintable() else "something else"
        raise RequestError(f"Content-Type must be application/json, not {shown:.80}", status=415)
    if charset and charset not in ("utf-8", "utf8", "us-ascii"):
        raise RequestError("Content-Type: JSON is read as UTF-8 only", status=415)


def parse_object(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        RequestError: It is no JSON (NaN is none, and neither is half a surrogate pair), is nested deeper than
            MAX_DEPTH, or is something other than an object.
    """
    if not body:
        raise RequestError("the request has no body; a JSON object is expected")
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as e:
        what = str(e)
        if what.startswith("recursion limit"):
            raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels") from e
        raise RequestError(f"the body is not valid JSON: {what:.200}") from e
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_NAMES.get(type(value), 'something else')}")
    return value


_NAMES: dict[type, str] = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}
