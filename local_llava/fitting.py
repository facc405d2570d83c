"""A conversation that fits into the context: whole, or without its oldest turns, or an error that tells what helps.

Knows how long prompts and contexts are. How a conversation becomes a prompt is handed in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from local_llava.conversation import n_turns, without_oldest
from local_llava.errors import PromptError
from local_llava.prompt import Prompt
from local_llava.request import Picture, Unit, as_units, n_tokens
from local_llava.types import Message, Options

_ANSWER_ROOM = 256
"""Tokens that are left for an answer, or as many as it may have, where turns are dropped to make room."""


@dataclass(frozen=True)
class Fitted:
    """What of a conversation is asked."""

    units: list[Unit]
    """The prompt."""
    pictures: tuple[Picture, ...]
    """Those that it shows."""
    dropped: int
    """Messages that were left out."""


def fit(
    messages: Sequence[Message],
    pictures: tuple[Picture, ...],
    options: Options,
    n_ctx: int,
    build: Callable[[Sequence[Message]], Prompt],
) -> Fitted:
    """Make a prompt of a conversation, with room for an answer.

    Args:
        messages: The conversation.
        pictures: Those that it shows, in order.
        options: Whether turns may be left out, and how long the answer may be.
        n_ctx: Tokens of the context.
        build: Gives the prompt of messages.

    Raises:
        PromptError: It does not fit.
    """

    def without(n: int) -> Fitted:
        left = without_oldest(messages, n)
        shown = pictures[len(pictures) - sum(len(message.images) for message in left) :]
        return Fitted(as_units(build(left), shown), shown, len(messages) - len(left))

    fitted, most = without(0), n_turns(messages) - 1
    if options.overflow == "drop_oldest" and most and n_tokens(fitted.units) >= n_ctx:
        room = min(options.max_tokens, _ANSWER_ROOM, n_ctx // 4)
        # The more is left out, the shorter is the prompt. Of a conversation of a thousand turns, to make one for each
        # of them would take minutes.
        n = 1 + bisect_left(range(1, most), True, key=lambda n: n_tokens(without(n).units) + room < n_ctx)
        fitted = without(n)
    total = n_tokens(fitted.units)
    if total >= n_ctx:
        raise PromptError(_too_long(total, n_ctx, messages[fitted.dropped :], fitted.pictures, options))
    return fitted


def _too_long(
    total: int, n_ctx: int, messages: Sequence[Message], pictures: Sequence[Picture], options: Options
) -> str:
    n_image = sum(picture.arrangement.n_tokens for picture in pictures)
    of_pictures = f", {n_image} of them for pictures" if n_image else ""
    turns = sum(message.role == "user" for message in messages)
    advice = ["shorten " + (f"the conversation of {turns} turns" if turns > 1 else "the question")]
    if turns > 1 and options.overflow == "error":
        advice.append('drop its oldest turns (overflow="drop_oldest", --overflow drop_oldest)')
    if len(pictures) > 1:
        advice.append(f"show fewer than {len(pictures)} pictures")
    if any(len(picture.pixels) > 1 for picture in pictures):
        advice.append("show pictures with less detail (--preprocess pad)")
    advice.append("raise n_ctx (--n-ctx)")
    return f"the prompt has {total} tokens{of_pictures}, the context {n_ctx}: {', or '.join(advice)}"
