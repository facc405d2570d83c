"""Finds a checkpoint's chat template, or the one that models of its kind were trained with.

Knows the files that transformers keeps templates in. Does not render them (`local_llava.template` does).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from local_llava.convert.config import read_json
from local_llava.convert.typed_parts import taking_both
from local_llava.default_chats import LLAMA3_CHAT, default_chat
from local_llava.errors import CheckpointError
from local_llava.types import MAX_CHAT_TEMPLATE

__all__ = ["LLAMA3_CHAT", "read_chat_template"]

logger = logging.getLogger("local_llava")


def read_chat_template(directory: Path, model: str, tokens: Collection[str]) -> str:
    """The template that the checkpoint's processor uses; else its tokenizer's; else its kind's, shown by its tokens.

    Where it takes only texts, or only lists of parts, it is made to take both.

    Args:
        directory: Of the checkpoint.
        model: Kind of the vocabulary as GGUF names it.
        tokens: The tokenizer's added tokens.

    Raises:
        CheckpointError: A file is malformed, or there is no template.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return _taking_both(_checked(path, path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path}: cannot be read as UTF-8 text") from e
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = directory / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, (list, dict)):
            template = _default_of(template)
        if template is not None:
            return _taking_both(_checked(path, template))
    default = default_chat(model, tokens)
    if default is not None:
        logger.info("%s: no chat template; the one that such models were trained with is taken", directory)
        return default
    raise CheckpointError(f"{directory}: no chat template: put it into chat_template.jinja beside config.json")


def _taking_both(template: str) -> str:
    """llama.cpp's server and others give a template texts or lists of parts, whichever a request came with."""
    longer = taking_both(template, {"bos_token": "", "eos_token": ""})
    return longer if len(longer) <= MAX_CHAT_TEMPLATE else template


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
    return template
