"""The turns of a conversation on the page: pictures, text, what an answer cost, and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nicegui import ui
from nicegui.element import Element

from local_llava.server.ui.conversation import Conversation, Turn
from local_llava.server.ui.keeper import Thumbnail
from local_llava.server.ui.rendering import html, typed


def icon_button(icon: str, name: str, on_click: Callable[[], object]) -> ui.button:
    """A button that shows an icon, and says what it does to those who point at it or do not see it."""
    button = ui.button(icon=icon, on_click=on_click, color=None).props("flat round dense")
    button.props["aria-label"] = button.props["title"] = name
    return button


@dataclass(frozen=True)
class Actions:
    """What can be done with a turn, by its index."""

    copy: Callable[[int], None]
    again: Callable[[int], None]
    edit: Callable[[int, str], None]


class TurnView:
    """One turn."""

    def __init__(self, turn: Turn, index: int, actions: Actions) -> None:
        self._index, self._actions, self._turn = index, actions, turn
        self._element = ui.element("article").classes(f"llava-turn llava-{turn.role}")
        self._element.props["aria-label"] = "Question" if turn.role == "user" else "Answer"
        with self._element:
            self._build()
        self.show(turn)

    def _build(self) -> None:
        if self._turn.pictures:
            with ui.element("div").classes("llava-pictures"):
                for picture in self._turn.pictures:
                    Thumbnail(picture)
        self._text = ui.html(sanitize=True).classes("llava-text")
        self._editor = ui.element("div").classes("llava-editor")
        self._error = ui.label().classes("llava-error").props("role=alert")
        with ui.element("div").classes("llava-under") as self._under:
            self._note = ui.label().classes("llava-note")
            self._buttons = ui.element("div").classes("llava-buttons")
            with self._buttons:
                icon_button("content_copy", "Copy", lambda: self._actions.copy(self._index))
                if self._turn.role == "user":
                    icon_button("edit", "Edit", self._edit)
                else:
                    self._again = icon_button("refresh", "Answer again", lambda: self._actions.again(self._index))

    def show(self, turn: Turn, waiting: str = "") -> None:
        """Show a turn.

        Args:
            turn: What is to be seen.
            waiting: What an unfinished answer waits for, in words; "" for a finished one.
        """
        self._turn = turn
        self._text.set_content(typed(turn.text) if turn.role == "user" else html(turn.text))
        self._text.set_visibility(bool(turn.text))
        self._error.set_text(turn.error)
        self._error.set_visibility(bool(turn.error))
        self._note.set_text(waiting or turn.note)
        self._buttons.set_visibility(not waiting)
        self._element.props["aria-busy"] = "true" if waiting else "false"

    def last(self, is_last: bool) -> None:
        """Only the last answer can be given again; an earlier one belongs to what was asked after it."""
        if self._turn.role == "assistant":
            self._again.set_visibility(is_last)

    def enable(self, enabled: bool) -> None:
        """Whether there are buttons: not while an answer is given."""
        self._buttons.set_visibility(enabled)

    def _edit(self) -> None:
        self._text.set_visibility(False)
        self._under.set_visibility(False)

        def done(text: str | None) -> None:
            self._editor.clear()
            self._under.set_visibility(True)
            self._text.set_visibility(bool(self._turn.text))
            if text is not None:
                self._actions.edit(self._index, text.strip())

        with self._editor:
            box = ui.textarea(value=self._turn.text).props("outlined autogrow autofocus dense")
            box.props["aria-label"] = "Edited question"
            box.on("keydown.esc", lambda: done(None), js_handler="(e) => { e.stopPropagation(); emit(); }")
            with ui.element("div").classes("llava-buttons"):
                ui.button("Ask", on_click=lambda: done(box.value or "")).props("no-caps unelevated dense")
                ui.button("Cancel", on_click=lambda: done(None), color=None).props("no-caps flat dense")


class Turns:
    """All turns, the last one at the bottom."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions
        self._views: list[TurnView] = []
        # Answers grow in many small steps, which a screen reader should not read one by one: `Page` tells it the end.
        self._element: Element = ui.element("section").classes("llava-turns").props("role=log aria-live=off")
        self._element.props["aria-label"] = "Conversation"
        with ui.element("div").classes("llava-hint") as self._hint:
            ui.label("Drop, paste or pick a picture, and ask about it.")
            ui.label("Nothing leaves this computer: pictures and conversations are kept in your browser.")

    def show(self, conversation: Conversation) -> None:
        """Show a conversation; views of turns that are there already are kept."""
        turns = conversation.turns
        same = 0
        while same < min(len(turns), len(self._views)) and self._views[same]._turn == turns[same]:
            same += 1
        for view in self._views[same:]:
            view._element.delete()
        del self._views[same:]
        with self._element:
            for index in range(same, len(turns)):
                self._views.append(TurnView(turns[index], index, self._actions))
        for view in self._views:
            view.last(view is self._views[-1])
        self._hint.set_visibility(not turns)

    def update_last(self, turn: Turn, waiting: str = "") -> None:
        """Show what there is of the last answer."""
        self._views[-1].show(turn, waiting)

    def enable(self, enabled: bool) -> None:
        """Whether something can be done with the turns: not while an answer is given."""
        for view in self._views:
            view.enable(enabled)
