"""Chat templates for models that come without one, as they were trained.

Knows the formats of Llama 3, Phi 3 and Vicuna, and by which tokens a vocabulary shows its own. Does not render them
(`template` does). Content is a text or a list of parts of type image and text; pictures come before the text, as
`<image>` and a newline.
"""

from __future__ import annotations

from collections.abc import Collection

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

_SHOWN_BY = {
    LLAMA3_CHAT: ("gpt2", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    PHI3_CHAT: ("llama", ("<|user|>", "<|assistant|>", "<|end|>")),
    # Llama 2's vocabulary has no marks of a chat; the LLaVA models with it are Vicunas.
    VICUNA_CHAT: ("llama", ()),
}
"""Template -> kind of the vocabulary, and the tokens that it must have."""


def default_chat(model: str, tokens: Collection[str]) -> str | None:
    """The template of a model without one, or None where its vocabulary shows no known format.

    Args:
        model: Kind of the vocabulary as GGUF names it, "gpt2" or "llama".
        tokens: The vocabulary, or its added tokens.
    """
    if model == "llama" and "[INST]" in tokens:
        return None  # Mistral's later vocabularies have marks of their own
    return next(
        (chat for chat, (kind, marks) in _SHOWN_BY.items() if kind == model and all(m in tokens for m in marks)), None
    )
