"""Chat templates for models that come without one, as they were trained.

Knows the formats of Llama 3, Qwen2, Phi 3, Vicuna and LLaVA's Mistral, and by which tokens a vocabulary shows its own.
Does not render them (`template` does). Content is a text or a list of parts of type image and text; pictures come
before the text, as `<image>` and a newline.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_CONTENT = """{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
"""

LLAMA3_CHAT = f"""{{{{- bos_token -}}}}
{{%- for message in messages -%}}
{{{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}}}
{_CONTENT}{{{{- '<|eot_id|>' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}}}{{%- endif -%}}
"""
"""XTuner's `llama3_chat`, with which its LLaVA was trained and whose checkpoints carry no template."""

QWEN2_CHAT = f"""{{%- if messages[0]['role'] != 'system' -%}}
{{{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{{{- '<|im_start|>' + message['role'] + '\\n' -}}}}
{_CONTENT}{{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n' -}}}}{{%- endif -%}}
"""
"""ChatML with the system prompt that Qwen2's own template puts where there is none, as the official code's `qwen_2`."""

PHI3_CHAT = f"""{{%- for message in messages -%}}
{{{{- '<|' + message['role'] + '|>\\n' -}}}}
{_CONTENT}{{{{- '<|end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- '<|assistant|>\\n' -}}}}{{%- endif -%}}
"""
"""XTuner's `phi3_chat`. BOS is the tokenizer's to put."""

VICUNA_CHAT = f"""{{%- for message in messages -%}}
{{%- if message['role'] == 'user' -%}}{{{{- 'USER: ' -}}}}{{%- endif -%}}
{{%- if message['role'] == 'assistant' -%}}{{{{- 'ASSISTANT: ' -}}}}{{%- endif -%}}
{_CONTENT}{{{{- eos_token if message['role'] == 'assistant' else ' ' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{- 'ASSISTANT:' -}}}}{{%- endif -%}}
"""
"""LLaVA 1.5's (`v1` of the official code's conversation.py). BOS is the tokenizer's to put, which for some tokenizers
says whether a space comes before the text."""

MISTRAL_CHAT = f"""{{%- for message in messages -%}}
{{%- if message['role'] == 'system' -%}}
{{{{- '[INST] <<SYS>>\\n' -}}}}{_CONTENT}{{{{- '\\n<</SYS>>\\n\\n' -}}}}
{{%- elif message['role'] == 'user' -%}}
{{%- if loop.first or loop.previtem['role'] != 'system' -%}}{{{{- '[INST] ' -}}}}{{%- endif -%}}
{_CONTENT}{{{{- ' [/INST]' -}}}}
{{%- else -%}}{{{{- ' ' -}}}}{_CONTENT}{{{{- ' ' + eos_token -}}}}{{%- endif -%}}
{{%- endfor -%}}
"""
"""LLaVA 1.6 Mistral's (`mistral_instruct` of the official code, LLAMA_2 style). Its vocabulary is of the kind of Llama
2's, and does not show it: who knows that the model is a Mistral must say so."""


@dataclass(frozen=True)
class DefaultChat:
    """A format, and how a vocabulary shows that a model was trained with it."""

    name: str
    template: str
    model: str
    """Kind of the vocabulary as GGUF names it."""
    marks: tuple[str, ...]
    """Tokens that the vocabulary must have."""


DEFAULT_CHATS = (
    DefaultChat("Llama 3", LLAMA3_CHAT, "gpt2", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    DefaultChat("Qwen2", QWEN2_CHAT, "gpt2", ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    DefaultChat("Phi 3", PHI3_CHAT, "llama", ("<|user|>", "<|assistant|>", "<|end|>")),
    # Llama 2's vocabulary has no marks of a chat; the LLaVA models with it are Vicunas.
    DefaultChat("Vicuna", VICUNA_CHAT, "llama", ()),
)
"""The first that a vocabulary shows counts."""


def find_default_chat(model: str, tokens: Collection[str]) -> DefaultChat | None:
    """The format that a vocabulary shows, or None where it shows no known one.

    Args:
        model: Kind of the vocabulary as GGUF names it, "gpt2" or "llama".
        tokens: The vocabulary, or its added tokens.
    """
    if model == "llama" and "[INST]" in tokens:
        return None  # Mistral's later vocabularies have marks of their own
    return next((c for c in DEFAULT_CHATS if c.model == model and all(m in tokens for m in c.marks)), None)


def default_chat(model: str, tokens: Collection[str]) -> str | None:
    """The template of a model without one; arguments as of `find_default_chat`."""
    chat = find_default_chat(model, tokens)
    return None if chat is None else chat.template
