"""From a conversation to prompt parts: text to be tokenized, special tokens, and slots for pictures.

Knows chat templates as GGUF files and transformers have them. Knows neither the model nor how text is tokenized.

What a user typed is text. So that nothing typed can pass for a special token or a picture's slot, every special
token's text inside a message is broken by a guard character before the template runs, and the guard is taken out again
where the parts are made. The template thus sees the user's words as they are, and may trim or test them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from local_llava.errors import PromptError
from local_llava.template import render
from local_llava.types import Message

IMAGE = "<image>"
"""What chat templates write where a picture goes."""

_GUARDS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
"""Noncharacters of Unicode, kept for uses such as this one."""


@dataclass(frozen=True)
class Special:
    """A special token that the template wrote."""

    token: int
    added: bool = field(default=False, compare=False)
    """Whether it was put before the prompt, and not written by the template."""


@dataclass(frozen=True)
class Slot:
    """The place of a picture."""

    image: int
    """Its number among all pictures of the conversation."""


Part: TypeAlias = "str | Special | Slot"
"""A string is text in which no special token may be found."""


class ChatFormat:
    """A model's chat template, with the special tokens that it may write."""

    def __init__(self, template: str, specials: Mapping[str, int], bos: int, eos: int, add_bos: bool) -> None:
        """
        Args:
            template: Jinja source.
            specials: Text of each special token -> its id.
            bos: Token that begins a text.
            eos: Token that ends one.
            add_bos: Whether a prompt begins with `bos` even where the template does not write it.
        """
        self._template = template
        self.image_token = specials.get(IMAGE)
        """The token that stands for pictures, where the vocabulary has one."""
        self._specials = dict(specials)
        by_id = {token: text for text, token in specials.items()}
        self._variables = {"bos_token": by_id.get(bos, ""), "eos_token": by_id.get(eos, "")}
        self._bos = bos if add_bos else None
        # A single character cannot be broken by another.
        texts = sorted((text for text in {*specials, IMAGE} if len(text) > 1), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)))

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The prompt of a conversation, up to where the assistant's next turn begins.

        Raises:
            PromptError: The template fails, refuses the conversation, leaves a message out, or has no place for its
                pictures.
        """
        n_images = sum(len(m.images) for m in messages)
        texts = "".join(m.text for m in messages) + self._template
        free = [g for g in _GUARDS if g not in texts]
        if len(free) < 3:
            raise PromptError("the conversation uses all of Unicode's noncharacters; leave some of them out")
        guards = _Guards(*free[:3])
        split = re.compile(f"{self._special.pattern}|{guards.slot}")
        problem = PromptError(f"the model's chat template leaves no place for {n_images} picture(s)")
        # Templates of LLaVA take typed parts and write <image>; those of text models take strings, a few both.
        for typed in (_always, _with_images, _never) if n_images else (_always, _never):
            try:
                rendered = self._render(messages, guards, typed)
            except PromptError as e:
                problem = e
                continue
            parts = self._cut(rendered, split, guards)
            if guards.repr in rendered or sum(isinstance(p, Slot) for p in parts) != n_images:
                continue
            missing = [m for m in messages if m.role != "assistant" and not self._says(rendered, m, guards)]
            if not missing:
                return parts
            problem = PromptError(f"the model's chat template has no place for a {missing[0].role} message")
        raise problem

    def raw_parts(self, message: Message) -> list[Part]:
        """A prompt that is one message and nothing around it: its pictures, then its text."""
        start: list[Part] = [] if self._bos is None else [Special(self._bos, added=True)]
        # Cut inside of whatever would read as a special token.
        cuts = [0, *(match.start() + 1 for match in self._special.finditer(message.text)), len(message.text)]
        texts = [message.text[i:j] for i, j in itertools.pairwise(cuts) if i < j]
        return [*start, *map(Slot, range(len(message.images))), *texts]

    def _says(self, rendered: str, message: Message, guards: _Guards) -> bool:
        """Whether a prompt holds a message's text; templates may trim it."""
        return self._plain(message.text, guards).strip() in rendered

    def _plain(self, text: str, guards: _Guards) -> str:
        """Text without special tokens."""
        return self._special.sub(lambda m: m[0][0] + guards.inside + m[0][1:], text)

    def _render(self, messages: Sequence[Message], guards: _Guards, typed: Callable[[Message], bool]) -> str:
        turns: list[dict[str, Any]] = []
        for m in messages:
            text = self._plain(m.text, guards)
            content: str | _Parts = f"{guards.slot}\n" * len(m.images) + text
            if typed(m):
                content = _Parts([{"type": "image"} for _ in m.images] + [{"type": "text", "text": text}])
                content.shown = guards.repr
            turns.append({"role": m.role, "content": content})
        return render(self._template, {"messages": turns, "add_generation_prompt": True, **self._variables})

    def _cut(self, rendered: str, split: re.Pattern[str], guards: _Guards) -> list[Part]:
        parts: list[Part] = []
        n_images = position = 0
        for match in split.finditer(rendered):
            parts += rendered[position : match.start()].split(guards.inside)
            if match[0] in (IMAGE, guards.slot):
                parts.append(Slot(n_images))
                n_images += 1
            else:
                parts.append(Special(self._specials[match[0]]))
            position = match.end()
        parts += rendered[position:].split(guards.inside)
        parts = [p for p in parts if p != ""]
        if self._bos is not None and (not parts or parts[0] != Special(self._bos)):
            parts.insert(0, Special(self._bos, added=True))
        return parts


@dataclass(frozen=True)
class _Guards:
    """Characters that neither a conversation nor its template uses."""

    inside: str
    """Breaks the text of special tokens in what was typed."""
    slot: str
    """Stands for a picture, in strings."""
    repr: str
    """What typed parts print as, where a template takes them for a string."""


class _Parts(list[dict[str, str]]):
    """Typed parts of a message, which a template has to go through: printed as a whole they show that it did not."""

    shown = ""

    def __str__(self) -> str:
        return self.shown

    __repr__ = __str__


def _always(message: Message) -> bool:
    return True


def _with_images(message: Message) -> bool:
    return bool(message.images)


def _never(message: Message) -> bool:
    return False
