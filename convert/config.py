"""Reading of configuration files: each value is checked where it is read, and errors name file and field.

Knows JSON. Knows nothing of any model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_llava.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is read whole; a real tokenizer.json has 9 MB."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file cannot be read, is larger than 64 MB, or is not a JSON object of Unicode text.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} that a JSON file may have")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if _SURROGATE.search(text):
            # Halves of a pair are no text: they could be neither written to a GGUF nor shown.
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeEncodeError as e:
        raise CheckpointError(f"{path}: not valid JSON: \\u{ord(e.object[e.start]):04x} is half of a character") from e
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e).splitlines()[0]
        raise CheckpointError(f"{path}: not valid JSON: {reason}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Config:
    """A JSON object of a file. `section` is the dotted path to it inside the file, empty for the whole.

    A field that is missing or null takes the default, as transformers' configuration classes do.
    """

    path: Path
    values: Mapping[str, Any]
    section: str = ""

    def name(self, key: str) -> str:
        """The field as errors call it: file and dotted path."""
        return f"{self.path}: {self.section + '.' if self.section else ''}{key}"

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.name(key)} is missing")
        return value

    def integer(self, key: str, default: int | None, low: int, high: int) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{self.name(key)} must be a whole number from {low} to {high}, not {value!a:.80}")
        return value

    def number(self, key: str, default: float | None, low: float, high: float) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(f"{self.name(key)} must be a number from {low:g} to {high:g}, not {value!a:.80}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.name(key)} must be true or false, not {value!a:.80}")
        return value

    def choice(self, key: str, default: str | None, choices: Sequence[str]) -> str:
        value = self._get(key, default)
        if value not in choices:
            raise CheckpointError(f"{self.name(key)} is {value!a:.80}; supported: {', '.join(choices)}")
        return str(value)

    def numbers(self, key: str, default: Sequence[float], count: int) -> tuple[float, ...]:
        value = self._get(key, list(default))
        good = isinstance(value, list) and len(value) == count
        # JSON can hold numbers that no float can.
        if not good or any(not isinstance(v, (int, float)) or isinstance(v, bool) or abs(v) > 1e30 for v in value):
            raise CheckpointError(f"{self.name(key)} must be a list of {count} numbers, not {value!a:.80}")
        return tuple(float(v) for v in value)

    def sub(self, key: str) -> Config:
        """The object under `key`; an empty one where it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.name(key)} must be an object, not {value!a:.80}")
        return Config(self.path, value, f"{self.section}.{key}" if self.section else key)
