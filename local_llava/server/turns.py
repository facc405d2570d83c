"""A client's conversation -> the turns that chat templates of LLaVA can put.

Such a template knows one system prompt, at the beginning, and then the user and the assistant by turns; many refuse
anything else. Clients send more, and expect it to be understood:

- System (or developer) messages at the beginning become one. A later one becomes a part of the user's turn at its
  place; so does the last one of a conversation that has no other messages.
- The result of a function becomes a part of the user's turn, under the function's name.
- Calls of functions become the text of the assistant's turn; see `tools`.
- Messages of one role in a row become one, with an empty line between them.

Knows neither HTTP nor an API's field names, except `where` each turn came from.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from local_llava.server.errors import RequestError
from local_llava.server.tools import Call, Toolbox, called
from local_llava.types import Message

BETWEEN = "\n\n"
"""Between texts that become one."""


@dataclass(frozen=True)
class Turn:
    """A message as a client sent it."""

    role: Literal["system", "user", "assistant", "tool"]
    where: str
    """The field that it came from."""
    text: str = ""
    images: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    """Of the assistant's turn."""
    call_id: str = ""
    """Of a tool's turn: the call that this is the result of."""


def conversation(turns: Sequence[Turn], toolbox: Toolbox | None, system: str | None) -> list[Message]:
    """What the engine is asked.

    Args:
        turns: Oldest first.
        toolbox: What may be called in the answer.
        system: System prompt for a conversation that does not begin with one.

    Raises:
        RequestError: The last turn is the assistant's, or a result belongs to no call.
    """
    if turns[-1].role == "assistant":
        raise RequestError(
            f"{turns[-1].where}: the last message must be the user's or a tool's; answers are not begun by clients",
            param=turns[-1].where,
            code="invalid_value",
        )
    n_leading = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns) - 1)
    prompts = [turn.text for turn in turns[:n_leading]] or ([] if system is None else [system])
    if toolbox is not None:
        prompts.append(toolbox.explanation())
    messages = [Message("system", BETWEEN.join(prompts))] if prompts else []
    for _, row in itertools.groupby(_messages(turns[n_leading:], toolbox), key=lambda message: message.role):
        messages.append(_joined(list(row)))
    return messages


def _messages(turns: Sequence[Turn], toolbox: Toolbox | None) -> Iterator[Message]:
    names: dict[str, str] = {}
    for turn in turns:
        if turn.role == "assistant":
            names.update((call.id, call.name) for call in turn.calls)
            yield Message("assistant", _written(turn, toolbox))
        elif turn.role == "tool":
            if turn.call_id not in names:
                raise RequestError(
                    f"{turn.where}: {turn.call_id!a:.80} is the id of no call before it",
                    param=turn.where,
                    code="invalid_value",
                )
            yield Message("user", f"Result of {names[turn.call_id]}: {turn.text}", turn.images)
        else:
            yield Message("user", turn.text, turn.images)


def _written(turn: Turn, toolbox: Toolbox | None) -> str:
    """The assistant's turn, as a text."""
    if not turn.calls:
        return turn.text if toolbox is None else toolbox.said(turn.text)
    return "\n".join([*filter(None, [turn.text]), called(turn.calls)])


def _joined(row: Sequence[Message]) -> Message:
    texts = [message.text for message in row if message.text]
    return Message(row[0].role, BETWEEN.join(texts), tuple(image for message in row for image in message.images))
