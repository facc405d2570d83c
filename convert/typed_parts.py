"""Makes a chat template take both forms of a message's content: a text, and a list of typed parts.

Knows how templates fail at the one or the other, by rendering them. Programs differ in what they give a template:
llama.cpp's server and this runtime give lists where there are pictures, others texts; and the templates of most text
models take only texts, those of LLaVA 1.5 only lists.
"""

from __future__ import annotations

from typing import Any

from local_llava.errors import PromptError
from local_llava.template import render

_PROBE = "\ufdd0"
"""A noncharacter of Unicode: no template writes it by itself."""

_AS_TEXT = """{%- set turns = namespace(made=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set turns.made = turns.made + [message] -%}
{%- else -%}
{%- set content = namespace(text='') -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{%- set content.text = content.text + '<image>\\n' -%}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{%- set content.text = content.text + part['text'] -%}
{%- endfor -%}
{%- set turns.made = turns.made + [{'role': message['role'], 'content': content.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = turns.made -%}
"""
"""Put before a template that takes texts only. Pictures come before the text, as in LLaVA's training."""

_AS_PARTS = """{%- set turns = namespace(made=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}{%- set turns.made = turns.made + [message] -%}
{%- else -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- set turns.made = turns.made + [{'role': message['role'], 'content': parts}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = turns.made -%}
"""
"""Put before a template that takes lists only."""


def taking_both(template: str, variables: dict[str, Any]) -> str:
    """A template that takes texts and lists of parts, and renders what the given one took as that one does.

    Args:
        template: Jinja source.
        variables: `bos_token` and `eos_token`, for the rendering that tries it.

    Returns:
        The template itself where it takes both already, or takes neither.
    """
    texts, parts = _takes(template, variables, _PROBE), _takes_parts(template, variables)
    if texts == parts:
        return template
    return (_AS_TEXT if texts else _AS_PARTS) + template


def _takes_parts(template: str, variables: dict[str, Any]) -> bool:
    content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    return _takes(template, variables, content)


def _takes(template: str, variables: dict[str, Any], content: Any) -> bool:
    """Whether a template shows a message's text, and not the list that it is in."""
    conversation = [{"role": "user", "content": content}]
    try:
        rendered = render(template, {"messages": conversation, "add_generation_prompt": True, **variables})
    except PromptError:
        return False
    shows_picture = isinstance(content, str) or "<image>" in rendered
    return _PROBE in rendered and "'type'" not in rendered and shows_picture
