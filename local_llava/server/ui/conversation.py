"""Conversations as the page knows them, as the browser keeps them, and as the models are asked.

Knows no NiceGUI and no browser. A picture is an id here; its bytes are in the browser, and here only while they are
asked about. What comes from a browser may be anything: what makes no sense is left out.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from local_llava.server.backend import Job
from local_llava.types import Message

NOT_FINISHED = "not finished"
"""The note under an answer that was being given when the page was left."""

_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_TITLE = 60


def new_id() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True)
class Picture:
    """A picture that the browser keeps."""

    id: str
    name: str
    """Of its file."""


@dataclass(frozen=True)
class Turn:
    """A question, or an answer."""

    role: Literal["user", "assistant"]
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    note: str = ""
    """What an answer cost, or why it ends."""
    error: str = ""
    """Why there is no answer, or no more of it."""
    attempt: int = 0
    """How often it was asked for again."""


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, in turns."""

    id: str = field(default_factory=new_id)
    turns: tuple[Turn, ...] = ()

    @property
    def title(self) -> str:
        """The first question, shortened."""
        for turn in self.turns:
            if text := " ".join(turn.text.split()) or ", ".join(p.name for p in turn.pictures):
                return text if len(text) <= _TITLE else text[: _TITLE - 1].rstrip() + "…"
        return "New conversation"

    def asked(self, text: str, pictures: Sequence[Picture]) -> Conversation:
        """With another question, and an answer that has yet to be given."""
        question = Turn("user", text, tuple(pictures))
        return replace(self, turns=(*self.turns, question, Turn("assistant")))

    def asked_again(self, index: int, text: str | None = None) -> Conversation:
        """Without what follows a question, and with its answer yet to be given.

        Args:
            index: Of the question, or of its answer.
            text: Of the question, where it was edited.
        """
        if self.turns[index].role == "assistant":
            index -= 1
        question, old = self.turns[index], self.turns[index + 1 : index + 2]
        if text is not None:
            question, old = replace(question, text=text), ()
        answer = Turn("assistant", attempt=old[0].attempt + 1 if old else 0)
        return replace(self, turns=(*self.turns[:index], question, answer))

    def answered(self, text: str, note: str = "", error: str = "") -> Conversation:
        """With this much of the last answer."""
        last = replace(self.turns[-1], text=text, note=note, error=error)
        return replace(self, turns=(*self.turns[:-1], last))


def wanted_pictures(conversation: Conversation) -> list[str]:
    """Ids of the pictures that a model must see to go on."""
    return [picture.id for turn in conversation.turns for picture in turn.pictures]


def job(conversation: Conversation, pictures: Mapping[str, bytes], options: Mapping[str, Any]) -> Job:
    """What the model is asked for the last answer of a conversation.

    A question that was never answered is part of the next one, since chat formats want turns to alternate.

    Args:
        conversation: Its last turn is the answer that is yet to be given.
        pictures: Their bytes, by id: at least those of `wanted_pictures`.
        options: Fields of `Options`.
    """
    messages: list[Message] = []
    for turn in conversation.turns[:-1]:
        images = tuple(pictures[picture.id] for picture in turn.pictures)
        if turn.role == "assistant":
            if turn.text:
                messages.append(Message("assistant", turn.text))
        elif messages and messages[-1].role == "user":
            before = messages.pop()
            text = "\n\n".join(part for part in (before.text, turn.text) if part)
            messages.append(Message("user", text, (*before.images, *images)))
        else:
            messages.append(Message("user", turn.text, images))
    attempt = conversation.turns[-1].attempt
    seed = (int(options.get("seed", 0)) + attempt) % (2**32 - 1)
    return Job(messages, {**options, "seed": seed})


def to_record(conversation: Conversation) -> dict[str, Any]:
    """As the browser keeps it."""
    turns = [
        {
            "role": turn.role,
            "text": turn.text,
            "pictures": [{"id": picture.id, "name": picture.name} for picture in turn.pictures],
            "note": turn.note,
            "error": turn.error,
            "attempt": turn.attempt,
        }
        for turn in conversation.turns
    ]
    return {"id": conversation.id, "title": conversation.title, "turns": turns}


def from_record(record: Any) -> Conversation | None:
    """A conversation from the browser; None if it is none."""
    if not isinstance(record, Mapping) or not _is_id(record.get("id")):
        return None
    found = record.get("turns")
    turns: list[Turn] = []
    for value in found if isinstance(found, list) else []:
        turn = _turn(value)
        # An answer follows a question, and a question its answer: whatever else there is, is not ours.
        if turn is not None and turn.role == ("user" if len(turns) % 2 == 0 else "assistant"):
            turns.append(turn)
    if len(turns) % 2:
        turns.append(Turn("assistant"))
    if turns and not turns[-1].note and not turns[-1].error:
        turns[-1] = replace(turns[-1], note=NOT_FINISHED)
    return Conversation(record["id"], tuple(turns))


def picture_from_record(record: Any) -> Picture | None:
    """A picture from the browser; None if it is none."""
    if not isinstance(record, Mapping) or not _is_id(record.get("id")):
        return None
    return Picture(record["id"], _text(record, "name")[:200] or "picture")


def _turn(value: Any) -> Turn | None:
    if not isinstance(value, Mapping):
        return None
    role, found, attempt = value.get("role"), value.get("pictures"), value.get("attempt")
    if role not in ("user", "assistant"):
        return None
    pictures = [picture_from_record(item) for item in found] if isinstance(found, list) else []
    return Turn(
        role,
        _text(value, "text"),
        tuple(picture for picture in pictures if picture is not None),
        _text(value, "note"),
        _text(value, "error"),
        attempt if isinstance(attempt, int) and 0 <= attempt < 2**31 else 0,
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    # Half of a surrogate pair is text in JavaScript, and an error where it is written as UTF-8.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else ""
