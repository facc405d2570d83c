"""/openapi.json as a page for people, at /docs.

It is HTML alone: FastAPI's own pages load their scripts from the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem } h3 code { font-size: 1.1rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem }
tr { border-top: 1px solid color-mix(in srgb, currentcolor 20%, transparent) } td:nth-child(3) { width: 55% }
"""


def html(schema: Mapping[str, Any]) -> str:
    """The page.

    Args:
        schema: An OpenAPI document.
    """
    by_tag: dict[str, list[str]] = {}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            tag = operation.get("tags", ["Other"])[0]
            by_tag.setdefault(tag, []).append(_operation(schema, path, method.upper(), operation))
    parts = [f"<h2>{escape(tag)}</h2>{''.join(operations)}" for tag, operations in by_tag.items()]
    types = schema.get("components", {}).get("schemas", {})
    tables = {name: _fields(fields) for name, fields in types.items() if "." in name}
    parts.append("<h2>Types</h2>")
    parts += [f'<h3 id="{escape(name)}">{escape(name)}</h3>{table}' for name, table in tables.items() if table]
    title, version = escape(schema["info"]["title"]), escape(schema["info"]["version"])
    about = escape(schema["info"].get("description", ""))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}: API</title>'
        f"<style>{_STYLE}</style></head><body><main><h1>{title} {version}</h1><p>{about} For programs: "
        f'<a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}</main></body></html>'
    )


def _operation(schema: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    answers = "; ".join(
        f"{escape(str(status))}: {escape(response.get('description', ''))}"
        for status, response in operation.get("responses", {}).items()
    )
    return (
        f"<h3><code>{method} {escape(path)}</code></h3><p>{escape(operation.get('summary', ''))}. "
        f"<small>{answers}</small></p>{_fields(_resolved(schema, body))}"
    )


def _fields(body: Mapping[str, Any]) -> str:
    """A table of what a request may have."""
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in body.get('required', ()) else ''}</td>"
        f"<td>{_kind(field)}</td><td>{escape(_described(field))}</td></tr>"
        for name, field in body.get("properties", {}).items()
    ]
    return f"<table><tr><th>Field</th><th>Type</th><th></th></tr>{''.join(rows)}</table>" if rows else ""


def _described(field: Mapping[str, Any]) -> str:
    texts = [field.get("description"), *(option.get("description") for option in field.get("anyOf", ()))]
    return " ".join(text for text in texts if text)


def _kind(field: Mapping[str, Any]) -> str:
    """A type in a few words, with links to others."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f'<a href="#{escape(name)}">{escape(name.rpartition(".")[2])}</a>'
    if "const" in field:
        return escape(json.dumps(field["const"]))
    if "enum" in field:
        return " or ".join(escape(json.dumps(value)) for value in field["enum"])
    options = [option for option in (*field.get("anyOf", ()), *field.get("oneOf", ())) if option.get("type") != "null"]
    if options:
        return " or ".join(dict.fromkeys(_kind(option) for option in options))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return escape(str(field.get("type", "any")))


def _resolved(schema: Mapping[str, Any], body: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in body:
        return body
    found: Mapping[str, Any] = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    return found
