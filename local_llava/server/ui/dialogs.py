"""The dialogs of the page: what a user can set, and whether a conversation is to be forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nicegui import ui

from local_llava.server.ui.preferences import APPEARANCE, PREPROCESS, Preferences, complaint
from local_llava.types import Options


def preferences_dialog(current: Preferences, server: Options, on_change: Callable[[Preferences], None]) -> ui.dialog:
    """What a user can set. An empty field means what the server was started with, which is shown in it.

    Args:
        current: What is set.
        server: What the server was started with.
        on_change: Called with the new preferences at every change that makes sense.
    """

    def change(name: str, value: Any) -> None:
        nonlocal current
        if value is None or not complaint(name, value):
            current = replace(current, **{name: value})
            on_change(current)

    with ui.dialog() as dialog, ui.card().classes("llava-dialog"):
        dialog.props["aria-label"] = "Settings"
        ui.label("Settings").props("role=heading aria-level=2").classes("llava-heading")
        system = ui.textarea("System prompt", value=current.system or "", placeholder=server.system or "none")
        system.props("outlined autogrow stack-label debounce=300")
        system.on_value_change(lambda event: change("system", event.value or None))
        with ui.element("div").classes("llava-fields"):
            _number("Temperature", "temperature", current.temperature, server.temperature, change)
            _number("Tokens of an answer, at most", "max_tokens", current.max_tokens, server.max_tokens, change)
        ui.select(
            PREPROCESS,
            label="What the model sees of a picture",
            value=current.preprocess or server.preprocess,
            on_change=lambda event: change("preprocess", event.value),
        ).props("outlined")
        ui.select(
            {name: name.capitalize() for name in APPEARANCE},
            label="Appearance",
            value=current.appearance,
            on_change=lambda event: _appear(event.value),
        ).props("outlined")
        ui.label("At temperature 0 the same question gets the same answer.").classes("llava-note")
        ui.button("Done", on_click=dialog.close).props("no-caps unelevated")

    def _appear(value: str) -> None:
        nonlocal current
        current = replace(current, appearance=value)
        on_change(current)

    return dialog


def confirm_dialog(question: str, yes: str, on_yes: Callable[[], object]) -> ui.dialog:
    """A question that is answered with a button; it is gone once it is answered."""
    with ui.dialog(value=True) as dialog, ui.card().classes("llava-dialog"):
        dialog.props["aria-label"] = question
        ui.label(question)
        with ui.element("div").classes("llava-buttons"):

            async def confirmed() -> None:
                dialog.close()
                result = on_yes()
                if hasattr(result, "__await__"):
                    await result

            ui.button(yes, on_click=confirmed).props("no-caps unelevated color=negative autofocus")
            ui.button("Cancel", on_click=dialog.close, color=None).props("no-caps flat")
    dialog.on("hide", dialog.delete)
    return dialog


def _number(
    label: str, name: str, value: float | None, default: float, change: Callable[[str, Any], None]
) -> ui.number:
    whole = isinstance(default, int)

    def parsed(found: float | None) -> float | None:
        return int(found) if whole and found is not None and found == int(found) else found

    field = ui.number(
        label,
        value=value,
        placeholder=f"{default:g}",
        step=1 if whole else 0.1,
        min=1 if whole else 0,
        validation=lambda found: None if found is None else complaint(name, parsed(found)) or None,
    )
    field.props("outlined stack-label clearable").on_value_change(lambda event: change(name, parsed(event.value)))
    return field
