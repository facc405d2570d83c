"""Durations as people and Ollama's clients write them. Knows no clock."""

from __future__ import annotations

import math
import re

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = r"(?:[0-9]{1,15}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})"
_TERM = re.compile(rf"({_NUMBER})({'|'.join(_UNITS)})")
_WHOLE = re.compile(rf"([+-]?)({_NUMBER}|(?:{_TERM.pattern})+)")

_MOST = 100
"""Characters."""

FOREVER = -1.0
"""What every negative duration means."""
_LONGEST = 10 * 365 * 86400.0
"""Seconds; what is longer is for ever."""


def seconds(value: str | float) -> float:
    """Seconds of "5m", "1h30m", "300" or 300; `FOREVER` for what is negative, or longer than ten years.

    The form is that of Go's time.ParseDuration, and besides a number alone, for seconds, and days.

    Raises:
        ValueError: It is no duration.
    """
    if isinstance(value, str):
        match = _WHOLE.fullmatch(value.strip()) if len(value) <= _MOST else None
        if match is None:
            raise ValueError(f"{value!r:.40} is no duration; accepted are such as 300, 5m, 1h30m, 0, and -1 for ever")
        terms = _TERM.findall(match[2])
        total = math.fsum(float(number) * _UNITS[unit] for number, unit in terms) if terms else float(match[2])
        value = -total if match[1] == "-" else total
    if value < 0 or value > _LONGEST:  # also whole numbers that no float can hold
        return FOREVER
    if math.isnan(value):
        raise ValueError("a duration must be a number")
    return float(value)
