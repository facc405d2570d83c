"""What the server says where a request does not, and what both APIs mean by the same words."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from local_llava.server.settings import ServerSettings

ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""What JSON is, where no schema says more."""

_SEEDS = 2**32 - 1
"""Seeds that `Options` takes."""


@dataclass(frozen=True)
class Defaults:
    """What the server says where a request does not."""

    max_tokens: int
    """Of an answer, at most."""
    seed: int
    """For a request that names none: another one each time, unless the server was told one."""
    system: str | None = None
    """System prompt of a conversation that does not begin with one."""

    @classmethod
    def of(cls, settings: ServerSettings) -> Defaults:
        """For one request."""
        seed = settings.options.get("seed")
        chance = secrets.randbelow(_SEEDS) if seed is None else seed
        return cls(settings.max_tokens, chance, settings.options.get("system"))


def seed_of(seed: int) -> int:
    """The engine's seed for any whole number."""
    return seed % _SEEDS
