"""How the page is laid out, and what its parts show. What they do is `Page`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from nicegui import ui

from local_llava.server.backend import ModelInfo
from local_llava.server.ui.conversation import Picture
from local_llava.server.ui.dialogs import confirm_dialog, preferences_dialog
from local_llava.server.ui.keeper import Thumbnail
from local_llava.server.ui.preferences import APPEARANCE, Preferences
from local_llava.server.ui.turns import Actions, Turns, icon_button

if TYPE_CHECKING:
    from local_llava.server.ui.page import Page

# Enter asks and Shift+Enter begins a line, but not while an input method is composing a word.
_ENTER = """(e) => {
    if (e.shiftKey || e.isComposing) return;
    e.preventDefault();
    emit(e.target.value);
}"""


class Layout:
    """The parts of the page: header, conversations, turns, and where a question is asked."""

    def __init__(self, page: Page, actions: Actions) -> None:
        self._page = page
        self._default: str | None = None
        ui.colors(primary="#2f5d8a", dark="#1d232a", dark_page="#14181c")
        self._dark = ui.dark_mode(None)
        self._drawer()
        self._header()
        self.turns = Turns(actions)
        self._footer()
        ui.skip_link("To the question", target=self._composer)

    def _header(self) -> None:
        with ui.header(wrap=False).classes("llava-header"):
            icon_button("menu", "Conversations", self._menu.toggle)
            ui.label("local-llava").props("role=heading aria-level=1").classes("llava-heading")
            self._models = ui.select({}, on_change=lambda event: self._choose_model(event.value))
            self._models.props("dense outlined options-dense").classes("llava-models")
            self._models.props["aria-label"] = "Model"
            self._models.on("popup-show", self._page.show_models)
            icon_button("settings", "Settings", self._open_settings)

    def _drawer(self) -> None:
        self._menu = ui.left_drawer(value=None, bordered=True, bottom_corner=True).classes("llava-drawer")
        with self._menu, ui.element("nav") as nav:
            nav.props["aria-label"] = "Conversations"
            new = ui.button("New conversation", icon="add", on_click=self._page.new)
            new.props("no-caps unelevated align=left").classes("llava-new")
            self._titles = ui.element("ul").classes("llava-titles")

    def _footer(self) -> None:
        with ui.footer().classes("llava-footer"), ui.element("div").classes("llava-composer") as self._composer:
            self._trouble = ui.label().classes("llava-error").props("role=alert")
            self._trouble.set_visibility(False)
            self._pictures = ui.element("div").classes("llava-pictures")
            with ui.element("div").classes("llava-row"):
                icon_button("add_photo_alternate", "Add pictures", self._page.pick)
                icon_button("photo_camera", "Take a picture", self._page.photograph)
                self._question = ui.textarea(placeholder="Ask about a picture").classes("llava-question")
                self._question.props("outlined autogrow dense autofocus rows=1")
                self._question.props["aria-label"] = "Question"
                self._question.on("keydown.enter", lambda event: self._page.ask(str(event.args)), js_handler=_ENTER)
                self._send = icon_button("send", "Ask", lambda: self._page.ask(self._question.value or ""))
                self._stop = icon_button("stop", "Stop", self._page.stop)
                self._stop.set_visibility(False)
            self._status = ui.label().classes("llava-unseen").props("role=status")

    # What is shown.

    def say(self, text: str) -> None:
        """Tell a screen reader."""
        self._status.set_text(text)

    def trouble(self, line: str) -> None:
        """Tell what did not work, until the next question."""
        self._trouble.set_text(line)
        self._trouble.set_visibility(bool(line))

    def clear_question(self) -> None:
        """Empty the field where a question is typed."""
        self._question.set_value("")
        self.trouble("")

    def show_pending(self, pictures: Sequence[Picture]) -> None:
        """Show the pictures that the next question is about."""
        self._pictures.clear()
        with self._pictures:
            for picture in pictures:
                with Thumbnail(picture):
                    button = icon_button("close", f"Leave out {picture.name}", partial(self._page.take_away, picture))
                    button.classes("llava-leave-out").props("size=xs")

    def show_answering(self, answering: bool) -> None:
        """Show whether an answer is given."""
        self._send.set_visibility(not answering)
        self._stop.set_visibility(answering)
        self.turns.enable(not answering)
        if answering:
            self.say("Answering")

    def show_models(self, models: Sequence[ModelInfo], chosen: str | None) -> None:
        """Show which models there are, the default one first."""
        names = [info.name for info in models]
        self._default = names[0] if names else None
        self._models.set_options(names, value=chosen if chosen in names else self._default)

    def show_titles(self, found: Any, current: str) -> None:
        """Show the conversations that the browser keeps.

        Args:
            found: Their ids and titles, from the browser.
            current: Id of the one that is open.
        """
        self._titles.clear()
        with self._titles:
            for record in found if isinstance(found, list) else []:
                if isinstance(record, dict) and isinstance(record.get("id"), str):
                    self._title(record["id"], str(record.get("title", ""))[:100], record["id"] == current)

    def show_preferences(self, preferences: Preferences) -> None:
        """Show the page as the user likes it."""
        self._dark.set_value(APPEARANCE[preferences.appearance])

    def _title(self, conversation_id: str, title: str, current: bool) -> None:
        with ui.element("li"):
            button = ui.button(title, on_click=lambda: self._page.open(conversation_id), color=None)
            button.props("flat no-caps align=left").classes("llava-title")
            if current:
                button.props["aria-current"] = "true"
            icon_button("delete", f"Delete {title}", lambda: self._ask_to_drop(conversation_id, title))

    def _ask_to_drop(self, conversation_id: str, title: str) -> None:
        confirm_dialog(f"Delete “{title}” and its pictures?", "Delete", lambda: self._page.drop(conversation_id))

    def _choose_model(self, name: str | None) -> None:
        # The default one is kept as that, not by name: the server may be started with another one.
        model = None if name == self._default else name
        if model != self._page.preferences.model:
            self._page.prefer(replace(self._page.preferences, model=model))

    def _open_settings(self) -> None:
        dialog = preferences_dialog(self._page.preferences, self._page.server_options, self._page.prefer)
        dialog.on("hide", dialog.delete)
        dialog.open()
