"""A model's answer -> what the client is told: pieces of text, and calls of functions as they come.

Knows the two forms of `tools`. Reads them letter by letter, so that a client sees the first word of an answer when the
model wrote it, and not when the JSON around it is complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from local_llava.text import AnswerText


@dataclass(frozen=True)
class Said:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call, of which the arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of a call's arguments, JSON."""

    index: int
    text: str


Event: TypeAlias = Said | CallBegun | Arguments

_Letters: TypeAlias = Generator[None, str, None]
_Text: TypeAlias = Generator[None, str, str]


class Reading(Protocol):
    """An answer that is read as it comes."""

    def push(self, text: str) -> list[Event]:
        """What a piece of the model's text tells the client."""
        ...


class PlainReader:
    """Where no function can be called: the text is the answer."""

    def push(self, text: str) -> list[Event]:
        return [Said(text)] if text else []


class ToolReader:
    """Where functions can be called."""

    def __init__(self, *, json_answer: bool = False, stop: Sequence[str] = ()) -> None:
        """
        Args:
            json_answer: Whether the answer is passed on as the JSON that it is, instead of the text that it says.
            stop: Texts that end the answer where they first occur. The model writes on, unseen: to end it in the
                middle of its JSON would be to end it at a letter that is no part of the answer.
        """
        self._json_answer = json_answer
        self._said = AnswerText(stop)
        self._events: list[Event] = []
        self._letters = self._answer()
        next(self._letters)
        self._ended = False

    def push(self, text: str) -> list[Event]:
        for letter in text:
            if self._ended:
                break
            try:
                self._letters.send(letter)
            except StopIteration:
                self._ended = True
        events, self._events = self._events, []
        return list(_merged(events))

    def _answer(self) -> _Letters:
        yield from self._until("{")
        form = yield from self._name()
        yield from self._until(":")
        if form == "answer":
            yield from self._what_is_said()
            self._events.append(Said(self._said.finish()))
        else:
            yield from self._calls()

    def _what_is_said(self) -> _Letters:
        letter = yield from self._begins()
        if self._json_answer:
            yield from self._value(letter, None)
            return
        while (text := (yield from self._character())) is not None:
            self._events.append(Said(self._said.push(text)))

    def _calls(self) -> _Letters:
        yield from self._until("[")
        index = 0
        while True:
            yield from self._until("{")
            yield from self._name()
            yield from self._until(":")
            name = yield from self._name()
            self._events.append(CallBegun(index, name))
            yield from self._until(":")
            letter = yield from self._begins()
            yield from self._value(letter, index)
            yield from self._until("}")
            index += 1

    def _value(self, letter: str, index: int | None) -> _Letters:
        """Pass on a JSON value, from its first letter on: the arguments of a call, or the answer.

        One that has no end of its own ends before the brace around it.
        """
        depth, in_string, escaped = 0, False, False
        while True:
            if not in_string and depth == 0 and letter in "}]":
                return
            self._events.append(Said(letter) if index is None else Arguments(index, letter))
            if in_string:
                in_string = escaped or letter != '"'
                escaped = letter == "\\" and not escaped
            elif letter == '"':
                in_string = True
            elif letter in "{[":
                depth += 1
            elif letter in "}]":
                depth -= 1
            if depth == 0 and not in_string and letter in '}]"':
                return
            letter = yield

    def _until(self, wanted: str) -> _Letters:
        while (yield) != wanted:
            pass

    def _begins(self) -> _Text:
        """The first letter of a value."""
        while (letter := (yield)).isspace():
            pass
        return letter

    def _name(self) -> _Text:
        """A whole string."""
        yield from self._until('"')
        text = ""
        while (character := (yield from self._character())) is not None:
            text += character
        return text

    def _character(self) -> Generator[None, str, str | None]:
        """The next character of a string; None where it ends."""
        letter = yield
        if letter == '"':
            return None
        if letter != "\\":
            return letter
        letter = yield
        if letter != "u":
            return _ESCAPES.get(letter, letter)
        code = yield from self._code()
        if 0xD800 <= code < 0xDC00:  # the first half of a pair; the second follows
            yield
            yield
            code = 0x10000 + ((code - 0xD800) << 10) + ((yield from self._code()) - 0xDC00)
        return chr(code)

    def _code(self) -> Generator[None, str, int]:
        digits = ""
        for _ in range(4):
            digits += yield
        return int(digits, 16)


_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


def _merged(events: Iterable[Event]) -> Iterator[Event]:
    """One event for all letters in a row that belong together."""
    for (kind, index), row in itertools.groupby(events, lambda event: (type(event), getattr(event, "index", 0))):
        if kind is CallBegun:
            yield from row
        elif text := "".join(event.text for event in row if not isinstance(event, CallBegun)):
            yield Said(text) if kind is Said else Arguments(index, text)
