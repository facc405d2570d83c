"""The browser's side of the page, as Python calls it. What it does is in `llava_keeper.js`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from local_llava.server.ui.conversation import Conversation, Picture, picture_from_record, to_record

_QUICK_S, _SEND_S = 10.0, 120.0
"""Seconds that a browser has to answer, and to send pictures."""


class Keeper(Element, component="llava_keeper.js", dependencies=["llava_store.js"]):
    """Takes pictures in, keeps them and the conversations, and sends pictures when they are asked about."""

    def __init__(
        self,
        page: str,
        prefix: str,
        max_bytes: int,
        on_taken: Callable[[Picture], None],
        on_trouble: Callable[[str], None],
        on_escape: Callable[[], None],
    ) -> None:
        """
        Args:
            page: Names this page where its browser sends something.
            prefix: Of the paths where it is sent to.
            max_bytes: Of a picture.
            on_taken: Called with each picture that a user gives.
            on_trouble: Called with one line about what did not work.
            on_escape: Called when Escape is pressed outside of dialogs.
        """
        super().__init__()
        self.props["page"], self.props["prefix"], self.props["max-bytes"] = page, prefix, max_bytes

        def taken(event: GenericEventArguments) -> None:
            picture = picture_from_record(event.args)
            if picture is not None:
                on_taken(picture)

        self.on("taken", taken)
        self.on("trouble", lambda event: on_trouble(str(event.args)[:300]))
        self.on("escape", lambda: on_escape())

    async def start(self) -> dict[str, Any]:
        """What the browser has kept: conversations, preferences, and the conversation that was open."""
        found = await self.run_method("start", timeout=_QUICK_S)
        return found if isinstance(found, dict) else {}

    async def titles(self) -> Any:
        """Ids and titles of the conversations, the last one changed first."""
        return await self.run_method("titles", timeout=_QUICK_S)

    async def open(self, conversation_id: str) -> Any:
        """A conversation, as it was kept; None if it is gone."""
        return await self.run_method("open", conversation_id, timeout=_QUICK_S)

    async def send(self, pictures: Sequence[str]) -> str:
        """Have pictures sent. Returns what went wrong, or ""."""
        complaint = await self.run_method("send", list(pictures), timeout=_SEND_S)
        return "the page was left" if complaint is None else str(complaint)

    def keep(self, conversation: Conversation) -> None:
        """Keep a conversation as it is now."""
        self.run_method("keep", to_record(conversation))

    async def drop(self, conversation_id: str) -> None:
        """Forget a conversation and its pictures."""
        await self.run_method("drop", conversation_id, timeout=_QUICK_S)

    def close(self) -> None:
        """After a reload, no conversation is open."""
        self.run_method("close")

    def keep_preferences(self, preferences: dict[str, Any]) -> None:
        """Keep what a user set."""
        self.run_method("keepPreferences", preferences)

    def pick(self) -> None:
        """Let the user choose files."""
        self.run_method("pick")

    def photograph(self) -> None:
        """Let the user take a picture."""
        self.run_method("photograph")

    def copy(self, text: str) -> None:
        """Put text on the clipboard."""
        self.run_method("copy", text)

    def focus_question(self) -> None:
        """Let the user type the next question, unless that would open a touch screen's keyboard."""
        self.run_method("focusQuestion")

    def to_end(self) -> None:
        """Show the end of the conversation."""
        self.run_method("toEnd")


class Thumbnail(Element, component="llava_picture.js", dependencies=["llava_store.js"]):
    """A picture that the browser keeps. What is put into it lies over it."""

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self.props["picture"], self.props["name"] = picture.id, picture.name
