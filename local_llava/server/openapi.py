"""What `/openapi.json` says of requests whose bodies the routes read themselves.

FastAPI describes what it parses. Bodies here are parsed by `json_body`, so their schemas are put where it would have
put them.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_DEFINITIONS = "x-definitions"
"""Of an operation, until all are moved to the components of the whole."""


def request_body(model: type[BaseModel], api: str) -> dict[str, Any]:
    """For `openapi_extra` of a route.

    Args:
        model: Of the JSON object in the body.
        api: Goes before the names of schemas, since two APIs have some of the same name.
    """
    schema = model.model_json_schema(ref_template=f"#/components/schemas/{api}.{{model}}")
    definitions = {f"{api}.{name}": value for name, value in schema.pop("$defs", {}).items()}
    definitions[f"{api}.{model.__name__}"] = schema
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{api}.{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}, _DEFINITIONS: definitions}


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole of an application."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for operations in schema["paths"].values():
            for operation in operations.values():
                schemas.update(operation.pop(_DEFINITIONS, {}))
        app.openapi_schema = schema
    return app.openapi_schema
