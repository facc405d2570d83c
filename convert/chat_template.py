"""Finds a checkpoint's chat template, and has one for Llama-3 checkpoints without.

Knows the files that transformers keeps templates in. Does not render them (`local_llava.template` does).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from local_llava.convert.checkpoint import read_json
from local_llava.errors import CheckpointError
from local_llava.types import MAX_CHAT_TEMPLATE

LLAMA3_CHAT = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
"""XTuner's `llama3_chat`, with which its LLaVA was trained and whose checkpoints carry no template: pictures come
before the text, as `<image>` and a newline. Content is a text or a list of parts of type image and text."""

_LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def read_chat_template(directory: Path, tokens: Collection[str]) -> str:
    """The template that the checkpoint's processor uses; else its tokenizer's; else Llama 3's where it has its tokens.

    Args:
        directory: Of the checkpoint.
        tokens: The tokenizer's added tokens.

    Raises:
        CheckpointError: A file is malformed, or there is no template.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return _checked(path, path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path}: cannot be read as UTF-8 text") from e
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = directory / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, (list, dict)):
            template = _default_of(template)
        if template is not None:
            return _checked(path, template)
    if all(token in tokens for token in _LLAMA3_TOKENS):
        return LLAMA3_CHAT
    raise CheckpointError(f"{directory}: no chat template: put it into chat_template.jinja beside config.json")


def _default_of(templates: Any) -> Any:
    """Of several templates by name, as some checkpoints have, the default one."""
    if isinstance(templates, dict):
        return templates.get("default", "")
    named = {
        t.get("name"): t.get("template") for t in templates if isinstance(t, dict) and isinstance(t.get("name"), str)
    }
    return named.get("default", "")


def _checked(path: Path, template: Any) -> str:
    if not isinstance(template, str) or not template.strip() or "\0" in template:
        raise CheckpointError(f"{path}: chat_template must be a text, or a list with one named default")
    if len(template) > MAX_CHAT_TEMPLATE:
        raise CheckpointError(
            f"{path}: chat_template has {len(template)} characters; at most {MAX_CHAT_TEMPLATE} are accepted"
        )
    try:
        template.encode()
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{path}: chat_template is not valid Unicode text") from e
    return template
