"""What a caller says in any of the accepted forms -> `Message`s.

Knows the dictionaries of OpenAI's chat format, which transformers' chat templates take too. Loads no picture.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast, get_args

from local_llava.errors import UsageError
from local_llava.images import ImageLike
from local_llava.types import Message, Role

Images: TypeAlias = "ImageLike | Sequence[ImageLike]"
Conversation: TypeAlias = "str | Sequence[Message | Mapping[str, Any]]"


def as_messages(conversation: Conversation, images: Images = (), system: str | None = None) -> list[Message]:
    """The turns of a conversation, the first system prompt included.

    Args:
        conversation: A question; or turns, oldest first, as `Message`s or as dictionaries with `role` and `content`:
            a text, or parts `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and
            `{"type": "image_url", "image_url": {"url": ...}}`. A turn's pictures are shown before its text.
        images: Pictures for the last turn, besides those it brings.
        system: System prompt, for a conversation that does not begin with one.

    Raises:
        UsageError: A turn is malformed, or the order of turns makes no sense.
    """
    turns = [Message("user", conversation)] if isinstance(conversation, str) else conversation
    if not isinstance(turns, Sequence) or not turns:
        raise UsageError("a conversation must be a question or a list of messages, and not empty")
    messages = [_message(turn, f"messages[{i}]") for i, turn in enumerate(turns)]
    if messages[-1].role != "user":
        raise UsageError(f"the last message must be the user's, not of role {messages[-1].role!r}")
    if any(m.role == "system" for m in messages[1:]):
        raise UsageError("only the first message can be of role 'system'")
    last = messages[-1]
    messages[-1] = Message("user", last.text, (*as_list(images), *last.images))
    if system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return messages


def n_turns(messages: Sequence[Message]) -> int:
    """Turns of a conversation, each a question and its answer."""
    return 1 + len(_later_questions(messages))


def without_oldest(messages: Sequence[Message], n: int) -> list[Message]:
    """A conversation without its n oldest turns, of `n_turns`; its system prompt stays."""
    if n == 0:
        return list(messages)
    n_system = int(messages[0].role == "system")
    return [*messages[:n_system], *messages[_later_questions(messages)[n - 1] :]]


def as_list(images: Images) -> list[ImageLike]:
    """One picture or several, as a list.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike)):
        return list(images)
    return [cast("ImageLike", images)]


def _later_questions(messages: Sequence[Message]) -> list[int]:
    n_system = int(messages[0].role == "system")
    return [i for i, message in enumerate(messages) if i > n_system and message.role == "user"]


def _message(turn: Message | Mapping[str, Any], where: str) -> Message:
    role: object
    if isinstance(turn, Message):
        role, text, images = turn.role, turn.text, tuple(turn.images)
    elif isinstance(turn, Mapping):
        role, content = turn.get("role"), turn.get("content")
        text, images = (content, ()) if isinstance(content, str) else _parts(content, f"{where}.content")
    else:
        raise UsageError(f"{where} must be a Message or a dictionary, not {type(turn).__name__}")
    if role not in get_args(Role):
        raise UsageError(f"{where}.role must be one of {', '.join(get_args(Role))}, not {role!r:.40}")
    if not isinstance(text, str):
        raise UsageError(f"{where}.text must be text, not {type(text).__name__}")
    if images and role != "user":
        raise UsageError(f"{where} has pictures, but only the user can show some")
    return Message(cast("Role", role), text, images)


def _parts(content: object, where: str) -> tuple[str, tuple[Any, ...]]:
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise UsageError(f"{where} must be text or a list of parts, not {type(content).__name__}")
    texts: list[str] = []
    images: list[Any] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get(kind) if isinstance(kind, str) and isinstance(part, Mapping) else None
        if kind == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in ("image", "image_url") and value is not None:
            images.append(value)
        else:
            raise UsageError(f"{where}[{i}] must be a part of type text, image or image_url, with a field of that name")
    return "\n".join(texts), tuple(images)
