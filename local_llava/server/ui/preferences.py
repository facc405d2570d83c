"""What a user sets on the page, as the browser keeps it and as the models are asked.

Knows no NiceGUI. The options themselves, with their ranges and defaults, are `Options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from local_llava.errors import UsageError
from local_llava.types import Options

PREPROCESS = {
    "checkpoint": "As the model's file says",
    "pad": "The whole picture, with bars",
    "crop": "Its middle, without bars",
}
"""What a user calls the choices of `Options.preprocess`."""

APPEARANCE: dict[str, bool | None] = {"auto": None, "light": False, "dark": True}
"""Whether the page is dark; None for as the system is."""


@dataclass(frozen=True)
class Preferences:
    """What a user set; None for what the server was started with."""

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    preprocess: str | None = None
    model: str | None = None
    appearance: str = "auto"

    def options(self) -> dict[str, Any]:
        """Fields of `Options` that differ from the server's."""
        values = {
            "system": self.system,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "preprocess": self.preprocess,
        }
        return {name: value for name, value in values.items() if value is not None}

    def to_record(self) -> dict[str, Any]:
        """As the browser keeps it."""
        return asdict(self)


def from_record(record: Any) -> Preferences:
    """Preferences from the browser. What is not one of them, or out of its range, is left out."""
    if not isinstance(record, Mapping):
        return Preferences()
    values = {name: record.get(name) for name in ("system", "temperature", "max_tokens", "preprocess")}
    kept = {name: value for name, value in values.items() if value is not None and not complaint(name, value)}
    model, appearance = record.get("model"), record.get("appearance")
    return Preferences(
        **kept,
        model=model if isinstance(model, str) and len(model) <= 1000 else None,
        appearance=appearance if isinstance(appearance, str) and appearance in APPEARANCE else "auto",
    )


def complaint(name: str, value: Any) -> str:
    """What is wrong with the value of an option, or ""."""
    try:
        Options().updated({name: value})
    except UsageError as error:
        return str(error)
    return ""


def job_options(preferences: Preferences, server: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    """Fields of `Options` for an answer.

    Args:
        preferences: The user's.
        server: What the server was started with.
        max_tokens: Most that it gives.
    """
    options = preferences.options()
    wanted = options.get("max_tokens", server.get("max_tokens", Options.max_tokens))
    return {**options, "max_tokens": min(wanted, max_tokens), "seed": server.get("seed", Options.seed)}
