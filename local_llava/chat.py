"""From a conversation to prompt parts: text to be tokenized, special tokens, and slots for pictures.

Knows chat templates as GGUF files and transformers have them. Knows neither the model nor how text is tokenized.

What a user typed is text. So that nothing typed can pass for a special token or a picture's slot, every special
token's text inside a message is broken by a guard character before the template runs, and the guard is taken out again
where the parts are made. The template thus sees the user's words as they are, and may trim or test them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        self._specials = dict(specials)
        by_id = {token: text for text, token in specials.items()}
        self._variables = {"bos_token": by_id.get(bos, ""), "eos_token": by_id.get(eos, "")}
        self._bos = bos if add_bos else None
        texts = sorted({*specials, IMAGE}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, filter(None, texts))))

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The prompt of a conversation, up to where the assistant's next turn begins.

        Raises:
            PromptError: The template fails, refuses the conversation, or has no place for its pictures.
        """
        n_images = sum(len(m.images) for m in messages)
        texts = "".join(m.text for m in messages) + self._template
        free = [g for g in _GUARDS if g not in texts]
        if len(free) < 2:
            raise PromptError("the conversation uses all of Unicode's noncharacters; leave some of them out")
        guard, slot = free[:2]
        split: re.Pattern[str] = re.compile(f"{self._special.pattern}|{slot}")
        found: list[list[Part]] = []
        # Templates of LLaVA take typed parts and write <image>; those of text models take strings.
        for typed in (True, False):
            try:
                rendered = self._render(messages, guard, slot, typed)
            except PromptError:
                if not typed or n_images == 0:
                    raise
                continue
            found.append(self._cut(rendered, split, guard, slot))
            if sum(isinstance(p, Slot) for p in found[-1]) == n_images:
                return found[-1]
        raise PromptError(f"the model's chat template leaves no place for {n_images} picture(s)")

    def _render(self, messages: Sequence[Message], guard: str, slot: str, typed: bool) -> str:
        def plain(text: str) -> str:
            return self._special.sub(lambda m: m[0][0] + guard + m[0][1:], text)

        turns: list[dict[str, Any]] = []
        for m in messages:
            text, content = plain(m.text), plain(m.text)
            if m.images and typed:
                turns.append(
                    {"role": m.role, "content": [{"type": "image"}] * len(m.images) + [{"type": "text", "text": text}]}
                )
                continue
            turns.append({"role": m.role, "content": f"{slot}\n" * len(m.images) + content})
        return render(self._template, {"messages": turns, "add_generation_prompt": True, **self._variables})

    def _cut(self, rendered: str, split: re.Pattern[str], guard: str, slot: str) -> list[Part]:
        parts: list[Part] = []
        n_images = position = 0
        for match in split.finditer(rendered):
            parts += rendered[position : match.start()].split(guard)
            if match[0] in (IMAGE, slot):
                parts.append(Slot(n_images))
                n_images += 1
            else:
                parts.append(Special(self._specials[match[0]]))
            position = match.end()
        parts += rendered[position:].split(guard)
        parts = [p for p in parts if p != ""]
        if self._bos is not None and (not parts or parts[0] != Special(self._bos)):
            parts.insert(0, Special(self._bos))
        return parts
