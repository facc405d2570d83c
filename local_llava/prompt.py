"""From a conversation to what the language model reads: runs of tokens, and the slots of pictures between them.

Knows how a chat format's parts become tokens. The parts are `chat`'s, the tokenizer is the language model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from local_llava.chat import ChatFormat, Slot, Special
from local_llava.errors import UsageError
from local_llava.types import Message

Prompt: TypeAlias = "list[list[int] | Slot]"


def build(messages: Sequence[Message], chat_format: ChatFormat, tokenize: Callable[[str], list[int]]) -> Prompt:
    """The prompt of a conversation, up to where the assistant's next turn begins.

    Args:
        messages: What was said so far. It is text: nothing in it acts as a control token.
        chat_format: The model's chat format.
        tokenize: Text -> token ids, in which no control token may be found.

    Raises:
        UsageError: A text is not valid Unicode.
        PromptError: The template refuses the conversation or has no place for its pictures.
    """
    for message in messages:
        _check_text(message)
    prompt: Prompt = []
    for part in chat_format.parts(messages):
        if isinstance(part, Slot):
            prompt.append(part)
            continue
        tokens = [part.token] if isinstance(part, Special) else tokenize(part)
        if prompt and isinstance(prompt[-1], list):
            prompt[-1] += tokens
        else:
            prompt.append(tokens)
    return prompt


def _check_text(message: Message) -> None:
    name = {"user": "question"}.get(message.role, message.role)
    if not isinstance(message.text, str):
        raise UsageError(f"{name} must be text, not {type(message.text).__name__}")
    # Half of a surrogate pair, as Python makes of bytes that are not UTF-8; no tokenizer knows such.
    if any("\ud800" <= ch <= "\udfff" for ch in message.text):
        raise UsageError(f"{name} is not valid Unicode text")
