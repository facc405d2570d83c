"""How lists look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of cells, the first of which is their heading, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def age(then: datetime) -> str:
    """How long ago, as a person says it."""
    from datetime import datetime, timezone

    seconds = max(0, int((datetime.now(timezone.utc) - then).total_seconds()))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"
