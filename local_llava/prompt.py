"""From a conversation to what the language model reads: runs of tokens, and the slots of pictures between them.

Knows how a chat format's parts become tokens, and what a text's tokens depend on around it. The parts are `chat`'s, the
tokenizer is the language model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from local_llava.chat import ChatFormat, Part, Slot, Special
from local_llava.errors import UsageError
from local_llava.sentencepiece import TextRun
from local_llava.types import Message

Prompt: TypeAlias = "list[list[int] | Slot]"


def build(
    messages: Sequence[Message],
    chat_format: ChatFormat,
    tokenize: Callable[[TextRun], list[int]],
    raw: bool = False,
) -> Prompt:
    """The prompt of a conversation, up to where the assistant's next turn begins.

    Args:
        messages: What was said so far. It is text: nothing in it acts as a control token.
        chat_format: The model's chat format.
        tokenize: Text -> token ids, in which no control token may be found.
        raw: The one message is the whole prompt: its pictures, then its text, after the token that begins a text where
            the vocabulary asks for it.

    Raises:
        UsageError: A text is not valid Unicode, or a raw prompt has several messages or is empty.
        PromptError: The template refuses the conversation or has no place for its pictures.
    """
    for message in messages:
        _check_text(message)
    if raw and len(messages) != 1:
        raise UsageError(f"a raw prompt is one message of the user's, not {len(messages)}")
    parts = chat_format.raw_parts(messages[0]) if raw else chat_format.parts(messages)
    if not parts:
        raise UsageError("a raw prompt must not be empty")
    prompt: Prompt = []
    start = 0
    while start < len(parts):
        part, end = parts[start], start + 1
        while isinstance(part, str) and end < len(parts) and isinstance(parts[end], str):
            end += 1
        if isinstance(part, Slot):
            prompt.append(part)
        else:
            tokens = [part.token] if isinstance(part, Special) else tokenize(_run(parts, start, end, chat_format))
            if prompt and isinstance(prompt[-1], list):
                prompt[-1] += tokens
            else:
                prompt.append(tokens)
        start = end
    return prompt


def _run(parts: Sequence[Part], start: int, end: int, chat_format: ChatFormat) -> TextRun:
    """The texts from `start` to `end`, which no special token or picture comes between."""
    before = parts[start - 1] if start else None
    first = before is None or (isinstance(before, Special) and before.added)
    return TextRun(
        pieces=tuple(part for part in parts[start:end] if isinstance(part, str)),
        first=first,
        after=None if first else _token(before, chat_format),
        before=_token(parts[end], chat_format) if end < len(parts) else None,
    )


def _token(part: Part | None, chat_format: ChatFormat) -> int | None:
    if isinstance(part, Slot):
        return chat_format.image_token
    return part.token if isinstance(part, Special) else None


def _check_text(message: Message) -> None:
    name = {"user": "question"}.get(message.role, message.role)
    if not isinstance(message.text, str):
        raise UsageError(f"{name} must be text, not {type(message.text).__name__}")
    # Half of a surrogate pair, as Python makes of bytes that are not UTF-8; no tokenizer knows such.
    if any("\ud800" <= ch <= "\udfff" for ch in message.text):
        raise UsageError(f"{name} is not valid Unicode text")
