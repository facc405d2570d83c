"""The value of an answer that follows a schema.

Knows pydantic's models and types; whatever its validators do happens in the thread of who asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("local_llava")


def value_of(text: str, schema: Any) -> Any:
    """The value of a complete JSON answer.

    Args:
        text: The answer.
        schema: As of `Options.json_schema`.

    Returns:
        An instance where the schema is a pydantic model or type, None where its validators refuse the answer; what
        `json.loads` gives where it is a JSON schema.
    """
    if schema is None or isinstance(schema, (str, bool, Mapping)):
        return json.loads(text)
    validate = getattr(schema, "model_validate_json", None) or getattr(schema, "validate_json", None)
    if validate is None:
        from pydantic import TypeAdapter

        validate = TypeAdapter(schema).validate_json
    try:
        return validate(text)
    except ValueError as e:  # validators of the caller's own ask for more than a schema can say
        log.warning("the answer follows the schema, but %r refuses it: %s", schema, str(e).splitlines()[0])
        return None
